use super::Group;
use super::coherence::Coherence;
use super::transfer::{Transfer, transfer};
use crate::config::{Config, LevelsTable, Placement};
use crate::error::{Result, ensure};
use crate::model::{Division, Layout, Params, Spec};
use candle_core::Tensor;

/// All levels of a net. Level 0 is the fine one; the ends are shared by all. (Where coarse levels are trained beside the
/// fine one, coarse levels have a copy of the ends, which moves with the switches from and to level 0.)
///
/// Each level owns a [`Group`] of N_l rows or, where the transfer operator shares rows (`injection`), is a set of
/// cosets of the fine group's rows. Tensors keep their storage for the life of the hierarchy, so cached views stay valid.
pub struct Hierarchy {
    /// One group for all levels or, with `parallel.placement = "beside"`, one for level 0 and one for all others.
    pub(super) ends: Vec<Group>,
    /// One group a level, or the fine one alone if all levels share its rows.
    pub(super) groups: Vec<Group>,
    pub(super) levels: Vec<Level>,
    /// The level that the run is on.
    pub(super) current: usize,
    /// The level of the coarse side while one is trained beside level 0.
    pub(super) beside: Option<usize>,
    /// e⁰ [1, E]: the ends as they were when the coarse side started.
    pub(super) ends_entry: Option<Tensor>,
    /// Trajectory [N, P] of [`Hierarchy::fine`], and its views; `None` where the fine trajectory itself serves.
    pub(super) scratch: Option<(Tensor, Params)>,
    pub(super) operator: &'static dyn Transfer,
    pub(super) rules: LevelsTable,
    /// `run.seed`
    pub(super) seed: u64,
    /// Name of each optimizer moment and the power of the gradient that it holds.
    pub(super) moments: Vec<(&'static str, i32)>,
}

pub(super) struct Level {
    /// h_l
    pub(super) h: f64,
    cosets: Vec<Coset>,
    /// θ_H⁰ = R θ_h [N_l, P] as at the last descent to this level, for `correct`; dropped at the ascent.
    pub(super) entry: Option<Tensor>,
    /// Dropped at the ascent.
    pub(super) coherence: Option<Coherence>,
}

/// A net that can be trained on a level: rows of the level's group, and views of them.
struct Coset {
    rows: Vec<usize>,
    theta: Params,
    grad: Params,
}

impl Hierarchy {
    /// The hierarchy over the fine `trajectory` [N, P] and `ends` [1, E], which stay the storage of the fine net.
    ///
    /// `moments`: name of each optimizer moment and the power of the gradient it holds (1 for m, 2 for v); `division`: which of
    /// their columns this rank keeps.
    pub fn new(
        config: &Config,
        spec: &Spec,
        moments: &[(&'static str, i32)],
        division: Division,
        trajectory: Tensor,
        ends: Tensor,
    ) -> Result<Hierarchy> {
        let operator = transfer(config.levels.transfer);
        let owners = if operator.shares_rows() { 1 } else { config.levels.count };
        let gradient = trajectory.zeros_like()?;
        let group = |level| {
            let rows = config.rows(level);
            let theta = if level == 0 { trajectory.clone() } else { trajectory.narrow(0, 0, rows)?.zeros_like()? };
            // One buffer serves the gradients of all levels: only one level is differentiated at a time.
            Group::new(Layout::block(spec), division, theta, gradient.narrow(0, 0, rows)?, moments.len())
        };
        let groups = (0..owners).map(group).collect::<Result<Vec<_>>>()?;
        let copies = if config.parallel.placement == Placement::Beside { 2 } else { 1 };
        let ends_gradient = ends.zeros_like()?;
        let ends_group = |copy| {
            let theta = if copy == 0 { ends.clone() } else { ends.zeros_like()? };
            Group::new(Layout::ends(spec), division, theta, ends_gradient.clone(), moments.len())
        };
        let ends = (0..copies).map(ends_group).collect::<Result<Vec<_>>>()?;
        let level = |l: usize| Level::new(config, spec, l, &groups[l.min(owners - 1)], &ends[l.min(copies - 1)]);
        let levels = (0..config.levels.count).map(level).collect::<Result<_>>()?;
        // Used on coarse levels only, so with their ends.
        let coarse_ends = &ends[copies - 1].theta;
        let scratch = if owners > 1 { Some(scratch(config, spec, &groups[0].theta, coarse_ends)?) } else { None };
        let (rules, moments) = (config.levels.clone(), moments.to_vec());
        let (current, beside, ends_entry, seed) = (0, None, None, config.run.seed);
        Ok(Hierarchy { ends, groups, levels, current, beside, ends_entry, scratch, operator, rules, seed, moments })
    }

    /// The level that the run is on.
    pub fn level(&self) -> usize {
        self.current
    }

    /// Number of cosets of `level`: c^level where levels share rows, else 1.
    pub fn cosets(&self, level: usize) -> usize {
        self.levels[level].cosets.len()
    }

    /// Parameters of the net of coset `coset` on `level`.
    pub fn params(&self, level: usize, coset: usize) -> &Params {
        &self.levels[level].cosets[coset].theta
    }

    /// Gradients, laid out as [`Hierarchy::params`].
    pub fn grads(&self, level: usize, coset: usize) -> &Params {
        &self.levels[level].cosets[coset].grad
    }

    /// Rows of `group(level)` that the net's blocks are, in order.
    pub fn row_indices(&self, level: usize, coset: usize) -> &[usize] {
        &self.levels[level].cosets[coset].rows
    }

    /// The tensors that hold `level`'s rows.
    pub fn group(&self, level: usize) -> &Group {
        &self.groups[self.owner(level)]
    }

    /// Whether each rank keeps and updates a part of the columns only (ZeRO-1).
    pub fn is_sharded(&self) -> bool {
        !self.ends[0].shard.is_whole()
    }

    /// Embeddings, final layer norm and head of the nets of `level`.
    pub fn ends(&self, level: usize) -> &Group {
        &self.ends[self.ends_owner(level)]
    }

    /// Counts `steps` more optimizer updates of a coset, made on another rank.
    pub fn count_elsewhere(&mut self, level: usize, coset: usize, steps: u64) {
        let owner = self.owner(level);
        for &row in &self.levels[level].cosets[coset].rows {
            self.groups[owner].updates[row] += steps;
        }
    }

    /// Sets how many optimizer updates the ends of `level` have had.
    pub fn set_ends_updates(&mut self, level: usize, updates: u64) {
        let owner = self.ends_owner(level);
        self.ends[owner].updates[0] = updates;
    }

    /// The rows of a coset, of θ and then of each moment, as views [1, P].
    pub fn rows_of(&self, level: usize, coset: usize) -> Result<Vec<Tensor>> {
        let group = self.group(level);
        let tensors = std::iter::once(&group.theta).chain(&group.moments);
        let rows = |tensor| self.row_indices(level, coset).iter().map(move |&row| Tensor::narrow(tensor, 0, row, 1));
        Ok(tensors.flat_map(rows).collect::<candle_core::Result<_>>()?)
    }

    /// Updates that each row of a coset has had, in the order of [`Hierarchy::row_indices`].
    pub fn updates(&self, level: usize, coset: usize) -> Vec<u64> {
        let counts = &self.group(level).updates;
        self.row_indices(level, coset).iter().map(|&row| counts[row]).collect()
    }

    /// Counts one optimizer update of these cosets and of the ends.
    pub fn count_update(&mut self, level: usize, cosets: impl IntoIterator<Item = usize>) {
        cosets.into_iter().for_each(|coset| self.count_elsewhere(level, coset, 1));
        let ends = self.ends_owner(level);
        self.ends[ends].updates[0] += 1;
    }

    /// g -= v in the gradients of `level` and of the ends, if the level carries a coherence term.
    pub fn correct_gradient(&self, level: usize) -> Result<()> {
        match &self.levels[level].coherence {
            Some(term) => term.correct(self.group(level), self.row_indices(level, 0), self.ends(level)),
            None => Ok(()),
        }
    }

    pub(super) fn owner(&self, level: usize) -> usize {
        level.min(self.groups.len() - 1)
    }

    pub(super) fn ends_owner(&self, level: usize) -> usize {
        level.min(self.ends.len() - 1)
    }

    /// N_l
    pub(super) fn rows(&self, level: usize) -> usize {
        self.row_indices(level, 0).len()
    }

    pub(super) fn shares_rows(&self) -> bool {
        self.operator.shares_rows()
    }
}

impl Level {
    fn new(config: &Config, spec: &Spec, level: usize, group: &Group, ends: &Group) -> Result<Level> {
        let (h, rows, stored) = (config.step_size(level), config.rows(level), group.theta.dim(0)?);
        ensure!(
            stored.is_multiple_of(rows),
            "the trajectory has {stored} rows: expected a multiple of the {rows} of level {level}"
        );
        let stride = stored / rows;
        let coset = |k| {
            let rows: Vec<usize> = (k..stored).step_by(stride).collect();
            let view = |blocks, ends| Params::view(spec, blocks, &rows, ends, h)?.with_context(config.context(level));
            let (theta, grad) = (view(&group.theta, &ends.theta)?, view(&group.grad, &ends.grad)?);
            Ok(Coset { rows, theta, grad })
        };
        let cosets = (0..stride).map(coset).collect::<Result<_>>()?;
        Ok(Level { h, cosets, entry: None, coherence: None })
    }

    /// The tensors that a level holds between its descent and its ascent.
    pub(super) fn terms(&self) -> impl Iterator<Item = &Tensor> {
        self.entry.iter().chain(self.coherence.iter().flat_map(|term| [&term.blocks, &term.ends]))
    }

    pub(super) fn leave(&mut self) {
        (self.entry, self.coherence) = (None, None);
    }
}

fn scratch(config: &Config, spec: &Spec, fine: &Tensor, ends: &Tensor) -> Result<(Tensor, Params)> {
    let theta = fine.zeros_like()?;
    let rows: Vec<usize> = (0..config.rows(0)).collect();
    let params = Params::view(spec, &theta, &rows, ends, config.step_size(0))?;
    Ok((theta, params))
}
