use super::kernel::Kernel;
use super::*;

/// Rows, columns, k: below a tile, ragged, whole panels, more than one block of k.
const SHAPES: [[usize; 3]; 8] =
    [[1, 1, 1], [3, 5, 2], [16, 32, 33], [32, 32, 32], [65, 33, 70], [64, 96, 256], [40, 530, 1030], [530, 40, 64]];

fn matrix(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 505.0 - 1.0).collect()
}

/// Both factors as they are and transposed, the product within `tolerance` of that of the rounded factors.
fn check(multiply: impl Fn(f64, Mat<f32>, Mat<f32>, f64, MatMut<f32>), tolerance: f32) {
    for [m, n, k] in SHAPES {
        let (a, b, c) = (matrix(m * k, 1), matrix(k * n, 2), matrix(m * n, 3));
        let factors = [
            (Mat::new(&a, k), Mat::new(&b, n)),
            (Mat::new(&a, m).t(), Mat::new(&b, n)),
            (Mat::new(&a, k), Mat::new(&b, k).t()),
            (Mat::new(&a, m).t(), Mat::new(&b, k).t()),
        ];
        for (form, (a, b)) in factors.into_iter().enumerate() {
            for (alpha, beta) in [(1.0, 0.0), (1.0, 1.0), (-0.3, 2.0)] {
                let start = if beta == 0.0 { vec![f32::NAN; m * n] } else { c.clone() };
                let (mut expected, mut actual) = (start.clone(), start);
                multiply_rounded(alpha, a, b, beta, MatMut::new(&mut expected, n));
                multiply(alpha, a, b, beta, MatMut::new(&mut actual, n));
                for (i, (x, y)) in actual.iter().zip(&expected).enumerate() {
                    assert!(
                        (x - y).abs() <= tolerance * (y.abs() + (k as f32).sqrt()),
                        "{m} × {n} × {k}, form {form}, alpha {alpha}, beta {beta}: element {i} is {x}, not {y}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_kernel_multiplies_the_rounded_factors() {
    for kernel in Kernel::all() {
        println!("{}", kernel.name());
        check(|alpha, a, b, beta, c| by_blocks(kernel, alpha, a, b, beta, c), 1e-5);
    }
    check(multiply, 1e-5);
}

/// Against the exact product: the factors' rounding is all that is lost.
#[test]
fn rounding_costs_what_bf16_does() {
    let (m, n, k) = (70, 50, 300);
    let (a, b) = (matrix(m * k, 1), matrix(k * n, 2));
    let (mut exact, mut rounded) = (vec![0f32; m * n], vec![0f32; m * n]);
    multiply_exactly(1.0, Mat::new(&a, k), Mat::new(&b, n), 0.0, MatMut::new(&mut exact, n));
    multiply(1.0, Mat::new(&a, k), Mat::new(&b, n), 0.0, MatMut::new(&mut rounded, n));
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let error = norm(&mut exact.iter().zip(&rounded).map(|(x, y)| x - y)) / norm(&mut exact.iter().copied());
    // Two factors, each rounded to 8 bits: relative deviation 2^-9 / √3 · √2 if errors are even.
    assert!((5e-4..4e-3).contains(&error), "{error}");
}

#[test]
fn a_tile_has_the_bits_of_the_whole() {
    let (m, n, k) = (300, 230, 1100);
    let (a, b) = (matrix(m * k, 1), matrix(k * n, 2));
    let (a, b) = (Mat::new(&a, k), Mat::new(&b, n));
    let (mut whole, mut tiled) = (vec![0f32; m * n], vec![0f32; m * n]);
    multiply(0.5, a, b, 0.0, MatMut::new(&mut whole, n));
    for rows in [0..96, 96..300] {
        for cols in [0..112, 112..230] {
            let (a, b) = (a.rows(rows.clone()), b.columns(cols.clone()));
            multiply(0.5, a, b, 0.0, MatMut::new(&mut tiled, n).block(rows.clone(), cols));
        }
    }
    assert!(whole == tiled);
}

#[test]
fn nan_and_infinity_stay() {
    let (mut a, b) = (matrix(40 * 40, 1), vec![1f32; 40 * 40]);
    (a[40], a[80]) = (f32::NAN, f32::INFINITY);
    let mut c = vec![0f32; 40 * 40];
    multiply(1.0, Mat::new(&a, 40), Mat::new(&b, 40), 0.0, MatMut::new(&mut c, 40));
    assert!(c[40].is_nan() && c[80] == f32::INFINITY && c[..40].iter().all(|c| c.is_finite()));
}
