use super::{Matrix, Transfer};

/// (P x)_n = x_⌊n/c⌋,  (R y)_n = y_cn: piecewise constant in t.
pub struct Copy;

impl Transfer for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }
    fn prolongation(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(c * coarse_rows, coarse_rows, |n| vec![(n / c, 1.0)])
    }
    fn restriction(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(coarse_rows, c * coarse_rows, |n| vec![(c * n, 1.0)])
    }
}
