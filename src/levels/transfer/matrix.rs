use crate::error::Result;
use crate::ops::{access, residual};
use candle_core::Tensor;

/// A sparse matrix on the depth axis (axis 0) of trajectories.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    cols: usize,
    /// The non-zero weights of each row as (column, weight), columns ascending.
    weights: Vec<Vec<(usize, f64)>>,
}

impl Matrix {
    /// A matrix [rows × cols] from the weights of each row; columns ascend, zero weights are dropped.
    pub fn new(rows: usize, cols: usize, row: impl Fn(usize) -> Vec<(usize, f64)>) -> Matrix {
        let nonzero = |n| row(n).into_iter().filter(|&(_, w)| w != 0.0).collect();
        Matrix { cols, weights: (0..rows).map(nonzero).collect() }
    }

    pub fn rows(&self) -> usize {
        self.weights.len()
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Mᵀ, with the same weights bit for bit.
    pub fn transpose(&self) -> Matrix {
        let mut weights = vec![Vec::new(); self.cols];
        for (i, row) in self.weights.iter().enumerate() {
            for &(j, w) in row {
                weights[j].push((i, w));
            }
        }
        Matrix { cols: self.rows(), weights }
    }

    /// The columns with a weight in row `row`, ascending.
    pub fn columns_of(&self, row: usize) -> impl Iterator<Item = usize> {
        self.weights[row].iter().map(|&(j, _)| j)
    }

    /// M x, a new tensor [rows, P] from x [cols, P].
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let out = Tensor::zeros((self.rows(), x.dim(1)?), x.dtype(), x.device())?;
        self.multiply(1.0, x, 0.0, &out)?;
        Ok(out)
    }

    /// out = α M x + β out  (=), for x [cols, P] and out [rows, P] in different storage. β = 0 never reads out.
    ///
    /// Takes no memory. A weight of exactly 1 copies bit for bit.
    pub fn multiply(&self, alpha: f64, x: &Tensor, beta: f64, out: &Tensor) -> Result<()> {
        for (i, weights) in self.weights.iter().enumerate() {
            let out = out.narrow(0, i, 1)?;
            let mut beta = beta;
            for &(j, w) in weights {
                let (x, w) = (x.narrow(0, j, 1)?, alpha * w);
                match (beta, w) {
                    (0.0, 1.0) => access::copy(&x, &out)?,
                    (0.0, _) => residual::combine(w, &x, 0.0, &x, &out)?,
                    _ => residual::scale_add(beta, &out, w, &x)?,
                }
                beta = 1.0;
            }
            match (weights.is_empty(), beta) {
                (true, 0.0) => access::fill(&out, 0.0)?,
                (true, beta) if beta != 1.0 => out.slice_set(&out.affine(beta, 0.0)?, 0, 0)?,
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn multiply_scales_and_accumulates_in_place() {
        let m = Matrix::new(3, 2, |i| [vec![(0, 2.0), (1, 0.0)], vec![], vec![(0, 1.0), (1, 1.0)]][i].clone());
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let out = Tensor::ones((3, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        m.multiply(10.0, &x, 1.0, &out).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), [[21.0, 41.0], [1.0, 1.0], [41.0, 61.0]]);
        m.multiply(1.0, &x, 0.5, &out).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), [[12.5, 24.5], [0.5, 0.5], [24.5, 36.5]]);
        m.multiply(1.0, &x, 0.0, &out).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), [[2.0, 4.0], [0.0, 0.0], [4.0, 6.0]]);
        assert_eq!(m.columns_of(0).collect::<Vec<_>>(), [0]);
    }
}
