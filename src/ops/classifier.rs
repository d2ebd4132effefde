//! Linear classifier with softmax cross-entropy:
//!
//! ```text
//! z_i = w x_i,   L = Σ_i (log Σ_v exp z_iv - z_i,t(i)),   dz_iv = softmax(z_i)_v - [v = t(i)],   dx = dz w,   dw = dzᵀ x
//! ```
//!
//! The rows x go in chunks. In a chunk the logits are computed transposed, [V, chunk], in tiles of the vocabulary: a
//! tile of w meets the chunk's x, then a tile of dz meets both, while they are in the cache; w is never packed.
use super::access::{check, check_indices, check_mixed, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda::{self, Batch, Product};
use super::matrix::{Factors, Mat, MatMut, multiply};
use super::profile;
use super::real::{PIECE, Real, vectorized, with_scratch};
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// The part of the op between its products, as the profile names it.
const SOFTMAX: &str = "classifier::softmax";
/// Tokens of the vocabulary in a tile.
const TILE: usize = 256;
/// Tiles in a task of the backward pass; each task has a dx of its own, which are added in the end.
const TASK: usize = 4;

/// Σ_i −log softmax(x wᵀ)[i, targets[i]] in chunks of rows of `logits`, so that [n, V] is never held.
/// x [n, d], w [V, d], targets U32 [n]; logits [chunk, V] is scratch (=, its content means nothing to the caller).
/// Columns that pad the vocabulary count as logits like the others.
pub fn loss(factors: Factors, x: &Tensor, w: &Tensor, targets: &Tensor, logits: &Tensor) -> Result<f64> {
    const OP: &str = "classifier::loss";
    let _time = profile::time(OP);
    let Shape { n, d, vocab, chunk } = Shape::of(OP, x, w, logits)?;
    check(OP, DType::U32, &[("targets", targets, &[n])], &[])?;
    check(OP, x.dtype(), &[("x", x, &[n, d]), ("w", w, &[vocab, d])], &[("logits", logits, &[chunk, vocab])])?;
    on_device!(OP, x, gpu => Ok(gpu.read_f64s(on_gpu(OP, &gpu, x, w, targets, logits, None)?, 1)?[0]), T => {
        let (x, w, targets) = (read::<T>(x)?, read::<T>(w)?, read::<u32>(targets)?);
        check_indices(OP, "target", &targets, vocab)?;
        write(logits, |logits: &mut [T]| {
            let chunks = x.chunks(chunk * d).zip(targets.chunks(chunk));
            Ok(chunks.map(|(x, targets)| Chunk::new(factors, x, &w, targets).with_stats(|c, stats| c.loss(logits, stats))).sum())
        })
    })
}

/// The [`loss`] into total [1] (=), f64 whatever the rest is, and at once dx = scale * dL/dx (=), dw += scale * dL/dw. On a GPU
/// nothing waits for the loss until it is read.
#[allow(clippy::too_many_arguments)]
pub fn loss_and_gradient(
    factors: Factors,
    x: &Tensor,
    w: &Tensor,
    targets: &Tensor,
    scale: f64,
    logits: &Tensor,
    total: &Tensor,
    dx: &Tensor,
    dw: &Tensor,
) -> Result<()> {
    const OP: &str = "classifier::loss_and_gradient";
    let _time = profile::time(OP);
    let Shape { n, d, vocab, chunk } = Shape::of(OP, x, w, logits)?;
    let outputs = [("logits", logits, &[chunk, vocab][..]), ("dx", dx, &[n, d]), ("dw", dw, &[vocab, d])];
    check(OP, DType::U32, &[("targets", targets, &[n])], &[])?;
    check_mixed(OP, x.dtype(), &["dw"], &[("x", x, &[n, d]), ("w", w, &[vocab, d])], &outputs)?;
    check(OP, DType::F64, &[], &[("total", total, &[1])])?;
    on_device!(OP, x, gpu => {
        on_gpu(OP, &gpu, x, w, targets, logits, Some(Gradient { scale, total, dx, dw })).map(drop)
    }, T => {
        let (x, w, targets) = (read::<T>(x)?, read::<T>(w)?, read::<u32>(targets)?);
        check_indices(OP, "target", &targets, vocab)?;
        let loss: f64 = write(logits, |logits: &mut [T]| write(dx, |dx: &mut [T]| write(dw, |dw: &mut [T]| {
            let chunks = x.chunks(chunk * d).zip(dx.chunks_mut(chunk * d)).zip(targets.chunks(chunk));
            Ok(chunks.map(|((x, dx), targets)| Chunk::new(factors, x, &w, targets).with_stats(|c, stats| {
                let loss = c.loss(logits, stats);
                c.gradient(T::of(scale), logits, stats, dx, dw);
                loss
            })).sum())
        })))?;
        write(total, |total: &mut [f64]| {
            total[0] = loss;
            Ok(())
        })
    })
}

/// Where loss and gradient go.
#[cfg(any(feature = "cuda", test))]
struct Gradient<'a> {
    scale: f64,
    total: &'a Tensor,
    dx: &'a Tensor,
    dw: &'a Tensor,
}

