//! What a comparison says: savings at matched validation loss, and whether the runs can be compared at all.

use crate::error::{Context, Result, ensure};
use crate::run::history::{self, Metrics};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Dotted key → value, as text; of a `config.toml` or a `provenance.json`.
pub type Settings = BTreeMap<String, String>;

/// A run directory as read.
pub struct Run {
    /// As given on the command line.
    pub name: String,
    pub dir: PathBuf,
    pub history: Vec<Metrics>,
    /// Empty where the run has no `config.toml`.
    pub config: Settings,
    /// Empty where the run has no `provenance.json`.
    pub provenance: Settings,
}

impl Run {
    pub fn load(dir: &Path) -> Result<Run> {
        let metrics = dir.join(history::FILE_NAME);
        ensure!(
            metrics.is_file(),
            "{} has no {}: expected a run directory, as `vcycle train` writes it",
            dir.display(),
            history::FILE_NAME
        );
        Ok(Run {
            name: dir.display().to_string(),
            dir: dir.to_owned(),
            history: history::read(&metrics)?,
            config: settings(&dir.join("config.toml"), |text| {
                Ok(serde_json::to_value(toml::from_str::<toml::Table>(text)?)?)
            })?,
            provenance: settings(&dir.join("provenance.json"), |text| Ok(serde_json::from_str(text)?))?,
        })
    }

    /// The lines that carry a validation loss of the fine net.
    pub fn evaluations(&self) -> impl DoubleEndedIterator<Item = (&Metrics, f64)> {
        self.history.iter().filter_map(|line| Some((line, line.val_loss?)))
    }

    /// Stretches of consecutive lines on one level and coset, in order.
    pub fn phases(&self) -> impl Iterator<Item = &[Metrics]> {
        self.history.chunk_by(|a, b| (a.level, a.coset) == (b.level, b.coset))
    }
}

/// The file at `path` flattened to [`Settings`]; none where it does not exist.
fn settings(path: &Path, parse: impl Fn(&str) -> Result<serde_json::Value>) -> Result<Settings> {
    let mut flat = Settings::new();
    if path.exists() {
        let value = std::fs::read_to_string(path).map_err(Into::into).and_then(|text| parse(&text));
        flatten("", &value.with_context(|| format!("cannot read {}", path.display()))?, &mut flat);
    }
    Ok(flat)
}

fn flatten(prefix: &str, value: &serde_json::Value, flat: &mut Settings) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, flat);
            }
        }
        serde_json::Value::String(text) => drop(flat.insert(prefix.to_owned(), text.clone())),
        other => drop(flat.insert(prefix.to_owned(), other.to_string())),
    }
}

/// What a run had spent when it had a validation loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    pub val_loss: f64,
    pub flops_total: u128,
    pub flops_blocks: u128,
    pub elapsed_s: f64,
    #[serde(skip)]
    pub step: u64,
}

impl Cost {
    fn of((line, val_loss): (&Metrics, f64)) -> Cost {
        let &Metrics { flops_total, flops_blocks, elapsed_s, step, .. } = line;
        Cost { val_loss, flops_total, flops_blocks, elapsed_s, step }
    }
}

/// What a run saved where it first met the baseline's final loss; fractions of the baseline's cost, negative for a loss.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Saving {
    pub run: String,
    pub reached: bool,
    pub flops_saved_total: Option<f64>,
    pub flops_saved_blocks: Option<f64>,
    pub wall_clock_saved: Option<f64>,
    /// Where it met the loss.
    #[serde(skip)]
    pub at: Option<Cost>,
    /// Its last evaluation.
    #[serde(skip)]
    pub last: Option<Cost>,
}

impl Saving {
    /// The first evaluation of `run` at or under the loss of `baseline`, against `baseline`'s cost.
    pub fn of(run: &Run, baseline: &Cost) -> Saving {
        let at = run.evaluations().find(|&(_, loss)| loss <= baseline.val_loss).map(Cost::of);
        let saved = |spent: fn(&Cost) -> f64| {
            let saved = 1.0 - spent(&at?) / spent(baseline);
            saved.is_finite().then_some(saved)
        };
        Saving {
            run: run.name.clone(),
            reached: at.is_some(),
            flops_saved_total: saved(|cost| cost.flops_total as f64),
            flops_saved_blocks: saved(|cost| cost.flops_blocks as f64),
            wall_clock_saved: saved(|cost| cost.elapsed_s),
            at,
            last: run.evaluations().next_back().map(Cost::of),
        }
    }
}

