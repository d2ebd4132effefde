//! Strided matrix views and their product, by the `gemm` crate, or in [`bf16`](super::bf16).
use super::real::Real;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// What the factors of a product are rounded to; its sums are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// Nothing: they stay what they are.
    Exact,
    Bf16,
}

/// A read-only matrix view.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: *const T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    lifetime: PhantomData<&'a [T]>,
}

/// A matrix view to write through. Not `Clone`: views that exist at once do not overlap.
pub struct MatMut<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: they stand for `&[T]` and `&mut [T]`.
unsafe impl<T: Sync> Send for Mat<'_, T> {}
unsafe impl<T: Sync> Sync for Mat<'_, T> {}
unsafe impl<T: Send> Send for MatMut<'_, T> {}
unsafe impl<T: Sync> Sync for MatMut<'_, T> {}

impl<'a, T: Copy> Mat<'a, T> {
    /// Row-major `data` with `cols` columns.
    pub fn new(data: &'a [T], cols: usize) -> Mat<'a, T> {
        let rows = data.len() / cols.max(1);
        assert_eq!(rows * cols, data.len(), "a matrix has whole rows");
        Mat { data: data.as_ptr(), rows, cols, row_stride: cols, col_stride: 1, lifetime: PhantomData }
    }
    /// The transpose.
    pub fn t(self) -> Mat<'a, T> {
        Mat { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
    /// The block of these rows and columns.
    pub fn block(self, rows: Range<usize>, cols: Range<usize>) -> Mat<'a, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        let data = self.data.wrapping_add(rows.start * self.row_stride + cols.start * self.col_stride);
        Mat { data, rows: rows.len(), cols: cols.len(), ..self }
    }
    pub fn rows(self, rows: Range<usize>) -> Mat<'a, T> {
        self.block(rows, 0..self.cols)
    }
    pub fn columns(self, cols: Range<usize>) -> Mat<'a, T> {
        self.block(0..self.rows, cols)
    }
    pub fn row_count(self) -> usize {
        self.rows
    }
    pub fn col_count(self) -> usize {
        self.cols
    }
    /// The elements of a row lie together; else those of a column do.
    pub fn is_row_major(self) -> bool {
        self.col_stride == 1
    }
    /// From an element to the one below it.
    pub fn row_stride(self) -> usize {
        self.row_stride
    }
    /// From an element to the one beside it.
    pub fn col_stride(self) -> usize {
        self.col_stride
    }
    pub fn at(self, row: usize, col: usize) -> T {
        // SAFETY: in bounds by the assertion in `pointer` and the construction.
        unsafe { *self.pointer(row, col) }
    }
    /// Where an element is.
    pub fn pointer(self, row: usize, col: usize) -> *const T {
        assert!(row < self.rows && col < self.cols);
        self.data.wrapping_add(row * self.row_stride + col * self.col_stride)
    }
    pub fn row(self, row: usize) -> &'a [T] {
        assert!(row < self.rows && self.col_stride == 1);
        // SAFETY: in bounds by the assertion and the construction.
        unsafe { std::slice::from_raw_parts(self.data.add(row * self.row_stride), self.cols) }
    }
}

impl<'a, T> MatMut<'a, T> {
    /// Row-major `data` with `cols` columns.
    pub fn new(data: &'a mut [T], cols: usize) -> MatMut<'a, T> {
        let rows = data.len() / cols.max(1);
        assert_eq!(rows * cols, data.len(), "a matrix has whole rows");
        MatMut { data: data.as_mut_ptr(), rows, cols, row_stride: cols, lifetime: PhantomData }
    }
    /// The block of these rows and columns.
    pub fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_, T> {
        // SAFETY: the block borrows self mutably.
        unsafe { self.disjoint_block(rows, cols) }
    }
    /// The block of these rows and columns, for writing several blocks in parallel.
    ///
    /// # Safety
    /// Blocks that live at the same time must not overlap.
    pub unsafe fn disjoint_block(&self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        let data = self.data.wrapping_add(rows.start * self.row_stride + cols.start);
        MatMut { data, rows: rows.len(), cols: cols.len(), ..*self }
    }
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: in bounds by the assertion and the construction; borrows self mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.cols) }
    }
    pub fn cols(&self) -> usize {
        self.cols
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// From an element to the one below it.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }
}

/// A tile of a matrix: its place and its elements.
pub struct Tile<'a, T> {
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    pub elements: MatMut<'a, T>,
}

/// Calls `f` with each tile of c, in parallel. The tiles suit a product with c on all threads of the pool.
pub fn for_each_tile<T: Real>(c: MatMut<T>, f: impl Fn(Tile<T>) + Sync) {
    let (row_tiles, col_tiles) = tile_counts(c.rows, c.cols, rayon::current_num_threads());
    (0..row_tiles * col_tiles).into_par_iter().for_each(|tile| {
        let rows = part(c.rows, row_tiles, tile / col_tiles);
        let cols = part(c.cols, col_tiles, tile % col_tiles);
        // SAFETY: tiles do not overlap.
        let elements = unsafe { c.disjoint_block(rows.clone(), cols.clone()) };
        f(Tile { rows, cols, elements });
    });
}

