//! Cycles as data: which level is smoothed for how long, and the switches between.
//!
//! A [`Cycle`] only says which levels it visits for how many steps; [`plan`] makes the ops: every switch between, the
//! coset policy, nothing of zero steps. So each plan starts and ends on level 0, switches between adjacent levels only and has
//! `run.steps` steps.

mod adaptive;
mod cascade;
mod f;
mod flat;
mod flops;
mod paper;
mod phases;
mod position;
mod repeat;
mod split;
mod v;
mod w;

pub use adaptive::shorten;
pub use flops::{Phase, plan_flops, tokens_per_step, total};
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
}

/// One operation of a multilevel cycle. Level 0 is the finest; a run starts on level 0 and ends there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Optimizer steps on one level.
    Smooth { level: usize, coset: Coset, steps: u64 },
    /// Restrict to the next coarser level; always one level at a time.
    Descend { to: usize },
    /// Prolong to the next finer level; always one level at a time.
    Ascend { to: usize },
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
    /// Whether to leave the current coarse level now, from the training loss since it was entered: means over
    /// `cycle.window` steps each, oldest first.
    fn leave(&self, _config: &Config, _losses: &[f64]) -> bool {
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
    let cycle = cycle(config.cycle.kind);
    let (mut ops, mut level) = (Vec::new(), 0);
    for visit in merged(cycle.visits(config)) {
        switch(&mut ops, level, visit.level);
        smooth(&mut ops, visit, cycle.cosets(config), config);
        level = visit.level;
    }
    switch(&mut ops, level, 0);
    ops
}

/// The part of `plan` that rank `rank` of `size` carries out.
pub fn localize(plan: &[Op], placement: Placement, _rank: usize, _size: usize) -> Vec<Op> {
    match placement {
        Placement::Sequential => plan.to_vec(),
        Placement::Cosets | Placement::Beside => unreachable!("refused by config::parse"),
    }
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
mod tests;
