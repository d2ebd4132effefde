use super::transfer::Matrix;
use crate::error::Result;
use crate::model::{Division, Layout, Shard};
use candle_core::{Device, Tensor};

/// Parameters with all that training keeps for them: R rows of P elements.
pub struct Group {
    /// Where each parameter lies in a row.
    pub layout: Layout,
    /// θ [R, P].
    pub theta: Tensor,
    /// ∂L/∂θ [R, P].
    pub grad: Tensor,
    /// The columns whose moments this rank keeps, S of the P.
    pub shard: Shard,
    /// Optimizer moments, each [R, S].
    pub moments: Vec<Tensor>,
    /// Optimizer updates that each row's moments have seen (Adam's bias correction); moves with the rows.
    pub updates: Vec<u64>,
}

impl Group {
    /// `moments` moments of zeros for `theta` [R, P], which stays the storage of the parameters.
    pub fn new(layout: Layout, division: Division, theta: Tensor, grad: Tensor, moments: usize) -> Result<Group> {
        let (shard, rows) = (Shard::new(&layout, division), theta.dim(0)?);
        // A GPU has no tensors without elements.
        let device = if shard.columns.is_empty() { &Device::Cpu } else { theta.device() };
        let moment = |_| Tensor::zeros((rows, shard.columns.len()), theta.dtype(), device);
        let moments = (0..moments).map(moment).collect::<candle_core::Result<_>>()?;
        Ok(Group { layout, shard, theta, grad, moments, updates: vec![0; rows] })
    }

    /// ∂L/∂θ of one row [1, S]: the columns that this rank updates.
    pub fn own_gradient(&self, row: usize) -> Result<Tensor> {
        let columns = &self.shard.columns;
        Ok(self.grad.narrow(0, row, 1)?.narrow(1, columns.start, columns.len())?)
    }

    /// The moments; none if this rank keeps no column: candle writes into no tensor without elements.
    fn kept_moments(&self) -> &[Tensor] {
        if self.shard.columns.is_empty() { &[] } else { &self.moments }
    }

    /// m = 0 for every moment and row (=), as if no update had been made.
    pub(super) fn reset_moments(&mut self) -> Result<()> {
        self.updates.fill(0);
        Ok(self.kept_moments().iter().try_for_each(Tensor::zero_set)?)
    }

    /// m_i = factors_i m_i for every moment (=).
    pub(super) fn scale_moments(&self, factors: &[f64]) -> Result<()> {
        for (moment, &factor) in self.kept_moments().iter().zip(factors) {
            for row in 0..self.updates.len() {
                moment.slice_set(&moment.narrow(0, row, 1)?.affine(factor, 0.0)?, 0, row)?;
            }
        }
        Ok(())
    }

    /// m_i = factors_i M m_i(from) for every moment (=); a row takes the update count of the rows it is made of.
    pub(super) fn take_moments(&mut self, matrix: &Matrix, from: &Group, factors: &[f64]) -> Result<()> {
        for ((to, from), &factor) in self.kept_moments().iter().zip(&from.moments).zip(factors) {
            matrix.multiply(factor, from, 0.0, to)?;
        }
        for (row, count) in self.updates.iter_mut().enumerate() {
            // All rows of a level that owns its trajectory are updated together, so these counts agree.
            *count = matrix.columns_of(row).map(|j| from.updates[j]).max().unwrap_or(*count);
        }
        Ok(())
    }
}
