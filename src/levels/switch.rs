//! Switches between adjacent levels, h fine and H coarse.

use super::Hierarchy;
use super::coherence::Coherence;
use super::transfer::Matrix;
use crate::config::{StateRule, Update};
use crate::error::{Result, ensure};
use crate::model::Params;
use candle_core::Tensor;

/// Called as `gradient(hierarchy, level)`: leaves in the gradient tensors of coset 0 of the level and of the ends (=)
/// the mean gradient, over all ranks, of batches that are the same in each call.
pub type Gradient<'a> = dyn FnMut(&Hierarchy, usize) -> Result<()> + 'a;

impl Hierarchy {
    /// Goes to the next coarser level: θ_H = R θ_h, optimizer state by rule; with `coherence`, a gradient, the coarse objective
    /// gets a coherence term.
    pub fn descend(&mut self, to: usize, coherence: Option<&mut Gradient>) -> Result<()> {
        self.check_descent(self.current, to)?;
        self.current = to;
        self.restrict(to, false, coherence)
    }

    /// Goes to the next finer level: θ_h by the update form, optimizer state by rule; the coherence term is dropped.
    pub fn ascend(&mut self, to: usize) -> Result<()> {
        self.check_ascent(self.current, to)?;
        self.prolong(to)?;
        self.current = to;
        Ok(())
    }

    pub(super) fn check_descent(&self, from: usize, to: usize) -> Result<()> {
        ensure!(
            to == from + 1 && to < self.levels.len(),
            "cannot descend from level {from} to level {to}: only to the next coarser of {} levels",
            self.levels.len()
        );
        Ok(())
    }

    pub(super) fn check_ascent(&self, from: usize, to: usize) -> Result<()> {
        ensure!(to + 1 == from, "cannot ascend from level {from} to level {to}: only to the next finer one");
        Ok(())
    }

    /// Everything that a descent to level `to` changes, except where the run is; `keeps_entry`: θ_H⁰ will be needed.
    pub(super) fn restrict(&mut self, to: usize, keeps_entry: bool, coherence: Option<&mut Gradient>) -> Result<()> {
        if !self.shares_rows() {
            let theta = &self.groups[to].theta;
            self.restriction(to).multiply(1.0, &self.groups[to - 1].theta, 0.0, theta)?;
            if keeps_entry || self.rules.update == Update::Correct {
                self.levels[to].entry = Some(theta.copy()?);
            }
        }
        self.copy_ends(to - 1, to)?;
        self.move_state(to - 1, to)?;
        if let Some(gradient) = coherence {
            self.levels[to].coherence = Some(self.measure_coherence(to, gradient)?);
        }
        Ok(())
    }

    /// Everything that an ascent to level `to` changes, except where the run is.
    pub(super) fn prolong(&mut self, to: usize) -> Result<()> {
        let from = to + 1;
        if !self.shares_rows() {
            self.update_finer(from, &self.groups[from].theta, &self.groups[to].theta)?;
            self.part_twins(to)?;
        }
        self.copy_ends(from, to)?;
        self.move_state(from, to)?;
        self.levels[from].leave();
        Ok(())
    }

    /// e_to = e_from with moments and update count (=), where the two levels do not share their ends.
    fn copy_ends(&mut self, from: usize, to: usize) -> Result<()> {
        let (from, to) = (self.ends_owner(from), self.ends_owner(to));
        if from == to {
            return Ok(());
        }
        let [source, target] = self.ends.get_disjoint_mut([from, to]).expect("two copies of the ends");
        target.updates.clone_from(&source.updates);
        target.theta.slice_set(&source.theta, 0, 0)?;
        let mut moments = target.moments.iter().zip(&source.moments);
        Ok(moments.try_for_each(|(target, source)| target.slice_set(source, 0, 0))?)
    }

    /// The fine net as it would be if all ascents from the current level were done now.
    ///
    /// On level 0, and where levels share rows, it is the fine trajectory itself; else a scratch trajectory, valid until
    /// the next call.
    pub fn fine(&self) -> Result<&Params> {
        Ok(match &self.scratch {
            Some((theta, params)) if self.current > 0 => {
                self.ascended(theta)?;
                params
            }
            _ => self.params(0, 0),
        })
    }

