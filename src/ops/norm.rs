//! Euclidean norm of whole tensors.
use super::access::{on_device, read};
#[cfg(any(feature = "cuda", test))]
use super::cuda::Batch;
use super::profile;
use super::real::{PIECE, Real, reduce, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Σ x² over all elements of all tensors, in f64: of each tensor in an order that does not depend on the number of threads, then
/// over the tensors as they come. They are contiguous, of any shapes, one type, on one device. The host waits for a GPU once.
pub fn sum_of_squares(tensors: &[Tensor]) -> Result<f64> {
    const OP: &str = "norm::sum_of_squares";
    let _time = profile::time(OP);
    let Some(first) = tensors.first() else { return Ok(0.0) };
    on_device!(OP, first, gpu => {
        let element = gpu.element(OP, first)?;
        let batch = |tensors: &[Tensor]| -> Result<Batch> {
            let places = tensors.iter().map(|x| Ok((gpu.at(x)?, x.elem_count()))).collect::<Result<Vec<_>>>()?;
            Ok(Batch::new(&places))
        };
        let longest = tensors.iter().map(Tensor::elem_count).max().unwrap_or(0);
        let scratch = unsafe { (gpu.kernels().sum_scratch)(tensors.len().min(Batch::MAX), longest) };
        let [sums, scratch] = gpu.scratch([tensors.len() * size_of::<f64>(), scratch])?;
        for (i, tensors) in tensors.chunks(Batch::MAX).enumerate() {
            let (batch, out) = (batch(tensors)?, sums.offset(i * Batch::MAX * size_of::<f64>()));
            gpu.launch(OP, |k, stream| Ok(unsafe { (k.sum_of_squares)(element, &batch, out, scratch, stream) }))?;
        }
        Ok(gpu.read_f64s(sums, tensors.len())?.iter().sum())
    }, T => {
        let sum = |x: &Tensor| {
            let x = read::<T>(x)?;
            Ok(with_scratch(x.len().div_ceil(PIECE), |partials: &mut [f64]| {
                x.par_chunks(PIECE).zip(partials.par_iter_mut()).for_each(|(x, partial)| *partial = piece(x));
                partials.iter().sum::<f64>()
            }))
        };
        tensors.iter().map(sum).sum()
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
            assert!((sum_of_squares(std::slice::from_ref(&x)).unwrap() - expected).abs() <= 1e-12 * expected);
            assert_independent_of_threads(|| {
                vec![Tensor::new(sum_of_squares(std::slice::from_ref(&x)).unwrap(), &candle_core::Device::Cpu).unwrap()]
            });
        }
        assert!(sum_of_squares(&[constant(f64::NAN, &[3], DType::F32)]).unwrap().is_nan());
        assert!((sum_of_squares(&[constant(1e30, &[2], DType::F32)]).unwrap() / 2e60 - 1.0).abs() < 1e-6);
    }
}
