//! Causal softmax attention, a task for each sequence and head, in blocks of queries:
//!
//! ```text
//! S = q kᵀ / √head_dim (keys up to the query),   lse = log Σ exp S,   P = exp(S - lse),   out = P v
//! dv = Pᵀ dout,   D = rowsum(dout · out),   dS = P (dout vᵀ - D) / √head_dim,   dq = dS k,   dk = dSᵀ q
//! ```
use super::access::{check_mixed, matrix_shape, on_device, read, write};
use super::matrix::{Factors, Mat, MatMut};
use super::packed::{Packed, Right, WIDEST};
use super::profile;
use super::real::{Real, blocks, dot, reduce, sum, vectorized, with_scratches};
use crate::error::{Result, ensure};
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// Queries in a block.
const BLOCK: usize = 48;
/// Elements between rows of scores.
const PAD: usize = 16;

/// Causal softmax attention. qkv [B*T, 3d] (rows: q | k | v, each heads × head_dim), out [B*T, d] (=), lse [B, heads, T] (=):
/// log-sum-exp of each row of scaled scores, all that the backward needs. Never holds T×T: query blocks, causal part only.
pub fn forward(factors: Factors, qkv: &Tensor, context: usize, heads: usize, out: &Tensor, lse: &Tensor) -> Result<()> {
    const OP: &str = "attention::forward";
    let _time = profile::time(OP);
    let shape = Shape::of(OP, qkv, context, heads)?;
    let outputs = [("out", out, &shape.out()[..]), ("lse", lse, &shape.lse())];
    check_mixed(OP, qkv.dtype(), &["lse"], &[("qkv", qkv, &shape.qkv())], &outputs)?;
    on_device!(OP, qkv, gpu => gpu.launch(OP, |k, stream| {
        let [sequences, context, heads, head_dim] = shape.for_gpu(OP)?;
        let (element, qkv, out, lse) = (gpu.element(OP, qkv)?, gpu.at(qkv)?, gpu.at(out)?, gpu.at(lse)?);
        Ok(unsafe { (k.attention_forward)(element, qkv, out, lse, sequences, context, heads, head_dim, stream) })
    }), T => {
        let qkv = read::<T>(qkv)?;
        write(out, |out: &mut [T]| write(lse, |lse: &mut [T]| {
            let out = MatMut::new(out, shape.width());
            lse.par_chunks_mut(context).enumerate().for_each(|(task, lse)| {
                let (rows, columns) = shape.place(task);
                let inputs = Head::new(factors, &qkv, shape, task);
                // SAFETY: each task has its own sequence or head.
                forward_head(inputs, unsafe { out.disjoint_block(rows, columns) }, lse);
            });
            Ok(())
        }))
    })
}

/// dqkv (=) from dout, recomputing the probabilities block by block from lse. Shapes as in [`forward`].
#[allow(clippy::too_many_arguments)]
pub fn backward(
    factors: Factors,
    qkv: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    context: usize,
    heads: usize,
    dqkv: &Tensor,
) -> Result<()> {
    const OP: &str = "attention::backward";
    let _time = profile::time(OP);
    let shape = Shape::of(OP, qkv, context, heads)?;
    let inputs = [
        ("qkv", qkv, &shape.qkv()[..]),
        ("out", out, &shape.out()),
        ("lse", lse, &shape.lse()),
        ("dout", dout, &shape.out()),
    ];
    check_mixed(OP, qkv.dtype(), &["lse"], &inputs, &[("dqkv", dqkv, &shape.qkv())])?;
    on_device!(OP, qkv, gpu => gpu.launch(OP, |k, stream| {
        let [sequences, context, heads, head_dim] = shape.for_gpu(OP)?;
        let [scratch] = gpu.scratch([unsafe { (k.attention_backward_scratch)(sequences, context, heads) }])?;
        let (element, qkv, out, lse) = (gpu.element(OP, qkv)?, gpu.at(qkv)?, gpu.at(out)?, gpu.at(lse)?);
        let (dout, dqkv) = (gpu.at(dout)?, gpu.at(dqkv)?);
        Ok(unsafe {
            (k.attention_backward)(
                element, qkv, out, lse, dout, dqkv, sequences, context, heads, head_dim, scratch, stream,
            )
        })
    }), T => {
        let (qkv, out, lse, dout) = (read::<T>(qkv)?, read::<T>(out)?, read::<T>(lse)?, read::<T>(dout)?);
        let (out, dout) = (Mat::new(&out, shape.width()), Mat::new(&dout, shape.width()));
        write(dqkv, |dqkv: &mut [T]| {
            let dqkv = MatMut::new(dqkv, 3 * shape.width());
            lse.par_chunks(context).enumerate().for_each(|(task, lse)| {
                let (rows, columns) = shape.place(task);
                // SAFETY: each task has its own sequence or head, and q, k, v their own columns.
                let part = |i: usize| unsafe {
                    let offset = i * shape.width();
                    dqkv.disjoint_block(rows.clone(), columns.start + offset..columns.end + offset)
                };
                let outputs = [out, dout].map(|x| x.block(rows.clone(), columns.clone()));
                backward_head(Head::new(factors, &qkv, shape, task), outputs, lse, [part(0), part(1), part(2)]);
            });
            Ok(())
        })
    })
}

