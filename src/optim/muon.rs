//! Muon: orthogonalised momentum on the hidden matrices, [`AdamW`] on everything else.
//!
//! For a matrix of r rows and c columns:
//!
//! ```text
//! B ← μ B + g
//! U = g + μ B  (Nesterov)   or   B
//! X = U / ‖U‖_F,  then five times  X ← (a I + b A + c A²) X,  A = X Xᵀ      (for r > c: X (a I + b A + c A²), A = Xᵀ X)
//! θ ← (1 − η λ) θ − η √max(1, r/c) X,   η = lr · muon_lr_ratio
//! ```
//!
//! X has U's singular vectors and singular values near 1 (about 0.7 to 1.2). Coefficients and scale are those of Keller
//! Jordan's post "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024), where
//! η is about 0.02 while Adam's rate is about a tenth of that: hence a ratio of learning rates instead of Moonshot's scale
//! 0.2 √max(r, c) (arXiv 2502.16982), which is made to share one rate. The fused qkv weight is three matrices.

#[cfg(any(feature = "cuda", test))]
use super::pass::GpuRows;
use super::pass::{Elements, Rule, Step};
use super::{AdamW, Hyper, Moment, Optimizer};
use crate::config::OptimizerTable;
use crate::error::Result;
use crate::model::{Segment, Shard};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::{Address, Batch, Gpu, Operand, Product};
use crate::ops::matrix::{Factors, Mat, MatMut, multiply};
use crate::ops::real::{Real, reduce, vectorized, with_scratch};
use candle_core::Tensor;

