//! Products with a right factor that is packed once for many products: small ones, whose factors lie in the first caches, where
//! packing anew for each takes much of the time of the `gemm` crate.
//!
//! ```text
//! c = beta c + alpha a b
//! ```
//!
//! b is cut into panels of two vectors of columns, each stored row by row. A kernel holds a few rows of c, as wide as a
//! panel, in registers, and reads a where it is, whatever its strides.
use super::matrix::{Factors, Mat, MatMut, multiply};
use super::real::{Real, blocks};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Vectors in a row of a panel.
const VECTORS: usize = 2;
/// A panel is at most this wide: f32 in AVX-512.
pub const WIDEST: usize = 32;

/// Vector instructions for elements T.
pub trait Vectors<T>: Copy {
    type V: Copy;
    const LANES: usize = size_of::<Self::V>() / size_of::<T>();
    fn splat(self, x: T) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b + c, rounded once where there is an instruction for it.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
}

macro_rules! vectors {
    ($t:ty, $v:ident, $splat:ident, $mul:ident, $mul_add:ident) => {
        impl WithSimd for Product<'_, $t> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                self.run(simd)
            }
        }
        impl<S: Simd> Vectors<$t> for S {
            type V = S::$v;
            #[inline(always)]
            fn splat(self, x: $t) -> S::$v {
                self.$splat(x)
            }
            #[inline(always)]
            fn mul(self, a: S::$v, b: S::$v) -> S::$v {
                self.$mul(a, b)
            }
            #[inline(always)]
            fn mul_add(self, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
                self.$mul_add(a, b, c)
            }
        }
    };
}

vectors!(f32, f32s, splat_f32s, mul_f32s, mul_add_e_f32s);
vectors!(f64, f64s, splat_f64s, mul_f64s, mul_add_e_f64s);

/// A packed right factor.
#[derive(Clone, Copy)]
pub struct Packed<'a, T> {
    panels: &'a [T],
    rows: usize,
    cols: usize,
    /// Columns of a panel.
    width: usize,
}

impl<'a, T: Real> Packed<'a, T> {
    /// Elements that [`Packed::new`] needs for a matrix of this shape.
    pub fn len(rows: usize, cols: usize) -> usize {
        rows * cols.next_multiple_of(WIDEST)
    }

    /// b, packed into `panels`.
    pub fn new(b: Mat<T>, panels: &'a mut [T]) -> Packed<'a, T> {
        let (rows, cols, width) = (b.row_count(), b.col_count(), width::<T>());
        assert!(rows > 0, "a factor of nothing");
        let panels = &mut panels[..rows * cols.next_multiple_of(width)];
        for (panel, cols) in panels.chunks_exact_mut(rows * width).zip(blocks(cols, width)) {
            let b = b.columns(cols);
            for (i, row) in panel.chunks_exact_mut(width).enumerate() {
                let (row, rest) = row.split_at_mut(b.col_count());
                match b.is_row_major() {
                    true => row.copy_from_slice(b.row(i)),
                    false => {
                        let (column, stride) = (b.pointer(i, 0), b.col_stride());
                        // SAFETY: the row has as many columns as b.
                        row.iter_mut().enumerate().for_each(|(j, x)| *x = unsafe { *column.add(j * stride) });
                    }
                }
                rest.fill(T::zero());
            }
        }
        Packed { panels, rows, cols, width }
    }

    /// c = beta c + alpha a b on this thread, with the first rows of b if a has fewer columns, and its first columns if c has
    /// fewer. beta = 0 does not read c. An element of c is added up in the order of the rows of b.
    pub fn multiply(self, alpha: f64, a: Mat<T>, beta: f64, c: MatMut<T>) {
        assert!(
            a.row_count() == c.rows() && a.col_count() <= self.rows && c.cols() <= self.cols,
            "shapes of a product"
        );
        T::multiply_packed(Product { alpha: T::of(alpha), a, b: self, beta: T::of(beta), c });
    }
}

/// A right factor of many products: packed, or where factors are rounded as it is, for then each product packs.
pub enum Right<'a, T> {
    Exact(Packed<'a, T>),
    Bf16(Mat<'a, T>),
}

impl<'a, T: Real> Right<'a, T> {
    /// b, packed into `panels` of [`Packed::len`].
    pub fn new(factors: Factors, b: Mat<'a, T>, panels: &'a mut [T]) -> Right<'a, T> {
        match factors {
            Factors::Exact => Right::Exact(Packed::new(b, panels)),
            Factors::Bf16 => Right::Bf16(b),
        }
    }

    /// As [`Packed::multiply`].
    pub fn multiply(&self, alpha: f64, a: Mat<T>, beta: f64, c: MatMut<T>) {
        match *self {
            Right::Exact(b) => b.multiply(alpha, a, beta, c),
            Right::Bf16(b) => multiply(Factors::Bf16, alpha, a, b.block(0..a.col_count(), 0..c.cols()), beta, c),
        }
    }
}

/// Columns of a panel on this CPU.
fn width<T: Real>() -> usize {
    struct VectorBytes;
    impl WithSimd for VectorBytes {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            size_of::<S::f32s>()
        }
    }
    VECTORS * pulp::Arch::new().dispatch(VectorBytes) / size_of::<T>()
}

