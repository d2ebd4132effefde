use super::{Matrix, Transfer};

/// (R y)_n = y_cn,  P = Rᵀ: a coarse level is coset 0 of the finer one (any other coset is as good), shared with it.
pub struct Injection;

impl Transfer for Injection {
    fn name(&self) -> &'static str {
        "injection"
    }
    fn prolongation(&self, coarse_rows: usize, c: usize) -> Matrix {
        self.restriction(coarse_rows, c).transpose()
    }
    fn restriction(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(coarse_rows, c * coarse_rows, |n| vec![(c * n, 1.0)])
    }
    fn shares_rows(&self) -> bool {
        true
    }
}
