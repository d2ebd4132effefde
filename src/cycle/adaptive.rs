use super::{Cycle, Op, Position, Visit, cascade, split};
use crate::config::Config;

/// A cascade that leaves a coarse level when it has stopped paying: `cycle.fractions` are the longest stays.
pub struct Adaptive;

/// Progress measured over `cycle.window` steps on one level.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Window {
    /// Decrease of the training loss over the window.
    pub decrease: f64,
    /// FLOPs spent in it.
    pub flops: f64,
}

impl Cycle for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        cascade::shares(config)
    }
    /// Leave when the last window's decrease per FLOP is at most `cycle.threshold` of the average since the level was
    /// entered, or of zero if the loss has grown. One window has nothing to be compared with; a NaN never leaves.
    fn leave(&self, config: &Config, windows: &[Window]) -> bool {
        let [_, .., last] = windows else { return false };
        let decrease: f64 = windows.iter().map(|window| window.decrease).sum();
        let flops: f64 = windows.iter().map(|window| window.flops).sum();
        if decrease.is_nan() {
            return false;
        }
        last.decrease / last.flops <= config.cycle.threshold * (decrease / flops).max(0.0)
    }
}

/// Ends the smooth at `position`, which has done `position.step_in_op` ≥ 1 steps, and gives the steps it had left to the
/// later smooths on finer levels in proportion; `position` moves to the next op. The total number of steps stays.
///
/// Without a later smooth on a finer level nothing changes.
pub fn shorten(ops: &mut [Op], position: &mut Position) {
    let (before, rest) = ops.split_at_mut((position.op + 1).min(ops.len()));
    let Some(Op::Smooth { level: current, steps, .. }) = before.last_mut() else { return };
    let mut finer: Vec<&mut u64> = rest
        .iter_mut()
        .filter_map(|op| match op {
            Op::Smooth { level, steps, .. } if *level < *current => Some(steps),
            _ => None,
        })
        .collect();
    if finer.is_empty() || position.step_in_op == 0 {
        return;
    }
    let left = *steps - position.step_in_op;
    let weights: Vec<f64> = finer.iter().map(|steps| **steps as f64).collect();
    for (steps, more) in finer.iter_mut().zip(split(left, &weights)) {
        **steps += more;
    }
    *steps = position.step_in_op;
    *position = Position { op: position.op + 1, step_in_op: 0 };
}
