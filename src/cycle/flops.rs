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

/// Tokens of a global batch on `level`, B_l T.
pub fn tokens_per_step(config: &Config, level: usize) -> u64 {
    config.batch(level) as u64 * config.data.context as u64
}

/// The smooths of `ops`, each with steps · step_flops(N_l, B_l T): the figures that a run logs. What a switch, an evaluation or
/// the measurement of a coherence term costs is not counted.
pub fn plan_flops(config: &Config, spec: &Spec, ops: &[Op]) -> Vec<Phase> {
    let phase = |op: &Op| match *op {
        Op::Smooth { level, coset, steps } => {
            let flops = step_flops(spec, config.rows(level), tokens_per_step(config, level)) * steps;
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
