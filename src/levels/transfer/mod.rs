//! Transfer operators between adjacent levels, one a file.
//!
//! A new one is a file with an `impl Transfer`, its word in `config::TransferKind` and its line in [`transfer`]; the
//! laws at the end of this file are tested over all of them.

mod average;
mod copy;
mod injection;
mod linear;
mod matrix;

pub use matrix::Matrix;

use crate::config::TransferKind;

/// Prolongation P and restriction R between a coarse level of `coarse_rows` rows and the next finer one, which has
/// `factor` times as many. Row n of a level stands for the time n h of its own step h.
///
/// Laws: R P = 1; no weight is negative (second moments stay non-negative); the rows of R, and those of P unless the
/// levels share rows, add up to 1 (a constant trajectory is kept).
pub trait Transfer: Sync {
    /// The word in `levels.transfer`.
    fn name(&self) -> &'static str;
    /// P [c N_H × N_H].
    fn prolongation(&self, coarse_rows: usize, factor: usize) -> Matrix;
    /// R [N_H × c N_H].
    fn restriction(&self, coarse_rows: usize, factor: usize) -> Matrix;
    /// Coarse levels are views of fine rows (cosets) instead of trajectories of their own.
    fn shares_rows(&self) -> bool {
        false
    }
}

/// The operator of a config word.
pub fn transfer(kind: TransferKind) -> &'static dyn Transfer {
    match kind {
        TransferKind::Injection => &injection::Injection,
        TransferKind::Copy => &copy::Copy,
        TransferKind::Average => &average::Average,
        TransferKind::Linear => &linear::Linear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Tensor};

    /// Every operator at several sizes, with P and R.
    fn each(mut law: impl FnMut(&dyn Transfer, usize, usize, &Matrix, &Matrix)) {
        for &kind in TransferKind::ALL {
            for (rows, factor) in [(1, 2), (3, 2), (4, 3), (6, 4)] {
                let operator = transfer(kind);
                let (p, r) = (operator.prolongation(rows, factor), operator.restriction(rows, factor));
                law(operator, rows, factor, &p, &r);
            }
        }
    }

    fn dense(m: &Matrix) -> Vec<Vec<f64>> {
        let identity = Tensor::eye(m.cols(), DType::F64, &Device::Cpu).unwrap();
        m.apply(&identity).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn names_are_the_config_words() {
        for &kind in TransferKind::ALL {
            assert_eq!(transfer(kind).name(), kind.name());
        }
    }

    #[test]
    fn restriction_undoes_prolongation() {
        each(|operator, rows, factor, p, r| {
            assert_eq!((p.rows(), p.cols()), (rows * factor, rows));
            assert_eq!((r.rows(), r.cols()), (rows, rows * factor));
            let identity = Tensor::eye(rows, DType::F64, &Device::Cpu).unwrap();
            let rp = r.apply(&p.apply(&identity).unwrap()).unwrap();
            let error = (rp - identity).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(error < 1e-15, "{} {rows}x{factor}: R P differs from 1 by {error}", operator.name());
        });
    }

    #[test]
    fn weights_are_not_negative_and_keep_constants() {
        each(|operator, _, _, p, r| {
            let sums = |m: &Matrix| dense(m).iter().map(|row| row.iter().sum::<f64>()).collect::<Vec<_>>();
            assert!(dense(p).iter().chain(&dense(r)).flatten().all(|&w| w >= 0.0), "{}", operator.name());
            assert!(sums(r).iter().all(|s| (s - 1.0).abs() < 1e-15), "{}", operator.name());
            assert!(operator.shares_rows() || sums(p).iter().all(|s| (s - 1.0).abs() < 1e-15), "{}", operator.name());
        });
    }

    #[test]
    fn the_transpose_is_the_adjoint() {
        each(|operator, rows, factor, p, r| {
            for (m, cols) in [(p, rows), (r, rows * factor)] {
                let x = Tensor::randn(0.0, 1.0, (cols, 5), &Device::Cpu).unwrap();
                let y = Tensor::randn(0.0, 1.0, (m.rows(), 5), &Device::Cpu).unwrap();
                let dot = |a: &Tensor, b: &Tensor| (a * b).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
                let (left, right) = (dot(&m.apply(&x).unwrap(), &y), dot(&x, &m.transpose().apply(&y).unwrap()));
                assert!((left - right).abs() < 1e-13 * (1.0 + left.abs()), "{}: {left} {right}", operator.name());
                assert_eq!(m.transpose().transpose(), *m);
            }
        });
    }

    #[test]
    fn linear_is_exact_for_straight_lines_up_to_the_last_row() {
        let line = |n: usize, h: f64| Tensor::from_iter((0..n).map(|i| i as f64 * h), &Device::Cpu).unwrap();
        let p = transfer(TransferKind::Linear).prolongation(4, 2);
        let fine: Vec<f64> =
            p.apply(&line(4, 2.0).reshape((4, 1)).unwrap()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(fine, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0]);
    }

    #[test]
    fn a_transfer_of_copies_is_bit_for_bit() {
        let x = Tensor::randn(0f32, 1.0, (3, 7), &Device::Cpu).unwrap();
        let fine = transfer(TransferKind::Copy).prolongation(3, 2).apply(&x).unwrap();
        let expected = x.repeat((1, 2)).unwrap().reshape((6, 7)).unwrap();
        assert_eq!(fine.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }
}
