//! One-step methods for dx/dt = F(x, θ(t)), one a file.
//!
//! A method is written in the verbs of [`Field`]. To add one: a file here, a word in [`Integrator`] and a line in
//! [`one_step`]; the tests of the model run over every word.

mod euler;
mod heun;
mod split;

use super::block::Field;
use super::params::BlockParams;
use super::tape::Evaluation;
use crate::config::Integrator;
use crate::error::Result;
use candle_core::Tensor;

/// x_{n+1} = Φ(x_n; θ_n, h) and its discrete adjoint.
pub(super) trait OneStep: Sync {
    /// Evaluations of F in a step: the length of `evaluations` below.
    fn evaluations(&self) -> usize;

    /// Adjoint states besides λ that `adjoint` works with: the length of `field.scratch.adjoints`.
    fn adjoint_states(&self) -> usize;

    /// out = Φ(x; θ, h), where x is the input of the first evaluation. Keeps in `evaluations` what the adjoint needs.
    fn forward(&self, field: &Field, h: f64, evaluations: &[Evaluation], out: &Tensor) -> Result<()>;

    /// λ = (∂Φ/∂x)ᵀ λ in place, grads += (∂Φ/∂θ)ᵀ λ.
    fn adjoint(
        &self,
        field: &Field,
        grads: &BlockParams,
        h: f64,
        evaluations: &[Evaluation],
        lambda: &Tensor,
    ) -> Result<()>;
}

/// The method that a config's word names.
pub(super) fn one_step(kind: Integrator) -> &'static dyn OneStep {
    match kind {
        Integrator::Euler => &euler::Euler,
        Integrator::Split => &split::Split,
        Integrator::Heun => &heun::Heun,
    }
}
