//! Products of f32 matrices with both factors rounded to bf16, sums in f32:
//!
//! ```text
//! c = beta c + bf16(alpha a) bf16(b)
//! ```
//!
//! The factors are packed ([`pack`]) into panels of 32 rows of a and 32 columns of b, in the order in which the kernels
//! ([`kernel`]) read them; a kernel adds the product of two panels to a block of c. A CPU without instructions for
//! products of bf16 multiplies the rounded factors in f32.
mod kernel;
mod pack;

use super::matrix::{Mat, MatMut, multiply_exactly};
use super::real::{Real, blocks, with_scratches};
use half::bf16;
use kernel::Kernel;

/// Rows and columns of a tile, in pairs of bf16.
const TILE: usize = 16;
/// Rows of a panel of a, columns of one of b: two tiles.
const PANEL: usize = 2 * TILE;
/// Elements of k in a step of a kernel: a row of a tile.
const STEP: usize = 2 * TILE;
/// Pairs of bf16 that a step reads from a panel.
const STEP_PAIRS: usize = PANEL * TILE;
/// At most this many elements of k are packed at once: 32 KiB a panel.
const MAX_K: usize = 512;
/// Rows of a and columns of b that are packed at once: 128 KiB and 1 MiB, which stay in a second cache of 2 MiB.
const MAX_ROWS: usize = 128;
const MAX_COLS: usize = 1024;

/// What this CPU multiplies bf16 with.
pub fn instructions() -> &'static str {
    Kernel::of_this_cpu().map_or("f32, rounded before", Kernel::name)
}

/// c = beta c + bf16(alpha a) bf16(b) on this thread. beta = 0 does not read c.
///
/// An element of c gets the same bits whatever larger product this one is a tile of.
pub fn multiply(alpha: f64, a: Mat<f32>, b: Mat<f32>, beta: f64, c: MatMut<f32>) {
    match Kernel::of_this_cpu() {
        Some(kernel) => by_blocks(kernel, alpha, a, b, beta, c),
        None => multiply_rounded(alpha, a, b, beta, c),
    }
}

/// As [`multiply`], by a product of f32 or f64.
pub fn multiply_rounded<T: Real>(alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    let (rows, cols, k) = (a.row_count(), b.col_count(), a.col_count());
    with_scratches([rows * k, k * cols], |[rounded_a, rounded_b]: [&mut [T]; 2]| {
        round(alpha, a, rounded_a);
        round(1.0, b, rounded_b);
        multiply_exactly(1.0, Mat::new(rounded_a, k), Mat::new(rounded_b, cols), beta, c);
    });
}

/// out = bf16(factor x), row by row.
fn round<T: Real>(factor: f64, x: Mat<T>, out: &mut [T]) {
    let factor = T::of(factor);
    for (i, out) in out.chunks_exact_mut(x.col_count().max(1)).enumerate() {
        for (j, out) in out.iter_mut().enumerate() {
            *out = T::of(bf16::from_f64((factor * x.at(i, j)).to_f64()).to_f64());
        }
    }
}

/// As [`multiply`], by `kernel`; k ≥ 1. Kernels set c or add to it: another beta is applied before.
fn by_blocks(kernel: Kernel, alpha: f64, a: Mat<f32>, b: Mat<f32>, beta: f64, mut c: MatMut<f32>) {
    let (rows, cols, k) = (a.row_count(), b.col_count(), a.col_count());
    assert!(k > 0, "a product of nothing");
    if beta != 0.0 && beta != 1.0 {
        (0..rows).for_each(|i| c.row(i).iter_mut().for_each(|c| *c *= beta as f32));
    }
    let panels = |n: usize| n.div_ceil(PANEL);
    let steps = k.min(MAX_K).div_ceil(STEP);
    let (a_len, b_len) =
        (panels(rows.min(MAX_ROWS)) * steps * STEP_PAIRS, panels(cols.min(MAX_COLS)) * steps * STEP_PAIRS);
    pack::with_pairs(a_len + b_len, |pairs| {
        let (packed_a, packed_b) = pairs.split_at_mut(a_len);
        kernel.session(|kernel| {
            for k in blocks(k, MAX_K) {
                let keep = beta != 0.0 || k.start > 0;
                for cols in blocks(cols, MAX_COLS) {
                    pack::columns(b.block(k.clone(), cols.clone()), packed_b);
                    for rows in blocks(rows, MAX_ROWS) {
                        pack::rows(alpha as f32, a.block(rows.clone(), k.clone()), packed_a);
                        let c = c.block(rows, cols.clone());
                        multiply_packed(kernel, k.len().div_ceil(STEP), packed_a, packed_b, keep, c);
                    }
                }
            }
        });
    });
}

/// c = the product of packed panels of `steps` steps, added to c if `keep`.
fn multiply_packed(kernel: &kernel::Session, steps: usize, a: &[u32], b: &[u32], keep: bool, mut c: MatMut<f32>) {
    let panel = steps * STEP_PAIRS;
    for (cols, b) in blocks(c.cols(), PANEL).zip(b.chunks_exact(panel)) {
        for (rows, a) in blocks(c.rows(), PANEL).zip(a.chunks_exact(panel)) {
            kernel.multiply(a, b, keep, c.block(rows, cols.clone()));
        }
    }
}

#[cfg(test)]
mod tests;
