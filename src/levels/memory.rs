use crate::config::{Config, CosetPolicy, Placement, Update};
use crate::model::{Layout, Spec};

use super::transfer::transfer;

/// Bytes that a [`super::Hierarchy`] holds on each rank, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// θ of every level and of the ends (twice, where a coarse level is trained beside the fine one).
    pub parameters: u64,
    /// One gradient buffer for all levels, and the ends'.
    pub gradients: u64,
    /// Optimizer moments of every level and of the ends.
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

/// Memory of a hierarchy whose optimizer keeps `moments` tensors, at its peak (all levels descended to).
pub fn memory(config: &Config, spec: &Spec, moments: usize) -> Memory {
    let (row, ends) = (Layout::block(spec).len() as u64, Layout::ends(spec).len() as u64);
    let shared = transfer(config.levels.transfer).shares_rows();
    let count = config.levels.count;
    let coarse: u64 = (1..count).map(|level| config.rows(level) as u64 * row).sum();
    let fine = config.rows(0) as u64 * row;

    let beside = config.parallel.placement == Placement::Beside;
    let copies = if beside { 2 } else { 1 };
    let parameters = fine + copies * ends + if shared { 0 } else { coarse };
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
        moments: 4 * moments as u64 * parameters,
        transfer: 4 * (scratch + entries + fork + coherence),
    }
}
