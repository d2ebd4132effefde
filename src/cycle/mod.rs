//! Cycles as data: which level is smoothed for how long, and the switches between.

use serde::{Deserialize, Serialize};

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
