use super::{Matrix, Transfer};

/// (P x)_n = x_⌊n/c⌋,  (R y)_n = (y_cn + ... + y_cn+c-1) / c: coalescing and de-coalescing of Zou, Zhang & Deng 2024.
pub struct Average;

impl Transfer for Average {
    fn name(&self) -> &'static str {
        "average"
    }
    fn prolongation(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(c * coarse_rows, coarse_rows, |n| vec![(n / c, 1.0)])
    }
    fn restriction(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(coarse_rows, c * coarse_rows, |n| (0..c).map(|j| (c * n + j, 1.0 / c as f64)).collect())
    }
}
