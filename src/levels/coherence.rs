use super::Group;
use crate::error::Result;
use crate::ops::residual::scale_add;
use candle_core::Tensor;

/// The first-order coherence term of a coarse objective, L_H(θ_H) - <v, θ_H> - <v_e, θ_e> (MG/OPT; FAS in multigrid):
///
/// v = g_H(θ_H⁰) - Pᵀ g_h(θ_h),   v_e = g_H,e - g_h,e,   all gradients on the same batches.
///
/// At θ_H⁰ the corrected coarse gradient g_H - v is Pᵀ g_h. A value, measured once at the descent.
pub(super) struct Coherence {
    /// v [N_H, P].
    pub(super) blocks: Tensor,
    /// v_e [1, E].
    pub(super) ends: Tensor,
}

impl Coherence {
    /// g_H -= v on `rows` of `level`, g_e -= v_e. Allocates nothing.
    pub(super) fn correct(&self, level: &Group, rows: &[usize], ends: &Group) -> Result<()> {
        for (n, &row) in rows.iter().enumerate() {
            scale_add(1.0, &level.grad.narrow(0, row, 1)?, -1.0, &self.blocks.narrow(0, n, 1)?)?;
        }
        scale_add(1.0, &ends.grad, -1.0, &self.ends)
    }
}
