//! GELU in GPT-2's tanh form:
//!
//! ```text
//! gelu(x)  = x/2 (1 + tanh u) = x σ(2u),   u = √(2/π) (x + 0.044715 x³),   σ(z) = 1 / (1 + e^{-z})
//! gelu'(x) = σ + x σ (1 - σ) 2u',          u' = √(2/π) (1 + 3 · 0.044715 x²)
//! ```
use super::access::{check, on_device, read, write};
use super::profile;
use super::real::{PIECE, Real, vectorized};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// 2 √(2/π)
const SCALE: f64 = 1.595_769_121_605_730_9;
const CUBIC: f64 = 0.044715;

/// out = gelu(x) (=), any shape.
pub fn forward(x: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "gelu::forward";
    let _time = profile::time(OP);
    check(OP, x.dtype(), &[("x", x, x.dims())], &[("out", out, x.dims())])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, n, x, out) = (gpu.element(OP, x)?, x.elem_count(), gpu.at(x)?, gpu.at(out)?);
        Ok(unsafe { (k.gelu_forward)(element, x, out, n, stream) })
    }), T => {
        let x = read::<T>(x)?;
        write(out, |out: &mut [T]| {
            out.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(out, x)| forward_piece(x, out));
            Ok(())
        })
    })
}

/// d = d * gelu'(x), in place.
pub fn backward(x: &Tensor, d: &Tensor) -> Result<()> {
    const OP: &str = "gelu::backward";
    let _time = profile::time(OP);
    check(OP, x.dtype(), &[("x", x, x.dims())], &[("d", d, x.dims())])?;
    on_device!(OP, d, gpu => gpu.launch(OP, |k, stream| {
        let (element, n, x, d) = (gpu.element(OP, x)?, x.elem_count(), gpu.at(x)?, gpu.at(d)?);
        Ok(unsafe { (k.gelu_backward)(element, x, d, n, stream) })
    }), T => {
        let x = read::<T>(x)?;
        write(d, |d: &mut [T]| {
            d.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(d, x)| backward_piece(x, d));
            Ok(())
        })
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

fn forward_piece<T: Real>(x: &[T], out: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = x * gate(x).0;
            }
        },
    );
}

fn backward_piece<T: Real>(x: &[T], d: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (d, &x) in d.iter_mut().zip(x) {
                let (gate, rest) = gate(x);
                let slope = (x * x).mul_add(T::of(3.0 * CUBIC * SCALE), T::of(SCALE));
                *d *= gate * (x * rest).mul_add(slope, T::one());
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    fn run(x: &Tensor, d: &Tensor) -> [Tensor; 2] {
        let [out, dx] = [unset(x.dims(), x.dtype()), copy_of(d)];
        forward(x, &out).unwrap();
        backward(x, &dx).unwrap();
        [out, dx]
    }

    #[test]
    fn equals_candle_and_is_differentiable() {
        for n in [1, 9, 70_001] {
            let x = (random(&[n], DType::F64, 1) * 4.0).unwrap();
            let d = random(&[n], DType::F64, 2);
            let [out, dx] = run(&x, &d);
            assert_close(&out, &x.gelu().unwrap(), 1e-14);
            let loss = |inputs: &[Tensor]| inner(&run(&inputs[0], &d)[0], &d);
            assert_gradients(loss, std::slice::from_ref(&x), &[dx]);
        }
    }

    /// The error of the fast exponential, where it could be seen: absolute below 4, relative above.
    #[test]
    fn f32_is_close_to_f64() {
        let x: Vec<f64> = (-1_000_000..=1_000_000).map(|i| (i as f32 * 1e-5) as f64).collect();
        let ones = vec![1.0; x.len()];
        let run = |dtype| run(&view(&x, &[x.len()], dtype), &view(&ones, &[x.len()], dtype)).map(|x| values(&x));
        let (fast, exact) = (run(DType::F32), run(DType::F64));
        for (what, fast, exact) in [("gelu", &fast[0], &exact[0]), ("gelu'", &fast[1], &exact[1])] {
            let errors = fast.iter().zip(exact).map(|(f, e)| (f - e).abs() / e.abs().max(1.0));
            let worst = errors.fold(0.0, f64::max);
            println!("{what}: largest error {worst:.2e}");
            assert!(worst < 3e-7, "{what}: {worst}");
        }
    }

    #[test]
    fn ends_and_nan() {
        let x = view(&[-1e30, -50.0, 0.0, 50.0, 1e9, f64::NAN], &[6], DType::F32);
        let [out, dx] = run(&x, &constant(1.0, &[6], DType::F32)).map(|x| values(&x));
        assert_eq!(out[2..4], [0.0, 50.0]);
        assert!(out[0].abs() < 1e-6 && out[1].abs() < 1e-30 && out[4] == 1e9 && out[5].is_nan());
        assert_eq!(dx[2..5], [0.5, 1.0, 1.0]);
        assert!(dx[5].is_nan());
    }
}