/// c = beta c + alpha a b, to be done by the vector instructions of the CPU.
pub struct Product<'a, T> {
    alpha: T,
    a: Mat<'a, T>,
    b: Packed<'a, T>,
    beta: T,
    c: MatMut<'a, T>,
}

impl<T: Real> Product<'_, T> {
    #[inline(always)]
    fn run<S: Vectors<T>>(mut self, simd: S) {
        let (cols, width) = (self.c.cols(), self.b.width);
        assert_eq!(width, VECTORS * S::LANES, "packed for these vectors");
        for (panel, cols) in self.b.panels.chunks_exact(self.b.rows * width).zip(blocks(cols, width)) {
            self.panel(simd, panel, cols);
        }
    }

    /// The columns of c that are a panel's.
    #[inline(always)]
    fn panel<S: Vectors<T>>(&mut self, simd: S, panel: &[T], cols: Range<usize>) {
        // With sixteen registers twelve sums leave room for a row of the panel.
        let rows = self.c.rows();
        let mut first = 0;
        while first < rows {
            first += match rows - first {
                1 => self.tile::<S, 1>(simd, panel, first, cols.clone()),
                2 => self.tile::<S, 2>(simd, panel, first, cols.clone()),
                3 => self.tile::<S, 3>(simd, panel, first, cols.clone()),
                4 => self.tile::<S, 4>(simd, panel, first, cols.clone()),
                5 => self.tile::<S, 5>(simd, panel, first, cols.clone()),
                _ => self.tile::<S, 6>(simd, panel, first, cols.clone()),
            };
        }
    }

    /// ROWS rows of c from `first` on, of the columns of a panel; returns ROWS.
    #[inline(always)]
    fn tile<S: Vectors<T>, const ROWS: usize>(
        &mut self,
        simd: S,
        panel: &[T],
        first: usize,
        cols: Range<usize>,
    ) -> usize {
        let sums = sums::<T, S, ROWS>(simd, self.a.rows(first..first + ROWS), panel);
        let (scales, mut c) = ([self.alpha, self.beta], self.c.block(first..first + ROWS, cols));
        let stride = c.row_stride();
        if c.cols() == VECTORS * S::LANES {
            // SAFETY: c is as large as the sums.
            unsafe { write(simd, scales, sums, c.row(0).as_mut_ptr(), stride) };
            return ROWS;
        }
        let (mut edge, len) = ([[T::zero(); WIDEST]; ROWS], c.cols());
        edge.iter_mut().enumerate().for_each(|(i, edge)| edge[..len].copy_from_slice(c.row(i)));
        // SAFETY: `edge` is as large as the widest sums.
        unsafe { write(simd, scales, sums, edge.as_mut_ptr().cast(), WIDEST) };
        edge.iter().enumerate().for_each(|(i, edge)| c.row(i).copy_from_slice(&edge[..len]));
        ROWS
    }
}

