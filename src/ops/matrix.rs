//! Strided matrix views and their product, by the `gemm` crate.
use super::real::Real;
use std::marker::PhantomData;
use std::ops::Range;

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

impl<'a, T> Mat<'a, T> {
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
}

/// c = beta c + alpha a b on all threads of the pool. beta = 0 does not read c.
pub fn multiply_parallel<T: Real>(alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    gemm_call(alpha, a, b, beta, c, gemm::Parallelism::Rayon(0));
}

/// c = beta c + alpha a b on this thread. beta = 0 does not read c.
pub fn multiply<T: Real>(alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>) {
    gemm_call(alpha, a, b, beta, c, gemm::Parallelism::None);
}

fn gemm_call<T: Real>(alpha: f64, a: Mat<T>, b: Mat<T>, beta: f64, c: MatMut<T>, parallelism: gemm::Parallelism) {
    assert!(a.rows == c.rows && a.cols == b.rows && b.cols == c.cols, "shapes of a product");
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
            parallelism,
        )
    }
}
