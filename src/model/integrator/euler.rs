use super::OneStep;
use crate::error::Result;
use crate::model::block::Field;
use crate::model::params::BlockParams;
use crate::model::tape::Evaluation;
use crate::ops::residual;
use candle_core::Tensor;

/// Explicit Euler: out = x + h F(x) = x + h (a + FF(LN2(x + a))), a = SA(LN1 x).
pub(super) struct Euler;

impl OneStep for Euler {
    fn evaluations(&self) -> usize {
        1
    }

    fn adjoint_states(&self) -> usize {
        1
    }

    fn forward(&self, field: &Field, h: f64, evaluations: &[Evaluation], out: &Tensor) -> Result<()> {
        forward(field, h, &evaluations[0], out)
    }

    fn adjoint(&self, field: &Field, grads: &BlockParams, h: f64, e: &[Evaluation], lambda: &Tensor) -> Result<()> {
        adjoint(field, grads, h, &e[0], 1.0, lambda, &field.scratch.adjoints[0])
    }
}

/// y = x + SA(LN1 x);  out = (1 − h) x + h y + h FF(LN2 y).
pub(super) fn forward(field: &Field, h: f64, e: &Evaluation, out: &Tensor) -> Result<()> {
    field.attention(e, 1.0, &e.x, &e.y)?;
    if h == 1.0 {
        return field.mlp(e, h, &e.y, out);
    }
    residual::combine(1.0 - h, &e.x, h, &e.y, out)?;
    field.mlp(e, h, out, out)
}

/// λ = w Φᵀ λ in place:  dy = w h (1 + J_FFᵀ) λ;  λ = w (1 − h) λ + dy + J_SAᵀ dy.  grads +=.
pub(super) fn adjoint(
    field: &Field,
    grads: &BlockParams,
    h: f64,
    e: &Evaluation,
    w: f64,
    lambda: &Tensor,
    dy: &Tensor,
) -> Result<()> {
    residual::combine(w * h, lambda, 0.0, lambda, dy)?;
    field.mlp_adjoint(grads, e, w * h, lambda, dy)?;
    residual::scale_add(w * (1.0 - h), lambda, 1.0, dy)?;
    field.attention_adjoint(grads, e, 1.0, dy, lambda)
}