/// c = beta c + alpha sums
///
/// # Safety
/// `c` is ROWS rows of a panel's width, `stride` elements apart, that may be written.
#[inline(always)]
unsafe fn write<T: Real, S: Vectors<T>, const ROWS: usize>(
    simd: S,
    [alpha, beta]: [T; 2],
    sums: [[S::V; VECTORS]; ROWS],
    c: *mut T,
    stride: usize,
) {
    let is_set = beta == T::zero();
    let (alpha, beta) = (simd.splat(alpha), simd.splat(beta));
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            let scaled = simd.mul(alpha, sum);
            unsafe {
                let c = c.add(i * stride + j * S::LANES).cast::<S::V>();
                c.write_unaligned(if is_set { scaled } else { simd.mul_add(beta, c.read_unaligned(), scaled) });
            }
        }
    }
}

/// The product of ROWS rows of a with as many rows of a panel as a has columns.
#[inline(always)]
fn sums<T: Real, S: Vectors<T>, const ROWS: usize>(simd: S, a: Mat<T>, panel: &[T]) -> [[S::V; VECTORS]; ROWS] {
    let mut sums = [[simd.splat(T::zero()); VECTORS]; ROWS];
    let width = VECTORS * S::LANES;
    let (k, row_stride, col_stride) = (a.col_count(), a.row_stride(), a.col_stride());
    assert!(a.row_count() == ROWS && k * width <= panel.len());
    // A loop that may not run at all would keep one of the sums on the stack: attention took 1.35 times as long (AVX2).
    if k == 0 {
        return sums;
    }
    let (a, panel) = (a.pointer(0, 0), panel.as_ptr());
    for p in 0..k {
        // SAFETY: p < k, and both have been checked to hold k columns or rows.
        unsafe {
            let row = panel.add(p * width).cast::<S::V>();
            let b: [S::V; VECTORS] = std::array::from_fn(|j| row.add(j).read_unaligned());
            for (i, sums) in sums.iter_mut().enumerate() {
                let a = simd.splat(*a.add(i * row_stride + p * col_stride));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = simd.mul_add(a, b, *sum);
                }
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::matrix::{Factors, multiply};

    fn element(i: usize) -> f64 {
        ((i * 7919) % 1009) as f64 / 1009.0 - 0.5
    }

    /// c [m, n], of which the product with the first `cols` columns of b is taken.
    fn assert_equals_a_plain_product(a: Mat<f64>, b: Mat<f64>, cols: usize, beta: f64) {
        let (m, n) = (a.row_count(), b.col_count());
        let before: Vec<f64> = (0..m * n).map(|i| if beta == 0.0 { f64::NAN } else { element(3 * i) }).collect();
        let (mut expected, mut found) = (before.clone(), before);
        let used = b.block(0..a.col_count(), 0..cols);
        multiply(Factors::Exact, 0.7, a, used, beta, MatMut::new(&mut expected, n).block(0..m, 0..cols));
        let mut panels = vec![f64::NAN; Packed::<f64>::len(b.row_count(), n)];
        Packed::new(b, &mut panels).multiply(0.7, a, beta, MatMut::new(&mut found, n).block(0..m, 0..cols));
        for (found, expected) in found.iter().zip(&expected) {
            match expected.is_nan() {
                true => assert!(found.is_nan(), "{found} where nothing is to be written"),
                false => assert!((found - expected).abs() < 1e-12, "{found} for {expected}"),
            }
        }
    }

    #[test]
    fn equals_a_plain_product() {
        // Rows of c, rows of b and how many are used, columns of b and how many are used.
        for (m, k, used_k, n, cols) in [(1, 1, 1, 1, 1), (6, 7, 7, 32, 32), (23, 70, 64, 37, 33), (64, 5, 5, 100, 7)] {
            let a: Vec<f64> = (0..m * used_k).map(element).collect();
            let b: Vec<f64> = (0..k * n).map(element).collect();
            for a in [Mat::new(&a, used_k), Mat::new(&a, m).t()] {
                for b in [Mat::new(&b, n), Mat::new(&b, k).t()] {
                    for beta in [0.0, 1.0, 0.5] {
                        assert_equals_a_plain_product(a, b, cols, beta);
                    }
                }
            }
        }
    }
}
