//! Layer normalisation of rows of d elements:
//!
//! ```text
//! x̂ = (x - mean) rstd,   rstd = 1 / √(var + 1e-5),   y = x̂ weight + bias
//! g = dy weight,   dx = rstd (g - mean(g) - x̂ mean(g x̂)),   dweight = Σ_rows dy x̂,   dbias = Σ_rows dy
//! ```
use super::access::{check_mixed, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda;
use super::profile;
use super::real::{Real, dot, rows_per_piece, sum, vectorized, with_scratch, with_scratches};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

const EPS: f64 = 1e-5;

/// out = (x - mean) * rstd * weight + bias (=), stats[i] = (mean, rstd) (=).
/// x, out [n, d]; ln [2, d]: weight in row 0, bias in row 1; stats [n, 2]; variance without Bessel, eps 1e-5.
pub fn forward(x: &Tensor, ln: &Tensor, out: &Tensor, stats: &Tensor) -> Result<()> {
    const OP: &str = "layer_norm::forward";
    let _time = profile::time(OP);
    let (n, d) = matrix_shape(OP, "x", x)?;
    let outputs = [("out", out, &[n, d][..]), ("stats", stats, &[n, 2])];
    check_mixed(OP, x.dtype(), &["stats"], &[("x", x, &[n, d]), ("ln", ln, &[2, d])], &outputs)?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, d) = (gpu.element(OP, x)?, cuda::length(OP, "width", d)?);
        let (x, ln, out, stats) = (gpu.at(x)?, gpu.at(ln)?, gpu.at(out)?, gpu.at(stats)?);
        Ok(unsafe { (k.layer_norm_forward)(element, x, ln, out, stats, n, d, stream) })
    }), T => {
        let (x, ln) = (read::<T>(x)?, read::<T>(ln)?);
        let rows = rows_per_piece(d);
        write(out, |out: &mut [T]| write(stats, |stats: &mut [T]| {
            let outputs = out.par_chunks_mut(rows * d).zip(stats.par_chunks_mut(rows * 2));
            outputs.zip(x.par_chunks(rows * d)).for_each(|((out, stats), x)| forward_rows(x, &ln, out, stats));
            Ok(())
        }))
    })
}

/// The same output from kept stats (=); used to recompute LN x in the backward pass instead of storing it.
pub fn normalize(x: &Tensor, ln: &Tensor, stats: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "layer_norm::normalize";
    let _time = profile::time(OP);
    let (n, d) = matrix_shape(OP, "x", x)?;
    let inputs = [("x", x, &[n, d][..]), ("ln", ln, &[2, d]), ("stats", stats, &[n, 2])];
    check_mixed(OP, x.dtype(), &["stats"], &inputs, &[("out", out, &[n, d])])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, d) = (gpu.element(OP, x)?, cuda::length(OP, "width", d)?);
        let (x, ln, stats, out) = (gpu.at(x)?, gpu.at(ln)?, gpu.at(stats)?, gpu.at(out)?);
        Ok(unsafe { (k.layer_norm_normalize)(element, x, ln, stats, out, n, d, stream) })
    }), T => {
        let (x, ln, stats) = (read::<T>(x)?, read::<T>(ln)?, read::<T>(stats)?);
        let rows = rows_per_piece(d);
        write(out, |out: &mut [T]| {
            let inputs = x.par_chunks(rows * d).zip(stats.par_chunks(rows * 2));
            out.par_chunks_mut(rows * d).zip(inputs).for_each(|(out, (x, stats))| normalize_rows(x, &ln, stats, out));
            Ok(())
        })
    })
}

