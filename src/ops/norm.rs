use crate::error::Result;
use candle_core::Tensor;
/// Σ x², accumulated in f64, in an order that does not depend on the number of threads.
pub fn sum_of_squares(_x: &Tensor) -> Result<f64> {
    todo!()
}
