//! What a coarse level cannot resolve of the finer level's gradient: whether staying on it still pays.

use super::Hierarchy;
use super::switch::Gradient;
use super::transfer::transfer;
use crate::config::{TransferKind, Update};
use crate::error::Result;
use crate::ops::norm::sum_of_squares;
use candle_core::Tensor;

impl Hierarchy {
    /// ρ = ‖g - Πg‖² / ‖Πg‖², g = ∂L/∂θ_h of the next finer level as an ascent now would make it; (Πg)_n is the mean of g over the c
    /// fine rows that stand for coarse row ⌊n/c⌋. Only where the current level has rows of its own.
    ///
    /// Πg is what the coarse level can follow: for `copy` and `average` Π is the orthogonal projector onto the range of P. To
    /// first order a step on the coarse level lowers the loss in proportion to ‖Πg‖², one on the finer level, for c times the
    /// work, to ‖g‖² = (1 + ρ) ‖Πg‖². So the finer level gives more for its work once ρ > c - 1. (Recursive multilevel
    /// methods of optimization choose levels alike, by ‖R g‖ against ‖g‖: Gratton, Sartenaer & Toint 2008.)
    pub fn unresolved(&mut self, gradient: &mut Gradient) -> Result<f64> {
        let (coarse, fine) = (self.current, self.current - 1);
        let theta = self.groups[fine].theta.clone();
        // `replace` will write over what is there; the others build on it.
        let kept = if self.rules.update == Update::Replace { None } else { Some(theta.copy()?) };
        self.update_finer(coarse, &self.groups[coarse].theta, &theta)?;
        gradient(self, fine)?;
        if let Some(kept) = kept {
            theta.slice_set(&kept, 0, 0)?;
        }
        ratio(&self.groups[fine].grad, self.rules.factor)
    }
}

/// ρ of the gradient `g` [c N_H, P]; 0 for a gradient that is zero or not finite.
fn ratio(g: &Tensor, c: usize) -> Result<f64> {
    let means = transfer(TransferKind::Average).restriction(g.dim(0)? / c, c);
    let all = sum_of_squares(std::slice::from_ref(g))?;
    let resolved = c as f64 * sum_of_squares(&[means.apply(g)?])?;
    // Finite, for checkpoints keep it as JSON.
    Ok(if all > 0.0 && all.is_finite() { (all / resolved - 1.0).clamp(0.0, f64::MAX) } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn twins_that_agree_are_resolved_and_opposites_are_not() {
        let g = |rows: &[[f32; 2]]| {
            let g = Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu).unwrap();
            ratio(&g, 2).unwrap()
        };
        assert_eq!(g(&[[3.0, 1.0], [3.0, 1.0], [-2.0, 0.0], [-2.0, 0.0]]), 0.0);
        assert_eq!(g(&[[3.0, 0.0], [0.0, 3.0]]), 1.0, "orthogonal");
        assert_eq!(g(&[[3.0, 1.0], [-3.0, -1.0]]), f64::MAX);
        assert_eq!((g(&[[0.0, 0.0], [0.0, 0.0]]), g(&[[f32::NAN, 0.0], [1.0, 0.0]])), (0.0, 0.0));
        let three = ratio(&Tensor::eye(3, candle_core::DType::F32, &Device::Cpu).unwrap(), 3).unwrap();
        assert!((three - 2.0).abs() < 1e-6, "c - 1 for c orthogonal rows: {three}");
    }
}
