//! A run as read from its directory, what it saved against another, and whether the two can be compared at all.

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
    /// Lines of the level that the run was on; a coarse level beside it has lines of its own, which are left out.
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
            history: own_lines(history::read(&metrics)?),
            config: settings(&dir.join("config.toml"), |text| {
                Ok(serde_json::to_value(toml::from_str::<toml::Table>(text)?)?)
            })?,
            provenance: settings(&dir.join("provenance.json"), last_start)?,
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

fn own_lines(lines: Vec<Metrics>) -> Vec<Metrics> {
    lines.into_iter().filter(|line| line.op != "beside").collect()
}

/// `provenance.json` has an entry for each process start: the last one.
fn last_start(text: &str) -> Result<serde_json::Value> {
    let starts: Vec<serde_json::Value> = serde_json::from_str(text)?;
    starts.into_iter().next_back().context("it has no entry")
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

/// Keys of `columns`, each with its value in every column; with `differing`, only where they are not all the same.
pub fn rows<'a>(columns: &[&'a Settings], differing: bool) -> Vec<(&'a str, Vec<Option<&'a str>>)> {
    let keys: BTreeSet<&String> = columns.iter().flat_map(|settings| settings.keys()).collect();
    let rows = keys.into_iter().map(|key| {
        let values: Vec<_> = columns.iter().map(|settings| settings.get(key).map(String::as_str)).collect();
        (key.as_str(), values)
    });
    rows.filter(|(_, values)| !differing || values.iter().any(|value| *value != values[0])).collect()
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
    /// Of a line with its validation loss.
    pub fn of((line, val_loss): (&Metrics, f64)) -> Cost {
        let &Metrics { flops_total, flops_blocks, elapsed_s, step, .. } = line;
        Cost { val_loss, flops_total, flops_blocks, elapsed_s, step }
    }

    /// Of the last evaluation of `run`.
    pub fn last(run: &Run) -> Option<Cost> {
        run.evaluations().next_back().map(Cost::of)
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
            last: Cost::last(run),
        }
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
const SAME_HOST: &[&str] = &["ranks", "threads_per_rank", "cpu", "version", "commit"];

/// Why savings of `run` against `baseline` may not mean what they seem to.
pub fn incomparable(baseline: &Run, run: &Run) -> Vec<String> {
    let mut why = Vec::new();
    if run.evaluations().next().is_none() {
        why.push("it has no evaluation, so it cannot meet any loss".to_owned());
    }
    if let Some(missing) = [baseline, run].iter().find(|run| run.config.is_empty()) {
        why.push(format!("{} has no config.toml, so nothing says that the runs can be compared", missing.name));
    } else {
        let differ = |keys| differing(keys, &baseline.config, &run.config);
        if !same_data(baseline, run) {
            why.push("not comparable: the validation losses are of different data (data.dir)".to_owned());
        }
        if let Some(keys) = differ(SAME_LOSS) {
            why.push(format!("not comparable: the validation losses are not of the same task ({keys})"));
        }
        if let Some(keys) = differ(SAME_NET) {
            why.push(format!("it trains another fine net than the baseline ({keys})"));
        }
    }
    let machine = differing(SAME_MACHINE, &baseline.config, &run.config);
    if let Some(keys) = machine.or_else(|| differing(SAME_HOST, &baseline.provenance, &run.provenance)) {
        why.push(format!("wall-clock times are not comparable: not run alike ({keys})"));
    }
    why
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

    /// The line after step `step`; a step costs 1 TFLOP in the blocks, 2 in all, and half a second, times `cost`.
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
            memory_bytes: None,
            ranks: None,
        }
    }

    pub fn run(name: &str, history: Vec<Metrics>, config: &str) -> Run {
        let config: toml::Table = toml::from_str(config).unwrap();
        let mut flat = Settings::new();
        flatten("", &serde_json::to_value(config).unwrap(), &mut flat);
        Run { name: name.to_owned(), dir: PathBuf::from(name), history, config: flat, provenance: Settings::new() }
    }

    pub const CONFIG: &str = "run.steps = 300\ndata = { dir = 'd', context = 128 }\nmodel = { vocab = 320, depth = 8 }";

    pub fn baseline() -> Run {
        run("base", (1..=3).map(|i| metrics(100 * i, 0, 4, Some(3.0 - 0.5 * i as f64))).collect(), CONFIG)
    }

    #[test]
    fn lines_of_a_level_beside_are_left_out() {
        let beside = |step| Metrics { op: "beside".to_owned(), ..metrics(step, 1, 1, None) };
        let history = own_lines(vec![metrics(1, 0, 1, None), beside(4), metrics(4, 0, 1, None)]);
        assert_eq!(run("run", history, CONFIG).phases().count(), 1);
    }

    #[test]
    fn a_saving_is_a_fraction_at_the_first_evaluation_at_or_under_the_loss() {
        // 300 steps at 4 against: 100 steps at 1, then meeting 1.5 exactly at step 200; 400 is lower, and later.
        let history = [(100, 1.9), (200, 1.5), (400, 1.2)].map(|(step, loss)| metrics(step, 0, 1, Some(loss)));
        let target = Cost::last(&baseline()).unwrap();
        let saving = Saving::of(&run("run", history.to_vec(), CONFIG), &target);
        assert_eq!((target.val_loss, saving.at.unwrap().step, saving.last.unwrap().step), (1.5, 200, 400));
        for saved in [saving.flops_saved_total, saving.flops_saved_blocks, saving.wall_clock_saved] {
            assert!((saved.unwrap() - (1.0 - 200.0 / 1200.0)).abs() < 1e-12, "{saved:?}");
        }
        let dear = run("dear", vec![metrics(600, 0, 4, Some(1.5))], CONFIG);
        assert_eq!(Saving::of(&dear, &target).flops_saved_total, Some(-1.0));
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
            let why = incomparable(&baseline(), &other);
            assert!(why.len() == 1 && why[0].contains(expected), "{to}: {why:?}");
        }
    }

    #[test]
    fn one_data_set_under_two_paths_is_one_data_set() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let with_dir = |dir: &Path| CONFIG.replace("'d'", &format!("'{}'", dir.display()));
        let [a, b] = [0, 1].map(|i| run("r", baseline().history, &with_dir(dirs[i].path())));
        for (second, warned) in [("sha256 = 1", false), ("sha256 = 2", true)] {
            std::fs::write(dirs[0].path().join("meta.json"), "sha256 = 1").unwrap();
            std::fs::write(dirs[1].path().join("meta.json"), second).unwrap();
            assert_eq!(!incomparable(&a, &b).is_empty(), warned);
        }
    }

    #[test]
    fn rows_list_only_what_differs() {
        let other = run("other", vec![], &CONFIG.replace("context = 128", "batch = 3"));
        let expected = [("data.batch", vec![None, Some("3")]), ("data.context", vec![Some("128"), None])];
        assert_eq!(rows(&[&baseline().config, &other.config], true), expected);
    }

    #[test]
    fn provenance_is_that_of_the_last_start() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(history::FILE_NAME), "").unwrap();
        std::fs::write(dir.path().join("provenance.json"), r#"[{"ranks": 1}, {"ranks": 2}]"#).unwrap();
        let mut other = baseline();
        other.provenance = Run::load(dir.path()).unwrap().provenance;
        let mut first = baseline();
        first.provenance.insert("ranks".to_owned(), "1".to_owned());
        assert!(incomparable(&first, &other)[0].contains("ranks: 1 ≠ 2"));
    }

    #[test]
    fn what_is_not_a_run_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let e = Run::load(dir.path()).err().unwrap().to_string();
        assert!(e.contains("has no metrics.jsonl"), "{e}");
    }
}
