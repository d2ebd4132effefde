//! The run directory: resolved config, provenance, metrics, log and checkpoints.

use crate::config::{self, Config, Placement};
use crate::error::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// Tables and keys that a resumed run may change: where and how it runs, not what it computes.
const MAY_CHANGE: &[&str] = &[
    "run.max_minutes",
    "data.dir",
    "data.micro_batch",
    "model.recompute",
    "model.dtype",
    "parallel.device",
    "parallel.placement",
    "parallel.groups",
    "parallel.zero",
    "parallel.threads",
    "parallel.timeout",
    "checkpoint",
    "log",
];

/// Folder of one run.
#[derive(Clone, Debug)]
pub struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    pub fn new(path: &Path) -> RunDirectory {
        RunDirectory { path: path.to_owned() }
    }

    /// Makes the folder of a new run, or checks that the one of a run to `resume` is of the same config.
    pub fn prepare(&self, config: &Config, resume: bool) -> Result<()> {
        if self.config_file().exists() {
            ensure!(
                resume,
                "{} already holds a run: continue it with --resume, or choose another --run-dir",
                self.path.display()
            );
            self.check_same_config(config)?;
        }
        std::fs::create_dir_all(self.checkpoints())
            .with_context(|| format!("cannot make the run directory {}", self.path.display()))?;
        write_whole(&self.config_file(), &config::to_toml(config))
    }

    pub fn config_file(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    pub fn metrics_file(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    pub fn log_file(&self) -> PathBuf {
        self.path.join("log.txt")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Adds one start of the run to `provenance.json`, a list with an entry a process start.
    pub fn add_provenance(&self, start: serde_json::Value) -> Result<()> {
        let file = self.path.join("provenance.json");
        let mut starts: Vec<serde_json::Value> = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("cannot read {}", file.display()))?,
            Err(_) => Vec::new(),
        };
        starts.push(start);
        write_whole(&file, &serde_json::to_string_pretty(&starts)?)
    }

    fn check_same_config(&self, config: &Config) -> Result<()> {
        let written = config::load(&self.config_file(), &[])?;
        // Beside each other, levels are trained from the same snapshot: that is another computation.
        let beside = [&written, config].iter().any(|config| config.parallel.placement == Placement::Beside);
        let may_change =
            |d: &Difference| MAY_CHANGE.iter().any(|key| d.is_of(key)) && !(beside && d.is_of("parallel.placement"));
        let changed = differences(&written, config).into_iter().filter(|d| !may_change(d));
        let changed: Vec<String> = changed.map(|d| d.to_string()).collect();
        if !changed.is_empty() {
            bail!(
                "{} was started with another config, so it cannot be resumed with this one: {}",
                self.path.display(),
                changed.join("; ")
            );
        }
        Ok(())
    }
}

/// A key in which two configs differ, with both values as TOML ("unset" where absent).
#[derive(Debug, PartialEq)]
pub struct Difference {
    pub key: String,
    pub old: String,
    pub new: String,
}

impl Difference {
    /// Whether it is in `key`, or in a key of the table `key`.
    pub fn is_of(&self, key: &str) -> bool {
        self.key.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} was {}, is now {}", self.key, self.old, self.new)
    }
}

/// The keys in which two resolved configs differ.
pub fn differences(old: &Config, new: &Config) -> Vec<Difference> {
    let table = |c: &Config| toml::Table::try_from(c).expect("a config is always a TOML table");
    let (old, new) = (table(old), table(new));
    let show = |t: &toml::Table, name: &str, key: &str| {
        t.get(name).and_then(|t| t.get(key)).map_or("unset".to_owned(), |v| v.to_string())
    };
    config::TABLES
        .iter()
        .flat_map(|(name, _, keys)| keys.iter().map(move |key| (*name, key.name)))
        .map(|(name, key)| Difference {
            key: format!("{name}.{key}"),
            old: show(&old, name, key),
            new: show(&new, name, key),
        })
        .filter(|d| d.old != d.new)
        .collect()
}

/// Writes a whole file under a temporary name and renames it, so that no reader sees half of it.
pub fn write_whole(path: &Path, content: &str) -> Result<()> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, content)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(overrides: &[&str]) -> Config {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        config::parse("[data]\ndir = 'd'\n[model]\nvocab = 64", &overrides).unwrap()
    }

    #[test]
    fn a_run_is_not_overwritten_and_resumes_only_with_its_own_config() {
        let temp = tempfile::tempdir().unwrap();
        let directory = RunDirectory::new(&temp.path().join("run"));
        let base = config(&[]);
        directory.prepare(&base, true).unwrap();
        let again = directory.prepare(&base, false).unwrap_err();
        assert!(again.to_string().contains("--resume"), "{again}");
        directory.prepare(&config(&["log.every_steps=3", "checkpoint.keep=9"]), true).unwrap();
        let other = directory.prepare(&config(&["optimizer.lr=0.5"]), true).unwrap_err();
        assert!(other.to_string().contains("optimizer.lr was 0.001, is now 0.5"), "{other}");
    }
}
