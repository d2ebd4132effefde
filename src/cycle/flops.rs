use super::{Coset, Op};
use crate::config::Config;
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
pub fn plan_flops(config: &Config, spec: &Spec, ops: &[Op]) -> Vec<Phase> {
    let phase = |op: &Op| match *op {
        Op::Smooth { level, coset, steps } => {
            let flops = step_flops(spec, config.rows(level), tokens_per_step(config)) * steps;
            Some(Phase { level, coset, steps, flops })
        }
        _ => None,
    };
    ops.iter().filter_map(phase).collect()
}

/// FLOPs of all phases.
pub fn total(phases: &[Phase]) -> Flops {
    phases.iter().map(|phase| phase.flops).sum()
}