    /// out [N, P] = θ_0 after all ascents from the current level.
    fn ascended(&self, out: &Tensor) -> Result<()> {
        let mut theta = self.groups[self.current].theta.clone();
        for coarse in (1..=self.current).rev() {
            let finer = &self.groups[coarse - 1].theta;
            let next = if coarse == 1 { out.clone() } else { finer.zeros_like()? };
            next.slice_set(finer, 0, 0)?;
            self.update_finer(coarse, &theta, &next)?;
            theta = next;
        }
        Ok(())
    }

    /// The update form, in place on θ_h = `fine`, for θ_H = `theta` of level `coarse`:
    ///
    /// - replace: θ_h = P θ_H
    /// - mix:     θ_h = (1 - α) θ_h + α P θ_H
    /// - correct: θ_h = θ_h + α P (θ_H - θ_H⁰)
    pub(super) fn update_finer(&self, coarse: usize, theta: &Tensor, fine: &Tensor) -> Result<()> {
        let (p, alpha) = (self.prolongation(coarse), self.rules.alpha);
        match (self.rules.update, &self.levels[coarse].entry) {
            (Update::Replace, _) => p.multiply(1.0, theta, 0.0, fine),
            (Update::Mix, _) => p.multiply(alpha, theta, 1.0 - alpha, fine),
            (Update::Correct, Some(entry)) => p.multiply(alpha, &(theta - entry)?, 1.0, fine),
            (Update::Correct, None) => unreachable!("a level is entered by a descent, which keeps θ_H⁰"),
        }
    }

    /// Optimizer state of level `from` to the adjacent level `to`.
    ///
    /// ∂L/∂θ_n = h γ(t_n) for a γ that does not depend on the grid, so a moment that holds the p-th power of the gradient
    /// is a function of t times h^p: m_to = (h_to / h_from)^p M m_from, M = R or P. The ends' gradient does not scale
    /// with h: their moments stay, except that `reset` restarts the optimizer as a whole.
    fn move_state(&mut self, from: usize, to: usize) -> Result<()> {
        let ratio = match self.rules.state {
            StateRule::Keep => return Ok(()),
            StateRule::Reset => {
                let ends = self.ends_owner(to);
                self.ends[ends].reset_moments()?;
                let owner = self.owner(to);
                return self.groups[owner].reset_moments();
            }
            StateRule::Move => 1.0,
            StateRule::Scale => self.levels[to].h / self.levels[from].h,
        };
        let factors: Vec<f64> = self.moments.iter().map(|&(_, power)| ratio.powi(power)).collect();
        if self.shares_rows() {
            // All rows, whichever coset will be trained: rows that stay idle get their moments back at the ascent.
            return self.groups[0].scale_moments(&factors);
        }
        let matrix = if to > from { self.restriction(to) } else { self.prolongation(from) };
        let [source, target] = self.groups.get_disjoint_mut([from, to]).expect("two levels, each with a group");
        target.take_moments(&matrix, source, &factors)
    }

    /// v at θ_H⁰. If level h carries a term itself, g_h is its corrected gradient.
    fn measure_coherence(&self, coarse: usize, gradient: &mut Gradient) -> Result<Coherence> {
        let fine = coarse - 1;
        gradient(self, fine)?;
        self.correct_gradient(fine)?;
        let blocks = self.prolongation(coarse).transpose().apply(&self.gradient_of(fine)?)?;
        let ends = self.ends(fine).grad.copy()?;
        gradient(self, coarse)?;
        Ok(Coherence { blocks: (self.gradient_of(coarse)? - blocks)?, ends: (&self.ends(coarse).grad - ends)? })
    }

    /// g of coset 0 of `level` [N_l, P]; a copy where levels share rows.
    pub(super) fn gradient_of(&self, level: usize) -> Result<Tensor> {
        let grad = &self.group(level).grad;
        if !self.shares_rows() {
            return Ok(grad.clone());
        }
        let rows = self.row_indices(level, 0);
        Matrix::new(rows.len(), grad.dim(0)?, |n| vec![(rows[n], 1.0)]).apply(grad)
    }

    /// P to the level above `coarse`.
    pub(super) fn prolongation(&self, coarse: usize) -> Matrix {
        self.operator.prolongation(self.rows(coarse), self.rules.factor)
    }

    /// R to `coarse` from the level above.
    fn restriction(&self, coarse: usize) -> Matrix {
        self.operator.restriction(self.rows(coarse), self.rules.factor)
    }
}
