//! Token and position embedding.
use super::access::{check, check_indices, matrix_shape, on_cpu, read, write};
use super::matrix::MatMut;
use super::real::{Real, rows_per_piece};
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// out[i] = wte[tokens[i]] + wpe[i mod T]   (=).  tokens U32 [n], wte [V, d], wpe [T, d], out [n, d].
pub fn forward(tokens: &Tensor, wte: &Tensor, wpe: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "embedding::forward";
    let n = tokens.elem_count();
    let (vocab, d) = matrix_shape(OP, "wte", wte)?;
    let (context, _) = matrix_shape(OP, "wpe", wpe)?;
    check(OP, DType::U32, &[("tokens", tokens, &[n])], &[])?;
    check(OP, wte.dtype(), &[("wte", wte, &[vocab, d]), ("wpe", wpe, &[context, d])], &[("out", out, &[n, d])])?;
    on_cpu!(OP, out, T => {
        let (tokens, wte, wpe) = (read::<u32>(tokens)?, read::<T>(wte)?, read::<T>(wpe)?);
        check_indices(OP, "token", &tokens, vocab)?;
        write(out, |out: &mut [T]| {
            let rows = out.par_chunks_mut(d).zip(tokens.par_iter()).enumerate();
            rows.with_min_len(rows_per_piece(d)).for_each(|(i, (out, &token))| {
                let (token, position) = (token as usize, i % context);
                let sources = wte[token * d..][..d].iter().zip(&wpe[position * d..][..d]);
                out.iter_mut().zip(sources).for_each(|(out, (&t, &p))| *out = t + p);
            });
            Ok(())
        })
    })
}

/// dwte[tokens[i]] += dx[i];  dwpe[i mod T] += dx[i]. dwte, dwpe may be views of one storage. Deterministic for any
/// number of threads.
pub fn backward(tokens: &Tensor, dx: &Tensor, dwte: &Tensor, dwpe: &Tensor) -> Result<()> {
    const OP: &str = "embedding::backward";
    let n = tokens.elem_count();
    let (vocab, d) = matrix_shape(OP, "dwte", dwte)?;
    let (context, _) = matrix_shape(OP, "dwpe", dwpe)?;
    check(OP, DType::U32, &[("tokens", tokens, &[n])], &[])?;
    check(OP, dx.dtype(), &[("dx", dx, &[n, d])], &[("dwte", dwte, &[vocab, d])])?;
    check(OP, dx.dtype(), &[("dx", dx, &[n, d])], &[("dwpe", dwpe, &[context, d])])?;
    on_cpu!(OP, dx, T => {
        let (tokens, dx) = (read::<u32>(tokens)?, read::<T>(dx)?);
        check_indices(OP, "token", &tokens, vocab)?;
        write(dwte, |dwte: &mut [T]| {
            add_to_rows(&dx, |i| tokens[i] as usize, MatMut::new(dwte, d));
            Ok(())
        })?;
        write(dwpe, |dwpe: &mut [T]| {
            add_to_rows(&dx, |i| i % context, MatMut::new(dwpe, d));
            Ok(())
        })
    })
}

/// sums[index(i)] += x[i], a task for each strip of columns, so that every sum is taken in the order of i.
fn add_to_rows<T: Real>(x: &[T], index: impl Fn(usize) -> usize + Sync, sums: MatMut<T>) {
    const STRIP: usize = 64;
    let d = sums.cols();
    (0..d.div_ceil(STRIP)).into_par_iter().for_each(|strip| {
        let columns = strip * STRIP..((strip + 1) * STRIP).min(d);
        // SAFETY: strips do not overlap.
        let mut sums = unsafe { sums.disjoint_block(0..sums.rows(), columns.clone()) };
        for (i, x) in x.chunks_exact(d).enumerate() {
            sums.row(index(i)).iter_mut().zip(&x[columns.clone()]).for_each(|(sum, &x)| *sum += x);
        }
    });
}
