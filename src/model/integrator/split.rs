use super::OneStep;
use crate::error::Result;
use crate::model::block::Field;
use crate::model::params::BlockParams;
use crate::model::tape::Evaluation;
use candle_core::Tensor;

/// Lie splitting of dx/dt = SA(LN1 x) + FF(LN2 x): y = x + h SA(LN1 x);  out = y + h FF(LN2 y). Euler's step at h = 1.
pub(super) struct Split;

impl OneStep for Split {
    fn evaluations(&self) -> usize {
        1
    }

    fn adjoint_states(&self) -> usize {
        0
    }

    fn forward(&self, field: &Field, h: f64, evaluations: &[Evaluation], out: &Tensor) -> Result<()> {
        let e = &evaluations[0];
        field.attention(e, h, &e.x, &e.y)?;
        field.mlp(e, h, &e.y, out)
    }

    /// λ = λ + h J_FFᵀ λ;  λ = λ + h J_SAᵀ λ.
    fn adjoint(&self, field: &Field, grads: &BlockParams, h: f64, e: &[Evaluation], lambda: &Tensor) -> Result<()> {
        field.mlp_adjoint(grads, &e[0], h, lambda, lambda)?;
        field.attention_adjoint(grads, &e[0], h, lambda, lambda)
    }
}
