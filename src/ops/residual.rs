//! Sums of states: the steps of the integrators.
use super::access::{check, on_device, read, write};
use super::profile;
use super::real::{PIECE, Real, vectorized};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// out = a x + b y (=), all of one shape. `out` may be neither x nor y.
pub fn combine(a: f64, x: &Tensor, b: f64, y: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "residual::combine";
    let _time = profile::time(OP);
    let shape = out.dims();
    check(OP, out.dtype(), &[("x", x, shape), ("y", y, shape)], &[("out", out, shape)])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, n, x, y, out) = (gpu.element(OP, out)?, out.elem_count(), gpu.at(x)?, gpu.at(y)?, gpu.at(out)?);
        Ok(unsafe { (k.combine)(element, a as f32, x, b as f32, y, out, n, stream) })
    }), T => {
        let (x, y) = (read::<T>(x)?, read::<T>(y)?);
        let (a, b) = (T::of(a), T::of(b));
        write(out, |out: &mut [T]| {
            let inputs = x.par_chunks(PIECE).zip(y.par_chunks(PIECE));
            out.par_chunks_mut(PIECE).zip(inputs).for_each(|(out, (x, y))| combine_piece(a, x, b, y, out));
            Ok(())
        })
    })
}

/// out = a out + b x, in place.
pub fn scale_add(a: f64, out: &Tensor, b: f64, x: &Tensor) -> Result<()> {
    const OP: &str = "residual::scale_add";
    let _time = profile::time(OP);
    check(OP, out.dtype(), &[("x", x, out.dims())], &[("out", out, out.dims())])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, n, x, out) = (gpu.element(OP, out)?, out.elem_count(), gpu.at(x)?, gpu.at(out)?);
        Ok(unsafe { (k.combine)(element, a as f32, out, b as f32, x, out, n, stream) })
    }), T => {
        let x = read::<T>(x)?;
        let (a, b) = (T::of(a), T::of(b));
        write(out, |out: &mut [T]| {
            out.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(out, x)| scale_add_piece(a, out, b, x));
            Ok(())
        })
    })
}

fn combine_piece<T: Real>(a: T, x: &[T], b: T, y: &[T], out: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
                *out = a * x + b * y;
            }
        },
    );
}

fn scale_add_piece<T: Real>(a: T, out: &mut [T], b: T, x: &[T]) {
    vectorized(
        #[inline(always)]
        || {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = a * *out + b * x;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    #[test]
    fn linear_combinations() {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-15)] {
            for n in [1, 10, 70_001] {
                let [x, y] = [random(&[n], dtype, 1), random(&[n], dtype, 2)];
                let out = unset(&[n], dtype);
                combine(2.0, &x, -0.5, &y, &out).unwrap();
                assert_close(&out, &((&x * 2.0).unwrap() + (&y * -0.5).unwrap()).unwrap(), tolerance);
                let out = copy_of(&x);
                scale_add(0.25, &out, 3.0, &y).unwrap();
                assert_close(&out, &((&x * 0.25).unwrap() + (&y * 3.0).unwrap()).unwrap(), tolerance);
            }
        }
    }

    #[test]
    fn views_of_one_storage_are_refused() {
        let both = constant(1.0, &[8], DType::F32);
        let [x, out] = [both.narrow(0, 0, 4).unwrap(), both.narrow(0, 4, 4).unwrap()];
        assert!(scale_add(1.0, &out, 1.0, &x).unwrap_err().to_string().contains("shares its storage"));
    }
}