/// dx += dL/dx, dln += dL/d(weight, bias) given dy. Shapes as in [`forward`].
pub fn backward(dy: &Tensor, x: &Tensor, ln: &Tensor, stats: &Tensor, dx: &Tensor, dln: &Tensor) -> Result<()> {
    const OP: &str = "layer_norm::backward";
    let _time = profile::time(OP);
    let (n, d) = matrix_shape(OP, "x", x)?;
    let inputs = [("dy", dy, &[n, d][..]), ("x", x, &[n, d]), ("ln", ln, &[2, d]), ("stats", stats, &[n, 2])];
    check_mixed(OP, x.dtype(), &["stats", "dln"], &inputs, &[("dx", dx, &[n, d]), ("dln", dln, &[2, d])])?;
    on_device!(OP, dx, gpu => gpu.launch(OP, |k, stream| {
        let (element, d) = (gpu.element(OP, x)?, cuda::length(OP, "width", d)?);
        let [scratch] = gpu.scratch([unsafe { (k.layer_norm_backward_scratch)(n, d) }])?;
        let (dy, x, ln, stats, dx, dln) =
            (gpu.at(dy)?, gpu.at(x)?, gpu.at(ln)?, gpu.at(stats)?, gpu.at(dx)?, gpu.at(dln)?);
        Ok(unsafe { (k.layer_norm_backward)(element, dy, x, ln, stats, dx, dln, n, d, scratch, stream) })
    }), T => {
        let (dy, x, ln, stats) = (read::<T>(dy)?, read::<T>(x)?, read::<T>(ln)?, read::<T>(stats)?);
        let rows = rows_per_piece(d);
        write(dx, |dx: &mut [T]| write(dln, |dln: &mut [T]| {
            with_scratch(n.div_ceil(rows) * 2 * d, |partials: &mut [T]| {
                let inputs = dy.par_chunks(rows * d).zip(x.par_chunks(rows * d)).zip(stats.par_chunks(rows * 2));
                let outputs = dx.par_chunks_mut(rows * d).zip(partials.par_chunks_mut(2 * d));
                inputs.zip(outputs).for_each(|(((dy, x), stats), (dx, dln))| backward_rows(dy, x, &ln, stats, dx, dln));
                for partial in partials.chunks_exact(2 * d) {
                    dln.iter_mut().zip(partial).for_each(|(sum, &partial)| *sum += partial);
                }
            });
            Ok(())
        }))
    })
}

fn forward_rows<T: Real>(x: &[T], ln: &[T], out: &mut [T], stats: &mut [T]) {
    let d = ln.len() / 2;
    vectorized(
        #[inline(always)]
        || {
            for ((x, out), stats) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).zip(stats.chunks_exact_mut(2)) {
                let (mean, rstd) = row_stats(x);
                (stats[0], stats[1]) = (mean, rstd);
                normalize_row(x, ln, mean, rstd, out);
            }
        },
    );
}

fn normalize_rows<T: Real>(x: &[T], ln: &[T], stats: &[T], out: &mut [T]) {
    let d = ln.len() / 2;
    vectorized(
        #[inline(always)]
        || {
            for ((x, out), stats) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)).zip(stats.chunks_exact(2)) {
                normalize_row(x, ln, stats[0], stats[1], out);
            }
        },
    );
}

#[inline(always)]
fn row_stats<T: Real>(x: &[T]) -> (T, T) {
    let d = T::of(x.len() as f64);
    let mean = sum(x, |x| x) / d;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / d;
    (mean, T::of(1.0 / (variance.to_f64() + EPS).sqrt()))
}

#[inline(always)]
fn normalize_row<T: Real>(x: &[T], ln: &[T], mean: T, rstd: T, out: &mut [T]) {
    let (weight, bias) = ln.split_at(x.len());
    for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = ((x - mean) * rstd).mul_add(weight, bias);
    }
}

/// dx += for these rows, dln = for these rows.
fn backward_rows<T: Real>(dy: &[T], x: &[T], ln: &[T], stats: &[T], dx: &mut [T], dln: &mut [T]) {
    let d = ln.len() / 2;
    with_scratches([d, d], |[g, normal]: [&mut [T]; 2]| {
        let (dweight, dbias) = dln.split_at_mut(d);
        vectorized(
            #[inline(always)]
            || {
                dweight.fill(T::zero());
                dbias.fill(T::zero());
                let rows = dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(stats.chunks_exact(2));
                for (((dy, x), stats), dx) in rows.zip(dx.chunks_exact_mut(d)) {
                    parameter_gradient_row(dy, x, (stats[0], stats[1]), normal, dweight, dbias);
                    g.iter_mut().zip(dy).zip(&ln[..d]).for_each(|((g, &dy), &weight)| *g = dy * weight);
                    input_gradient_row(g, normal, stats[1], dx);
                }
            },
        );
    });
}

