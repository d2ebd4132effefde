//! A study as it lies in its folder.
//!
//! ```text
//! scaling.toml            what `init` was asked for: a Study
//! config.toml             the config at the fewest ranks
//! configs/MODE-NxR.toml   the config of each mode on N nodes of R ranks
//! NxR.sbatch              the job array of N nodes, with train.sbatch beside it
//! runs/MODE-NxR-I/        run directories, I from 1
//! output/                 what jobs print
//! jobs.txt                the arrays that were submitted
//! ```

use crate::config::{self, Config};
use crate::error::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What stays the same when ranks are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The global batch: each rank has less to do.
    Strong,
    /// The sequences a rank: the global batch grows.
    Weak,
}

impl Mode {
    pub const ALL: [Mode; 2] = [Mode::Strong, Mode::Weak];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Strong => "strong",
            Mode::Weak => "weak",
        }
    }

    /// `base`, which is for `fewest` ranks, for `ranks`.
    pub fn config(self, base: &Config, fewest: usize, ranks: usize) -> Result<Config> {
        let config = match self {
            Mode::Strong => base.clone(),
            Mode::Weak => with_batches(base, ranks, fewest)
                .with_context(|| format!("weak scaling from {fewest} to {ranks} ranks"))?,
        };
        let (smallest, _) = config.batches();
        ensure!(
            smallest >= ranks,
            "{} scaling to {ranks} ranks needs a sequence for each, and the smallest batch (data.batch, levels.batch) has {smallest}",
            self.name()
        );
        Ok(config)
    }
}

/// `config` with the batches of all levels times `times` / `over`.
fn with_batches(config: &Config, times: usize, over: usize) -> Result<Config> {
    let scaled = |batch: usize| {
        ensure!((batch * times).is_multiple_of(over), "a batch of {batch} does not divide: take a multiple of {over}");
        Ok(batch * times / over)
    };
    let mut config = config.clone();
    config.data.batch = scaled(config.data.batch)?;
    config.levels.batch = config.levels.batch.map(|of| of.into_iter().map(scaled).collect()).transpose()?;
    Ok(config)
}

/// A number of nodes and of ranks on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    pub nodes: usize,
    pub ranks_per_node: usize,
}

impl Point {
    pub fn ranks(self) -> usize {
        self.nodes * self.ranks_per_node
    }

    /// `NxR`
    pub fn name(self) -> String {
        format!("{}x{}", self.nodes, self.ranks_per_node)
    }
}

/// What `init` was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    pub title: String,
    pub modes: Vec<Mode>,
    pub repeats: usize,
    pub cpus_per_rank: usize,
    pub gpus: bool,
    /// Time limit of a job, in minutes.
    pub minutes: u32,
    /// In rising order of ranks.
    pub points: Vec<Point>,
    /// Its folder, absolute.
    #[serde(skip)]
    pub dir: PathBuf,
}

/// One run of a study.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub mode: Mode,
    pub point: Point,
    pub name: String,
    pub dir: PathBuf,
}

impl Study {
    /// Reads the study in `dir`.
    pub fn load(dir: &Path) -> Result<Study> {
        let file = dir.join("scaling.toml");
        let text = std::fs::read_to_string(&file).with_context(|| {
            format!("{} has no scaling.toml: expected a folder that `vcycle scaling init` wrote", dir.display())
        })?;
        let study: Study = toml::from_str(&text).with_context(|| format!("in {}", file.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
        ensure!(!study.points.is_empty(), "{}: it has no points", file.display());
        Ok(Study { dir, ..study })
    }

    /// The ranks of the smallest point, which efficiencies refer to.
    pub fn fewest(&self) -> usize {
        self.points.iter().map(|point| point.ranks()).min().unwrap_or(1)
    }

    /// The config at the fewest ranks.
    pub fn base_config(&self) -> Result<Config> {
        config::load(&self.dir.join("config.toml"), &[])
    }

    pub fn config_file(&self, mode: Mode, point: Point) -> PathBuf {
        self.dir.join("configs").join(format!("{}-{}.toml", mode.name(), point.name()))
    }

    /// The job array of `point`.
    pub fn script(&self, point: Point) -> PathBuf {
        self.dir.join(format!("{}.sbatch", point.name()))
    }

    /// The runs of `point`, in the order of the tasks of its job array.
    pub fn runs(&self, point: Point) -> Vec<Run> {
        let run = |mode: Mode, repeat: usize| {
            let name = format!("{}-{}-{repeat}", mode.name(), point.name());
            Run { mode, point, dir: self.dir.join("runs").join(&name), name }
        };
        // Modes in turn: if the machine changes, it changes for all.
        (1..=self.repeats).flat_map(|repeat| self.modes.iter().map(move |&mode| run(mode, repeat))).collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn study(dir: &Path) -> Study {
        let point = |nodes, ranks_per_node| Point { nodes, ranks_per_node };
        Study {
            title: "test".to_owned(),
            modes: Mode::ALL.to_vec(),
            repeats: 2,
            cpus_per_rank: 1,
            gpus: false,
            minutes: 10,
            points: vec![point(1, 2), point(2, 2)],
            dir: dir.to_owned(),
        }
    }

    pub fn config() -> Config {
        let text = "[run]\nsteps = 20\n[data]\ndir = 'x'\ncontext = 32\nbatch = 8\n[model]\nvocab = 64\nwidth = 16\nheads = 2\n\
                    depth = 4\n[levels]\ncount = 2\n[cycle]\nkind = 'cascade'";
        config::parse(text, &[]).unwrap()
    }

    #[test]
    fn weak_scaling_keeps_the_sequences_a_rank() {
        let batch = |mode: Mode, ranks| mode.config(&config(), 2, ranks).map(|config| config.data.batch);
        assert_eq!([batch(Mode::Weak, 2).unwrap(), batch(Mode::Weak, 6).unwrap()], [8, 24]);
        assert_eq!(batch(Mode::Strong, 8).unwrap(), 8);
        let e = batch(Mode::Strong, 9).unwrap_err().to_string();
        assert!(e.contains("strong scaling to 9 ranks needs a sequence for each") && e.contains("has 8"), "{e}");
        let e = format!("{:#}", Mode::Weak.config(&config(), 3, 4).unwrap_err());
        assert!(
            e.contains("weak scaling from 3 to 4 ranks: a batch of 8 does not divide: take a multiple of 3"),
            "{e}"
        );
    }

    #[test]
    fn every_run_has_a_task_of_its_own() {
        let study = study(Path::new("/s"));
        let names: Vec<String> = study.runs(study.points[1]).into_iter().map(|run| run.name).collect();
        assert_eq!(names, ["strong-2x2-1", "weak-2x2-1", "strong-2x2-2", "weak-2x2-2"]);
        assert_eq!(study.fewest(), 2);
    }
}