/// A baseline and the runs measured against it. [`Serialize`] gives the JSON contract.
#[derive(Serialize)]
pub struct Comparison {
    /// The baseline's last evaluation: the loss to meet, and its cost.
    pub baseline: Cost,
    /// One for each run after the first.
    #[serde(rename = "runs")]
    pub savings: Vec<Saving>,
    /// The baseline, then the others.
    #[serde(skip)]
    pub runs: Vec<Run>,
    /// Why the figures may not mean what they seem to.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

impl Comparison {
    /// Of `runs`, the first is the baseline.
    pub fn new(runs: Vec<Run>) -> Result<Comparison> {
        let last = runs[0].evaluations().next_back().with_context(|| {
            format!("the baseline {} has no evaluation: no line of its metrics has a val_loss", runs[0].name)
        })?;
        let baseline = Cost::of(last);
        let savings = runs[1..].iter().map(|run| Saving::of(run, &baseline)).collect();
        let warnings = warnings(&runs, &baseline);
        Ok(Comparison { baseline, savings, runs, warnings })
    }

    /// Where the run at `index` of `runs` first met the baseline's final loss; the baseline itself, at its end.
    pub fn met(&self, index: usize) -> Option<Cost> {
        index.checked_sub(1).map_or(Some(self.baseline), |i| self.savings[i].at)
    }

    /// Short names of all runs: the last part of their paths where that tells them apart.
    pub fn labels(&self) -> Vec<String> {
        let last = |run: &Run| Some(run.dir.file_name()?.to_string_lossy().into_owned());
        let short: Option<Vec<String>> = self.runs.iter().map(last).collect();
        let distinct = |names: &Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
        short.filter(distinct).unwrap_or_else(|| self.runs.iter().map(|run| run.name.clone()).collect())
    }

