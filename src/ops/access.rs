//! Typed access to the elements of contiguous CPU tensors, without copies.
use crate::error::Result;
use candle_core::Tensor;
// to be written: read / write access (Tensor::inplace_op1 gives the mutable storage), trait Real (f32, f64), SIMD dispatch (pulp)

/// x = value, all elements.
pub fn fill(_x: &Tensor, _value: f64) -> Result<()> {
    todo!()
}
/// Copies the elements of `source` into `out` (=).
pub fn copy(_source: &Tensor, _out: &Tensor) -> Result<()> {
    todo!()
}
/// Copies host values into a tensor (=) of the same element count, converting to its dtype.
pub fn upload_u32(_source: &[u32], _out: &Tensor) -> Result<()> {
    todo!()
}
