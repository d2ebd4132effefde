//! Euclidean norm of a whole tensor.
use super::access::{on_cpu, read};
use super::real::{PIECE, Real, reduce, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Σ x², accumulated in f64, in an order that does not depend on the number of threads. x contiguous, any shape.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    on_cpu!("norm::sum_of_squares", x, T => {
        let x = read::<T>(x)?;
        Ok(with_scratch(x.len().div_ceil(PIECE), |partials: &mut [f64]| {
            x.par_chunks(PIECE).zip(partials.par_iter_mut()).for_each(|(x, partial)| *partial = piece(x));
            partials.iter().sum()
        }))
    })
}

fn piece<T: Real>(x: &[T]) -> f64 {
    vectorized(
        #[inline(always)]
        || {
            reduce(
                x.len(),
                0.0,
                #[inline(always)]
                |i| x[i].to_f64() * x[i].to_f64(),
                #[inline(always)]
                |a, b| a + b,
            )
        },
    )
}
