//! GELU of rows plus a bias, in GPT-2's tanh form:
//!
//! ```text
//! gelu(z)  = z/2 (1 + tanh u) = z σ(2u),   u = √(2/π) (z + 0.044715 z³),   σ(v) = 1 / (1 + e^{-v})
//! gelu'(z) = σ + z σ (1 - σ) 2u',          u' = √(2/π) (1 + 3 · 0.044715 z²)
//! ```
//!
//! The bias is that of the affine map before it: added here, it costs no pass over its products.
use super::access::{check, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda;
use super::profile;
use super::real::{Real, rows_per_piece, vectorized};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// 2 √(2/π)
const SCALE: f64 = 1.595_769_121_605_730_9;
const CUBIC: f64 = 0.044715;

/// out = gelu(x + b) (=), b added to each row. x and out [n, w], b [w].
pub fn forward(x: &Tensor, b: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "gelu::forward";
    let (n, w) = matrix_shape(OP, "x", x)?;
    let _time = profile::time(OP);
    check(OP, x.dtype(), &[("x", x, &[n, w]), ("b", b, &[w])], &[("out", out, &[n, w])])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, w) = (gpu.element(OP, x)?, cuda::length(OP, "width", w)?);
        let (x, b, out) = (gpu.at(x)?, gpu.at(b)?, gpu.at(out)?);
        Ok(unsafe { (k.gelu_forward)(element, x, b, out, n, w, stream) })
    }), T => {
        let (x, b) = (read::<T>(x)?, read::<T>(b)?);
        write(out, |out: &mut [T]| {
            let piece = rows_per_piece(w) * w;
            out.par_chunks_mut(piece).zip(x.par_chunks(piece)).for_each(|(out, x)| forward_rows(x, &b, out));
            Ok(())
        })
    })
}

/// With z = x + b: d = d * gelu'(z) and x = gelu(z), which the gradient of the next affine map needs, both in place.
pub fn backward(x: &Tensor, b: &Tensor, d: &Tensor) -> Result<()> {
    const OP: &str = "gelu::backward";
    let (n, w) = matrix_shape(OP, "x", x)?;
    let _time = profile::time(OP);
    check(OP, x.dtype(), &[("b", b, &[w])], &[("x", x, &[n, w]), ("d", d, &[n, w])])?;
    on_device!(OP, d, gpu => gpu.launch(OP, |k, stream| {
        let (element, w) = (gpu.element(OP, x)?, cuda::length(OP, "width", w)?);
        let (x, b, d) = (gpu.at(x)?, gpu.at(b)?, gpu.at(d)?);
        Ok(unsafe { (k.gelu_backward)(element, x, b, d, n, w, stream) })
    }), T => {
        let b = read::<T>(b)?;
        write(d, |d: &mut [T]| write(x, |x: &mut [T]| {
            let piece = rows_per_piece(w) * w;
            d.par_chunks_mut(piece).zip(x.par_chunks_mut(piece)).for_each(|(d, x)| backward_rows(x, &b, d));
            Ok(())
        }))
    })
}

/// σ(2u) and 1 - σ(2u), without cancellation.
#[inline(always)]
fn gate<T: Real>(x: T) -> (T, T) {
    let z = x * T::of(SCALE) * (x * x).mul_add(T::of(CUBIC), T::one());
    let e = (-z).exp();
    let gate = T::one() / (T::one() + e);
    (gate, e * gate)
}

fn forward_rows<T: Real>(x: &[T], b: &[T], out: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (out, x) in out.chunks_exact_mut(b.len()).zip(x.chunks_exact(b.len())) {
                for ((out, &x), &b) in out.iter_mut().zip(x).zip(b) {
                    let z = x + b;
                    *out = z * gate(z).0;
                }
            }
        },
    );
}

fn backward_rows<T: Real>(x: &mut [T], b: &[T], d: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (d, x) in d.chunks_exact_mut(b.len()).zip(x.chunks_exact_mut(b.len())) {
                for ((d, x), &b) in d.iter_mut().zip(x).zip(b) {
                    let z = *x + b;
                    let (gate, rest) = gate(z);
                    let slope = (z * z).mul_add(T::of(3.0 * CUBIC * SCALE), T::of(SCALE));
                    *d *= gate * (z * rest).mul_add(slope, T::one());
                    *x = z * gate;
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    /// gelu(x + b), d gelu'(x + b) and what the backward pass makes of x.
    fn run(x: &Tensor, b: &Tensor, d: &Tensor) -> [Tensor; 3] {
        let [out, again, dx] = [unset(x.dims(), x.dtype()), copy_of(x), copy_of(d)];
        forward(x, b, &out).unwrap();
        backward(&again, b, &dx).unwrap();
        [out, dx, again]
    }

    /// The first two, of x alone.
    fn of(x: &[f64], d: &[f64], dtype: DType) -> [Vec<f64>; 2] {
        let [x, d] = [x, d].map(|values| view(values, &[1, values.len()], dtype));
        let [out, dx, _] = run(&x, &constant(0.0, &[x.elem_count()], dtype), &d);
        [values(&out), values(&dx)]
    }

    #[test]
    fn equals_candle_and_is_differentiable() {
        for shape @ [_, w] in [[1, 1], [3, 3], [70, 1001]] {
            let [x, b] = [(random(&shape, DType::F64, 1) * 4.0).unwrap(), random(&[w], DType::F64, 3)];
            let d = random(&shape, DType::F64, 2);
            let [out, dx, again] = run(&x, &b, &d);
            assert_close(&out, &x.broadcast_add(&b).unwrap().gelu().unwrap(), 1e-14);
            assert_close(&again, &out, 0.0);
            let loss = |inputs: &[Tensor]| inner(&run(&inputs[0], &b, &d)[0], &d);
            assert_gradients(loss, std::slice::from_ref(&x), &[dx]);
        }
    }

    /// The error of the fast exponential, where it could be seen: absolute below 4, relative above.
    #[test]
    fn f32_is_close_to_f64() {
        let x: Vec<f64> = (-1_000_000..=1_000_000).map(|i| (i as f32 * 1e-5) as f64).collect();
        let ones = vec![1.0; x.len()];
        let (fast, exact) = (of(&x, &ones, DType::F32), of(&x, &ones, DType::F64));
        for (what, fast, exact) in [("gelu", &fast[0], &exact[0]), ("gelu'", &fast[1], &exact[1])] {
            let errors = fast.iter().zip(exact).map(|(f, e)| (f - e).abs() / e.abs().max(1.0));
            let worst = errors.fold(0.0, f64::max);
            println!("{what}: largest error {worst:.2e}");
            assert!(worst < 3e-7, "{what}: {worst}");
        }
    }

    #[test]
    fn ends_and_nan() {
        let [out, dx] = of(&[-1e30, -50.0, 0.0, 50.0, 1e9, f64::NAN], &[1.0; 6], DType::F32);
        assert_eq!(out[2..4], [0.0, 50.0]);
        assert!(out[0].abs() < 1e-6 && out[1].abs() < 1e-30 && out[4] == 1e9 && out[5].is_nan());
        assert_eq!(dx[2..5], [0.5, 1.0, 1.0]);
        assert!(dx[5].is_nan());
    }
}