/// normal = x̂, dweight += dy x̂, dbias += dy
#[inline(always)]
fn parameter_gradient_row<T: Real>(
    dy: &[T],
    x: &[T],
    (mean, rstd): (T, T),
    normal: &mut [T],
    dweight: &mut [T],
    dbias: &mut [T],
) {
    let outputs = normal.iter_mut().zip(dweight).zip(dbias);
    for (((normal, dweight), dbias), (&dy, &x)) in outputs.zip(dy.iter().zip(x)) {
        *normal = (x - mean) * rstd;
        *dweight += dy * *normal;
        *dbias += dy;
    }
}

/// dx += rstd (g - mean(g) - x̂ mean(g x̂))
#[inline(always)]
fn input_gradient_row<T: Real>(g: &[T], normal: &[T], rstd: T, dx: &mut [T]) {
    let d = T::of(g.len() as f64);
    let (mean_g, mean_gx) = (sum(g, |g| g) / d, dot(g, normal) / d);
    for ((dx, &g), &normal) in dx.iter_mut().zip(g).zip(normal) {
        *dx += rstd * (g - mean_g - normal * mean_gx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::{D, DType};

    const SHAPES: [[usize; 2]; 4] = [[1, 2], [5, 3], [7, 65], [300, 256]];

    fn inputs([n, d]: [usize; 2], dtype: DType) -> [Tensor; 3] {
        [plus(&random(&[n, d], dtype, 1), 3.0), random(&[2, d], dtype, 2), random(&[n, d], dtype, 3)]
    }

    /// out, dx, dln
    fn run([x, ln, dy]: &[Tensor; 3]) -> [Tensor; 3] {
        let dtype = x.dtype();
        let [out, again, stats] = [unset(x.dims(), dtype), unset(x.dims(), dtype), unset(&[x.dims()[0], 2], dtype)];
        forward(x, ln, &out, &stats).unwrap();
        normalize(x, ln, &stats, &again).unwrap();
        assert_close(&again, &out, 0.0);
        let [dx, dln] = [constant(2.0, x.dims(), dtype), constant(2.0, ln.dims(), dtype)];
        backward(dy, x, ln, &stats, &dx, &dln).unwrap();
        [out, plus(&dx, -2.0), plus(&dln, -2.0)]
    }

    fn naive(x: &Tensor, ln: &Tensor) -> candle_core::Result<Tensor> {
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let std = (centered.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
        centered.broadcast_div(&std)?.broadcast_mul(&ln.get(0)?)?.broadcast_add(&ln.get(1)?)
    }

    #[test]
    fn equals_the_naive_formula_and_is_differentiable() {
        for shape in SHAPES {
            let inputs64 @ [x, ln, dy] = &inputs(shape, DType::F64);
            let results = run(inputs64);
            assert_close(&results[0], &naive(x, ln).unwrap(), 1e-12);
            let loss = |inputs: &[Tensor]| inner(&naive(&inputs[0], &inputs[1]).unwrap(), dy);
            assert_gradients(loss, &[x.clone(), ln.clone()], &results[1..]);
            assert_all_close(&run(&inputs(shape, DType::F32)), &results, 2e-5);
        }
    }

    #[test]
    fn independent_of_threads() {
        assert_independent_of_threads(|| run(&inputs([900, 128], DType::F32)).to_vec());
    }

    #[test]
    fn nan_stays_in_its_row() {
        let [_, ln, _] = inputs([2, 2], DType::F32);
        let x = view(&[f64::NAN, 0.0, 1.0, 2.0], &[2, 2], DType::F32);
        let [out, stats] = [unset(&[2, 2], DType::F32), unset(&[2, 2], DType::F32)];
        forward(&x, &ln, &out, &stats).unwrap();
        let is_nan: Vec<bool> = values(&out).iter().map(|x| x.is_nan()).collect();
        assert_eq!(is_nan, [true, true, false, false]);
    }
}
