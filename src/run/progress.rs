//! How far a run is: all that a resumed run must know besides tensors.

use crate::config::Config;
use crate::cycle::{self, Coset, Op, Position};
use crate::error::Result;
use crate::model::{Flops, Spec, step_flops};
use serde::{Deserialize, Serialize};

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
    /// Wall-clock spent training, over all processes of this run, in seconds.
    pub elapsed_s: f64,
    /// How often the fine level has been left.
    pub descents: u64,
    /// Steps since the last level switch, if there was one.
    pub since_switch: Option<u64>,
    /// The loss since the current level was entered.
    pub stay: Stay,
}

/// The training loss of a stay on one level, in windows of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stay {
    /// Mean loss of each complete window, oldest first.
    pub losses: Vec<f64>,
    /// Sum of losses, and steps, of the window being filled.
    sum: f64,
    steps: u64,
}

impl Stay {
    /// Adds one step; true if it completed a window of `length` steps.
    pub fn add(&mut self, loss: f64, length: u64) -> bool {
        self.sum += loss;
        self.steps += 1;
        let complete = self.steps >= length;
        if complete {
            self.losses.push(self.sum / self.steps as f64);
            (self.sum, self.steps) = (0.0, 0);
        }
        complete
    }
}

impl Progress {
    pub fn new(plan: Vec<Op>) -> Progress {
        Progress {
            plan,
            position: Position::default(),
            step: 0,
            sequences: 0,
            elapsed_s: 0.0,
            descents: 0,
            since_switch: None,
            stay: Stay::default(),
        }
    }

    /// The op to do next; `None` at the end.
    pub fn op(&self) -> Option<Op> {
        self.position.op(&self.plan)
    }

    /// Index of the current cycle: 0 until the fine level has been left a second time.
    pub fn cycle(&self) -> u64 {
        self.descents.saturating_sub(1)
    }

    /// FLOPs of all steps done.
    pub fn flops(&self, config: &Config, spec: &Spec) -> Flops {
        let done = |(i, op): (usize, &Op)| match *op {
            Op::Smooth { level, steps, .. } if i < self.position.op => Some((level, steps)),
            Op::Smooth { level, .. } if i == self.position.op => Some((level, self.position.step_in_op)),
            _ => None,
        };
        let mut sum = Flops::default();
        for (level, steps) in self.plan.iter().enumerate().filter_map(done) {
            sum += step_flops(spec, config.rows(level), cycle::tokens_per_step(config, level)) * steps;
        }
        sum
    }

    /// One optimizer step over a global batch of `sequences` is done.
    pub fn count_step(&mut self, sequences: u64) {
        self.step += 1;
        self.sequences += sequences;
        self.since_switch = self.since_switch.map(|steps| steps + 1);
        self.position.advance(&self.plan);
    }

    /// The switch at the position, to level `to`, is done.
    pub fn count_switch(&mut self, op: Op) {
        self.descents += u64::from(op == Op::Descend { to: 1 });
        self.since_switch = Some(0);
        self.stay = Stay::default();
        self.position.advance(&self.plan);
    }

    /// Leaves the smooth that the last step was part of, if it has steps left.
    pub fn leave(&mut self) {
        if self.position.step_in_op > 0 {
            cycle::shorten(&mut self.plan, &mut self.position);
        }
    }

    pub fn check(&self, config: &Config) -> Result<()> {
        cycle::check(&self.plan, config)
    }
}

/// The coset to train at `step`: the same on every rank, and again after a resume.
pub fn coset_at(coset: Coset, cosets: usize, seed: u64, step: u64) -> usize {
    match coset {
        Coset::Index(k) => k,
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

    #[test]
    fn a_stay_has_the_mean_of_each_window() {
        let mut stay = Stay::default();
        let losses = [4.0, 3.0, 3.0, 2.0, 9.0];
        let completed: Vec<bool> = losses.iter().map(|&loss| stay.add(loss, 2)).collect();
        assert_eq!((completed, stay.losses), (vec![false, true, false, true, false], vec![3.5, 2.5]));
    }
}
