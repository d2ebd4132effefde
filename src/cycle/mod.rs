//! Cycles as data: which level is smoothed for how long, and the switches between.
//!
//! A [`Cycle`] only says which levels it visits for how many steps; [`plan`] makes the ops: every switch between, the
//! coset policy, nothing of zero steps. So each plan starts and ends on level 0, switches between adjacent levels only and has
//! `run.steps` steps.
//!
//! The plan says what is done. [`Places`] says by which ranks: it cuts ops into [`Round`]s, between which all ranks meet, and
//! gives each rank its list of [`LocalOp`]s. `docs/PLACEMENT.md` has the mathematics.

mod adaptive;
mod cascade;
mod f;
mod flat;
mod flops;
mod groups;
mod local;
mod paper;
mod phases;
mod places;
mod position;
mod repeat;
mod split;
mod stage;
mod v;
mod w;

pub use adaptive::shorten;
pub use flops::{Phase, flops, level_flops, plan_flops, tokens_per_step, total};
pub use groups::Groups;
pub use local::{LocalOp, Scope, Side, Smooth, localize, own_cosets};
pub use places::{Places, Round, done};
pub use position::{Position, check};

use crate::config::{Config, CosetPolicy, CycleKind, Placement};
use serde::{Deserialize, Serialize};
use split::split;

/// Which rows of a coarse `injection` level a smooth trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Coset {
    Index(usize),
    /// Drawn each step from (seed, step).
    Random,
    /// All at once: a step trains each coset, on a batch of its own.
    All,
}

/// One operation of a multilevel cycle. Level 0 is the finest; a run starts on level 0 and ends there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Optimizer steps on one level.
    Smooth { level: usize, coset: Coset, steps: u64 },
    /// Restrict to the next coarser level; always one level at a time.
    Descend { to: usize },
    /// Prolong to the next finer level; always one level at a time.
    Ascend { to: usize },
    /// `fine` steps on level 0 beside the ops `coarse`, which start from the same θ⁰ by a descent to level 1 and end there; then
    /// the correction of the fine level by the coarse one. Both sides meet after each of `rounds` nearly equal parts.
    Beside { fine: u64, coarse: Vec<Op>, rounds: u64 },
}

impl Op {
    /// Optimizer steps that it counts for in `run.steps`.
    pub fn steps(&self) -> u64 {
        self.steps_after(self.length())
    }

    /// Length in the units of a [`Position`]: the steps of a smooth, the rounds of a `Beside`, 1 of a switch.
    pub fn length(&self) -> u64 {
        match self {
            Op::Smooth { steps, .. } => *steps,
            Op::Beside { rounds, .. } => *rounds,
            Op::Descend { .. } | Op::Ascend { .. } => 1,
        }
    }

    /// Optimizer steps done after `done` units of it.
    pub fn steps_after(&self, done: u64) -> u64 {
        match self {
            Op::Smooth { .. } => done,
            Op::Beside { fine, coarse, rounds } => {
                let coarse = coarse.iter().map(Op::steps).sum();
                places::upto(*fine, done, *rounds) + places::upto(coarse, done, *rounds)
            }
            Op::Descend { .. } | Op::Ascend { .. } => 0,
        }
    }

    /// The smooths that it is made of; of a `Beside` the fine side's, then the coarse side's.
    pub fn smooths(&self) -> Vec<Op> {
        match self {
            Op::Smooth { .. } => vec![self.clone()],
            Op::Beside { fine, coarse, .. } => {
                let fine = Op::Smooth { level: 0, coset: Coset::Index(0), steps: *fine };
                std::iter::once(fine).chain(coarse.iter().flat_map(Op::smooths)).collect()
            }
            Op::Descend { .. } | Op::Ascend { .. } => Vec::new(),
        }
    }
}

/// Optimizer steps on a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    pub level: usize,
    pub steps: u64,
}

/// An order in which levels are visited.
pub trait Cycle: Sync {
    /// The word in `cycle.kind`.
    fn name(&self) -> &'static str;
    /// Visits of `run.steps` steps together; neighbours may be on any two levels, or on the same one.
    fn visits(&self, config: &Config) -> Vec<Visit>;
    /// How a visit's steps are given to the cosets of its level.
    fn cosets(&self, config: &Config) -> CosetPolicy {
        config.levels.coset
    }
    /// Whether the unresolved ratio ρ of a coarse level is measured every `cycle.window` steps, for [`Cycle::leave`].
    fn measures(&self) -> bool {
        false
    }
    /// Whether to leave the current coarse level now, from the ρ measured since it was entered, oldest first.
    fn leave(&self, _config: &Config, _unresolved: &[f64]) -> bool {
        false
    }
}

/// The cycle of a config word.
pub fn cycle(kind: CycleKind) -> &'static dyn Cycle {
    match kind {
        CycleKind::Flat => &flat::Flat,
        CycleKind::Paper => &paper::Paper,
        CycleKind::Cascade => &cascade::Cascade,
        CycleKind::V => &v::V,
        CycleKind::W => &w::W,
        CycleKind::F => &f::F,
        CycleKind::Adaptive => &adaptive::Adaptive,
        CycleKind::Phases => &phases::Phases,
    }
}

/// The ops of a run: `run.steps` steps, from level 0 to level 0. A function of the config alone.
pub fn plan(config: &Config) -> Vec<Op> {
    let visits = cycle(config.cycle.kind).visits(config);
    if config.parallel.placement == Placement::Beside {
        return stage::plan(config, visits);
    }
    let mut ops = Vec::new();
    stage::sequence(config, &mut ops, visits, 0);
    ops
}

/// Visits of zero steps dropped, neighbours on one level joined.
fn merged(visits: Vec<Visit>) -> Vec<Visit> {
    let mut merged: Vec<Visit> = Vec::new();
    for visit in visits.into_iter().filter(|visit| visit.steps > 0) {
        match merged.last_mut() {
            Some(last) if last.level == visit.level => last.steps += visit.steps,
            _ => merged.push(visit),
        }
    }
    merged
}

/// Switches from level `from` to level `to`, one level at a time.
fn switch(ops: &mut Vec<Op>, from: usize, to: usize) {
    ops.extend((from + 1..=to).map(|to| Op::Descend { to }));
    ops.extend((to..from).rev().map(|to| Op::Ascend { to }));
}

fn smooth(ops: &mut Vec<Op>, Visit { level, steps }: Visit, policy: CosetPolicy, config: &Config) {
    let mut push = |coset, steps| ops.push(Op::Smooth { level, coset, steps });
    match policy {
        CosetPolicy::Random if level > 0 => push(Coset::Random, steps),
        CosetPolicy::All if level > 0 => push(Coset::All, steps),
        CosetPolicy::Alternate if level > 0 => {
            let cosets = config.levels.factor.pow(level as u32);
            let shares = split(steps, &vec![1.0; cosets]);
            let busy = shares.into_iter().enumerate().filter(|&(_, steps)| steps > 0);
            busy.for_each(|(coset, steps)| push(Coset::Index(coset), steps));
        }
        _ => push(Coset::Index(0), steps),
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
