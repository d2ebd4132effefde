//! The pull between twin rows, which keeps cosets interchangeable.

use super::Hierarchy;
use crate::error::Result;

impl Hierarchy {
    /// θ_n ← θ_n + β (θ̄ - θ_n), β = `levels.pull`, θ̄ the mean of n's twins on `level`: of the K = c^level neighbours
    /// mK, ..., mK + K - 1, of which each coset has one. Only where levels share rows.
    ///
    /// Cosets that are trained by themselves drift apart, and the fine net, which puts them side by side, was never
    /// trained as a whole. The mean of twins is not changed; β = 1 makes them copies.
    pub fn pull(&self, level: usize) -> Result<()> {
        let (beta, twins) = (self.rules.pull, self.cosets(level));
        if beta == 0.0 || twins == 1 {
            return Ok(());
        }
        let theta = &self.group(level).theta;
        for first in (0..theta.dim(0)?).step_by(twins) {
            let rows = theta.narrow(0, first, twins)?;
            let mean = rows.mean_keepdim(0)?;
            let pulled = rows.affine(1.0 - beta, 0.0)?.broadcast_add(&mean.affine(beta, 0.0)?)?;
            theta.slice_set(&pulled, 0, first)?;
        }
        Ok(())
    }
}
