use super::{Cycle, Op, Position, Visit, cascade, split};
use crate::config::Config;

/// A cascade that leaves a coarse level once the next finer one gives more for its work: `cycle.fractions` are the longest stays.
pub struct Adaptive;

impl Cycle for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        cascade::shares(config)
    }
    fn measures(&self) -> bool {
        true
    }
    /// The mean of the last five ρ is at least `cycle.threshold` · (c - 1). One alone, of one batch, is noisy: ± 0.1.
    fn leave(&self, config: &Config, unresolved: &[f64]) -> bool {
        let Some(last) = unresolved.last_chunk::<5>() else { return false };
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        mean >= config.cycle.threshold * (config.levels.factor - 1) as f64
    }
}

/// Ends the smooth at `position`, which has done `position.step_in_op` ≥ 1 steps, and gives the steps it had left to the
/// later smooths on finer levels, so that each gets as much more work in proportion to what it has: `factor` = c times as many
/// steps on a level as on the next finer one. `position` moves to the next op. The total number of steps stays.
///
/// Without a later smooth on a finer level nothing changes.
pub fn shorten(ops: &mut [Op], position: &mut Position, factor: usize) {
    let (before, rest) = ops.split_at_mut((position.op + 1).min(ops.len()));
    let Some(Op::Smooth { level: current, steps, .. }) = before.last_mut() else { return };
    let (mut finer, mut weights) = (Vec::new(), Vec::new());
    for op in rest {
        match op {
            Op::Smooth { level, steps, .. } if *level < *current => {
                weights.push(*steps as f64 * (factor as f64).powi(*level as i32));
                finer.push(steps);
            }
            _ => {}
        }
    }
    if finer.is_empty() || position.step_in_op == 0 {
        return;
    }
    let left = *steps - position.step_in_op;
    for (steps, more) in finer.into_iter().zip(split(left, &weights)) {
        *steps += more;
    }
    *steps = position.step_in_op;
    *position = Position { op: position.op + 1, step_in_op: 0 };
}