/// The numbers of tiles of a rows × cols product that let `threads` threads end first. A tile of h × w costs its h w
/// elements and the packing of its h rows and w columns of the factors, each about as much as 16 elements.
fn tile_counts(rows: usize, cols: usize, threads: usize) -> (usize, usize) {
    const PACKING: usize = 16;
    /// A tile below this is not worth a task.
    const SMALLEST: usize = 96;
    /// Below this the crate has kernels that do not give a part the bits of the whole.
    const THIN: usize = 16;
    if rows.min(cols) < THIN {
        return (1, 1);
    }
    let most = 3 * threads;
    let row_counts = 1..=(rows / SMALLEST).clamp(1, most);
    let counts = row_counts.flat_map(|row_tiles| {
        let col_counts = 1..=(cols / SMALLEST).clamp(1, most.div_ceil(row_tiles));
        col_counts.map(move |col_tiles| (row_tiles, col_tiles))
    });
    let cost = |&(row_tiles, col_tiles): &(usize, usize)| {
        let (h, w) = (rows.div_ceil(row_tiles), cols.div_ceil(col_tiles));
        (row_tiles * col_tiles).div_ceil(threads) * (h * w + PACKING * (h + w))
    };
    counts.min_by_key(cost).unwrap_or((1, 1))
}

/// The i-th of `parts` nearly equal parts of 0..n, cut at multiples of 16 elements, where vectors and packed panels begin.
fn part(n: usize, parts: usize, i: usize) -> Range<usize> {
    let cut = |i: usize| if i == parts { n } else { (n * i / parts).next_multiple_of(16).min(n) };
    cut(i)..cut(i + 1)
}

/// c = beta c + alpha a b on all threads of the pool. beta = 0 does not read c.
pub fn multiply_parallel<T: Real>(factors: Factors, alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    for_each_tile(c, |tile| multiply(factors, alpha, a.rows(tile.rows), b.columns(tile.cols), beta, tile.elements));
}

/// c = beta c + alpha a b on this thread. beta = 0 does not read c.
///
/// An element of c gets the same bits whatever larger product this one is a tile of.
pub fn multiply<T: Real>(factors: Factors, alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    assert!(a.rows == c.rows && a.cols == b.rows && b.cols == c.cols, "shapes of a product");
    match factors {
        Factors::Exact => multiply_exactly(alpha, a, b, beta, c),
        Factors::Bf16 => T::multiply_bf16(alpha, a, b, beta, c),
    }
}

/// c = beta c + alpha a b by the `gemm` crate; the shapes fit. It adds up k in an order that depends on k alone, but for
/// thin products and those of at most 64 × 64.
pub(super) fn multiply_exactly<T: Real>(alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    // SAFETY: the views are in bounds by construction, their shapes fit, and c overlaps nothing.
    // The crate calls alpha what multiplies c, and beta what multiplies the product.
    unsafe {
        gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data,
            1,
            c.row_stride as isize,
            beta != 0.0,
            a.data,
            a.col_stride as isize,
            a.row_stride as isize,
            b.data,
            b.col_stride as isize,
            b.row_stride as isize,
            T::of(beta),
            T::of(alpha),
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_and_tiles_keep_threads_busy() {
        for (n, parts) in [(1, 1), (100, 1), (1000, 3), (1027, 7)] {
            let ends: Vec<usize> = (0..parts).flat_map(|i| [part(n, parts, i).start, part(n, parts, i).end]).collect();
            assert!(ends[0] == 0 && ends[2 * parts - 1] == n && ends.is_sorted());
        }
        assert_eq!(tile_counts(50, 60, 8), (1, 1));
        for threads in [1, 2, 3, 12, 64] {
            let (row_tiles, col_tiles) = tile_counts(4096, 4096, threads);
            let tiles = row_tiles * col_tiles;
            assert!(
                tiles as f64 / (tiles.div_ceil(threads) * threads) as f64 > 0.9,
                "{tiles} tiles, {threads} threads"
            );
        }
    }

    #[test]
    fn a_tile_has_the_bits_of_the_whole() {
        let element = |i: usize| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5;
        for (m, n, k) in [(300, 230, 100), (200, 200, 700), (97, 500, 1600), (16, 500, 300)] {
            let (a, b): (Vec<f32>, Vec<f32>) = ((0..m * k).map(element).collect(), (0..n * k).map(element).collect());
            for (a, b) in [
                (Mat::new(&a, k), Mat::new(&b, k).t()),
                (Mat::new(&a, k), Mat::new(&b, n)),
                (Mat::new(&a, m).t(), Mat::new(&b, n)),
            ] {
                let mut whole = vec![f32::NAN; m * n];
                multiply(Factors::Exact, 0.5, a, b, 0.0, MatMut::new(&mut whole, n));
                for (row_tiles, col_tiles) in [(1, 2), (1, 5), (m.div_ceil(96), 2)] {
                    let mut tiled = vec![f32::NAN; m * n];
                    for tile in 0..row_tiles * col_tiles {
                        let (rows, cols) = (part(m, row_tiles, tile / col_tiles), part(n, col_tiles, tile % col_tiles));
                        let c = MatMut::new(&mut tiled, n);
                        let c = unsafe { c.disjoint_block(rows.clone(), cols.clone()) };
                        multiply(Factors::Exact, 0.5, a.rows(rows), b.columns(cols), 0.0, c);
                    }
                    assert!(whole == tiled, "{m} × {n} × {k} in {row_tiles} × {col_tiles} tiles");
                }
            }
        }
    }
}
