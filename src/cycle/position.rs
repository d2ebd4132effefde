use super::{Coset, Op};
use crate::config::Config;
use crate::error::{Result, ensure};
use serde::{Deserialize, Serialize};

/// How far a list of ops has been carried out. Starts at the default, and is at the end when [`Position::op`] is `None`.
///
/// ```
/// use vcycle::cycle::{Coset, Op, Position};
/// let ops = [Op::Smooth { level: 0, coset: Coset::Index(0), steps: 2 }];
/// let (mut position, mut steps) = (Position::default(), 0);
/// while let Some(op) = position.op(&ops) {
///     if let Op::Smooth { .. } = op {
///         steps += 1; // one optimizer step
///     } // else switch levels
///     position.advance(&ops, 1);
/// }
/// assert_eq!(steps, 2);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Index of the op to go on with.
    pub op: usize,
    /// Units of it that are done: steps of a smooth, rounds of a `Beside`.
    pub step_in_op: u64,
}

impl Position {
    /// The op to do next; `None` at the end.
    pub fn op(self, ops: &[Op]) -> Option<&Op> {
        ops.get(self.op)
    }

    /// Counts `units` of the op at the position as done.
    pub fn advance(&mut self, ops: &[Op], units: u64) {
        self.step_in_op += units;
        if ops.get(self.op).is_none_or(|op| self.step_in_op >= op.length()) {
            *self = Position { op: self.op + 1, step_in_op: 0 };
        }
    }

    /// Optimizer steps done before this position.
    pub fn steps_done(self, ops: &[Op]) -> u64 {
        let current = self.op(ops).map_or(0, |op| op.steps_after(self.step_in_op));
        ops.iter().take(self.op).map(Op::steps).sum::<u64>() + current
    }

    /// The level the run is on at this position.
    pub fn level(self, ops: &[Op]) -> usize {
        let mut switches = ops.iter().take(self.op).filter_map(|op| match op {
            Op::Descend { to } | Op::Ascend { to } => Some(*to),
            Op::Smooth { .. } | Op::Beside { .. } => None,
        });
        switches.next_back().unwrap_or(0)
    }
}

/// Refuses a list of ops that `config` cannot carry out: one that does not start and end on level 0, switches between
/// levels that are not adjacent, names a level or coset that does not exist, or does not have `run.steps` steps.
pub fn check(ops: &[Op], config: &Config) -> Result<()> {
    let end = end_level(ops, config, 0)?;
    let steps: u64 = ops.iter().map(Op::steps).sum();
    ensure!(end == 0, "the cycle ends on level {end}: expected level 0");
    ensure!(steps == config.run.steps, "the cycle has {steps} steps: expected run.steps = {}", config.run.steps);
    Ok(())
}

/// The level on which `ops` end. They start on level 0 and otherwise stay on level `finest` or below.
fn end_level(ops: &[Op], config: &Config, finest: usize) -> Result<usize> {
    let mut current = 0;
    for (i, op) in ops.iter().enumerate() {
        let fits = match *op {
            Op::Smooth { level, coset, steps } => {
                let coset_exists = match coset {
                    Coset::Index(k) => k < config.levels.factor.pow(level as u32),
                    Coset::Random | Coset::All => level > 0,
                };
                level == current && level >= finest && coset_exists && steps > 0
            }
            Op::Descend { to } => to == current + 1 && to < config.levels.count,
            Op::Ascend { to } => to + 1 == current && to >= finest,
            Op::Beside { fine, ref coarse, rounds } => {
                let steps: u64 = coarse.iter().map(Op::steps).sum();
                current == 0
                    && finest == 0
                    && (1..=fine.min(steps)).contains(&rounds)
                    && end_level(coarse, config, 1)? == 1
            }
        };
        ensure!(fits, "op {i} of the cycle, {op:?}, is not possible on level {current} of {}", config.levels.count);
        if let Op::Descend { to } | Op::Ascend { to } = *op {
            current = to;
        }
    }
    Ok(current)
}
