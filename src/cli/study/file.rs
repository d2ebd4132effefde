//! The study file: TOML as written → checked [`Study`].

use super::plan::{self, Run};
use crate::error::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Config keys (`table.key`) with their values, in the order in which they are applied.
pub type Settings = Vec<(String, Value)>;

/// A grid of runs and how to run it.
#[derive(Debug)]
pub struct Study {
    pub title: String,
    /// The folder of its runs.
    pub dir: PathBuf,
    pub seeds: Vec<u64>,
    /// MPI ranks a run.
    pub ranks: usize,
    /// Runs at once.
    pub parallel: usize,
    /// What starts several ranks; `{ranks}` stands for their number.
    pub launcher: String,
    /// The baseline, then the others in the order of the file.
    pub arms: Vec<Arm>,
    /// Every run that it may ask for, whatever its sweeps choose.
    pub runs: Vec<Run>,
}

/// One way to train: a config and overrides, with every seed.
#[derive(Debug)]
pub struct Arm {
    pub name: String,
    pub config: PathBuf,
    /// What all arms set, then what this one sets.
    pub settings: Settings,
    /// Keys of which the best value is to be found, with the values to try.
    pub sweep: Vec<(String, Vec<Value>)>,
    /// Keys that it sets itself.
    pub own_keys: BTreeSet<String>,
}

/// As [`Study`], as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    title: Option<String>,
    dir: Option<PathBuf>,
    config: PathBuf,
    seeds: Vec<u64>,
    #[serde(default = "one")]
    ranks: usize,
    #[serde(default = "one")]
    threads: usize,
    #[serde(default)]
    parallel: usize,
    #[serde(default = "launcher")]
    launcher: String,
    baseline: String,
    #[serde(default)]
    set: Table,
    arms: Table,
}

/// A table `[arms.NAME]` as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenArm {
    config: Option<PathBuf>,
    #[serde(default)]
    set: Table,
    #[serde(default)]
    sweep: Table,
}

fn one() -> usize {
    1
}

/// Unbound: launchers bind each job's ranks to the first cores, which runs side by side would share.
fn launcher() -> String {
    "mpirun --bind-to none -n {ranks}".to_owned()
}

/// Keys that the study sets itself, and by what.
const RESERVED: [(&str, &str); 2] = [("run.seed", "seeds"), ("parallel.threads", "threads")];

impl Study {
    /// Reads and checks the study file at `path`, and the configs of all its runs.
    pub fn load(path: &Path) -> Result<Study> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the study {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Study::parse(&text, &name).with_context(|| format!("in the study {}", path.display()))
    }

    /// As [`Study::load`], from the text of a study called `name`.
    pub fn parse(text: &str, name: &str) -> Result<Study> {
        let written: Written = toml::from_str(text)?;
        let Written { seeds, ranks, threads, .. } = &written;
        let (ranks, threads) = (*ranks, *threads);
        ensure!(!seeds.is_empty(), "seeds is empty: list at least one, as in seeds = [1, 2, 3]");
        let distinct = seeds.iter().collect::<BTreeSet<_>>().len() == seeds.len();
        ensure!(distinct, "seeds = {seeds:?}: a seed is listed twice");
        ensure!(ranks >= 1, "ranks = {ranks}: expected at least 1");
        ensure!(threads >= 1, "threads = {threads}: expected at least 1, the threads of each rank");
        let launcher_fits = !written.launcher.trim().is_empty() && written.launcher.contains("{ranks}");
        ensure!(launcher_fits, "launcher = \"{}\": expected a command with {{ranks}} in it", written.launcher);
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let common = settings(written.set).context("set")?;
        let arms = written.arms.into_iter();
        let arms = arms.map(|(name, arm)| {
            let context = format!("[arms.{name}]");
            Arm::new(name, arm, &written.config, &common, threads).context(context)
        });
        let mut study = Study {
            title: written.title.unwrap_or_else(|| name.to_owned()),
            dir: written.dir.unwrap_or_else(|| Path::new("runs").join(name)),
            parallel: if written.parallel > 0 { written.parallel } else { (cores / (ranks * threads)).max(1) },
            seeds: written.seeds,
            ranks,
            launcher: written.launcher,
            arms: arms.collect::<Result<_>>()?,
            runs: Vec::new(),
        };
        let names: Vec<&str> = study.arms.iter().map(|arm| &*arm.name).collect();
        ensure!(
            names.contains(&&*written.baseline),
            "baseline = \"{}\" is not an arm; arms: {}",
            written.baseline,
            names.join(", ")
        );
        study.arms.sort_by_key(|arm| arm.name != written.baseline);
        study.runs = plan::expand(&study)?;
        Ok(study)
    }

    /// Index of the arm called `name`.
    pub fn arm(&self, name: &str) -> Result<usize> {
        self.arms.iter().position(|arm| arm.name == name).with_context(|| {
            let names: Vec<&str> = self.arms.iter().map(|arm| &*arm.name).collect();
            format!("the study has no arm \"{name}\"; arms: {}", names.join(", "))
        })
    }
}

