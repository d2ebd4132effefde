//! Linear classifier with softmax cross-entropy:
//!
//! ```text
//! z_i = w x_i,   L = Σ_i (log Σ_v exp z_iv - z_i,t(i)),   dz_iv = softmax(z_i)_v - [v = t(i)],   dx = dz w,   dw = dzᵀ x
//! ```
use super::access::{check, check_indices, matrix_shape, on_cpu, read, write};
use super::matrix::{Mat, MatMut, multiply_parallel};
use super::real::{Real, reduce, vectorized, with_scratch};
use crate::error::{Result, ensure};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Σ_i −log softmax(x wᵀ)[i, targets[i]] in chunks of rows of `logits`, so that [n, V] is never held.
/// x [n, d], w [V, d], targets U32 [n]; logits [chunk, V] is scratch (=).
/// Columns that pad the vocabulary count as logits like the others.
pub fn loss(x: &Tensor, w: &Tensor, targets: &Tensor, logits: &Tensor) -> Result<f64> {
    const OP: &str = "classifier::loss";
    let Shape { n, d, vocab, chunk } = shape(OP, x, w, logits)?;
    check(OP, DType::U32, &[("targets", targets, &[n])], &[])?;
    check(OP, x.dtype(), &[("x", x, &[n, d]), ("w", w, &[vocab, d])], &[("logits", logits, &[chunk, vocab])])?;
    on_cpu!(OP, x, T => {
        let (x, w, targets) = (read::<T>(x)?, read::<T>(w)?, read::<u32>(targets)?);
        check_indices(OP, "target", &targets, vocab)?;
        write(logits, |logits: &mut [T]| {
            let mut total = 0.0;
            for (x, targets) in x.chunks(chunk * d).zip(targets.chunks(chunk)) {
                let logits = &mut logits[..targets.len() * vocab];
                multiply_parallel(1.0, Mat::new(x, d), Mat::new(&w, d).t(), 0.0, MatMut::new(logits, vocab));
                total += cross_entropy(logits, targets, None);
            }
            Ok(total)
        })
    })
}

/// As [`loss`], and at once dx = scale * dL/dx (=), dw += scale * dL/dw; the gradient of the logits is formed in place
/// in `logits`.
pub fn loss_and_gradient(
    x: &Tensor,
    w: &Tensor,
    targets: &Tensor,
    scale: f64,
    logits: &Tensor,
    dx: &Tensor,
    dw: &Tensor,
) -> Result<f64> {
    const OP: &str = "classifier::loss_and_gradient";
    let Shape { n, d, vocab, chunk } = shape(OP, x, w, logits)?;
    let outputs = [("logits", logits, &[chunk, vocab][..]), ("dx", dx, &[n, d]), ("dw", dw, &[vocab, d])];
    check(OP, DType::U32, &[("targets", targets, &[n])], &[])?;
    check(OP, x.dtype(), &[("x", x, &[n, d]), ("w", w, &[vocab, d])], &outputs)?;
    on_cpu!(OP, x, T => {
        let (x, w, targets) = (read::<T>(x)?, read::<T>(w)?, read::<u32>(targets)?);
        check_indices(OP, "target", &targets, vocab)?;
        let w = Mat::new(&w, d);
        write(logits, |logits: &mut [T]| write(dx, |dx: &mut [T]| write(dw, |dw: &mut [T]| {
            let mut total = 0.0;
            let chunks = x.chunks(chunk * d).zip(dx.chunks_mut(chunk * d)).zip(targets.chunks(chunk));
            for ((x, dx), targets) in chunks {
                let x = Mat::new(x, d);
                let logits = &mut logits[..targets.len() * vocab];
                multiply_parallel(1.0, x, w.t(), 0.0, MatMut::new(logits, vocab));
                total += cross_entropy(logits, targets, Some(T::of(scale)));
                let dlogits = Mat::new(logits, vocab);
                multiply_parallel(1.0, dlogits, w, 0.0, MatMut::new(dx, d));
                multiply_parallel(1.0, dlogits.t(), x, 1.0, MatMut::new(dw, d));
            }
            Ok(total)
        })))
    })
}

struct Shape {
    n: usize,
    d: usize,
    vocab: usize,
    chunk: usize,
}

fn shape(op: &str, x: &Tensor, w: &Tensor, logits: &Tensor) -> Result<Shape> {
    let (n, d) = matrix_shape(op, "x", x)?;
    let (vocab, _) = matrix_shape(op, "w", w)?;
    let (chunk, _) = matrix_shape(op, "logits", logits)?;
    ensure!(chunk > 0, "{op}: logits has no rows, expected at least one");
    Ok(Shape { n, d, vocab, chunk })
}

/// Σ over rows of the cross-entropy; with `scale`, logits = scale * its gradient.
fn cross_entropy<T: Real>(logits: &mut [T], targets: &[u32], scale: Option<T>) -> f64 {
    let vocab = logits.len() / targets.len();
    with_scratch(targets.len(), |losses: &mut [f64]| {
        let rows = logits.par_chunks_mut(vocab).zip(targets.par_iter()).zip(losses.par_iter_mut());
        rows.for_each(|((logits, &target), loss)| {
            let target = target as usize;
            let lse = log_sum_exp(logits);
            *loss = lse - logits[target].to_f64();
            if let Some(scale) = scale {
                scaled_softmax(logits, T::of(lse), scale);
                logits[target] -= scale;
            }
        });
        losses.iter().sum()
    })
}

/// log Σ exp x
fn log_sum_exp<T: Real>(x: &[T]) -> f64 {
    vectorized(
        #[inline(always)]
        || {
            let max = reduce(
                x.len(),
                T::NEG_INFINITY,
                #[inline(always)]
                |i| x[i],
                T::larger,
            );
            let sum = reduce(
                x.len(),
                T::zero(),
                #[inline(always)]
                |i| (x[i] - max).exp(),
                #[inline(always)]
                |a, b| a + b,
            );
            max.to_f64() + sum.to_f64().ln()
        },
    )
}

/// x = scale * exp(x - lse)
fn scaled_softmax<T: Real>(x: &mut [T], lse: T, scale: T) {
    vectorized(
        #[inline(always)]
        || x.iter_mut().for_each(|x| *x = scale * (*x - lse).exp()),
    );
}
