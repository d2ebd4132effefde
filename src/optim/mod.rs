//! Update rules over flat tensors, one a file, and learning-rate schedules.

mod adamw;
#[cfg(test)]
mod laws;
mod muon;
mod pass;
mod schedule;
mod sgd;

pub use adamw::AdamW;
pub use muon::Muon;
pub use schedule::learning_rate;
pub use sgd::Sgd;

use crate::config::{OptimizerKind, OptimizerTable, ParallelTable};
use crate::error::Result;
use crate::model::{Division, Shard};
use candle_core::Tensor;

/// A tensor of optimizer state, of the shape of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Name in a checkpoint: `m`, `v`, `momentum`.
    pub name: &'static str,
    /// Power of the gradient it holds: 1 for m, 2 for v. Level switches scale by (ratio of h)^power.
    pub power: i32,
}

/// What one step needs besides tensors.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// Learning rate of this step (schedule and level multiplier applied).
    pub lr: f64,
    /// Factor on the gradient: min(1, clip / norm).
    pub gradient_scale: f64,
    /// Factor on ε (CompleteP: h).
    pub eps_scale: f64,
}

/// An update rule. `theta` and `grad` are [R, P], every moment [R, S], S the columns of `shard`; only those of `rows` change.
/// `updates[i]` counts the updates that row `rows[i]` has had before this one (Adam's bias correction).
pub trait Optimizer: Send + Sync {
    fn name(&self) -> &'static str;
    fn moments(&self) -> &'static [Moment];
    /// The update of an element follows from its whole matrix, so no shard may cut one.
    fn whole_matrices(&self) -> bool {
        false
    }
    #[allow(clippy::too_many_arguments)]
    fn step(
        &self,
        shard: &Shard,
        rows: &[usize],
        updates: &[u64],
        theta: &Tensor,
        grad: &Tensor,
        moments: &[Tensor],
        hyper: &Hyper,
    ) -> Result<()>;
}

/// The update rule that the config names.
pub fn new(table: &OptimizerTable) -> Box<dyn Optimizer> {
    match table.kind {
        OptimizerKind::Sgd => Box::new(Sgd::new(table)),
        OptimizerKind::AdamW => Box::new(AdamW::new(table)),
        OptimizerKind::Muon => Box::new(Muon::new(table)),
    }
}

/// How the config divides the state of `optimizer` among ranks.
pub fn division(table: &ParallelTable, optimizer: &dyn Optimizer, rank: usize, ranks: usize) -> Division {
    match table.zero {
        0 => Division::NONE,
        _ => Division { rank, ranks, whole_matrices: optimizer.whole_matrices() },
    }
}

/// min(1, clip / norm): the factor that clips a gradient of this norm; 1 if `clip` is 0 (off). A norm that is not a number
/// gives a factor that is not, so that the fault is seen.
pub fn gradient_scale(norm: f64, clip: f64) -> f64 {
    if clip == 0.0 || norm <= clip { 1.0 } else { clip / norm }
}
