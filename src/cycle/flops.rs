use super::{Coset, Op};
use crate::config::Config;
use crate::error::{Context, Result};
use crate::model::{Flops, Spec, step_flops};

/// A smooth of a plan and the model FLOPs of all its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    pub level: usize,
    pub coset: Coset,
    pub steps: u64,
    pub flops: Flops,
}

/// Tokens of the global batch, B T.
pub fn tokens_per_step(config: &Config) -> u64 {
    config.data.batch as u64 * config.data.context as u64
}

/// The smooths of `ops`, each with steps · step_flops(N_l, B T): the figures that a run logs. What a switch, an evaluation or
/// the measurement of a coherence term costs is not counted.
pub fn plan_flops(config: &Config, spec: &Spec, ops: &[Op]) -> Result<Vec<Phase>> {
    let smooths = ops.iter().filter_map(|op| match *op {
        Op::Smooth { level, coset, steps } => Some((level, coset, steps)),
        _ => None,
    });
    let phase = |(level, coset, steps)| {
        let step = step_flops(spec, config.rows(level), tokens_per_step(config));
        let flops = Flops { blocks: product(step.blocks, steps)?, total: product(step.total, steps)? };
        Ok(Phase { level, coset, steps, flops })
    };
    smooths.map(phase).collect()
}

/// FLOPs of all phases.
pub fn total(phases: &[Phase]) -> Result<Flops> {
    let sum = |figure: fn(&Flops) -> u64| {
        phases.iter().try_fold(0u64, |sum, phase| sum.checked_add(figure(&phase.flops))).context(TOO_MANY)
    };
    Ok(Flops { blocks: sum(|flops| flops.blocks)?, total: sum(|flops| flops.total)? })
}

const TOO_MANY: &str = "the plan has more than 2^64 FLOPs, more than can be counted";

fn product(step: u64, steps: u64) -> Result<u64> {
    step.checked_mul(steps).context(TOO_MANY)
}