#[derive(Clone, Copy)]
struct Shape {
    sequences: usize,
    context: usize,
    heads: usize,
    head_dim: usize,
}

impl Shape {
    fn of(op: &str, qkv: &Tensor, context: usize, heads: usize) -> Result<Shape> {
        let (rows, columns) = matrix_shape(op, "qkv", qkv)?;
        ensure!(context > 0 && rows % context == 0, "{op}: {rows} rows of qkv are no whole sequences of {context}");
        ensure!(
            heads > 0 && columns % (3 * heads) == 0,
            "{op}: {columns} columns of qkv are no q, k, v of {heads} heads"
        );
        Ok(Shape { sequences: rows / context, context, heads, head_dim: columns / (3 * heads) })
    }
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Sequences, context, heads, head_dim as the kernels take them.
    #[cfg(any(feature = "cuda", test))]
    fn for_gpu(&self, op: &str) -> Result<[std::ffi::c_int; 4]> {
        /// The widest tile of attention.cu.
        const MAX_HEAD_DIM: usize = 128;
        let Shape { sequences, context, heads, head_dim } = *self;
        ensure!(
            head_dim <= MAX_HEAD_DIM,
            "{op}: a GPU takes heads of at most {MAX_HEAD_DIM} elements, these have {head_dim}: take more heads"
        );
        let [sequences, context, heads, head_dim] =
            [sequences, context, heads, head_dim].map(|n| super::cuda::length(op, "extent", n));
        Ok([sequences?, context?, heads?, head_dim?])
    }
    fn qkv(&self) -> [usize; 2] {
        [self.sequences * self.context, 3 * self.width()]
    }
    fn out(&self) -> [usize; 2] {
        [self.sequences * self.context, self.width()]
    }
    fn lse(&self) -> [usize; 3] {
        [self.sequences, self.heads, self.context]
    }
    /// Rows and columns of a task's sequence and head in [B*T, d].
    fn place(&self, task: usize) -> (Range<usize>, Range<usize>) {
        let (sequence, head) = (task / self.heads, task % self.heads);
        (sequence * self.context..(sequence + 1) * self.context, head * self.head_dim..(head + 1) * self.head_dim)
    }
}

/// q, k, v [T, head_dim] of one head of one sequence.
#[derive(Clone, Copy)]
struct Head<'a, T> {
    factors: Factors,
    q: Mat<'a, T>,
    k: Mat<'a, T>,
    v: Mat<'a, T>,
    context: usize,
    head_dim: usize,
}

impl<'a, T: Real> Head<'a, T> {
    fn new(factors: Factors, qkv: &'a [T], shape: Shape, task: usize) -> Head<'a, T> {
        let qkv = Mat::new(qkv, 3 * shape.width());
        let (rows, columns) = shape.place(task);
        let part = |i: usize| {
            let offset = i * shape.width();
            qkv.block(rows.clone(), columns.start + offset..columns.end + offset)
        };
        Head { factors, q: part(0), k: part(1), v: part(2), context: shape.context, head_dim: shape.head_dim }
    }
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }
    /// Elements of a block's scores: rows are not a power of two apart, so that a column lies in many sets of a cache.
    fn scores_len(&self) -> usize {
        BLOCK.min(self.context) * self.scores_stride()
    }
    fn scores_stride(&self) -> usize {
        self.context + PAD
    }
    /// Columns of whole panels that hold the scores of a block: those after its end mean nothing.
    fn keys(&self, queries: &Range<usize>) -> usize {
        queries.end.next_multiple_of(WIDEST).min(self.context)
    }
}

