//! Affine map of rows: y = x wᵀ + b.
use super::access::{check, check_mixed, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda;
use super::matrix::{Factors, Mat, MatMut, for_each_tile, multiply, multiply_parallel};
use super::profile;
use super::real::{Real, rows_per_piece, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// out = beta * out + alpha * (x wᵀ + b).  x [n, i], w [o, i], b [o], out [n, o]. beta = 0 never reads out.
pub fn forward(
    factors: Factors,
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    alpha: f64,
    beta: f64,
    out: &Tensor,
) -> Result<()> {
    const OP: &str = "linear::forward";
    let (n, i) = matrix_shape(OP, "x", x)?;
    let (o, _) = matrix_shape(OP, "w", w)?;
    let _time = profile::time_product(OP, [o, i]);
    check(OP, x.dtype(), &[("x", x, &[n, i]), ("w", w, &[o, i])], &[("out", out, &[n, o])])?;
    if let Some(b) = b {
        check(OP, x.dtype(), &[("b", b, &[o])], &[("out", out, &[n, o])])?;
    }
    on_device!(OP, out, gpu => {
        let beta = match b {
            Some(b) => {
                gpu.launch(OP, |k, stream| {
                    let (element, o) = (gpu.element(OP, out)?, cuda::length(OP, "width", o)?);
                    let (b, out) = (gpu.at(b)?, gpu.at(out)?);
                    Ok(unsafe { (k.add_bias)(element, alpha as f32, b, beta as f32, out, n, o, stream) })
                })?;
                1.0
            }
            None => beta,
        };
        gpu.multiply([n, o, i], alpha, gpu.matrix(x, i)?, gpu.matrix(w, i)?.t(), beta, gpu.matrix(out, o)?)
    }, T => {
        let (x, w) = (read::<T>(x)?, read::<T>(w)?);
        let b = b.map(read::<T>).transpose()?;
        let (x, w) = (Mat::new(&x, i), Mat::new(&w, i).t());
        write(out, |out: &mut [T]| {
            for_each_tile(MatMut::new(out, o), |mut tile| {
                let mut beta = beta;
                if let Some(b) = &b {
                    scale_and_add_to_rows(T::of(beta), T::of(alpha), &b[tile.cols.clone()], &mut tile.elements);
                    beta = 1.0;
                }
                multiply(factors, alpha, x.rows(tile.rows), w.columns(tile.cols), beta, tile.elements);
            });
            Ok(())
        })
    })
}

/// dx = beta * dx + alpha * dy w. dy [n, o], w [o, i], dx [n, i]. beta = 0 never reads dx.
pub fn backward_input(factors: Factors, dy: &Tensor, w: &Tensor, alpha: f64, beta: f64, dx: &Tensor) -> Result<()> {
    const OP: &str = "linear::backward_input";
    let (n, o) = matrix_shape(OP, "dy", dy)?;
    let (_, i) = matrix_shape(OP, "w", w)?;
    let _time = profile::time_product(OP, [o, i]);
    check(OP, dy.dtype(), &[("dy", dy, &[n, o]), ("w", w, &[o, i])], &[("dx", dx, &[n, i])])?;
    on_device!(OP, dx, gpu => {
        gpu.multiply([n, i, o], alpha, gpu.matrix(dy, o)?, gpu.matrix(w, i)?, beta, gpu.matrix(dx, i)?)
    }, T => {
        let (dy, w) = (read::<T>(dy)?, read::<T>(w)?);
        write(dx, |dx: &mut [T]| {
            multiply_parallel(factors, alpha, Mat::new(&dy, o), Mat::new(&w, i), beta, MatMut::new(dx, i));
            Ok(())
        })
    })
}

/// dw += alpha * dyᵀ x;  db += alpha * column sums of dy. dy [n, o], x [n, i], dw [o, i], db [o]; dw and db may be
/// views of one storage.
pub fn backward_weight(
    factors: Factors,
    dy: &Tensor,
    x: &Tensor,
    alpha: f64,
    dw: &Tensor,
    db: Option<&Tensor>,
) -> Result<()> {
    const OP: &str = "linear::backward_weight";
    let (n, o) = matrix_shape(OP, "dy", dy)?;
    let (_, i) = matrix_shape(OP, "x", x)?;
    let _time = profile::time_product(OP, [o, i]);
    check_mixed(OP, dy.dtype(), &["dw"], &[("dy", dy, &[n, o]), ("x", x, &[n, i])], &[("dw", dw, &[o, i])])?;
    if let Some(db) = db {
        check_mixed(OP, dy.dtype(), &["db"], &[("dy", dy, &[n, o])], &[("db", db, &[o])])?;
    }
    on_device!(OP, dw, gpu => {
        gpu.multiply([o, i, n], alpha, gpu.matrix(dy, o)?.t(), gpu.matrix(x, i)?, 1.0, gpu.matrix(dw, i)?)?;
        let Some(db) = db else { return Ok(()) };
        gpu.launch(OP, |k, stream| {
            let (element, o) = (gpu.element(OP, dy)?, cuda::length(OP, "width", o)?);
            let [scratch] = gpu.scratch([unsafe { (k.add_column_sums_scratch)(n, o) }])?;
            let (dy, db) = (gpu.at(dy)?, gpu.at(db)?);
            Ok(unsafe { (k.add_column_sums)(element, dy, alpha as f32, db, n, o, scratch, stream) })
        })
    }, T => {
        let (dy, x) = (read::<T>(dy)?, read::<T>(x)?);
        write(dw, |dw: &mut [T]| {
            multiply_parallel(factors, alpha, Mat::new(&dy, o).t(), Mat::new(&x, i), 1.0, MatMut::new(dw, i));
            Ok(())
        })?;
        match db {
            Some(db) => write(db, |db: &mut [T]| {
                add_column_sums(T::of(alpha), &dy, db);
                Ok(())
            }),
            None => Ok(()),
        }
    })
}

/// Each row of out = beta * out + alpha * b. beta = 0 does not read out.
fn scale_and_add_to_rows<T: Real>(beta: T, alpha: T, b: &[T], out: &mut MatMut<T>) {
    vectorized(
        #[inline(always)]
        || {
            for row in 0..out.rows() {
                let out = out.row(row).iter_mut().zip(b);
                if beta == T::zero() {
                    out.for_each(|(out, &b)| *out = alpha * b);
                } else {
                    out.for_each(|(out, &b)| *out = beta * *out + alpha * b);
                }
            }
        },
    );
}

/// sums += alpha * column sums of the rows of x.
fn add_column_sums<T: Real>(alpha: T, x: &[T], sums: &mut [T]) {
    let width = sums.len();
    let piece = rows_per_piece(width) * width;
    with_scratch(x.len().div_ceil(piece) * width, |partials: &mut [T]| {
        x.par_chunks(piece).zip(partials.par_chunks_mut(width)).for_each(|(rows, partial)| {
            vectorized(
                #[inline(always)]
                || {
                    partial.fill(T::zero());
                    for row in rows.chunks_exact(width) {
                        partial.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
                    }
                },
            );
        });
        for partial in partials.chunks_exact(width) {
            sums.iter_mut().zip(partial).for_each(|(sum, &partial)| *sum += alpha * partial);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;
    use candle_core::DType;

    const SHAPES: [[usize; 3]; 5] = [[1, 1, 1], [3, 5, 2], [65, 33, 17], [130, 64, 300], [257, 31, 96]];

    /// x [n, i], w [o, i], b [o], y and dy [n, o].
    fn inputs([n, i, o]: [usize; 3], dtype: DType) -> [Tensor; 4] {
        [random(&[n, i], dtype, 1), random(&[o, i], dtype, 2), random(&[o], dtype, 3), random(&[n, o], dtype, 4)]
    }

    #[test]
    fn forward_is_the_affine_map() {
        for shape in SHAPES {
            let [x, w, b, y] = inputs(shape, DType::F64);
            let product = x.matmul(&w.t().unwrap()).unwrap();
            let affine = product.broadcast_add(&b).unwrap();
            for dtype in [DType::F64, DType::F32] {
                let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-5 };
                let [x, w, b, y0] = inputs(shape, dtype);
                let out = unset(y.dims(), dtype);
                forward(Factors::Exact, &x, &w, Some(&b), 0.5, 0.0, &out).unwrap();
                assert_close(&out, &(&affine * 0.5).unwrap(), tolerance);
                forward(Factors::Exact, &x, &w, None, 1.0, 0.0, &out).unwrap();
                assert_close(&out, &product, tolerance);
                forward(Factors::Exact, &x, &w, Some(&b), -2.0, 3.0, &y0).unwrap();
                assert_close(&y0, &((&y * 3.0).unwrap() - (&affine * 2.0).unwrap()).unwrap(), tolerance);
            }
        }
    }

    #[test]
    fn backward_is_the_gradient() {
        for shape in SHAPES {
            let [x, w, b, dy] = inputs(shape, DType::F64);
            let run = |dtype| {
                let [x, w, b, dy] = inputs(shape, dtype);
                let dx = unset(x.dims(), dtype);
                backward_input(Factors::Exact, &dy, &w, 0.5, 0.0, &dx).unwrap();
                let [dw, db] = [constant(2.0, w.dims(), dtype), constant(2.0, b.dims(), dtype)];
                backward_weight(Factors::Exact, &dy, &x, 0.5, &dw, Some(&db)).unwrap();
                [dx, plus(&dw, -2.0), plus(&db, -2.0)]
            };
            let gradients = run(DType::F64);
            let loss = |inputs: &[Tensor]| {
                let out = unset(dy.dims(), DType::F64);
                forward(Factors::Exact, &inputs[0], &inputs[1], Some(&inputs[2]), 0.5, 0.0, &out).unwrap();
                inner(&out, &dy)
            };
            assert_gradients(loss, &[x.clone(), w.clone(), b], &gradients);
            assert_all_close(&run(DType::F32), &gradients, 1e-5);

            let dx = copy_of(&x);
            backward_input(Factors::Exact, &dy, &w, 0.5, 3.0, &dx).unwrap();
            assert_close(&dx, &(&gradients[0] + (&x * 3.0).unwrap()).unwrap(), 1e-13);
        }
    }

    #[test]
    fn weight_and_bias_gradient_may_share_a_storage() {
        let [x, w, b, dy] = inputs([20, 6, 4], DType::F32);
        let row = constant(0.0, &[28], DType::F32);
        let [dw, db] = [row.narrow(0, 0, 24).unwrap().reshape((4, 6)).unwrap(), row.narrow(0, 24, 4).unwrap()];
        backward_weight(Factors::Exact, &dy, &x, 1.0, &dw, Some(&db)).unwrap();
        let [dw2, db2] = [constant(0.0, w.dims(), DType::F32), constant(0.0, b.dims(), DType::F32)];
        backward_weight(Factors::Exact, &dy, &x, 1.0, &dw2, Some(&db2)).unwrap();
        assert_all_close(&[dw, db], &[dw2, db2], 0.0);
    }

    #[test]
    fn independent_of_threads() {
        let [x, w, b, dy] = inputs([600, 70, 530], DType::F32);
        assert_independent_of_threads(|| {
            let [out, dx] = [unset(dy.dims(), DType::F32), unset(x.dims(), DType::F32)];
            let [dw, db] = [constant(0.0, w.dims(), DType::F32), constant(0.0, b.dims(), DType::F32)];
            forward(Factors::Exact, &x, &w, Some(&b), 1.0, 0.0, &out).unwrap();
            backward_input(Factors::Exact, &dy, &w, 1.0, 0.0, &dx).unwrap();
            backward_weight(Factors::Exact, &dy, &x, 1.0, &dw, Some(&db)).unwrap();
            vec![out, dx, dw, db]
        });
    }

    #[test]
    fn wrong_arguments_are_named() {
        let [x, w, b, dy] = inputs([3, 5, 2], DType::F32);
        let message = |result: Result<()>| result.unwrap_err().to_string();
        let wrong = message(forward(Factors::Exact, &x, &w, Some(&x), 1.0, 0.0, &dy));
        assert!(wrong.contains("b has shape [3, 5], expected [2]"), "{wrong}");
        let wrong = message(forward(Factors::Exact, &x, &w.to_dtype(DType::F64).unwrap(), Some(&b), 1.0, 0.0, &dy));
        assert!(wrong.contains("w is F64, expected F32"), "{wrong}");
        let wrong = message(backward_input(
            Factors::Exact,
            &dy,
            &w,
            1.0,
            0.0,
            &x.t().unwrap().contiguous().unwrap().t().unwrap(),
        ));
        assert!(wrong.contains("dx is not contiguous"), "{wrong}");
        let square = constant(1.0, &[3, 3], DType::F32);
        let wrong = message(forward(Factors::Exact, &square, &square, None, 1.0, 0.0, &square));
        assert!(wrong.contains("out shares its storage with x"), "{wrong}");
        let empty = Tensor::zeros((0, 5), DType::F32, &candle_core::Device::Cpu).unwrap();
        let wrong = message(forward(Factors::Exact, &empty, &w, Some(&b), 1.0, 0.0, &dy));
        assert!(wrong.contains("x has shape [0, 5], expected a matrix that is not empty"), "{wrong}");
        let half = x.to_dtype(DType::BF16).unwrap();
        let wrong =
            message(forward(Factors::Exact, &half, &half, None, 1.0, 0.0, &half.matmul(&half.t().unwrap()).unwrap()));
        assert!(wrong.contains("no kernel for BF16"), "{wrong}");
    }
}
