//! Affine map of rows: y = x wᵀ + b.
use super::access::{check, check_mixed, is_same, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda::{self, Address, BIAS_ALIGNMENT, Gpu, Product};
use super::matrix::{Factors, Mat, MatMut, for_each_tile, multiply, multiply_parallel};
use super::profile;
use super::real::{Real, rows_per_piece, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// out = onto + alpha * (x wᵀ + b).  x [n, i], w [o, i], b [o], onto and out [n, o]; without `onto` nothing is added, and it may be out
/// itself.
pub fn forward(
    factors: Factors,
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    alpha: f64,
    onto: Option<&Tensor>,
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
    let elsewhere = onto.filter(|onto| !is_same(onto, out));
    if let Some(onto) = elsewhere {
        check(OP, x.dtype(), &[("onto", onto, &[n, o])], &[("out", out, &[n, o])])?;
    }
    on_device!(OP, out, gpu => {
        let onto = onto.map(|onto| gpu.matrix(onto, o)).transpose()?;
        let product = Product::new([n, o, i], gpu.matrix(x, i)?, gpu.matrix(w, i)?.t(), gpu.matrix(out, o)?);
        let (beta, c) = onto.map_or((0.0, product.out), |onto| (1.0, onto));
        let product = Product { alpha, beta, c, ..product };
        match b {
            Some(b) => multiply_with_bias(OP, &gpu, product, b),
            None => gpu.multiply(product),
        }
    }, T => {
        let (x, w) = (read::<T>(x)?, read::<T>(w)?);
        let (b, elsewhere) = (b.map(read::<T>).transpose()?, elsewhere.map(read::<T>).transpose()?);
        let (x, w) = (Mat::new(&x, i), Mat::new(&w, i).t());
        let elsewhere = elsewhere.as_ref().map(|onto| Mat::new(onto, o));
        write(out, |out: &mut [T]| {
            for_each_tile(MatMut::new(out, o), |mut tile| {
                let (rows, cols) = (tile.rows.clone(), tile.cols.clone());
                let start = match (elsewhere, onto) {
                    (Some(elsewhere), _) => Start::From(elsewhere.block(rows, cols)),
                    (None, Some(_)) => Start::Kept,
                    (None, None) => Start::Zero,
                };
                let b = b.as_ref().map(|b| &b[tile.cols.clone()]);
                let beta = begin_rows(start, T::of(alpha), b, &mut tile.elements);
                multiply(factors, alpha, x.rows(tile.rows), w.columns(tile.cols), beta, tile.elements);
            });
            Ok(())
        })
    })
}

/// The product, and alpha b added to each row: as it ends or, where cuBLASLt may not do that, before.
#[cfg(any(feature = "cuda", test))]
fn multiply_with_bias(op: &str, gpu: &Gpu, product: Product, b: &Tensor) -> Result<()> {
    let Product { shape: [n, o, _], alpha, beta, c, out, .. } = product;
    let (element, at, alpha) = (gpu.element(op, b)?, gpu.at(b)?, alpha as f32);
    if !product.takes_bias() {
        let start = if beta == 0.0 { Address::NONE } else { c.at };
        let width = cuda::length(op, "width", o)?;
        gpu.launch(op, |k, stream| Ok(unsafe { (k.begin_rows)(element, alpha, at, start, out.at, n, width, stream) }))?;
        return gpu.multiply(Product { beta: 1.0, c: out, ..product });
    }
    if alpha == 1.0 && at.is_aligned(BIAS_ALIGNMENT) {
        return gpu.multiply(Product { bias: Some(at), ..product });
    }
    let [scaled] = gpu.scratch([o * b.dtype().size_in_bytes()])?;
    gpu.launch(op, |k, stream| Ok(unsafe { (k.combine)(element, alpha, at, 0.0, at, scaled, o, stream) }))?;
    gpu.multiply(Product { bias: Some(scaled), ..product })
}

/// dx = beta * dx + alpha * dy w. dy [n, o], w [o, i], dx [n, i]. beta = 0 never reads dx.
pub fn backward_input(factors: Factors, dy: &Tensor, w: &Tensor, alpha: f64, beta: f64, dx: &Tensor) -> Result<()> {
    const OP: &str = "linear::backward_input";
    let (n, o) = matrix_shape(OP, "dy", dy)?;
    let (_, i) = matrix_shape(OP, "w", w)?;
    let _time = profile::time_product(OP, [o, i]);
    check(OP, dy.dtype(), &[("dy", dy, &[n, o]), ("w", w, &[o, i])], &[("dx", dx, &[n, i])])?;
    on_device!(OP, dx, gpu => {
        let product = Product::new([n, i, o], gpu.matrix(dy, o)?, gpu.matrix(w, i)?, gpu.matrix(dx, i)?);
        gpu.multiply(Product { alpha, beta, ..product })
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
        let product = Product::new([o, i, n], gpu.matrix(dy, o)?.t(), gpu.matrix(x, i)?, gpu.matrix(dw, i)?);
        gpu.multiply(Product { alpha, beta: 1.0, ..product })?;
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

/// What a product is added to.
enum Start<'a, T> {
    Zero,
    /// What is there.
    Kept,
    From(Mat<'a, T>),
}

/// Each row of out = start + alpha * b, as far as it is not 0 or there already. Returns the β of the product that is still to be added.
fn begin_rows<T: Real>(start: Start<T>, alpha: T, b: Option<&[T]>, out: &mut MatMut<T>) -> f64 {
    let beta = if matches!((&start, b), (Start::Zero, None)) { 0.0 } else { 1.0 };
    vectorized(
        #[inline(always)]
        || {
            for row in 0..out.rows() {
                let out = out.row(row);
                match (&start, b) {
                    (Start::Zero | Start::Kept, None) => return,
                    (Start::Zero, Some(b)) => out.iter_mut().zip(b).for_each(|(out, &b)| *out = alpha * b),
                    (Start::Kept, Some(b)) => out.iter_mut().zip(b).for_each(|(out, &b)| *out += alpha * b),
                    (Start::From(start), None) => out.copy_from_slice(start.row(row)),
                    (Start::From(start), Some(b)) => {
                        let terms = start.row(row).iter().zip(b);
                        out.iter_mut().zip(terms).for_each(|(out, (&start, &b))| *out = start + alpha * b);
                    }
                }
            }
        },
    );
    beta
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
                forward(Factors::Exact, &x, &w, Some(&b), 0.5, None, &out).unwrap();
                assert_close(&out, &(&affine * 0.5).unwrap(), tolerance);
                forward(Factors::Exact, &x, &w, None, 1.0, None, &out).unwrap();
                assert_close(&out, &product, tolerance);
                forward(Factors::Exact, &x, &w, None, 1.0, Some(&y0), &out).unwrap();
                assert_close(&out, &(&y + &product).unwrap(), tolerance);
                let added = (&y - (&affine * 2.0).unwrap()).unwrap();
                forward(Factors::Exact, &x, &w, Some(&b), -2.0, Some(&y0), &out).unwrap();
                assert_close(&out, &added, tolerance);
                forward(Factors::Exact, &x, &w, Some(&b), -2.0, Some(&y0), &y0).unwrap();
                assert_close(&y0, &added, tolerance);
                assert_close(&y0, &out, 0.0);
                forward(Factors::Exact, &x, &w, None, 1.0, Some(&y0), &y0).unwrap();
                assert_close(&y0, &(&added + &product).unwrap(), tolerance);
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
                forward(Factors::Exact, &inputs[0], &inputs[1], Some(&inputs[2]), 0.5, None, &out).unwrap();
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
            forward(Factors::Exact, &x, &w, Some(&b), 1.0, None, &out).unwrap();
            backward_input(Factors::Exact, &dy, &w, 1.0, 0.0, &dx).unwrap();
            backward_weight(Factors::Exact, &dy, &x, 1.0, &dw, Some(&db)).unwrap();
            vec![out, dx, dw, db]
        });
    }

    #[test]
    fn wrong_arguments_are_named() {
        let [x, w, b, dy] = inputs([3, 5, 2], DType::F32);
        let message = |result: Result<()>| result.unwrap_err().to_string();
        let wrong = message(forward(Factors::Exact, &x, &w, Some(&x), 1.0, None, &dy));
        assert!(wrong.contains("b has shape [3, 5], expected [2]"), "{wrong}");
        let wrong = message(forward(Factors::Exact, &x, &w.to_dtype(DType::F64).unwrap(), Some(&b), 1.0, None, &dy));
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
        let wrong = message(forward(Factors::Exact, &square, &square, None, 1.0, None, &square));
        assert!(wrong.contains("out shares its storage with x"), "{wrong}");
        let empty = Tensor::zeros((0, 5), DType::F32, &candle_core::Device::Cpu).unwrap();
        let wrong = message(forward(Factors::Exact, &empty, &w, Some(&b), 1.0, None, &dy));
        assert!(wrong.contains("x has shape [0, 5], expected a matrix that is not empty"), "{wrong}");
        let half = x.to_dtype(DType::BF16).unwrap();
        let wrong =
            message(forward(Factors::Exact, &half, &half, None, 1.0, None, &half.matmul(&half.t().unwrap()).unwrap()));
        assert!(wrong.contains("no kernel for BF16"), "{wrong}");
    }
}
