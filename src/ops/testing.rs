//! What the tests of the ops share: tensors that are views into NaN, comparison, finite differences.
use crate::ops::access;
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A view of `shape` at an odd offset into a larger storage whose other elements are NaN.
pub fn view(values: &[f64], shape: &[usize], dtype: DType) -> Tensor {
    const BEFORE: usize = 7;
    let storage = [&[f64::NAN; BEFORE][..], values, &[f64::NAN; 5]].concat();
    let storage = Tensor::new(storage, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    storage.narrow(0, BEFORE, values.len()).unwrap().reshape(shape).unwrap()
}

/// Uniform in [-1, 1), rounded to f32 so that every dtype gets the same values.
pub fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.0) as f64).collect();
    view(&values, shape, dtype)
}

/// NaN everywhere: what an op that sets (`=`) its output must not read.
pub fn unset(shape: &[usize], dtype: DType) -> Tensor {
    constant(f64::NAN, shape, dtype)
}

pub fn constant(value: f64, shape: &[usize], dtype: DType) -> Tensor {
    view(&vec![value; shape.iter().product()], shape, dtype)
}

/// Random indices below `end`, some repeated.
pub fn random_indices(n: usize, end: usize, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<u32> = (0..n).map(|i| if i % 3 == 2 { 0 } else { rng.random_range(0..end as u32) }).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}

pub fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest |actual - expected| ≤ tolerance * (largest |expected|, at least 1); NaN fails.
#[track_caller]
pub fn assert_close(actual: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(actual.dims(), expected.dims());
    let (actual, expected) = (values(actual), values(expected));
    let scale = expected.iter().fold(1.0, |scale: f64, e| scale.max(e.abs()));
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() <= tolerance * scale, "element {i}: {a} is not {e} within {tolerance} * {scale}");
    }
}

#[track_caller]
pub fn assert_all_close(actual: &[Tensor], expected: &[Tensor], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    actual.iter().zip(expected).for_each(|(a, e)| assert_close(a, e, tolerance));
}

/// ⟨x, y⟩
pub fn inner(x: &Tensor, y: &Tensor) -> f64 {
    values(x).iter().zip(values(y)).map(|(x, y)| x * y).sum()
}

/// `gradients[k]` is the gradient of `f` in `inputs[k]` (f64): central differences along random directions.
#[track_caller]
pub fn assert_gradients(f: impl Fn(&[Tensor]) -> f64, inputs: &[Tensor], gradients: &[Tensor]) {
    const STEP: f64 = 1e-5;
    for (k, gradient) in gradients.iter().enumerate() {
        for seed in 0..3 {
            let direction = random(inputs[k].dims(), DType::F64, 1000 + seed);
            let shifted = |step: f64| {
                let mut shifted = inputs.to_vec();
                shifted[k] = (&inputs[k] + (&direction * step).unwrap()).unwrap();
                f(&shifted)
            };
            let numeric = (shifted(STEP) - shifted(-STEP)) / (2.0 * STEP);
            let analytic = inner(gradient, &direction);
            let error = (numeric - analytic).abs() / analytic.abs().max(1.0);
            assert!(error < 1e-7, "input {k}: derivative {analytic}, finite difference {numeric}");
        }
    }
}

/// x + value, for expecting `+=`.
pub fn plus(x: &Tensor, value: f64) -> Tensor {
    (x + value).unwrap()
}

/// The same bits with one thread and with several.
#[track_caller]
pub fn assert_independent_of_threads(run: impl Fn() -> Vec<Tensor> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run().iter().map(values).collect::<Vec<_>>())
    };
    let one = on(1);
    for threads in [2, 3, 7] {
        assert!(one == on(threads), "{threads} threads give another result than one");
    }
}

/// `access::read` of all elements, as the kernels see them.
pub fn copy_of(x: &Tensor) -> Tensor {
    let out = unset(x.dims(), x.dtype());
    access::copy(x, &out).unwrap();
    out
}
