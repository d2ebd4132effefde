//! Euclidean norm of a whole tensor.
use super::access::{on_device, read};
use super::profile;
use super::real::{PIECE, Real, reduce, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Σ x², accumulated in f64, in an order that does not depend on the number of threads. x contiguous, any shape.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    const OP: &str = "norm::sum_of_squares";
    let _time = profile::time(OP);
    on_device!(OP, x, gpu => {
        let n = x.elem_count();
        let [sum, scratch] = gpu.scratch([size_of::<f64>(), unsafe { (gpu.kernels().sum_scratch)(n) }])?;
        gpu.launch(OP, |k, stream| {
            let (element, x) = (gpu.element(OP, x)?, gpu.at(x)?);
            Ok(unsafe { (k.sum_of_squares)(element, x, sum, n, scratch, stream) })
        })?;
        gpu.read_f64(sum)
    }, T => {
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
        || reduce(x, 0.0, |x| x.to_f64() * x.to_f64(), |a, b| a + b),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    #[test]
    fn sums_in_f64_in_a_fixed_order() {
        for n in [0, 1, 33, 100_003] {
            let x = random(&[n], DType::F32, 1);
            let expected: f64 = values(&x).iter().map(|x| x * x).sum();
            assert!((sum_of_squares(&x).unwrap() - expected).abs() <= 1e-12 * expected);
            assert_independent_of_threads(|| {
                vec![Tensor::new(sum_of_squares(&x).unwrap(), &candle_core::Device::Cpu).unwrap()]
            });
        }
        assert!(sum_of_squares(&constant(f64::NAN, &[3], DType::F32)).unwrap().is_nan());
        assert!((sum_of_squares(&constant(1e30, &[2], DType::F32)).unwrap() / 2e60 - 1.0).abs() < 1e-6);
    }
}
