use super::Group;
use super::coherence::Coherence;
use super::transfer::{Transfer, transfer};
use crate::config::{Config, LevelsTable};
use crate::error::{Result, ensure};
use crate::model::{Layout, Params, Spec};
use candle_core::Tensor;

/// All levels of a net. Level 0 is the fine one; the ends are shared by all.
///
/// Each level owns a [`Group`] of N_l rows or, where the transfer operator shares rows (`injection`), is a set of
/// cosets of the fine group's rows. Tensors keep their storage for the life of the hierarchy, so cached views stay valid.
pub struct Hierarchy {
    pub(super) ends: Group,
    /// One group a level, or the fine one alone if all levels share its rows.
    pub(super) groups: Vec<Group>,
    pub(super) levels: Vec<Level>,
    /// The level that the run is on.
    pub(super) current: usize,
    /// Trajectory [N, P] of [`Hierarchy::fine`], and its views; `None` where the fine trajectory itself serves.
    pub(super) scratch: Option<(Tensor, Params)>,
    pub(super) operator: &'static dyn Transfer,
    pub(super) rules: LevelsTable,
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
    /// `moments`: name of each optimizer moment and the power of the gradient it holds (1 for m, 2 for v).
    pub fn new(
        config: &Config,
        spec: &Spec,
        moments: &[(&'static str, i32)],
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
            Group::new(Layout::block(spec), theta, gradient.narrow(0, 0, rows)?, moments.len())
        };
        let groups = (0..owners).map(group).collect::<Result<Vec<_>>>()?;
        let ends_gradient = ends.zeros_like()?;
        let ends = Group::new(Layout::ends(spec), ends, ends_gradient, moments.len())?;
        let levels = (0..config.levels.count)
            .map(|level| Level::new(config, spec, level, &groups[level.min(owners - 1)], &ends))
            .collect::<Result<_>>()?;
        let scratch = if owners > 1 { Some(scratch(config, spec, &groups[0].theta, &ends.theta)?) } else { None };
        let (rules, moments) = (config.levels.clone(), moments.to_vec());
        Ok(Hierarchy { ends, groups, levels, current: 0, scratch, operator, rules, moments })
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

    /// Embeddings, final layer norm and head, shared by all levels.
    pub fn ends(&self) -> &Group {
        &self.ends
    }

    /// Updates that each row of a coset has had, in the order of [`Hierarchy::row_indices`].
    pub fn updates(&self, level: usize, coset: usize) -> Vec<u64> {
        let counts = &self.group(level).updates;
        self.row_indices(level, coset).iter().map(|&row| counts[row]).collect()
    }

    /// Counts one optimizer update of a coset and the ends.
    pub fn count_update(&mut self, level: usize, coset: usize) {
        let owner = self.owner(level);
        for &row in &self.levels[level].cosets[coset].rows {
            self.groups[owner].updates[row] += 1;
        }
        self.ends.updates[0] += 1;
    }

    /// g -= v in the gradients of `level` and of the ends, if the level carries a coherence term.
    pub fn correct_gradient(&self, level: usize) -> Result<()> {
        match &self.levels[level].coherence {
            Some(term) => term.correct(self.group(level), self.row_indices(level, 0), &self.ends),
            None => Ok(()),
        }
    }

    pub(super) fn owner(&self, level: usize) -> usize {
        level.min(self.groups.len() - 1)
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
            let theta = Params::view(spec, &group.theta, &rows, &ends.theta, h)?;
            let grad = Params::view(spec, &group.grad, &rows, &ends.grad, h)?;
            Ok(Coset { rows, theta, grad })
        };
        let cosets = (0..stride).map(coset).collect::<Result<_>>()?;
        Ok(Level { h, cosets, entry: None, coherence: None })
    }
}

fn scratch(config: &Config, spec: &Spec, fine: &Tensor, ends: &Tensor) -> Result<(Tensor, Params)> {
    let theta = fine.zeros_like()?;
    let rows: Vec<usize> = (0..config.rows(0)).collect();
    let params = Params::view(spec, &theta, &rows, ends, config.step_size(0))?;
    Ok((theta, params))
}
