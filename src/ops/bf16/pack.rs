//! Packing: f32 to pairs of bf16 in the order in which kernels read them.
//!
//! A pair holds elements 2p and 2p+1 of k, the first in the low half. A step of a panel is two tiles of 16 × 16 pairs:
//! of a panel of a [row][p], of one of b [p][column]. Beyond the matrix are zeros.
use super::super::matrix::Mat;
use super::super::real::with_scratch;
use super::{PANEL, STEP, TILE};
use half::bf16;

type Tile = [u32; TILE * TILE];

/// Lends `f` a buffer of `len` pairs of unspecified value that begins at a cache line.
pub fn with_pairs<R>(len: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    const LINE: usize = 16;
    with_scratch(len + LINE, |scratch: &mut [f32]| {
        // SAFETY: f32 and u32 have one size and alignment, and any bits are both.
        let pairs = unsafe { std::slice::from_raw_parts_mut(scratch.as_mut_ptr().cast::<u32>(), scratch.len()) };
        let start = pairs.as_ptr().align_offset(64).min(LINE);
        f(&mut pairs[start..start + len])
    })
}

/// packed = panels of 32 rows of alpha a.
pub fn rows(alpha: f32, a: Mat<f32>, packed: &mut [u32]) {
    panels(alpha, a, Order::LinesFirst, packed);
}

/// packed = panels of 32 columns of b.
pub fn columns(b: Mat<f32>, packed: &mut [u32]) {
    panels(1.0, b.t(), Order::PairsFirst, packed);
}

/// How a tile is kept: [line][p] or [p][line].
#[derive(Clone, Copy, PartialEq)]
enum Order {
    LinesFirst,
    PairsFirst,
}

/// Panels of 32 lines of factor x [lines, k].
fn panels(factor: f32, x: Mat<f32>, order: Order, packed: &mut [u32]) {
    let (lines, k) = (x.row_count(), x.col_count());
    let mut tiles = packed.as_chunks_mut::<{ TILE * TILE }>().0.iter_mut();
    for panel in (0..lines).step_by(PANEL) {
        for step in (0..k).step_by(STEP) {
            for line in [panel, panel + TILE] {
                let tile = tiles.next().expect("a tile for each half of a step");
                let (lines, k) = (line.min(lines)..(line + TILE).min(lines), step..(step + STEP).min(k));
                fill(factor, x.block(lines, k), order, tile);
            }
        }
    }
}

/// tile = factor x, at most 16 lines and 32 elements of k.
fn fill(factor: f32, x: Mat<f32>, order: Order, tile: &mut Tile) {
    #[cfg(target_arch = "x86_64")]
    if x.row_count() == TILE && x.col_count() == STEP && super::kernel::has_avx512_bf16() {
        // SAFETY: the CPU has the instructions, and the tile is whole.
        return unsafe { avx512::fill(factor, x, order, tile) };
    }
    let at = |line: usize, k: usize| {
        let inside = line < x.row_count() && k < x.col_count();
        if inside { u32::from(bf16::from_f32(factor * x.at(line, k)).to_bits()) } else { 0 }
    };
    for line in 0..TILE {
        for p in 0..TILE {
            let pair = at(line, 2 * p) | at(line, 2 * p + 1) << 16;
            tile[if order == Order::LinesFirst { line * TILE + p } else { p * TILE + line }] = pair;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Mat, Order, TILE, Tile};
    use std::arch::x86_64::*;

    /// tile = factor x, x [16, 32].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn fill(factor: f32, x: Mat<f32>, order: Order, tile: &mut Tile) {
        let factor = _mm512_set1_ps(factor);
        // Of the elements that lie together: 16 of k from each line, or 16 lines for each k.
        let load = |row: usize, col: usize| _mm512_mul_ps(factor, unsafe { _mm512_loadu_ps(x.pointer(row, col)) });
        let (vectors, given) = if x.is_row_major() {
            let pairs = |line| as_integers(_mm512_cvtne2ps_pbh(load(line, 16), load(line, 0)));
            (std::array::from_fn(pairs), Order::LinesFirst)
        } else {
            let pairs = |p| interleave(as_integers(_mm512_cvtne2ps_pbh(load(0, 2 * p + 1), load(0, 2 * p))));
            (std::array::from_fn(pairs), Order::PairsFirst)
        };
        let vectors: [__m512i; TILE] = if given == order { vectors } else { transpose(vectors) };
        for (vector, out) in vectors.iter().zip(tile.as_chunks_mut::<TILE>().0) {
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *vector) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn as_integers(x: __m512bh) -> __m512i {
        // SAFETY: both are 512 bits without a meaning of their own.
        unsafe { std::mem::transmute(x) }
    }

    /// Pairs of an element of the lower half and one of the upper half.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn interleave(halves: __m512i) -> __m512i {
        #[rustfmt::skip]
        let from = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
            23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
        );
        _mm512_permutexvar_epi16(from, halves)
    }

    /// The transpose: within quarters of four rows and columns, then the quarters.
    #[target_feature(enable = "avx512f")]
    fn transpose(x: [__m512i; TILE]) -> [__m512i; TILE] {
        // Of the quarters of rows 4q + r: y[4q + c] has columns c, c + 4, c + 8, c + 12 of rows 4q .. 4q + 4.
        let mut y = x;
        for q in (0..TILE).step_by(4) {
            let (a, b) = (_mm512_unpacklo_epi32(x[q], x[q + 1]), _mm512_unpackhi_epi32(x[q], x[q + 1]));
            let (c, d) = (_mm512_unpacklo_epi32(x[q + 2], x[q + 3]), _mm512_unpackhi_epi32(x[q + 2], x[q + 3]));
            y[q] = _mm512_unpacklo_epi64(a, c);
            y[q + 1] = _mm512_unpackhi_epi64(a, c);
            y[q + 2] = _mm512_unpacklo_epi64(b, d);
            y[q + 3] = _mm512_unpackhi_epi64(b, d);
        }
        // Column 4l + c is quarter l of y[c], y[4 + c], y[8 + c], y[12 + c].
        let mut out = x;
        for c in 0..4 {
            let (low, high) =
                (_mm512_shuffle_i32x4::<0x44>(y[c], y[4 + c]), _mm512_shuffle_i32x4::<0xEE>(y[c], y[4 + c]));
            let (low2, high2) =
                (_mm512_shuffle_i32x4::<0x44>(y[8 + c], y[12 + c]), _mm512_shuffle_i32x4::<0xEE>(y[8 + c], y[12 + c]));
            out[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
            out[4 + c] = _mm512_shuffle_i32x4::<0xDD>(low, low2);
            out[8 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
            out[12 + c] = _mm512_shuffle_i32x4::<0xDD>(high, high2);
        }
        out
    }
}
