use super::{Cycle, Op, Position, Visit, cascade, split};
use crate::config::Config;

/// A cascade that leaves a coarse level when it has stopped paying: `cycle.fractions` are the longest stays.
///
/// A loss that falls as a power of the steps falls, from one doubling of the steps to the next, by a nearly constant share
/// of what it fell before; a net that is too coarse for what is left to learn falls behind that. This needs no scale: it
/// knows neither the loss that can be reached nor the length of the run.
pub struct Adaptive;

impl Cycle for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        cascade::shares(config)
    }
    /// With n windows, μ(a, b) the mean loss of the windows from a to b, leave when the last doubling of the stay has brought
    /// at most `cycle.threshold` of what the one before it did, or has brought nothing:
    ///
    /// ```text
    /// μ(n/4, n/2) - μ(n/2, n) ≤ threshold · max(μ(n/8, n/4) - μ(n/4, n/2), 0)
    /// ```
    ///
    /// Eight windows are needed; a NaN never leaves.
    fn leave(&self, config: &Config, losses: &[f64]) -> bool {
        let n = losses.len();
        if n < 8 {
            return false;
        }
        let mean = |a: usize, b: usize| losses[a..b].iter().sum::<f64>() / (b - a) as f64;
        let [early, middle, late] = [mean(n / 8, n / 4), mean(n / 4, n / 2), mean(n / 2, n)];
        middle - late <= config.cycle.threshold * (early - middle).max(0.0)
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
