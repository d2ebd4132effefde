use crate::error::Result;
use candle_core::Tensor;
/// Σ_i −log softmax(x wᵀ)[i, targets[i]] in chunks of rows of `logits`, so that [n, V] is never held.
/// x [n, d], w [V, d], targets U32 [n]; logits [chunk, V] is scratch. Columns ≥ `classes` (padding of the vocabulary) count as logits like the others.
pub fn loss(_x: &Tensor, _w: &Tensor, _targets: &Tensor, _logits: &Tensor) -> Result<f64> {
    todo!()
}
/// As [`loss`], and at once dx = scale * dL/dx (=), dw += scale * dL/dw; the gradient of the logits is formed in place in `logits`.
pub fn loss_and_gradient(
    _x: &Tensor,
    _w: &Tensor,
    _targets: &Tensor,
    _scale: f64,
    _logits: &Tensor,
    _dx: &Tensor,
    _dw: &Tensor,
) -> Result<f64> {
    todo!()
}