impl Arm {
    fn new(name: String, written: Value, config: &Path, common: &Settings, threads: usize) -> Result<Arm> {
        let is_folder = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !name.starts_with('.');
        ensure!(is_folder, "the name of an arm is that of a folder: use letters, digits, '-', '_' and '.'");
        let written = WrittenArm::deserialize(written).map_err(|e| anyhow!("{}", e.message()))?;
        let own = settings(written.set).context("set")?;
        let own_keys: BTreeSet<String> = own.iter().map(|(key, _)| key.clone()).collect();
        let sweep = settings(written.sweep).context("sweep")?.into_iter().map(|(key, values)| {
            ensure!(!own_keys.contains(&key), "{key} is both set and swept");
            let Value::Array(values) = values else {
                return Err(anyhow!(
                    "sweep: {key} = {values}: expected the list of values to try, as in {key} = [{values}]"
                ));
            };
            let repeats = (1..values.len()).any(|i| values[..i].contains(&values[i]));
            ensure!(!values.is_empty() && !repeats, "sweep: {key} needs at least one value, and each only once");
            Ok((key, values))
        });
        let sweep = sweep.collect::<Result<_>>()?;
        let mut settings = common.clone();
        settings.extend(own);
        settings.push(("parallel.threads".to_owned(), Value::Integer(threads as i64)));
        let config = written.config.unwrap_or_else(|| config.to_owned());
        Ok(Arm { name, config, settings, sweep, own_keys })
    }
}

/// `{ optimizer.lr = 1e-3 }`, or with the key in quotes, as one setting; the config says whether such a key exists.
fn settings(written: Table) -> Result<Settings> {
    let mut settings = Settings::new();
    for (name, value) in written {
        match value {
            value if name.contains('.') => settings.push((name, value)),
            Value::Table(keys) => {
                settings.extend(keys.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)))
            }
            value => return Err(anyhow!("{name} = {value}: expected table.key = value, as in optimizer.lr = 1e-3")),
        }
    }
    for (reserved, by) in RESERVED {
        ensure!(settings.iter().all(|(key, _)| key != reserved), "{reserved} is given by `{by}` of the study");
    }
    Ok(settings)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A study of `arms` with two seeds, over a config that holds for any arm.
    pub fn study(arms: &str) -> Result<Study> {
        let config = tempfile::NamedTempFile::new()?;
        std::fs::write(&config, "[data]\ndir = 'd'\n[model]\nvocab = 64\nwidth = 16\nheads = 2\ndepth = 8")?;
        let head = format!("config = '{}'\ndir = 'studies/x'\nbaseline = 'flat'\n", config.path().display());
        let seeds = if arms.contains("seeds") { "" } else { "seeds = [1, 2]\n" };
        Study::parse(&format!("{head}{seeds}{arms}"), "x")
    }

    #[test]
    fn settings_are_applied_from_the_general_to_the_particular() {
        let text =
            "threads = 2\nset = { run.steps = 7, 'optimizer.lr' = 0.5 }\n[arms.b.set]\nrun.steps = 9\n[arms.flat]\n";
        let study = study(text).unwrap();
        let names: Vec<&str> = study.arms.iter().map(|arm| &*arm.name).collect();
        assert_eq!((names, study.title.as_str()), (vec!["flat", "b"], "x"));
        let configs: Vec<_> = study.runs.iter().map(|run| &run.config).collect();
        let of = |i: usize| (configs[i].run.steps, configs[i].run.seed, configs[i].optimizer.lr);
        assert_eq!([of(0), of(1), of(2), of(3)], [(7, 1, 0.5), (7, 2, 0.5), (9, 1, 0.5), (9, 2, 0.5)]);
        assert!(configs.iter().all(|config| config.parallel.threads == 2));
    }

    #[test]
    fn what_is_wrong_is_named_before_anything_runs() {
        for (text, expected) in [
            ("sed = 1\n[arms.flat]", "unknown field `sed`"),
            ("seeds = []\n[arms.flat]", "seeds is empty"),
            ("seeds = [3, 3]\n[arms.flat]", "a seed is listed twice"),
            ("threads = 0\n[arms.flat]", "threads = 0"),
            ("launcher = 'srun'\n[arms.flat]", "launcher = \"srun\": expected a command with {ranks}"),
            ("[arms.flt]", "baseline = \"flat\" is not an arm; arms: flt"),
            ("[arms.flat]\nsweeep = {}", "[arms.flat]: unknown field `sweeep`"),
            ("[arms.flat]\nset.steps = 3", "steps = 3: expected table.key = value"),
            ("[arms.flat]\nset.run.seed = 3", "run.seed is given by `seeds`"),
            ("[arms.flat]\nset.run.stps = 3", "unknown key run.stps; did you mean `steps`?"),
            ("[arms.flat]\nset.levels.count = 5", "flat seed 1: in the config"),
            ("[arms.flat]\nsweep.optimizer.lr = 3", "expected the list of values"),
            ("[arms.flat]\nsweep.optimizer.lr = []", "at least one value"),
            ("[arms.flat]\nset.run.steps = 3\nsweep.run.steps = [3]", "run.steps is both set and swept"),
            ("[arms.flat]\nsweep.optimizer.lr = [1e-3, -1.0]", "optimizer.lr = -1"),
            ("[arms.flat]\n[arms.'a b']", "the name of an arm is that of a folder"),
            ("[arms.flat]\nconfig = 'none.toml'", "cannot read the config none.toml"),
        ] {
            let e = format!("{:#}", study(text).unwrap_err());
            assert!(e.contains(expected), "{text}: {e}");
        }
    }
}
