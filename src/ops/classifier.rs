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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{D, Var};

    /// Rows, width, vocabulary, rows of a chunk.
    const SHAPES: [[usize; 4]; 5] = [[1, 1, 1, 1], [5, 3, 7, 2], [6, 9, 33, 3], [20, 16, 301, 64], [70, 40, 1001, 32]];

    fn inputs([n, d, v, _]: [usize; 4], dtype: DType) -> (Tensor, Tensor, Tensor) {
        (random(&[n, d], dtype, 1), (random(&[v, d], dtype, 2) * 2.0).unwrap(), random_indices(n, v, 3))
    }

    /// dx and dw of scale * loss, and the loss.
    fn run([.., v, chunk]: [usize; 4], (x, w, targets): &(Tensor, Tensor, Tensor), scale: f64) -> ([Tensor; 2], f64) {
        let dtype = x.dtype();
        let [dx, dw] = [unset(x.dims(), dtype), constant(2.0, w.dims(), dtype)];
        let loss = loss_and_gradient(x, w, targets, scale, &unset(&[chunk, v], dtype), &dx, &dw).unwrap();
        ([dx, plus(&dw, -2.0)], loss)
    }

    fn naive(x: &Tensor, w: &Tensor, targets: &Tensor) -> candle_core::Result<Tensor> {
        let logits = x.matmul(&w.t()?)?;
        let lse = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        logits.broadcast_sub(&lse)?.gather(&targets.unsqueeze(1)?, 1)?.sum_all()?.neg()
    }

    #[test]
    fn equals_the_naive_formula_and_its_gradient() {
        for shape @ [.., v, chunk] in SHAPES {
            let (x, w, targets) = inputs(shape, DType::F64);
            let (x, w) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&w).unwrap());
            let expected = naive(&x, &w, &targets).unwrap();
            let store = expected.backward().unwrap();
            let expected = expected.to_scalar::<f64>().unwrap();
            let gradients = [&x, &w].map(|x| (store.get(x).unwrap() * 0.5).unwrap());
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                let inputs @ (x, w, targets) = &inputs(shape, dtype);
                let (actual, total) = run(shape, inputs, 0.5);
                assert_all_close(&actual, &gradients, tolerance);
                assert!((total - expected).abs() <= tolerance * expected.abs());
                assert_eq!(loss(x, w, targets, &unset(&[chunk, v], dtype)).unwrap(), total);
            }
        }
    }

    #[test]
    fn backward_is_the_gradient() {
        for shape @ [.., v, chunk] in SHAPES {
            let inputs @ (x, w, targets) = &inputs(shape, DType::F64);
            let (gradients, _) = run(shape, inputs, 1.0);
            let loss = |inputs: &[Tensor]| {
                loss(&copy_of(&inputs[0]), &copy_of(&inputs[1]), targets, &unset(&[chunk, v], DType::F64)).unwrap()
            };
            assert_gradients(loss, &[x.clone(), w.clone()], &gradients);
        }
    }

    #[test]
    fn independent_of_threads() {
        let shape = [70, 40, 1001, 32];
        let inputs = inputs(shape, DType::F32);
        assert_independent_of_threads(|| {
            let ([dx, dw], loss) = run(shape, &inputs, 1.0);
            vec![dx, dw, Tensor::new(loss, &candle_core::Device::Cpu).unwrap()]
        });
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_is_not_hidden() {
        let shape = [5, 3, 7, 2];
        let (x, w, targets) = inputs(shape, DType::F32);
        let (gradients, loss) = run(shape, &((&x * 1e3).unwrap(), w.clone(), targets.clone()), 1.0);
        assert!(loss.is_finite() && gradients.iter().all(|g| values(g).iter().all(|g| g.is_finite())));
        let mut elements = values(&x);
        elements[4] = f64::NAN;
        let (_, loss) = run(shape, &(view(&elements, x.dims(), DType::F32), w, targets), 1.0);
        assert!(loss.is_nan());
    }

    #[test]
    fn a_target_out_of_range_is_named() {
        let (x, w, _) = inputs([2, 3, 7, 2], DType::F32);
        let targets = Tensor::new(&[1u32, 7], &candle_core::Device::Cpu).unwrap();
        let wrong = loss(&x, &w, &targets, &unset(&[2, 7], DType::F32)).unwrap_err().to_string();
        assert!(wrong.contains("target 7 at position 1 is not below the vocabulary's 7"), "{wrong}");
    }
}
