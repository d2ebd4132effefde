use super::{Matrix, Transfer};

/// (P x)_cn+j = (1 - j/c) x_n + (j/c) x_n+1, constant past the last row;  (R y)_n = y_cn.
pub struct Linear;

impl Transfer for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn prolongation(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(c * coarse_rows, coarse_rows, |fine| {
            let (n, s) = (fine / c, (fine % c) as f64 / c as f64);
            if n + 1 < coarse_rows { vec![(n, 1.0 - s), (n + 1, s)] } else { vec![(n, 1.0)] }
        })
    }
    fn restriction(&self, coarse_rows: usize, c: usize) -> Matrix {
        Matrix::new(coarse_rows, c * coarse_rows, |n| vec![(c * n, 1.0)])
    }
}
