//! What the metrics of one run say of its speed, level by level.

use crate::cli::report::run::Run;
use crate::run::history::{self, Metrics};
use std::path::Path;

/// Means over the timed steps of a run on one level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub level: usize,
    pub blocks: usize,
    pub step_s: f64,
    pub tokens_per_s: f64,
    pub flops_per_s: f64,
    /// Share of the time that even the slowest rank waits: communication that is not hidden.
    pub exposed: f64,
    /// Share of the time that the mean rank waits for the slowest, besides.
    pub imbalance: f64,
    /// Null where no line has it.
    pub mfu: Option<f64>,
}

/// Sums over lines.
#[derive(Default)]
struct Sums {
    blocks: usize,
    seconds: f64,
    steps: f64,
    tokens: f64,
    flops: f64,
    /// Times seconds.
    exposed: f64,
    imbalance: f64,
    mfu: f64,
}

/// A sample for each level that `run` timed. Left out are the first line after a start or a switch, in which the machine warms up,
/// and lines with an evaluation.
pub fn samples(run: &Run) -> Vec<Sample> {
    let mut levels: Vec<Option<Sums>> = Vec::new();
    for phase in run.phases() {
        for pair in phase.windows(2) {
            let (before, line) = (&pair[0], &pair[1]);
            if line.val_loss.is_none() && line.step > before.step && line.tokens_per_s > 0.0 {
                levels.resize_with(levels.len().max(line.level + 1), || None);
                levels[line.level].get_or_insert_default().add(before, line);
            }
        }
    }
    levels.iter().enumerate().filter_map(|(level, sums)| Some(sums.as_ref()?.sample(level))).collect()
}

impl Sums {
    /// The steps from `before` to `line`.
    fn add(&mut self, before: &Metrics, line: &Metrics) {
        let tokens = (line.tokens - before.tokens) as f64;
        let seconds = tokens / line.tokens_per_s;
        self.blocks = line.rows;
        self.seconds += seconds;
        self.tokens += tokens;
        self.steps += (line.step - before.step) as f64;
        self.flops += (line.flops_total - before.flops_total) as f64;
        self.mfu += line.mfu.unwrap_or(f64::NAN) * seconds;
        if let Some(ranks) = &line.ranks {
            let exposed = 1.0 - ranks.slowest_computes;
            self.exposed += exposed * seconds;
            self.imbalance += (ranks.waiting - exposed) * seconds;
        }
    }

    fn sample(&self, level: usize) -> Sample {
        let per_s = |sum: f64| sum / self.seconds;
        Sample {
            level,
            blocks: self.blocks,
            step_s: self.seconds / self.steps,
            tokens_per_s: per_s(self.tokens),
            flops_per_s: per_s(self.flops),
            exposed: per_s(self.exposed),
            imbalance: per_s(self.imbalance),
            mfu: Some(per_s(self.mfu)).filter(|mfu| mfu.is_finite()),
        }
    }
}

/// Whether the run in `dir` has done all its `steps`.
pub fn is_finished(dir: &Path, steps: u64) -> bool {
    let lines = history::read(&dir.join(history::FILE_NAME)).unwrap_or_default();
    lines.last().is_some_and(|line| line.step == steps && line.val_loss.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::report::run::tests::{metrics, run};
    use crate::run::Balance;

    #[test]
    fn first_lines_and_evaluations_are_not_timed() {
        let ranks = Some(Balance { waiting: 0.3, exposed: 0.1, slowest: 1, slowest_computes: 0.9 });
        let line = |step, level, tokens_per_s| Metrics { tokens_per_s, ranks, ..metrics(step, level, 1, None) };
        let mut lines =
            vec![line(1, 1, 1.0), line(2, 1, 4096.0), line(4, 1, 1024.0), line(5, 0, 1.0), line(6, 0, 512.0)];
        lines.push(Metrics { val_loss: Some(2.0), ..line(7, 0, 1.0) });
        let [fine, coarse] = samples(&run("r", lines, ""))[..] else { panic!("two levels") };
        // 2048 tokens a step: half a second, then two steps in four.
        assert_eq!((coarse.blocks, coarse.step_s, coarse.tokens_per_s), (4, 4.5 / 3.0, 3.0 * 2048.0 / 4.5));
        assert_eq!((fine.step_s, fine.flops_per_s), (4.0, 0.5e12));
        assert!((fine.exposed - 0.1).abs() < 1e-12 && (fine.imbalance - 0.2).abs() < 1e-12);
        assert_eq!(fine.mfu, None);
    }
}