fn forward_head<T: Real>(head: Head<T>, mut out: MatMut<T>, lse: &mut [T]) {
    let Head { factors, context, head_dim, .. } = head;
    let lens = [Packed::<T>::len(head_dim, context), Packed::<T>::len(context, head_dim), head.scores_len()];
    with_scratches(lens, |[k_t, v, scores]| {
        let (k_t, v) = (Right::new(factors, head.k.t(), k_t), Right::new(factors, head.v, v));
        for queries in blocks(context, BLOCK) {
            let (rows, keys, stride) = (0..queries.len(), head.keys(&queries), head.scores_stride());
            let scores = &mut scores[..rows.len() * stride];
            let q = head.q.rows(queries.clone());
            k_t.multiply(head.scale(), q, 0.0, MatMut::new(scores, stride).block(rows.clone(), 0..keys));
            let mut sums = [T::zero(); BLOCK];
            for ((row, query), sum) in scores.chunks_exact_mut(stride).zip(queries.clone()).zip(&mut sums) {
                let max;
                [max, *sum] = exponentials(&mut row[..queries.end], query + 1);
                lse[query] = max + T::of(sum.to_f64().ln());
            }
            let weights = Mat::new(scores, stride).columns(0..queries.end);
            v.multiply(1.0, weights, 0.0, out.block(queries.clone(), 0..head_dim));
            for (query, sum) in queries.zip(sums) {
                out.row(query).iter_mut().for_each(|out| *out *= T::one() / sum);
            }
        }
    });
}

/// row[..visible] = exp(row[..visible] - max), the rest 0; returns the maximum and the sum.
fn exponentials<T: Real>(row: &mut [T], visible: usize) -> [T; 2] {
    vectorized(
        #[inline(always)]
        || {
            let (x, hidden) = row.split_at_mut(visible);
            hidden.fill(T::zero());
            let max = reduce(x, T::NEG_INFINITY, |x| x, T::larger);
            x.iter_mut().for_each(|x| *x = (*x - max).exp());
            [max, sum(x, |x| x)]
        },
    )
}

fn backward_head<T: Real>(
    head: Head<T>,
    [out, dout]: [Mat<T>; 2],
    lse: &[T],
    [mut dq, mut dk, mut dv]: [MatMut<T>; 3],
) {
    let Head { factors, context, head_dim, .. } = head;
    let (columns, rows, block) = (
        Packed::<T>::len(head_dim, context),
        Packed::<T>::len(context, head_dim),
        Packed::<T>::len(BLOCK.min(context), head_dim),
    );
    let (scores, sums) = (head.scores_len(), context * head_dim);
    let lens = [columns, columns, rows, block, block, scores, scores, sums, sums];
    with_scratches(lens, |[k_t, v_t, k, q_block, dout_block, p, ds, k_sums, v_sums]| {
        let [k_t, v_t] = [(head.k, k_t), (head.v, v_t)].map(|(x, panels)| Right::new(factors, x.t(), panels));
        let (k, stride) = (Right::new(factors, head.k, k), head.scores_stride());
        // the last block meets all keys: it sets the sums, the others add to them
        let mut beta = 0.0;
        for queries in blocks(context, BLOCK).rev() {
            let (rows, keys) = (0..queries.len(), head.keys(&queries));
            let (p, ds) = (&mut p[..rows.len() * stride], &mut ds[..rows.len() * stride]);
            let (q, dout) = (head.q.rows(queries.clone()), dout.rows(queries.clone()));
            k_t.multiply(head.scale(), q, 0.0, MatMut::new(p, stride).block(rows.clone(), 0..keys));
            v_t.multiply(1.0, dout, 0.0, MatMut::new(ds, stride).block(rows.clone(), 0..keys));
            for (i, (p, ds)) in p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).enumerate() {
                let (query, row) = (queries.start + i, [&mut p[..queries.end], &mut ds[..queries.end]]);
                score_gradient_row(row, query + 1, lse[query], [dout.row(i), out.row(query)], T::of(head.scale()));
            }
            let [p, ds] = [p, ds].map(|x| Mat::new(x, stride).columns(0..queries.end));
            let (q, dout) = (Right::new(factors, q, q_block), Right::new(factors, dout, dout_block));
            dout.multiply(1.0, p.t(), beta, MatMut::new(v_sums, head_dim).block(0..queries.end, 0..head_dim));
            q.multiply(1.0, ds.t(), beta, MatMut::new(k_sums, head_dim).block(0..queries.end, 0..head_dim));
            k.multiply(1.0, ds, 0.0, dq.block(queries, 0..head_dim));
            beta = 1.0;
        }
        for (sums, out) in [(k_sums, &mut dk), (v_sums, &mut dv)] {
            sums.chunks_exact(head_dim).enumerate().for_each(|(i, sum)| out.row(i).copy_from_slice(sum));
        }
    });
}