/// The whole op on a GPU, chunk by chunk: logits = x wᵀ, losses and dz in their place, dx = dz w, dw += dzᵀ x. Returns where
/// the loss will be, without a `gradient` in scratch memory.
#[cfg(any(feature = "cuda", test))]
fn on_gpu(
    op: &str,
    gpu: &cuda::Gpu,
    x: &Tensor,
    w: &Tensor,
    targets: &Tensor,
    logits: &Tensor,
    gradient: Option<Gradient>,
) -> Result<cuda::Address> {
    let Shape { n, d, vocab, chunk } = Shape::of(op, x, w, logits)?;
    let float = size_of::<f32>();
    let sum_scratch = unsafe { (gpu.kernels().sum_scratch)(1, n) };
    let [losses, own_total, sum_scratch] = gpu.scratch([n * float, size_of::<f64>(), sum_scratch])?;
    let total = gradient.as_ref().map_or(Ok(own_total), |gradient| gpu.at(gradient.total))?;
    let (element, targets) = (gpu.element(op, x)?, gpu.at(targets)?);
    let (w, z) = (gpu.matrix(w, d)?, gpu.matrix(logits, vocab)?);
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        let x_rows = gpu.matrix(&x.narrow(0, first, rows)?, d)?;
        gpu.multiply(Product::new([rows, vocab, d], x_rows, w.t(), z))?;
        let (targets, losses) = (targets.offset(first * size_of::<u32>()), losses.offset(first * float));
        let softmax = profile::time(SOFTMAX);
        gpu.launch(op, |k, stream| {
            Ok(match &gradient {
                None => unsafe { (k.softmax_loss)(element, z.at, targets, losses, rows, vocab as u32, stream) },
                Some(Gradient { scale, .. }) => unsafe {
                    let scale = *scale as f32;
                    (k.softmax_loss_and_gradient)(element, z.at, targets, scale, losses, rows, vocab as u32, stream)
                },
            })
        })?;
        drop(softmax);
        if let Some(Gradient { dx, dw, .. }) = &gradient {
            let (dx_rows, dw) = (gpu.matrix(&dx.narrow(0, first, rows)?, d)?, gpu.matrix(dw, d)?);
            gpu.multiply(Product::new([rows, d, vocab], z, w, dx_rows))?; // =
            gpu.multiply(Product { beta: 1.0, ..Product::new([vocab, d, rows], z.t(), x_rows, dw) })?; // +=
        }
    }
    // The losses are float for either element type.
    let batch = Batch::new(&[(losses, n)]);
    gpu.launch(op, |k, stream| Ok(unsafe { (k.sum)(0, &batch, total, sum_scratch, stream) }))?;
    Ok(total)
}

/// Bytes of scratch that [`loss_and_gradient`] takes beside `logits` [chunk, V], for x [_, d] of elements of `size` bytes.
pub fn scratch_bytes(chunk: usize, d: usize, vocab: usize, size: usize) -> usize {
    (stats_len(chunk, vocab) + partials_len(chunk, d, vocab)) * size
}

/// The [`Stats`] of all tiles.
fn stats_len(rows: usize, vocab: usize) -> usize {
    vocab.div_ceil(TILE) * Stats::<f32>::PARTS * rows
}

/// A dx for each task.
fn partials_len(rows: usize, d: usize, vocab: usize) -> usize {
    vocab.div_ceil(TASK * TILE) * rows * d
}

struct Shape {
    n: usize,
    d: usize,
    vocab: usize,
    chunk: usize,
}

impl Shape {
    fn of(op: &str, x: &Tensor, w: &Tensor, logits: &Tensor) -> Result<Shape> {
        let (n, d) = matrix_shape(op, "x", x)?;
        let (vocab, _) = matrix_shape(op, "w", w)?;
        let (chunk, _) = matrix_shape(op, "logits", logits)?;
        Ok(Shape { n, d, vocab, chunk })
    }
}

/// Some rows of x with their targets, and w.
struct Chunk<'a, T> {
    factors: Factors,
    x: Mat<'a, T>,
    w: Mat<'a, T>,
    targets: &'a [u32],
    d: usize,
    vocab: usize,
}

