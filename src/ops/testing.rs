//! What the tests of the ops share: tensors that are views into NaN, comparison, finite differences.
use crate::ops::access;
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::cell::RefCell;

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

/// Where an op runs in a test: its device, the dtypes of elements and of sums, how its tensors lie in memory. They have
/// guards of NaN on both sides.
pub struct Place {
    pub device: Device,
    pub elements: DType,
    pub sums: DType,
    /// Elements in front of each tensor.
    before: usize,
    /// What inputs are rounded to before they become elements.
    rounded_to: DType,
    storages: RefCell<Vec<(Tensor, usize)>>,
}

impl Place {
    const AFTER: usize = 5;

    fn new(device: &Device, elements: DType, before: usize) -> Place {
        let (device, sums) = (device.clone(), access::sums(elements));
        Place { device, elements, sums, before, rounded_to: elements, storages: RefCell::default() }
    }

    fn rounding(self, dtype: DType) -> Place {
        Place { rounded_to: dtype, ..self }
    }

    fn tensor(&self, values: &[f64], shape: &[usize], dtype: DType) -> Tensor {
        let storage = [&vec![f64::NAN; self.before][..], values, &[f64::NAN; Place::AFTER]].concat();
        let storage = Tensor::new(storage, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let storage = storage.to_device(&self.device).unwrap();
        self.storages.borrow_mut().push((storage.clone(), values.len()));
        storage.narrow(0, self.before, values.len()).unwrap().reshape(shape).unwrap()
    }

    /// An input of the test, rounded to this place's elements.
    pub fn input(&self, x: &Tensor) -> Tensor {
        self.tensor(&values(&x.to_dtype(self.rounded_to).unwrap()), x.dims(), self.elements)
    }

    pub fn indices(&self, x: &Tensor) -> Tensor {
        x.to_device(&self.device).unwrap()
    }

    /// NaN everywhere, for an output that an op sets.
    pub fn unset(&self, shape: &[usize]) -> Tensor {
        self.tensor(&vec![f64::NAN; shape.iter().product()], shape, self.elements)
    }

    pub fn unset_sums(&self, shape: &[usize]) -> Tensor {
        self.tensor(&vec![f64::NAN; shape.iter().product()], shape, self.sums)
    }

    /// For sums that an op adds to.
    pub fn sums_of(&self, value: f64, shape: &[usize]) -> Tensor {
        self.tensor(&vec![value; shape.iter().product()], shape, self.sums)
    }

    #[track_caller]
    fn check_guards(&self) {
        for (storage, len) in self.storages.borrow().iter() {
            let values = values(&storage.to_device(&Device::Cpu).unwrap());
            let (before, rest) = values.split_at(self.before);
            let guards = before.iter().chain(&rest[*len..]);
            assert!(guards.copied().all(f64::is_nan), "a write beside the tensor");
        }
    }
}

/// Bit patterns, so that NaN equals itself.
fn run_at(place: Place, op: &dyn Fn(&Place) -> Vec<Tensor>) -> Vec<Vec<u64>> {
    let outputs = op(&place);
    let bits = |x: &Tensor| values(&x.to_device(&Device::Cpu).unwrap()).into_iter().map(f64::to_bits).collect();
    let bits = outputs.iter().map(bits).collect();
    place.check_guards();
    bits
}

/// Held by a test while it uses GPUs: the making of a stream waits for all others of its GPU, and none of them may be captured then.
#[cfg(feature = "cuda")]
pub fn alone_on_gpus() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    // What a test that failed has left there is of no matter to the next.
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What `f` makes on a GPU, twice the same bits: on the first real one with the feature `cuda`, else on the emulated one.
/// `None` where there is no g++ to compile the emulation with.
#[cfg(not(feature = "cuda"))]
pub fn on_gpu<R: PartialEq>(f: impl Fn(&Device) -> R) -> Option<R> {
    crate::ops::cuda::emulate::run(|| f(&Device::Cpu))
}

#[cfg(feature = "cuda")]
pub fn on_gpu<R: PartialEq>(f: impl Fn(&Device) -> R) -> Option<R> {
    let _alone = alone_on_gpus();
    thread_local! {
        static GPU: Device = crate::ops::cuda::select(0).expect("tests of the feature `cuda` need a GPU").device;
    }
    GPU.with(|gpu| {
        let result = f(gpu);
        assert!(result == f(gpu), "a second time the result is another: a race, or memory that nobody has set");
        Some(result)
    })
}

/// `op` on a GPU ([`on_gpu`]) equals `op` on the CPU in f64: in f32 up to `tolerances[0]`, in bf16, from inputs rounded to it, up
/// to `tolerances[1]`, as [`assert_close`] says. Tensors begin at multiples of 16 bytes, and at odd elements. Prints the
/// largest errors.
#[track_caller]
pub fn assert_gpu_equals_cpu(name: &str, tolerances: [f64; 2], op: impl Fn(&Place) -> Vec<Tensor>) {
    for (dtype, tolerance) in [(DType::F32, tolerances[0]), (DType::BF16, tolerances[1])] {
        // Inputs are rounded as the GPU's are, then widened.
        let expected = run_at(Place::new(&Device::Cpu, DType::F64, 8).rounding(dtype), &op);
        for before in [8, 7] {
            let Some(outputs) = on_gpu(|device| run_at(Place::new(device, dtype, before), &op)) else { return };
            report(name, dtype, tolerance, &outputs, &expected);
        }
    }
}

#[track_caller]
fn report(name: &str, dtype: DType, tolerance: f64, outputs: &[Vec<u64>], expected: &[Vec<u64>]) {
    let gpu = if cfg!(feature = "cuda") { "GPU" } else { "emulated" };
    assert_eq!(outputs.len(), expected.len());
    let mut worst = 0f64;
    for (k, (outputs, expected)) in outputs.iter().zip(expected).enumerate() {
        let [outputs, expected] = [outputs, expected].map(|x| x.iter().map(|&x| f64::from_bits(x)).collect::<Vec<_>>());
        assert_eq!(outputs.len(), expected.len());
        let scale = expected.iter().fold(1.0, |scale: f64, e| scale.max(e.abs()));
        for (i, (o, e)) in outputs.iter().zip(&expected).enumerate() {
            let error = (o - e).abs() / scale;
            worst = worst.max(error);
            assert!(
                error <= tolerance || o.is_nan() && e.is_nan(),
                "{name} {gpu} {dtype:?}: output {k}, element {i}: {o}, expected {e}"
            );
        }
    }
    println!("{name:40} {gpu:8} {dtype:?}: largest error {worst:.1e} (allowed {tolerance:.1e})");
}