/// p = exp(p - lse), ds = p (ds - D) scale with D = ⟨dout, out⟩; both 0 for keys that are not visible.
fn score_gradient_row<T: Real>([p, ds]: [&mut [T]; 2], visible: usize, lse: T, [dout, out]: [&[T]; 2], scale: T) {
    vectorized(
        #[inline(always)]
        || {
            let delta = dot(dout, out);
            p[visible..].fill(T::zero());
            ds[visible..].fill(T::zero());
            for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
                *p = (*p - lse).exp();
                *ds = *p * (*ds - delta) * scale;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{D, DType, Device, Var};

    /// Sequences, context, heads, head_dim.
    const SHAPES: [[usize; 4]; 6] =
        [[1, 1, 1, 1], [2, 1, 3, 4], [1, 7, 1, 5], [2, 64, 2, 8], [2, 65, 3, 7], [1, 200, 2, 32]];

    fn inputs([b, t, h, k]: [usize; 4], dtype: DType) -> (Tensor, Tensor) {
        let qkv = (random(&[b * t, 3 * h * k], dtype, 1) * 2.0).unwrap();
        (qkv, random(&[b * t, h * k], dtype, 2))
    }

    fn run([b, t, h, _]: [usize; 4], qkv: &Tensor, dout: &Tensor) -> [Tensor; 3] {
        let dtype = qkv.dtype();
        let [out, lse, dqkv] = [unset(dout.dims(), dtype), unset(&[b, h, t], dtype), unset(qkv.dims(), dtype)];
        forward(Factors::Exact, qkv, t, h, &out, &lse).unwrap();
        backward(Factors::Exact, qkv, &out, &lse, dout, t, h, &dqkv).unwrap();
        [out, lse, dqkv]
    }

    /// The formula with whole T×T scores.
    fn naive([b, t, h, k]: [usize; 4], qkv: &Tensor) -> candle_core::Result<[Tensor; 2]> {
        let part = |i: usize| qkv.reshape((b, t, 3, h, k))?.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2)?.contiguous();
        let mask: Vec<f64> = (0..t * t).map(|i| if i % t > i / t { f64::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu)?;
        let scores = (part(0)?.matmul(&part(1)?.t()?)? / (k as f64).sqrt())?.broadcast_add(&mask)?;
        let lse = scores.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let out = scores.broadcast_sub(&lse)?.exp()?.matmul(&part(2)?)?;
        Ok([out.transpose(1, 2)?.reshape((b * t, h * k))?, lse.squeeze(D::Minus1)?])
    }

    #[test]
    fn equals_the_naive_formula_and_its_gradient() {
        for shape in SHAPES {
            let (qkv, dout) = inputs(shape, DType::F64);
            let qkv = Var::from_tensor(&qkv).unwrap();
            let [out, lse] = naive(shape, &qkv).unwrap();
            let gradients = (&out * &dout).unwrap().sum_all().unwrap().backward().unwrap();
            let expected = [out, lse, gradients.get(&qkv).unwrap().clone()];
            assert_all_close(&run(shape, &qkv, &dout), &expected, 1e-12);
            let (qkv, dout) = inputs(shape, DType::F32);
            assert_all_close(&run(shape, &qkv, &dout), &expected, 1e-5);
        }
    }

    #[test]
    fn backward_is_the_gradient() {
        for shape in SHAPES {
            let (qkv, dout) = inputs(shape, DType::F64);
            let [_, _, dqkv] = run(shape, &qkv, &dout);
            let loss = |inputs: &[Tensor]| {
                let [out, ..] = run(shape, &copy_of(&inputs[0]), &dout);
                inner(&out, &dout)
            };
            assert_gradients(loss, &[qkv], &[dqkv]);
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let shape = [1, 66, 1, 4];
        let (qkv, dout) = inputs(shape, DType::F32);
        let results = run(shape, &(qkv * 50.0).unwrap(), &dout);
        assert!(results.iter().all(|x| values(x).iter().all(|x| x.is_finite())));
    }

    #[test]
    fn nan_reaches_only_what_sees_it() {
        let shape @ [_, t, h, k] = [1, 70, 1, 4];
        let (qkv, _) = inputs(shape, DType::F32);
        let mut elements = values(&qkv);
        elements[30 * 3 * h * k] = f64::NAN;
        let qkv = view(&elements, qkv.dims(), DType::F32);
        let [out, lse] = [unset(&[t, h * k], DType::F32), unset(&[1, h, t], DType::F32)];
        forward(Factors::Exact, &qkv, t, h, &out, &lse).unwrap();
        let is_nan: Vec<usize> = (0..t).filter(|i| values(&out)[i * k].is_nan()).collect();
        assert_eq!(is_nan, [30]);
    }

    #[test]
    fn independent_of_threads() {
        let shape = [2, 100, 3, 16];
        let (qkv, dout) = inputs(shape, DType::F32);
        assert_independent_of_threads(|| run(shape, &qkv, &dout).to_vec());
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (qkv, dout) = inputs([1, 6, 2, 2], DType::F32);
        let lse = unset(&[1, 2, 6], DType::F32);
        assert!(
            forward(Factors::Exact, &qkv, 4, 2, &dout, &lse)
                .unwrap_err()
                .to_string()
                .contains("no whole sequences of 4")
        );
        assert!(
            forward(Factors::Exact, &qkv, 6, 5, &dout, &lse).unwrap_err().to_string().contains("no q, k, v of 5 heads")
        );
    }
}
