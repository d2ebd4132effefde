//! What a run directory says of its run.

use super::plan::Run;
use crate::cli::report::run::Cost;
use crate::config;
use crate::error::{Result, ensure};
use crate::run::{DIVERGED, RunDirectory, differences, history};
use std::path::{Path, PathBuf};

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    New,
    /// Not finished; there may be a checkpoint to go on from. `step` is that of its last line of metrics.
    Stopped {
        step: u64,
    },
    /// All steps are done: its last evaluation.
    Finished(Cost),
    /// Its loss ceased to be a number. It would do so again.
    Diverged,
}

/// Tables and keys in which a run may differ from what the study asks for: they change neither losses nor time.
const MAY_DIFFER: &[&str] = &["run.max_minutes", "data.dir", "checkpoint", "parallel.timeout", "log.every_steps"];

impl State {
    /// Of `run`. An error if its directory holds a run of another config.
    pub fn read(run: &Run) -> Result<State> {
        let directory = RunDirectory::new(&run.dir);
        if !directory.config_file().exists() {
            return Ok(State::New);
        }
        let written = config::load(&directory.config_file(), &[])?;
        let mut wanted = run.config.clone();
        // Where the config leaves it to the data.
        wanted.model.vocab = wanted.model.vocab.or(written.model.vocab);
        let other = differences(&written, &wanted).into_iter().filter(|d| !MAY_DIFFER.iter().any(|key| d.is_of(key)));
        let other: Vec<String> = other.map(|difference| difference.to_string()).collect();
        ensure!(
            other.is_empty(),
            "{} holds a run of another config: {}; give the study another `dir`, or replace the run with --force",
            run.dir.display(),
            other.join("; ")
        );
        let metrics = directory.metrics_file();
        let lines = if metrics.exists() { history::read(&metrics)? } else { Vec::new() };
        let last = lines.last();
        Ok(match last.and_then(|line| Some((line, line.val_loss?))) {
            Some(end) if end.0.step == wanted.run.steps => State::Finished(Cost::of(end)),
            _ if has_diverged(&run.dir) => State::Diverged,
            _ => State::Stopped { step: last.map_or(0, |line| line.step) },
        })
    }

    /// Whether there is nothing more to learn of the run.
    pub fn is_settled(self) -> bool {
        matches!(self, State::Finished(_) | State::Diverged)
    }

    /// Final validation loss of a finished run.
    pub fn val_loss(self) -> Option<f64> {
        match self {
            State::Finished(cost) => Some(cost.val_loss),
            _ => None,
        }
    }
}

/// Where what a run prints goes, at its last start.
pub fn output_file(dir: &Path) -> PathBuf {
    dir.join("output.txt")
}

/// What the last start of the run in `dir` printed as its error, if it failed.
pub fn last_error(dir: &Path) -> Option<String> {
    let output = std::fs::read(output_file(dir)).ok()?;
    let output = String::from_utf8_lossy(&output);
    output.lines().filter_map(|line| line.strip_prefix("error: ")).next_back().map(str::to_owned)
}

fn has_diverged(dir: &Path) -> bool {
    last_error(dir).is_some_and(|error| error.starts_with(DIVERGED))
}

#[cfg(test)]
pub mod tests {
    use super::super::file::tests::study;
    use super::*;
    use crate::cli::report::run::tests::metrics;
    use crate::run::history::Log;

    pub fn finished(val_loss: f64) -> State {
        State::Finished(Cost { val_loss, flops_total: 2, flops_blocks: 1, elapsed_s: 1.0, step: 10 })
    }

    /// A run of 20 steps whose folder is `dir`.
    fn run(dir: &Path, set: &str) -> Run {
        let mut study = study(&format!("[arms.flat]\nset = {{ run.steps = 20{set} }}")).unwrap();
        let mut run = study.runs.swap_remove(0);
        run.dir = dir.to_owned();
        run
    }

    #[test]
    fn a_run_is_finished_when_its_last_step_is_evaluated() {
        let dir = tempfile::tempdir().unwrap();
        let run = run(dir.path(), "");
        assert_eq!(State::read(&run).unwrap(), State::New);
        RunDirectory::new(dir.path()).prepare(&run.config, true).unwrap();
        assert_eq!(State::read(&run).unwrap(), State::Stopped { step: 0 });
        let mut log = Log::open(&dir.path().join(history::FILE_NAME), 0).unwrap();
        log.append(&metrics(10, 0, 1, Some(2.0))).unwrap();
        assert_eq!(State::read(&run).unwrap(), State::Stopped { step: 10 });
        log.append(&metrics(20, 0, 1, Some(1.5))).unwrap();
        assert_eq!(State::read(&run).unwrap().val_loss(), Some(1.5));
    }

    #[test]
    fn a_run_that_diverged_is_settled_and_one_that_failed_otherwise_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let run = run(dir.path(), "");
        RunDirectory::new(dir.path()).prepare(&run.config, true).unwrap();
        let output = |text: &str| std::fs::write(output_file(dir.path()), text).unwrap();
        output("step 1\nerror: the disk is full\n");
        assert_eq!(State::read(&run).unwrap(), State::Stopped { step: 0 });
        output(&format!("step 1\nerror: {DIVERGED} 7: loss NaN\nmpirun was told\n"));
        assert_eq!(State::read(&run).unwrap(), State::Diverged);
    }

    #[test]
    fn a_run_of_another_config_is_named_with_its_keys() {
        let dir = tempfile::tempdir().unwrap();
        RunDirectory::new(dir.path()).prepare(&run(dir.path(), "").config, true).unwrap();
        assert!(State::read(&run(dir.path(), ", data.dir = 'moved', checkpoint.keep = 1")).is_ok());
        for (set, expected) in [
            (", optimizer.lr = 0.5", "optimizer.lr was 0.001, is now 0.5"),
            (", log.eval_every = 5", "log.eval_every was 200, is now 5"),
        ] {
            let e = State::read(&run(dir.path(), set)).unwrap_err().to_string();
            assert!(e.contains(expected) && e.contains(&dir.path().display().to_string()), "{e}");
        }
    }
}
