use crate::config::{Config, CosetPolicy, Placement, Update};
use crate::model::{Division, Layout, Spec};

use super::transfer::transfer;
use std::ops::Range;

/// Bytes that a [`super::Hierarchy`] holds on a rank, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// θ of every level and of the ends (twice, where a coarse level is trained beside the fine one).
    pub parameters: u64,
    /// One gradient buffer for all levels, and the ends'.
    pub gradients: u64,
    /// Optimizer moments of every level and of the ends: the rank's part, the largest of all ranks'.
    pub moments: u64,
    /// Scratch trajectory for evaluations on coarse levels; θ_H⁰ of `correct`; coherence terms; the ends of cosets that are
    /// trained apart.
    pub transfer: u64,
}

impl Memory {
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.moments + self.transfer
    }
}

/// Memory of a hierarchy whose optimizer keeps `moments` tensors, divided so among ranks, at its peak (all levels descended to).
pub fn memory(config: &Config, spec: &Spec, moments: usize, division: Division) -> Memory {
    let [block_layout, ends_layout] = [Layout::block(spec), Layout::ends(spec)];
    let (row, ends) = (block_layout.len() as u64, ends_layout.len() as u64);
    let shared = transfer(config.levels.transfer).shares_rows();
    let count = config.levels.count;
    let coarse_rows: u64 = (1..count).map(|level| config.rows(level) as u64).sum();
    let coarse = coarse_rows * row;
    let fine = config.rows(0) as u64 * row;

    let beside = config.parallel.placement == Placement::Beside;
    let copies = if beside { 2 } else { 1 };
    let rows = config.rows(0) as u64 + if shared { 0 } else { coarse_rows };
    let parameters = rows * row + copies * ends;
    let (blocks, kept_ends) = (division.columns(&block_layout), division.columns(&ends_layout));
    let kept = |(row, ends): (&Range<usize>, &Range<usize>)| rows * row.len() as u64 + copies * ends.len() as u64;
    let kept = blocks.iter().zip(&kept_ends).map(kept).max().unwrap_or_default();
    let scratch = if shared || count == 1 { 0 } else { fine };
    let entries = match config.levels.update {
        Update::Correct => coarse,
        _ if beside => config.rows(1) as u64 * row,
        _ => 0,
    } + if beside { ends } else { 0 };
    // The ends where each coset starts, and the sum of what the cosets make of them, with moments.
    let averaged = config.levels.coset == CosetPolicy::All && config.parallel.sync_every > 1;
    let fork = if averaged { 2 * (1 + moments as u64) * ends } else { 0 };
    let coherence = if config.levels.coherence { coarse + (count as u64 - 1) * ends } else { 0 };
    Memory {
        parameters: 4 * parameters,
        gradients: 4 * (fine + ends),
        moments: 4 * moments as u64 * kept,
        transfer: 4 * (scratch + entries + fork + coherence),
    }
}
