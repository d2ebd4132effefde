//! GELU in GPT-2's tanh form:
//!
//! ```text
//! gelu(x)  = x/2 (1 + tanh u) = x σ(2u),   u = √(2/π) (x + 0.044715 x³),   σ(z) = 1 / (1 + e^{-z})
//! gelu'(x) = σ + x σ (1 - σ) 2u',          u' = √(2/π) (1 + 3 · 0.044715 x²)
//! ```
use super::access::{check, on_cpu, read, write};
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
    check(OP, x.dtype(), &[("x", x, x.dims())], &[("out", out, x.dims())])?;
    on_cpu!(OP, out, T => {
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
    check(OP, x.dtype(), &[("x", x, x.dims())], &[("d", d, x.dims())])?;
    on_cpu!(OP, d, T => {
        let x = read::<T>(x)?;
        write(d, |d: &mut [T]| {
            d.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(d, x)| backward_piece(x, d));
            Ok(())
        })
    })
}

/// σ(2u)
#[inline(always)]
fn gate<T: Real>(x: T) -> T {
    let z = x * T::of(SCALE) * (x * x).mul_add(T::of(CUBIC), T::one());
    T::one() / (T::one() + (-z).exp())
}

fn forward_piece<T: Real>(x: &[T], out: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = x * gate(x);
            }
        },
    );
}

fn backward_piece<T: Real>(x: &[T], d: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            for (d, &x) in d.iter_mut().zip(x) {
                let gate = gate(x);
                let slope = (x * x).mul_add(T::of(3.0 * CUBIC * SCALE), T::of(SCALE));
                *d *= gate * (x * (T::one() - gate)).mul_add(slope, T::one());
            }
        },
    );
}
