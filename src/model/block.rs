//! The block's vector field F(x; θ) as two primitives, and their adjoints.
//!
//! ```text
//! F(x; θ) = a + FF(LN2(x + a)),   a = SA(LN1 x)
//! SA(u) = attention(u Wqkvᵀ + bqkv) Woᵀ + bo
//! FF(u) = gelu(u Wfcᵀ + bfc) Wprojᵀ + bproj
//! ```
//!
//! A primitive adds s times its value to a state, and its adjoint s times the transposed Jacobian's product with g to an
//! adjoint state: integrators are written in these four verbs, and the additions cost no pass of their own, they are
//! the β of a matrix product.

use super::params::BlockParams;
use super::tape::{Evaluation, Scratch};
use crate::error::Result;
use crate::ops::matrix::Factors;
use crate::ops::{attention, gelu, layer_norm, linear};
use candle_core::Tensor;

/// F(·; θ) of one block, with room to work in.
pub(super) struct Field<'a> {
    pub theta: &'a BlockParams,
    /// T
    pub context: usize,
    pub heads: usize,
    /// What the factors of products are rounded to.
    pub factors: Factors,
    pub scratch: &'a Scratch,
}

impl Field<'_> {
    /// out = onto + s · SA(LN1 x), x = e.x. Keeps stats1, qkv, att and lse (=). onto may be out.
    pub fn attention(&self, e: &Evaluation, s: f64, onto: &Tensor, out: &Tensor) -> Result<()> {
        let (theta, normed) = (self.theta, &self.scratch.normed);
        layer_norm::forward(&e.x, &theta.ln1, normed, &e.stats1)?;
        linear::forward(self.factors, normed, &theta.qkv.weight, Some(&theta.qkv.bias), 1.0, None, &e.qkv)?;
        attention::forward(self.factors, &e.qkv, self.context, self.heads, &e.att, &e.lse)?;
        let proj = &theta.attn_proj;
        linear::forward(self.factors, &e.att, &proj.weight, Some(&proj.bias), s, Some(onto), out)
    }

    /// out = onto + s · FF(LN2 y), y = e.y. Keeps stats2 and fc (=). onto may be out.
    pub fn mlp(&self, e: &Evaluation, s: f64, onto: &Tensor, out: &Tensor) -> Result<()> {
        let (theta, Scratch { normed, hidden, .. }) = (self.theta, self.scratch);
        layer_norm::forward(&e.y, &theta.ln2, normed, &e.stats2)?;
        linear::forward(self.factors, normed, &theta.fc.weight, None, 1.0, None, &e.fc)?;
        gelu::forward(&e.fc, &theta.fc.bias, hidden)?;
        let proj = &theta.mlp_proj;
        linear::forward(self.factors, hidden, &proj.weight, Some(&proj.bias), s, Some(onto), out)
    }

    /// dx += s · J_SAᵀ g, grads += s · ∂⟨g, SA(LN1 x)⟩/∂θ.
    ///
    /// The last use of g comes before the first write to dx: they may be one tensor.
    pub fn attention_adjoint(
        &self,
        grads: &BlockParams,
        e: &Evaluation,
        s: f64,
        g: &Tensor,
        dx: &Tensor,
    ) -> Result<()> {
        let (theta, Scratch { normed, dnormed, dqkv, .. }) = (self.theta, self.scratch);
        linear::backward_weight(self.factors, g, &e.att, s, &grads.attn_proj.weight, Some(&grads.attn_proj.bias))?; // +=
        let datt = dnormed;
        linear::backward_input(self.factors, g, &theta.attn_proj.weight, s, 0.0, datt)?; // =
        attention::backward(self.factors, &e.qkv, &e.att, &e.lse, datt, self.context, self.heads, dqkv)?; // =

        layer_norm::normalize(&e.x, &theta.ln1, &e.stats1, normed)?;
        linear::backward_weight(self.factors, dqkv, normed, 1.0, &grads.qkv.weight, Some(&grads.qkv.bias))?; // +=
        linear::backward_input(self.factors, dqkv, &theta.qkv.weight, 1.0, 0.0, dnormed)?; // =
        layer_norm::backward(dnormed, &e.x, &theta.ln1, &e.stats1, dx, &grads.ln1) // dx +=, dln +=
    }

    /// dy += s · J_FFᵀ g, grads += s · ∂⟨g, FF(LN2 y)⟩/∂θ. As above, g and dy may be one tensor. Uses e.fc up: it holds GELU's
    /// output afterwards.
    pub fn mlp_adjoint(&self, grads: &BlockParams, e: &Evaluation, s: f64, g: &Tensor, dy: &Tensor) -> Result<()> {
        let (theta, Scratch { normed, dnormed, hidden, .. }) = (self.theta, self.scratch);
        let dhidden = hidden;
        linear::backward_input(self.factors, g, &theta.mlp_proj.weight, s, 0.0, dhidden)?; // =
        gelu::backward(&e.fc, &theta.fc.bias, dhidden)?; // both in place
        let hidden = &e.fc;
        linear::backward_weight(self.factors, g, hidden, s, &grads.mlp_proj.weight, Some(&grads.mlp_proj.bias))?; // +=

        layer_norm::normalize(&e.y, &theta.ln2, &e.stats2, normed)?;
        linear::backward_weight(self.factors, dhidden, normed, 1.0, &grads.fc.weight, Some(&grads.fc.bias))?; // +=
        linear::backward_input(self.factors, dhidden, &theta.fc.weight, 1.0, 0.0, dnormed)?; // =
        layer_norm::backward(dnormed, &e.y, &theta.ln2, &e.stats2, dy, &grads.ln2) // dy +=, dln +=
    }
}