/// a, b, c: the slope at 0 is as large as it may be, so that small singular values grow fast.
const QUINTIC: [f64; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
/// Least norm that is divided by: a matrix without gradient stays where it is.
const SMALLEST_NORM: f64 = 1e-7;

pub struct Muon {
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    lr_ratio: f64,
    adamw: AdamW,
}

impl Muon {
    pub fn new(table: &OptimizerTable) -> Muon {
        Muon {
            momentum: table.momentum,
            nesterov: table.nesterov,
            weight_decay: table.weight_decay,
            lr_ratio: table.muon_lr_ratio,
            adamw: AdamW::new(table),
        }
    }

    /// 1 − η λ and η √max(1, r/c) of a matrix [r, c].
    fn keep_and_step_size(&self, [rows, columns]: [usize; 2], decay: bool, hyper: &Hyper) -> (f64, f64) {
        let lr = hyper.lr * self.lr_ratio;
        let keep = 1.0 - if decay { lr * self.weight_decay } else { 0.0 };
        (keep, lr * (rows as f64 / columns as f64).max(1.0).sqrt())
    }

    /// Updates one matrix of `columns` columns, on this thread; the moment v is not used.
    fn update_matrix<T: Real>(&self, columns: usize, decay: bool, hyper: &Hyper, elements: Elements<T, 3>) {
        let Elements { grad, written: [theta, momentum, _] } = elements;
        let rows = grad.len() / columns;
        let small = rows.min(columns);
        with_scratch(2 * grad.len() + 2 * small * small, |scratch: &mut [T]| {
            let (x, workspace) = scratch.split_at_mut(grad.len());
            let gradient = Elements { grad, written: [momentum, x] };
            self.accumulate(hyper, gradient);
            let x = orthogonalize(x, workspace, columns);
            let (keep, step_size) = self.keep_and_step_size([rows, columns], decay, hyper);
            let (keep, step_size) = (T::of(keep), T::of(step_size));
            let direction = Elements { grad: x, written: [theta] };
            vectorized(
                #[inline(always)]
                || direction.update(&|x, [theta]| [keep * theta - step_size * x]),
            );
        });
    }

    /// written = B, U of the gradient.
    fn accumulate<T: Real>(&self, hyper: &Hyper, gradient: Elements<T, 2>) {
        let (mu, nesterov, scale) = (T::of(self.momentum), self.nesterov, T::of(hyper.gradient_scale));
        vectorized(
            #[inline(always)]
            || {
                gradient.update(&|g, [b, _]| {
                    let g = scale * g;
                    let b = mu * b + g;
                    [b, if nesterov { g + mu * b } else { b }]
                })
            },
        );
    }
}

/// Shape and number of the matrices that a segment is, if Muon orthogonalises it.
fn matrices(segment: &Segment) -> Option<([usize; 2], usize)> {
    let &[rows, columns] = &segment.shape[..] else { return None };
    let count = segment.matrices;
    (count > 0).then(|| ([rows / count, columns], count))
}

#[cfg(any(feature = "cuda", test))]
impl Muon {
    /// Updates one matrix on a GPU, as [`Muon::update_matrix`] does.
    fn launch_matrix(
        &self,
        gpu: &Gpu,
        shape: [usize; 2],
        decay: bool,
        hyper: &Hyper,
        grad: Address,
        [theta, momentum]: [Address; 2],
    ) -> Result<()> {
        let (n, small) = (shape[0] * shape[1], shape[0].min(shape[1]));
        let float = size_of::<f32>();
        let sum_scratch = unsafe { (gpu.kernels().sum_scratch)(1, n) };
        let lengths =
            [n * float, n * float, small * small * float, small * small * float, size_of::<f64>(), sum_scratch];
        let [x, next, gram, polynomial, square, sum_scratch] = gpu.scratch(lengths)?;
        let (scale, mu) = (hyper.gradient_scale as f32, self.momentum as f32);
        gpu.launch(Self::NAME, |k, stream| {
            Ok(unsafe { (k.momentum)(scale, mu, self.nesterov.into(), grad, momentum, x, n, stream) })
        })?;
        let batch = Batch::new(&[(x, n)]);
        gpu.launch(Self::NAME, |k, stream| Ok(unsafe { (k.sum_of_squares)(0, &batch, square, sum_scratch, stream) }))?;
        gpu.launch(Self::NAME, |k, stream| Ok(unsafe { (k.normalize)(x, square, SMALLEST_NORM, n, stream) }))?;
        let x = launch_orthogonalize(gpu, shape, [x, next], gram, polynomial)?;
        let (keep, step_size) = self.keep_and_step_size(shape, decay, hyper);
        gpu.launch(Self::NAME, |k, stream| {
            Ok(unsafe { (k.combine)(0, keep as f32, theta, -step_size as f32, x, theta, n, stream) })
        })
    }
}

/// The orthogonalised `x`, which lies in `x` or in `next`, both overwritten.
#[cfg(any(feature = "cuda", test))]
fn launch_orthogonalize(
    gpu: &Gpu,
    [rows, columns]: [usize; 2],
    [mut x, mut next]: [Address; 2],
    gram: Address,
    polynomial: Address,
) -> Result<Address> {
    let small = rows.min(columns);
    let matrix = |at, pitch| Operand { at, dtype: candle_core::DType::F32, pitch, transposed: false };
    let (gram, polynomial) = (matrix(gram, small), matrix(polynomial, small));
    let [a, b, c] = QUINTIC;
    for _ in 0..ITERATIONS {
        let view = matrix(x, columns);
        let (left, right) = if rows <= columns { (view, view.t()) } else { (view.t(), view) };
        gpu.multiply(Product::new([small, small, rows.max(columns)], left, right, gram))?;
        // polynomial = a I + b A + c A²
        gpu.multiply(Product { alpha: c, beta: b, c: gram, ..Product::new([small; 3], gram, gram, polynomial) })?;
        gpu.launch(Muon::NAME, |k, stream| Ok(unsafe { (k.add_diagonal)(polynomial.at, a as f32, small, stream) }))?;
        let (left, right) = if rows <= columns { (polynomial, view) } else { (view, polynomial) };
        gpu.multiply(Product::new([rows, columns, small], left, right, matrix(next, columns)))?;
        std::mem::swap(&mut x, &mut next);
    }
    Ok(x)
}

/// The orthogonalised `x`, which lies in `x` or in `workspace` (|x| + 2 min(r, c)² elements). Both are overwritten.
fn orthogonalize<'a, T: Real>(mut x: &'a mut [T], workspace: &'a mut [T], columns: usize) -> &'a [T] {
    let rows = x.len() / columns;
    let small = rows.min(columns);
    let (mut next, workspace) = workspace.split_at_mut(x.len());
    let (gram, polynomial) = workspace.split_at_mut(small * small);
    normalize(x);
    for _ in 0..ITERATIONS {
        let view = Mat::new(x, columns);
        let (left, right) = if rows <= columns { (view, view.t()) } else { (view.t(), view) };
        multiply(Factors::Exact, 1.0, left, right, 0.0, MatMut::new(gram, small));
        // polynomial = a I + b A + c A²
        let [a, b, c] = QUINTIC;
        polynomial.copy_from_slice(gram);
        multiply(Factors::Exact, c, Mat::new(gram, small), Mat::new(gram, small), b, MatMut::new(polynomial, small));
        polynomial.iter_mut().step_by(small + 1).for_each(|diagonal| *diagonal += T::of(a));
        let polynomial = Mat::new(polynomial, small);
        let (left, right) = if rows <= columns { (polynomial, view) } else { (view, polynomial) };
        multiply(Factors::Exact, 1.0, left, right, 0.0, MatMut::new(next, columns));
        std::mem::swap(&mut x, &mut next);
    }
    x
}

/// x ← x / ‖x‖
fn normalize<T: Real>(x: &mut [T]) {
    vectorized(
        #[inline(always)]
        || {
            let norm = reduce(
                x,
                0.0,
                #[inline(always)]
                |x| x.to_f64() * x.to_f64(),
                #[inline(always)]
                |a, b| a + b,
            );
            let norm = norm.sqrt();
            let factor = T::of(if norm < SMALLEST_NORM { SMALLEST_NORM } else { norm }.recip());
            x.iter_mut().for_each(|x| *x *= factor);
        },
    )
}

impl Rule<3> for Muon {
    const NAME: &str = "muon";

    fn update<T: Real>(&self, segment: &Segment, t: u64, hyper: &Hyper, elements: Elements<T, 3>) {
        let Some(([rows, columns], count)) = matrices(segment) else {
            return self.adamw.update(segment, t, hyper, elements);
        };
        elements.for_each_part(0..count, &|k| k * rows * columns, &|_, matrix| {
            self.update_matrix(columns, segment.decay, hyper, matrix);
        });
    }

    #[cfg(any(feature = "cuda", test))]
    fn launch(&self, gpu: &Gpu, rows: &GpuRows<3>) -> Result<()> {
        for segment in &rows.layout.segments {
            let Some((shape, count)) = matrices(segment) else { continue };
            for (row, k) in (0..rows.rows.count).flat_map(|row| (0..count).map(move |k| (row, k))) {
                let (grad, [theta, momentum, _]) = rows.place(row, segment.offset + k * shape[0] * shape[1]);
                self.launch_matrix(gpu, shape, segment.decay, rows.hyper, grad, [theta, momentum])?;
            }
        }
        self.adamw.launch_on(gpu, rows, |segment| matrices(segment).is_none())
    }
}

impl Optimizer for Muon {
    fn name(&self) -> &'static str {
        Muon::NAME
    }

    fn whole_matrices(&self) -> bool {
        true
    }

    /// On the hidden matrices m is the momentum B and v is not used.
    fn moments(&self) -> &'static [Moment] {
        &[Moment { name: "m", power: 1 }, Moment { name: "v", power: 2 }]
    }

    fn step(
        &self,
        shard: &Shard,
        rows: &[usize],
        updates: &[u64],
        theta: &Tensor,
        grad: &Tensor,
        moments: &[Tensor],
        hyper: &Hyper,
    ) -> Result<()> {
        Step { shard, rows, updates, theta, grad, moments, hyper }.apply(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// |A v| after many steps of v ← A v / |A v|: the largest eigenvalue of a symmetric positive A.
    fn largest_eigenvalue(a: &[f64], n: usize) -> f64 {
        let mut v: Vec<f64> = (0..n).map(|i| (1.0 + i as f64).sin()).collect();
        let mut norm = 0.0;
        for _ in 0..2000 {
            v = a.chunks(n).map(|row| row.iter().zip(&v).map(|(a, v)| a * v).sum()).collect();
            norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
            v.iter_mut().for_each(|v| *v /= norm);
        }
        norm
    }

    #[test]
    fn orthogonalized_matrices_have_singular_values_near_1() {
        for (rows, columns) in [(12, 12), (8, 40), (40, 8)] {
            let mut u: Vec<f64> = (0..rows * columns).map(|i| ((i * i) as f64 * 0.37).sin()).collect();
            let small = rows.min(columns);
            let mut workspace = vec![0.0; u.len() + 2 * small * small];
            let x = Mat::new(orthogonalize(&mut u, &mut workspace, columns), columns);
            let (left, right) = if rows <= columns { (x, x.t()) } else { (x.t(), x) };
            let mut gram = vec![0.0; small * small];
            multiply(Factors::Exact, 1.0, left, right, 0.0, MatMut::new(&mut gram, small));
            let largest = largest_eigenvalue(&gram, small);
            gram.iter_mut().for_each(|a| *a = -*a);
            gram.iter_mut().step_by(small + 1).for_each(|a| *a += largest);
            let smallest = largest - largest_eigenvalue(&gram, small);
            let (smallest, largest) = (smallest.sqrt(), largest.sqrt());
            assert!(smallest > 0.6 && largest < 1.3, "{rows} x {columns}: from {smallest} to {largest}");
        }
    }
}
