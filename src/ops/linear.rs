//! Affine map of rows: y = x wᵀ + b.
use super::access::{check, matrix_shape, on_cpu, read, write};
use super::matrix::{Mat, MatMut, multiply_parallel};
use super::real::{Real, rows_per_piece, vectorized, with_scratch};
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// out = beta * out + alpha * (x wᵀ + b).  x [n, i], w [o, i], b [o], out [n, o]. beta = 0 never reads out.
pub fn forward(x: &Tensor, w: &Tensor, b: Option<&Tensor>, alpha: f64, beta: f64, out: &Tensor) -> Result<()> {
    const OP: &str = "linear::forward";
    let (n, i) = matrix_shape(OP, "x", x)?;
    let (o, _) = matrix_shape(OP, "w", w)?;
    check(OP, x.dtype(), &[("x", x, &[n, i]), ("w", w, &[o, i])], &[("out", out, &[n, o])])?;
    if let Some(b) = b {
        check(OP, x.dtype(), &[("b", b, &[o])], &[("out", out, &[n, o])])?;
    }
    on_cpu!(OP, out, T => {
        let (x, w) = (read::<T>(x)?, read::<T>(w)?);
        let b = b.map(read::<T>).transpose()?;
        write(out, |out: &mut [T]| {
            let mut beta = beta;
            if let Some(b) = b {
                scale_and_add_to_rows(T::of(beta), T::of(alpha), &b, out);
                beta = 1.0;
            }
            multiply_parallel(alpha, Mat::new(&x, i), Mat::new(&w, i).t(), beta, MatMut::new(out, o));
            Ok(())
        })
    })
}

/// dx = beta * dx + alpha * dy w. dy [n, o], w [o, i], dx [n, i]. beta = 0 never reads dx.
pub fn backward_input(dy: &Tensor, w: &Tensor, alpha: f64, beta: f64, dx: &Tensor) -> Result<()> {
    const OP: &str = "linear::backward_input";
    let (n, o) = matrix_shape(OP, "dy", dy)?;
    let (_, i) = matrix_shape(OP, "w", w)?;
    check(OP, dy.dtype(), &[("dy", dy, &[n, o]), ("w", w, &[o, i])], &[("dx", dx, &[n, i])])?;
    on_cpu!(OP, dx, T => {
        let (dy, w) = (read::<T>(dy)?, read::<T>(w)?);
        write(dx, |dx: &mut [T]| {
            multiply_parallel(alpha, Mat::new(&dy, o), Mat::new(&w, i), beta, MatMut::new(dx, i));
            Ok(())
        })
    })
}

/// dw += alpha * dyᵀ x;  db += alpha * column sums of dy. dy [n, o], x [n, i], dw [o, i], db [o]; dw and db may be
/// views of one storage.
pub fn backward_weight(dy: &Tensor, x: &Tensor, alpha: f64, dw: &Tensor, db: Option<&Tensor>) -> Result<()> {
    const OP: &str = "linear::backward_weight";
    let (n, o) = matrix_shape(OP, "dy", dy)?;
    let (_, i) = matrix_shape(OP, "x", x)?;
    check(OP, dy.dtype(), &[("dy", dy, &[n, o]), ("x", x, &[n, i])], &[("dw", dw, &[o, i])])?;
    if let Some(db) = db {
        check(OP, dy.dtype(), &[("dy", dy, &[n, o])], &[("db", db, &[o])])?;
    }
    on_cpu!(OP, dw, T => {
        let (dy, x) = (read::<T>(dy)?, read::<T>(x)?);
        write(dw, |dw: &mut [T]| {
            multiply_parallel(alpha, Mat::new(&dy, o).t(), Mat::new(&x, i), 1.0, MatMut::new(dw, i));
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
fn scale_and_add_to_rows<T: Real>(beta: T, alpha: T, b: &[T], out: &mut [T]) {
    out.par_chunks_mut(rows_per_piece(b.len()) * b.len()).for_each(|rows| {
        vectorized(
            #[inline(always)]
            || {
                for row in rows.chunks_exact_mut(b.len()) {
                    if beta == T::zero() {
                        row.iter_mut().zip(b).for_each(|(out, &b)| *out = alpha * b);
                    } else {
                        row.iter_mut().zip(b).for_each(|(out, &b)| *out = beta * *out + alpha * b);
                    }
                }
            },
        );
    });
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
