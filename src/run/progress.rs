//! How far a run is: all that a resumed run must know besides tensors.

use crate::config::Config;
use crate::cycle::{self, Coset, Op, Position, Round};
use crate::error::Result;
use crate::model::{Flops, Spec};
use serde::{Deserialize, Serialize};

/// The first sequence number that coarse levels read beside the fine one: so far on that a run's own never gets there. What
/// the fine level reads does not depend on what is trained beside it.
pub const COARSE_SEQUENCES: u64 = 1 << 48;

/// Position and measurements of a run. Saved in every checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The whole plan; `adaptive` shortens it on the way.
    pub plan: Vec<Op>,
    /// The op that is being done and the steps done of it.
    pub position: Position,
    /// Optimizer steps done, over all levels.
    pub step: u64,
    /// Sequences consumed by training: the sampler's cursor.
    pub sequences: u64,
    /// Sequences consumed by coarse levels beside the fine one, which count from [`COARSE_SEQUENCES`] on.
    #[serde(default)]
    pub coarse_sequences: u64,
    /// Wall-clock spent training, over all processes of this run, in seconds.
    pub elapsed_s: f64,
    /// How often the fine level has been left.
    pub descents: u64,
    /// Steps since the last level switch, if there was one.
    pub since_switch: Option<u64>,
    /// Unresolved ratios of the current level, since it was entered, oldest first.
    #[serde(default)]
    pub unresolved: Vec<f64>,
    /// Levels on which the gradients for them were taken, since the start of the run.
    #[serde(default)]
    pub measured: Vec<usize>,
}

impl Progress {
    pub fn new(plan: Vec<Op>) -> Progress {
        Progress {
            plan,
            position: Position::default(),
            step: 0,
            sequences: 0,
            coarse_sequences: 0,
            elapsed_s: 0.0,
            descents: 0,
            since_switch: None,
            unresolved: Vec::new(),
            measured: Vec::new(),
        }
    }

    /// The op to do next; `None` at the end.
    pub fn op(&self) -> Option<&Op> {
        self.position.op(&self.plan)
    }

    /// Index of the current cycle: 0 until the fine level has been left a second time.
    pub fn cycle(&self) -> u64 {
        self.descents.saturating_sub(1)
    }

    /// FLOPs of all steps done, and of measurements.
    pub fn flops(&self, config: &Config, spec: &Spec) -> Flops {
        let whole = self.plan.iter().take(self.position.op).map(|op| cycle::flops(config, spec, op));
        let current = self.op().map_or(Vec::new(), |op| cycle::done(op, self.position.step_in_op));
        let measured = self.measured.iter().map(|&level| cycle::level_flops(config, spec, level));
        whole.chain(current.iter().map(|op| cycle::flops(config, spec, op))).chain(measured).sum()
    }

    /// A round of the op at the position is done; it has read `sequences` on the level that the run is on, and beside it.
    pub fn count_round(&mut self, round: &Round, sequences: [u64; 2]) {
        let starts_beside = !round.coarse.is_empty() && self.position.step_in_op == 0;
        self.descents += u64::from(starts_beside);
        self.step += round.steps();
        self.sequences += sequences[0];
        self.coarse_sequences += sequences[1];
        self.since_switch = self.since_switch.map(|steps| steps + round.main.steps());
        self.position.advance(&self.plan, round.advance);
    }

    /// The switch at the position is done.
    pub fn count_switch(&mut self, op: &Op) {
        self.descents += u64::from(*op == Op::Descend { to: 1 });
        self.since_switch = Some(0);
        self.unresolved.clear();
        self.position.advance(&self.plan, 1);
    }

    /// Leaves the smooth that the last step was part of, which has steps left.
    pub fn leave(&mut self, config: &Config) {
        cycle::shorten(&mut self.plan, &mut self.position, config.levels.factor);
    }

    pub fn check(&self, config: &Config) -> Result<()> {
        cycle::check(&self.plan, config)
    }
}

/// The coset to train at `step`: the same on every rank, and again after a resume.
pub fn coset_at(coset: Coset, cosets: usize, seed: u64, step: u64) -> usize {
    match coset {
        Coset::Index(k) => k,
        Coset::All => unreachable!("localised to the coset of each group"),
        Coset::Random => {
            use rand::{Rng, SeedableRng};
            let mut stream = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            stream.set_stream(step);
            stream.random_range(0..cosets as u64) as usize
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_cosets_repeat_and_are_spread_evenly() {
        let draw = |step| coset_at(Coset::Random, 4, 7, step);
        let mut counts = [0; 4];
        (0..4000).for_each(|step| counts[draw(step)] += 1);
        assert!(counts.iter().all(|&n| (900..1100).contains(&n)), "{counts:?}");
        assert_eq!((0..50).map(draw).collect::<Vec<_>>(), (0..50).map(draw).collect::<Vec<_>>());
    }
}
