use super::{OneStep, euler};
use crate::error::Result;
use crate::model::block::Field;
use crate::model::params::BlockParams;
use crate::model::tape::Evaluation;
use crate::ops::{access, residual};
use candle_core::Tensor;

/// Heun's method: out = x + h/2 (k1 + k2), k1 = F(x), k2 = F(x + h k1), both with θ_n. In Euler steps Φ:
///
/// x1 = Φ(x);  out = ½ x + ½ Φ(x1).
pub(super) struct Heun;

impl OneStep for Heun {
    fn evaluations(&self) -> usize {
        2
    }

    fn adjoint_states(&self) -> usize {
        2
    }

    fn forward(&self, field: &Field, h: f64, evaluations: &[Evaluation], out: &Tensor) -> Result<()> {
        let [first, second] = [&evaluations[0], &evaluations[1]];
        euler::forward(field, h, first, &second.x)?;
        euler::forward(field, h, second, out)?;
        residual::scale_add(0.5, out, 0.5, &first.x)
    }

    /// dx1 = ½ Φ'(x1)ᵀ λ;  λ = ½ λ + Φ'(x)ᵀ dx1.
    fn adjoint(&self, field: &Field, grads: &BlockParams, h: f64, e: &[Evaluation], lambda: &Tensor) -> Result<()> {
        let [dy, dx1] = [&field.scratch.adjoints[0], &field.scratch.adjoints[1]];
        access::copy(lambda, dx1)?;
        euler::adjoint(field, grads, h, &e[1], 0.5, dx1, dy)?;
        euler::adjoint(field, grads, h, &e[0], 1.0, dx1, dy)?;
        residual::scale_add(0.5, lambda, 1.0, dx1)
    }
}