    /// Keys of `of`, each with its value in every run; with `differing`, only where they are not all the same.
    pub fn settings(&self, of: fn(&Run) -> &Settings, differing: bool) -> Vec<(&str, Vec<Option<&str>>)> {
        let keys: BTreeSet<&String> = self.runs.iter().flat_map(|run| of(run).keys()).collect();
        let rows = keys.into_iter().map(|key| {
            let values: Vec<_> = self.runs.iter().map(|run| of(run).get(key).map(String::as_str)).collect();
            (key.as_str(), values)
        });
        rows.filter(|(_, values)| !differing || values.iter().any(|value| *value != values[0])).collect()
    }
}

/// Config keys that fix what a validation loss is: it cannot be compared where they differ. `data.dir` is not among
/// them, since one data set may have two paths.
const SAME_LOSS: &[&str] = &["data.context", "model.vocab", "log.eval_sequences"];
/// Those that fix the fine net: where they differ, the runs train different nets.
const SAME_NET: &[&str] = &[
    "model.width",
    "model.heads",
    "model.depth",
    "model.horizon",
    "model.integrator",
    "model.parametrization",
    "model.tied",
];
/// Those that wall-clock time hangs on.
const SAME_MACHINE: &[&str] = &["parallel.device", "parallel.threads"];
/// Their like in `provenance.json`.
const SAME_HOST: &[&str] = &["ranks", "threads", "device", "hostname", "vcycle", "features"];

fn warnings(runs: &[Run], baseline: &Cost) -> Vec<String> {
    let mut warnings = Vec::new();
    let first = &runs[0];
    if let Some(steps) = first.config.get("run.steps").filter(|steps| **steps != baseline.step.to_string()) {
        let step = baseline.step;
        warnings.push(format!(
            "{}: its last evaluation is at step {step} of {steps}; savings are against that",
            first.name
        ));
    }
    for run in &runs[1..] {
        let mut warn = |why: String| warnings.push(format!("{}: {why}", run.name));
        if run.evaluations().next().is_none() {
            warn("it has no evaluation, so it cannot meet any loss".to_owned());
        }
        if let Some(missing) = [first, run].iter().find(|run| run.config.is_empty()) {
            warn(format!("{} has no config.toml, so nothing says that the runs can be compared", missing.name));
        } else {
            let differ = |keys| differing(keys, &first.config, &run.config);
            if !same_data(first, run) {
                warn("not comparable: the validation losses are of different data (data.dir)".to_owned());
            }
            if let Some(keys) = differ(SAME_LOSS) {
                warn(format!("not comparable: the validation losses are not of the same task ({keys})"));
            }
            if let Some(keys) = differ(SAME_NET) {
                warn(format!("it trains another fine net than the baseline ({keys})"));
            }
        }
        let machine = differing(SAME_MACHINE, &first.config, &run.config);
        if let Some(keys) = machine.or_else(|| differing(SAME_HOST, &first.provenance, &run.provenance)) {
            warn(format!("wall-clock times are not comparable: not run alike ({keys})"));
        }
    }
    warnings
}

/// "key: a ≠ b, ..." for those of `keys` whose values differ.
fn differing(keys: &[&str], a: &Settings, b: &Settings) -> Option<String> {
    let show = |value: Option<&String>| value.map_or("not set", String::as_str).to_owned();
    let differing = keys.iter().filter(|key| a.get(**key) != b.get(**key));
    let shown: Vec<String> =
        differing.map(|key| format!("{key}: {} ≠ {}", show(a.get(*key)), show(b.get(*key)))).collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}

/// One data set: the same path, or folders with the same checksums.
fn same_data(a: &Run, b: &Run) -> bool {
    let (a, b) = (a.config.get("data.dir"), b.config.get("data.dir"));
    let meta = |dir: Option<&String>| std::fs::read(Path::new(dir?).join("meta.json")).ok();
    a == b || meta(a).is_some_and(|text| meta(b).as_ref() == Some(&text))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::path::Path;

    /// A line every 100 steps; a step costs 1 TFLOP in the blocks, 2 in all, and half a second, times `cost`.
    pub fn metrics(step: u64, level: usize, cost: u128, val_loss: Option<f64>) -> Metrics {
        let flops_blocks = u128::from(step) * cost * 1_000_000_000_000;
        Metrics {
            step,
            cycle: 0,
            op: "smooth".to_owned(),
            level,
            coset: None,
            rows: 8 >> level,
            loss: val_loss.unwrap_or(3.0),
            val_loss,
            lr: 1e-3,
            grad_norm: 1.0,
            tokens: step * 2048,
            flops_total: flops_blocks * 2,
            flops_blocks,
            elapsed_s: 0.5 * (step * cost as u64) as f64,
            tokens_per_s: 4096.0,
            mfu: None,
        }
    }

    pub fn run(name: &str, history: Vec<Metrics>, config: &str) -> Run {
        let config: toml::Table = toml::from_str(config).unwrap();
        let mut flat = Settings::new();
        flatten("", &serde_json::to_value(config).unwrap(), &mut flat);
        Run { name: name.to_owned(), dir: PathBuf::from(name), history, config: flat, provenance: Settings::new() }
    }

    const CONFIG: &str = "run.steps = 300\ndata = { dir = 'd', context = 128 }\nmodel = { vocab = 320, depth = 8 }";

    fn baseline() -> Run {
        run("base", (1..=3).map(|i| metrics(100 * i, 0, 4, Some(3.0 - 0.5 * i as f64))).collect(), CONFIG)
    }

    #[test]
    fn savings_are_fractions_at_the_first_evaluation_at_or_under_the_final_loss() {
        // 300 steps at 4 against: 100 steps at 1, then meeting 1.5 exactly at step 200; 400 is lower, and later.
        let history = [(100, 1.9), (200, 1.5), (400, 1.2)].map(|(step, loss)| metrics(step, 0, 1, Some(loss)));
        let comparison = Comparison::new(vec![baseline(), run("run", history.to_vec(), CONFIG)]).unwrap();
        let saving = &comparison.savings[0];
        assert_eq!(comparison.baseline.val_loss, 1.5);
        assert_eq!(saving.at.unwrap().step, 200);
        for saved in [saving.flops_saved_total, saving.flops_saved_blocks, saving.wall_clock_saved] {
            assert!((saved.unwrap() - (1.0 - 200.0 / 1200.0)).abs() < 1e-12, "{saved:?}");
        }
        assert_eq!(comparison.warnings, [""; 0]);
    }

    #[test]
    fn json_is_the_contract() {
        let never = run("never", vec![metrics(100, 1, 1, Some(1.6)), metrics(300, 0, 1, None)], CONFIG);
        let comparison = Comparison::new(vec![baseline(), never]).unwrap();
        assert_eq!(
            serde_json::to_string(&comparison).unwrap(),
            r#"{"baseline":{"val_loss":1.5,"flops_total":2400000000000000,"flops_blocks":1200000000000000,"elapsed_s":600.0},"#
                .to_owned()
                + r#""runs":[{"run":"never","reached":false,"flops_saved_total":null,"flops_saved_blocks":null,"wall_clock_saved":null}]}"#
        );
    }

    #[test]
    fn a_dearer_run_has_a_negative_saving() {
        let dear = run("dear", vec![metrics(600, 0, 4, Some(1.5))], CONFIG);
        assert_eq!(
            Saving::of(&dear, &Comparison::new(vec![baseline()]).unwrap().baseline).flops_saved_total,
            Some(-1.0)
        );
    }

    #[test]
    fn missing_evaluations_are_an_error_in_the_baseline_and_not_reached_in_a_run() {
        let silent = || run("silent", vec![metrics(100, 0, 1, None)], CONFIG);
        let e = Comparison::new(vec![silent(), baseline()]).err().unwrap().to_string();
        assert!(e.contains("baseline silent has no evaluation"), "{e}");
        let comparison = Comparison::new(vec![baseline(), silent()]).unwrap();
        assert!(!comparison.savings[0].reached);
        assert!(comparison.warnings[0].contains("no evaluation"), "{:?}", comparison.warnings);
    }

    #[test]
    fn runs_on_other_data_another_task_or_another_net_are_called_so() {
        for (from, to, expected) in [
            ("'d'", "'e'", "different data"),
            ("context = 128", "context = 256", "data.context: 128 ≠ 256"),
            ("vocab = 320", "vocab = 50304", "model.vocab"),
            ("depth = 8", "depth = 16", "another fine net"),
        ] {
            let other = run("other", vec![metrics(100, 0, 1, Some(1.0))], &CONFIG.replace(from, to));
            let warnings = Comparison::new(vec![baseline(), other]).unwrap().warnings;
            assert!(warnings.len() == 1 && warnings[0].contains(expected), "{to}: {warnings:?}");
        }
    }

    #[test]
    fn a_baseline_that_was_stopped_is_called_so() {
        let mut stopped = baseline();
        stopped.history.pop();
        let warnings = Comparison::new(vec![stopped]).unwrap().warnings;
        assert!(warnings[0].contains("step 200 of 300"), "{warnings:?}");
    }

    #[test]
    fn one_data_set_under_two_paths_is_one_data_set() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let with_dir = |dir: &Path| CONFIG.replace("'d'", &format!("'{}'", dir.display()));
        let runs = || dirs.iter().map(|dir| run("r", baseline().history, &with_dir(dir.path()))).collect();
        for (second, warned) in [("sha256 = 1", false), ("sha256 = 2", true)] {
            std::fs::write(dirs[0].path().join("meta.json"), "sha256 = 1").unwrap();
            std::fs::write(dirs[1].path().join("meta.json"), second).unwrap();
            assert_eq!(!Comparison::new(runs()).unwrap().warnings.is_empty(), warned);
        }
    }

    #[test]
    fn differences_list_only_what_differs() {
        let other = run("other", baseline().history, &CONFIG.replace("context = 128", "batch = 3"));
        let comparison = Comparison::new(vec![baseline(), other]).unwrap();
        let expected = [("data.batch", vec![None, Some("3")]), ("data.context", vec![Some("128"), None])];
        assert_eq!(comparison.settings(|run| &run.config, true), expected);
    }
}
