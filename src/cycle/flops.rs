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
    /// Another phase is done at the same time: the fine level beside a coarse one, or the other way round.
    pub beside: bool,
}

/// Tokens of a global batch on `level`, B_l T.
pub fn tokens_per_step(config: &Config, level: usize) -> u64 {
    config.batch(level) as u64 * config.data.context as u64
}

/// FLOPs of a step on `level`: N_l blocks, B_l T tokens in sequences of T_l.
pub fn level_flops(config: &Config, spec: &Spec, level: usize) -> Flops {
    step_flops(spec, config.rows(level), config.context(level), tokens_per_step(config, level))
}

/// FLOPs of `op`: steps · [`level_flops`] a smooth, times the number of cosets where all are trained. What a switch,
/// an evaluation, a held-out batch or the measurement of a coherence term costs is not counted.
pub fn flops(config: &Config, spec: &Spec, op: &Op) -> Flops {
    phases(config, spec, op).iter().map(|phase| phase.flops).sum()
}

/// The smooths of `ops` with the figures that a run logs.
pub fn plan_flops(config: &Config, spec: &Spec, ops: &[Op]) -> Vec<Phase> {
    ops.iter().flat_map(|op| phases(config, spec, op)).collect()
}

fn phases(config: &Config, spec: &Spec, op: &Op) -> Vec<Phase> {
    match *op {
        Op::Smooth { level, coset, steps } => {
            let nets = if coset == Coset::All { config.levels.factor.pow(level as u32) as u64 } else { 1 };
            let flops = level_flops(config, spec, level) * (steps * nets);
            vec![Phase { level, coset, steps, flops, beside: false }]
        }
        Op::Beside { .. } => {
            let smooths = op.smooths();
            let sides = smooths.iter().flat_map(|op| phases(config, spec, op));
            sides.map(|phase| Phase { beside: true, ..phase }).collect()
        }
        Op::Descend { .. } | Op::Ascend { .. } => Vec::new(),
    }
}

/// FLOPs of all phases.
pub fn total(phases: &[Phase]) -> Flops {
    phases.iter().map(|phase| phase.flops).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_counts_the_tokens_of_its_own_batch() {
        let config = |batch: &str| {
            let text = format!(
                "[run]\nsteps = 10\n[data]\ndir = \"d\"\nbatch = 16\n[model]\nvocab = 64\ndepth = 8\n\
                 [levels]\ncount = 2\n{batch}\n[cycle]\nkind = \"cascade\"\nfractions = [0.5, 0.5]"
            );
            crate::config::parse(&text, &[]).unwrap()
        };
        let phases = |config: &Config| plan_flops(config, &Spec::new(config), &super::super::plan(config));
        let (all, less) = (phases(&config("")), phases(&config("batch = [16, 4]")));
        assert_eq!(all[1], less[1]);
        assert_eq!((all[0].level, all[0].flops.total), (1, less[0].flops.total * 4));
    }
}