/// What a tile of the vocabulary gives to each row of the chunk.
struct Stats<'a, T> {
    /// max z
    max: &'a mut [T],
    /// Σ exp (z - max)
    sum: &'a mut [T],
    /// z of the target, 0 if that is in another tile
    target: &'a mut [T],
}

impl<'a, T> Stats<'a, T> {
    const PARTS: usize = 3;

    fn split(stats: &'a mut [T]) -> Stats<'a, T> {
        let rows = stats.len() / Self::PARTS;
        let (max, rest) = stats.split_at_mut(rows);
        let (sum, target) = rest.split_at_mut(rows);
        Stats { max, sum, target }
    }
}

impl<'a, T: Real> Chunk<'a, T> {
    fn new(factors: Factors, x: &'a [T], w: &'a [T], targets: &'a [u32]) -> Chunk<'a, T> {
        let d = x.len() / targets.len();
        Chunk { factors, x: Mat::new(x, d), w: Mat::new(w, d), targets, d, vocab: w.len() / d }
    }

    fn rows(&self) -> usize {
        self.targets.len()
    }

    /// Tokens of the n-th tile.
    fn tile(&self, n: usize) -> Range<usize> {
        n * TILE..((n + 1) * TILE).min(self.vocab)
    }

    fn with_stats(&self, f: impl FnOnce(&Self, &mut [T]) -> f64) -> f64 {
        with_scratch(stats_len(self.rows(), self.vocab), |stats| f(self, stats))
    }

    /// The chunk's loss. Leaves exp (z - max) in `logits` [V, rows], and in each tile's stats exp (max - lse) for max.
    fn loss(&self, logits: &mut [T], stats: &mut [T]) -> f64 {
        let (rows, stats_len) = (self.rows(), Stats::<T>::PARTS * self.rows());
        let tiles = logits[..self.vocab * rows].par_chunks_mut(TILE * rows).zip(stats.par_chunks_mut(stats_len));
        tiles.enumerate().with_max_len(1).for_each(|(n, (z, stats))| {
            let tokens = self.tile(n);
            multiply(self.factors, 1.0, self.w.rows(tokens.clone()), self.x.t(), 0.0, MatMut::new(z, rows));
            let stats = Stats::split(stats);
            stats.target.fill(T::zero());
            for (i, token) in self.targets_in(&tokens) {
                stats.target[i] = z[token * rows + i];
            }
            exponentials(z, stats.max, stats.sum);
        });
        with_scratch(stats_len, |whole: &mut [T]| {
            let mut whole = Stats::split(whole);
            combine(stats, &mut whole);
            let rows = whole.max.iter().zip(whole.sum.iter()).zip(whole.target.iter());
            rows.map(|((max, sum), target)| max.to_f64() + sum.to_f64().ln() - target.to_f64()).sum()
        })
    }

    /// dx = and dw += scale times their gradients, from what [`Chunk::loss`] has left.
    fn gradient(&self, scale: T, logits: &mut [T], stats: &mut [T], dx: &mut [T], dw: &mut [T]) {
        let (rows, d, stats_len) = (self.rows(), self.d, Stats::<T>::PARTS * self.rows());
        with_scratch(partials_len(rows, d, self.vocab), |partials: &mut [T]| {
            let tiles = logits[..self.vocab * rows].par_chunks_mut(TASK * TILE * rows);
            let tiles = tiles.zip(stats.par_chunks_mut(TASK * stats_len)).zip(dw.par_chunks_mut(TASK * TILE * d));
            tiles.zip(partials.par_chunks_mut(rows * d)).enumerate().with_max_len(1).for_each(
                |(task, (((z, stats), dw), dx))| {
                    let tiles = z.chunks_mut(TILE * rows).zip(stats.chunks_mut(stats_len)).zip(dw.chunks_mut(TILE * d));
                    for (n, ((dz, stats), dw)) in tiles.enumerate() {
                        let tokens = self.tile(task * TASK + n);
                        scale_columns(dz, scale, Stats::split(stats).max);
                        for (i, token) in self.targets_in(&tokens) {
                            dz[token * rows + i] -= scale;
                        }
                        let (dz, beta) = (Mat::new(dz, rows), if n == 0 { 0.0 } else { 1.0 });
                        multiply(self.factors, 1.0, dz.t(), self.w.rows(tokens), beta, MatMut::new(dx, d));
                        multiply(self.factors, 1.0, dz, self.x, 1.0, MatMut::new(dw, d));
                    }
                },
            );
            add_up(partials, dx);
        });
    }

    /// Rows whose target is one of `tokens`, with its index among them.
    fn targets_in(&self, tokens: &Range<usize>) -> impl Iterator<Item = (usize, usize)> + use<'_, T> {
        let (tokens, start) = (tokens.clone(), tokens.start);
        let targets = self.targets.iter().enumerate().filter(move |(_, target)| tokens.contains(&(**target as usize)));
        targets.map(move |(i, &target)| (i, target as usize - start))
    }
}

/// max = column maxima of z [_, rows], z = exp (z - max), sum = column sums of that.
fn exponentials<T: Real>(z: &mut [T], max: &mut [T], sum: &mut [T]) {
    let _time = profile::time_on_thread(SOFTMAX);
    let rows = max.len();
    vectorized(
        #[inline(always)]
        || {
            max.fill(T::NEG_INFINITY);
            sum.fill(T::zero());
            for z in z.chunks_exact(rows) {
                max.iter_mut().zip(z).for_each(|(max, &z)| *max = max.larger(z));
            }
            for z in z.chunks_exact_mut(rows) {
                for ((z, &max), sum) in z.iter_mut().zip(&*max).zip(&mut *sum) {
                    *z = (*z - max).exp();
                    *sum += *z;
                }
            }
        },
    );
}

/// The stats of the whole vocabulary from those of the tiles; then max of each tile = exp (max - lse).
fn combine<T: Real>(tiles: &mut [T], whole: &mut Stats<T>) {
    let stats_len = Stats::<T>::PARTS * whole.max.len();
    vectorized(
        #[inline(always)]
        || {
            whole.max.fill(T::NEG_INFINITY);
            whole.sum.fill(T::zero());
            whole.target.fill(T::zero());
            for tile in tiles.chunks_exact_mut(stats_len) {
                let tile = Stats::split(tile);
                whole.max.iter_mut().zip(tile.max).for_each(|(max, tile)| *max = max.larger(*tile));
                whole.target.iter_mut().zip(tile.target).for_each(|(target, tile)| *target += *tile);
            }
            for tile in tiles.chunks_exact_mut(stats_len) {
                let tile = Stats::split(tile);
                for (((max, sum), &whole_max), whole_sum) in
                    tile.max.iter_mut().zip(tile.sum).zip(&*whole.max).zip(&mut *whole.sum)
                {
                    *max = (*max - whole_max).exp();
                    *whole_sum += *sum * *max;
                }
            }
            for tile in tiles.chunks_exact_mut(stats_len) {
                Stats::split(tile).max.iter_mut().zip(&*whole.sum).for_each(|(max, &sum)| *max /= sum);
            }
        },
    );
}

/// z = z * scale * factors, a factor a column.
fn scale_columns<T: Real>(z: &mut [T], scale: T, factors: &mut [T]) {
    let _time = profile::time_on_thread(SOFTMAX);
    vectorized(
        #[inline(always)]
        || {
            factors.iter_mut().for_each(|factor| *factor *= scale);
            for z in z.chunks_exact_mut(factors.len()) {
                z.iter_mut().zip(&*factors).for_each(|(z, &factor)| *z *= factor);
            }
        },
    );
}

/// total = sum of the partials, each as long as it.
fn add_up<T: Real>(partials: &[T], total: &mut [T]) {
    let len = total.len();
    total.par_chunks_mut(PIECE).enumerate().for_each(|(piece, total)| {
        vectorized(
            #[inline(always)]
            || {
                total.fill(T::zero());
                for partial in partials.chunks_exact(len) {
                    let partial = &partial[piece * PIECE..][..total.len()];
                    total.iter_mut().zip(partial).for_each(|(total, &partial)| *total += partial);
                }
            },
        );
    });
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
        let (logits, total) = (unset(&[chunk, v], dtype), unset(&[1], DType::F64));
        loss_and_gradient(Factors::Exact, x, w, targets, scale, &logits, &total, &dx, &dw).unwrap();
        ([dx, plus(&dw, -2.0)], values(&total)[0])
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
                assert_eq!(loss(Factors::Exact, x, w, targets, &unset(&[chunk, v], dtype)).unwrap(), total);
            }
        }
    }

    #[test]
    fn backward_is_the_gradient() {
        for shape @ [.., v, chunk] in SHAPES {
            let inputs @ (x, w, targets) = &inputs(shape, DType::F64);
            let (gradients, _) = run(shape, inputs, 1.0);
            let loss = |inputs: &[Tensor]| {
                loss(
                    Factors::Exact,
                    &copy_of(&inputs[0]),
                    &copy_of(&inputs[1]),
                    targets,
                    &unset(&[chunk, v], DType::F64),
                )
                .unwrap()
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
        let wrong = loss(Factors::Exact, &x, &w, &targets, &unset(&[2, 7], DType::F32)).unwrap_err().to_string();
        assert!(wrong.contains("target 7 at position 1 is not below the vocabulary's 7"), "{wrong}");
    }
}
