//! Laws of update rules, over all of them.

use super::*;
use crate::model::{Division, Init, Layout, Segment, Shard};
use crate::ops::testing::on_gpu;
use candle_core::{DType, Device};

/// A row with every kind of segment; the embedding is longer than a piece of the pass.
fn layout() -> Layout {
    layout_with(9001)
}

/// As [`layout`], with an embedding of `vocab` tokens.
fn layout_with(vocab: usize) -> Layout {
    let mut layout = Layout { segments: Vec::new() };
    for (name, shape, decay, matrices) in [
        ("ln1", vec![2, 4], false, 0),
        ("attn/qkv/weight", vec![12, 4], true, 3),
        ("mlp/fc/weight", vec![16, 4], true, 1),
        ("mlp/fc/bias", vec![16], false, 0),
        ("mlp/proj/weight", vec![4, 16], true, 1),
        ("wte", vec![vocab, 5], true, 0),
    ] {
        let offset = layout.len();
        layout.segments.push(Segment { name, shape, offset, init: Init::Zeros, decay, matrices });
    }
    layout
}

fn tables() -> Vec<OptimizerTable> {
    let table = |kind, nesterov| OptimizerTable { kind, nesterov, lr: 0.01, ..Default::default() };
    vec![
        table(OptimizerKind::Sgd, true),
        table(OptimizerKind::Sgd, false),
        table(OptimizerKind::AdamW, true),
        table(OptimizerKind::Muon, true),
        table(OptimizerKind::Muon, false),
    ]
}

const HYPER: Hyper = Hyper { lr: 0.01, gradient_scale: 0.5, eps_scale: 0.25 };
const ROWS: usize = 3;

fn wave(elements: usize, frequency: f64) -> Vec<f64> {
    (0..elements).map(|i| (frequency * (i * i % 7919) as f64).sin()).collect()
}

fn tensor(values: &[f64], dtype: DType) -> Tensor {
    let width = values.len() / ROWS;
    Tensor::from_slice(values, (ROWS, width), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A rule with its tensors.
struct Run {
    optimizer: Box<dyn Optimizer>,
    layout: Layout,
    shard: Shard,
    theta: Tensor,
    moments: Vec<Tensor>,
    updates: [u64; ROWS],
}

impl Run {
    fn new(table: &OptimizerTable, dtype: DType) -> Run {
        Run::with_layout(table, dtype, layout())
    }

    fn with_layout(table: &OptimizerTable, dtype: DType, layout: Layout) -> Run {
        Run::of_rank(table, dtype, layout, 0, 1)
    }

    /// What one of `ranks` ranks keeps.
    fn of_rank(table: &OptimizerTable, dtype: DType, layout: Layout, rank: usize, ranks: usize) -> Run {
        let optimizer = new(table);
        let shard = Shard::new(&layout, Division { rank, ranks, whole_matrices: optimizer.whole_matrices() });
        let kept = vec![0.0; ROWS * shard.columns.len()];
        let moments = optimizer.moments().iter().map(|_| tensor(&kept, dtype)).collect();
        let theta = tensor(&wave(ROWS * layout.len(), 0.3), dtype);
        Run { optimizer, layout, shard, theta, moments, updates: [0; ROWS] }
    }

    /// With its tensors on `device`.
    fn on(mut self, device: &Device) -> Run {
        self.theta = self.theta.to_device(device).unwrap();
        self.moments.iter_mut().for_each(|moment| *moment = moment.to_device(device).unwrap());
        self
    }

    fn gradient(&self, step: usize) -> Vec<f64> {
        wave(ROWS * self.layout.len(), 0.7 + step as f64)
    }

    fn step(&mut self, rows: &[usize], grad: &[f64]) {
        let updates: Vec<_> = rows.iter().map(|&row| self.updates[row]).collect();
        let grad = tensor(grad, self.theta.dtype()).to_device(self.theta.device()).unwrap();
        let Run { optimizer, shard, theta, moments, .. } = self;
        optimizer.step(shard, rows, &updates, theta, &grad, moments, &HYPER).unwrap();
        rows.iter().for_each(|&row| self.updates[row] += 1);
    }

    fn state(&self) -> Vec<Vec<f64>> {
        std::iter::once(&self.theta).chain(&self.moments).map(values).collect()
    }
}

/// The rules once more, scalar by scalar in f64.
mod naive {
    use super::*;

    pub fn step(table: &OptimizerTable, layout: &Layout, t: u64, g: &[f64], state: &mut [Vec<f64>], row: usize) {
        for segment in &layout.segments {
            let first = row * layout.len() + segment.offset;
            let range = first..first + segment.len();
            let weight_decay = if segment.decay { table.weight_decay } else { 0.0 };
            match (table.kind, segment.matrices) {
                (OptimizerKind::Muon, parts @ 1..) => {
                    let len = segment.len() / parts;
                    for part in 0..parts {
                        matrix(table, segment.shape[1], weight_decay, g, state, first + part * len, len);
                    }
                }
                (OptimizerKind::Sgd, _) => {
                    for i in range {
                        let direction = momentum(table, g[i], &mut state[1][i]);
                        state[0][i] = state[0][i] * (1.0 - HYPER.lr * weight_decay) - HYPER.lr * direction;
                    }
                }
                _ => {
                    for i in range {
                        let g = g[i] * HYPER.gradient_scale;
                        state[1][i] = table.beta1 * state[1][i] + (1.0 - table.beta1) * g;
                        state[2][i] = table.beta2 * state[2][i] + (1.0 - table.beta2) * g * g;
                        let m = state[1][i] / (1.0 - table.beta1.powi(t as i32));
                        let v = state[2][i] / (1.0 - table.beta2.powi(t as i32));
                        state[0][i] -= HYPER.lr * weight_decay * state[0][i];
                        state[0][i] -= HYPER.lr * m / (v.sqrt() + table.eps * HYPER.eps_scale);
                    }
                }
            }
        }
    }

    fn momentum(table: &OptimizerTable, g: f64, b: &mut f64) -> f64 {
        let g = g * HYPER.gradient_scale;
        *b = table.momentum * *b + g;
        if table.nesterov { g + table.momentum * *b } else { *b }
    }

    type Matrix = Vec<Vec<f64>>;

    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, b)| x * b[j]).sum();
        a.iter().map(|row| (0..b[0].len()).map(|j| entry(row, j)).collect()).collect()
    }

    pub fn transpose(a: &Matrix) -> Matrix {
        (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
    }

    /// a x + b (x xᵀ) x + c (x xᵀ)² x, whatever the shape.
    fn quintic(x: &Matrix) -> Matrix {
        let gram = product(x, &transpose(x));
        let cubic = product(&gram, x);
        let fifth = product(&gram, &cubic);
        let entry = |i: usize, j: usize| 3.4445 * x[i][j] - 4.7750 * cubic[i][j] + 2.0315 * fifth[i][j];
        (0..x.len()).map(|i| (0..x[0].len()).map(|j| entry(i, j)).collect()).collect()
    }

    fn matrix(
        t: &OptimizerTable,
        columns: usize,
        decay: f64,
        g: &[f64],
        state: &mut [Vec<f64>],
        first: usize,
        len: usize,
    ) {
        let u: Vec<f64> = (first..first + len).map(|i| momentum(t, g[i], &mut state[1][i])).collect();
        let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut x: Matrix = u.chunks(columns).map(|row| row.iter().map(|x| x / norm).collect()).collect();
        for _ in 0..5 {
            x = quintic(&x);
        }
        let lr = HYPER.lr * t.muon_lr_ratio;
        let scale = (x.len() as f64 / columns as f64).max(1.0).sqrt();
        for (i, x) in x.concat().into_iter().enumerate() {
            let theta = &mut state[0][first + i];
            *theta = *theta * (1.0 - lr * decay) - lr * scale * x;
        }
    }
}

#[test]
fn rules_equal_their_formulas() {
    for table in tables() {
        for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 2e-4)] {
            let mut run = Run::new(&table, dtype);
            let mut expected = run.state();
            for (step, rows) in [&[0, 1, 2][..], &[2, 0], &[1], &[0, 1, 2]].into_iter().enumerate() {
                // As the tensor holds it.
                let grad = values(&tensor(&run.gradient(step), dtype));
                for &row in rows {
                    naive::step(&table, &run.layout, run.updates[row] + 1, &grad, &mut expected, row);
                }
                run.step(rows, &grad);
            }
            for (k, (got, expected)) in run.state().iter().zip(&expected).enumerate() {
                for (i, (x, y)) in got.iter().zip(expected).enumerate() {
                    let (kind, error) = (table.kind, (x - y).abs());
                    assert!(error <= tolerance * y.abs().max(1.0), "{kind} {dtype:?} tensor {k}[{i}]: {x} is not {y}");
                }
            }
        }
    }
}

/// With rows of whole vectors, and of an odd length.
#[test]
fn a_gpu_updates_as_the_cpu() {
    for table in tables() {
        for vocab in [52, 41] {
            let run = |dtype, device: &Device| {
                let mut run = Run::with_layout(&table, dtype, layout_with(vocab)).on(device);
                for (step, rows) in [&[0, 1, 2][..], &[2, 0], &[1], &[0, 2]].into_iter().enumerate() {
                    run.step(rows, &run.gradient(step));
                }
                run.state()
            };
            let expected = run(DType::F64, &Device::Cpu);
            let Some(got) = on_gpu(|device| run(DType::F32, device)) else { return };
            for (k, (got, expected)) in got.iter().zip(&expected).enumerate() {
                for (i, (x, y)) in got.iter().zip(expected).enumerate() {
                    let (kind, error) = (table.kind, (x - y).abs());
                    assert!(error <= 2e-4 * y.abs().max(1.0), "{kind} tensor {k}[{i}]: {x} is not {y}");
                }
            }
        }
    }
}

/// The columns of a tensor [ROWS, P].
fn columns(values: &[f64], width: usize, columns: &std::ops::Range<usize>) -> Vec<f64> {
    values.chunks_exact(width).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

/// Shards that ranks update by themselves are what one rank makes of the whole, bit for bit, on the CPU and by the kernels of a GPU;
/// nothing else changes. More ranks than matrices: some have nothing.
#[test]
fn shards_are_updated_as_the_whole() {
    let law = |numbers: &[usize], device: &Device| {
        for table in tables() {
            let steps: [&[usize]; 4] = [&[0, 1, 2], &[2, 0], &[1], &[0, 2]];
            let mut whole = Run::with_layout(&table, DType::F32, layout_with(41)).on(device);
            let (before, width) = (whole.state(), whole.layout.len());
            steps.iter().enumerate().for_each(|(step, rows)| whole.step(rows, &whole.gradient(step)));
            for &ranks in numbers {
                for rank in 0..ranks {
                    let mut part = Run::of_rank(&table, DType::F32, layout_with(41), rank, ranks).on(device);
                    steps.iter().enumerate().for_each(|(step, rows)| part.step(rows, &part.gradient(step)));
                    let own = part.shard.columns.clone();
                    let mut expected = before[0].clone();
                    for row in 0..ROWS {
                        let at = row * width;
                        expected[at + own.start..at + own.end]
                            .copy_from_slice(&whole.state()[0][at + own.start..at + own.end]);
                    }
                    let state = part.state();
                    assert_eq!(state[0], expected, "{} rank {rank} of {ranks}", table.kind);
                    for (k, moment) in state.iter().enumerate().skip(1) {
                        assert_eq!(*moment, columns(&whole.state()[k], width, &own), "{} moment {k}", table.kind);
                    }
                }
            }
        }
    };
    law(&[2, 3, 4, 9], &Device::Cpu);
    on_gpu(|device| law(&[3], device));
}

#[test]
fn only_the_given_rows_change() {
    for table in tables() {
        let mut run = Run::new(&table, DType::F32);
        let before = run.state();
        run.step(&[1], &run.gradient(0));
        let width = run.layout.len();
        for (k, (before, after)) in before.iter().zip(&run.state()).enumerate() {
            let same = |row: usize| before[row * width..][..width] == after[row * width..][..width];
            assert!(same(0) && same(2) && !same(1), "{}: tensor {k}", run.optimizer.name());
        }
    }
}

#[test]
fn a_run_resumes_bit_for_bit() {
    for table in tables() {
        let mut whole = Run::new(&table, DType::F32);
        (0..4).for_each(|step| whole.step(&[0, 1, 2], &whole.gradient(step)));
        let mut first = Run::new(&table, DType::F32);
        (0..2).for_each(|step| first.step(&[0, 1, 2], &first.gradient(step)));
        let mut second = Run::new(&table, DType::F32);
        second.theta = first.theta.copy().unwrap();
        second.moments = first.moments.iter().map(|m| m.copy().unwrap()).collect();
        second.updates = first.updates;
        (2..4).for_each(|step| second.step(&[0, 1, 2], &second.gradient(step)));
        assert_eq!(whole.state(), second.state(), "{}", whole.optimizer.name());
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for table in tables() {
        let state = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut run = Run::new(&table, DType::F32);
                (0..3).for_each(|step| run.step(&[0, 1, 2], &run.gradient(step)));
                run.state()
            })
        };
        assert_eq!(state(1), state(5), "{}", table.kind);
    }
}

#[test]
fn a_gradient_that_is_not_a_number_is_seen_in_theta() {
    for table in tables() {
        let layout = layout();
        for segment in &layout.segments {
            let mut run = Run::new(&table, DType::F32);
            let mut grad = run.gradient(0);
            grad[segment.offset + 1] = f64::NAN;
            run.step(&[0], &grad);
            let theta = &run.state()[0];
            assert!(theta[segment.offset + 1].is_nan(), "{} {}", run.optimizer.name(), segment.name);
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    for table in tables() {
        let run = Run::new(&table, DType::F32);
        let (step, grad) = (
            |rows: &[usize], updates: &[u64], theta: &Tensor, grad: &Tensor| {
                run.optimizer.step(&run.shard, rows, updates, theta, grad, &run.moments, &HYPER)
            },
            run.theta.zeros_like().unwrap(),
        );
        assert!(step(&[3], &[0], &run.theta, &grad).is_err(), "no such row");
        assert!(step(&[0], &[], &run.theta, &grad).is_err(), "no update count");
        assert!(step(&[0], &[0], &run.theta, &run.theta).is_err(), "the gradient is theta");
        assert!(step(&[0], &[0], &run.theta, &grad.to_dtype(DType::F64).unwrap()).is_err(), "another dtype");
        assert!(step(&[0], &[0], &run.theta.to_dtype(DType::BF16).unwrap(), &grad).is_err(), "no kernel");
    }
}

/// One matrix, three steps, θ_i = sin i, gradient cos(i² + t). The values are PyTorch 2.11's:
///
/// ```python
/// def run(make, shape):
///     i = torch.arange(6, dtype=torch.float64)
///     p = torch.nn.Parameter(torch.sin(i).reshape(shape))
///     o = make([p])
///     for t in range(3):
///         p.grad = torch.cos(i * i + t).reshape(shape)
///         o.step()
///     print(p)
/// run(lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), (2, 3))
/// run(lambda p: SGD(p, lr=0.1, momentum=0.9), (2, 3))
/// run(lambda p: AdamW(p, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), (2, 3))
/// run(lambda p: Muon(p, lr=0.1, momentum=0.9, weight_decay=0.1), (2, 3))
/// run(lambda p: Muon(p, lr=0.1, momentum=0.9, weight_decay=0.1), (3, 2))
/// ```
///
/// PyTorch's Muon iterates in bf16, which is good to about two digits.
#[test]
fn rules_equal_pytorch() {
    use OptimizerKind::{AdamW, Muon, Sgd};
    #[rustfmt::skip]
    let cases = [
        (Sgd, true, [2, 3], 1e-11, [-0.411254025946, 0.956535388878, 0.874780661317, 0.681005206884, -0.478354309979, -1.419607684355]),
        (Sgd, false, [2, 3], 1e-11, [-0.332042754460, 0.873116208522, 0.936522004177, 0.547017329756, -0.511027412735, -1.321241027047]),
        (AdamW, true, [2, 3], 1e-11, [-0.239204345867, 0.759547071171, 0.975739610400, 0.411658856099, -0.531719319665, -1.182966886012]),
        (Muon, true, [2, 3], 5e-3, [-0.170429570313, 0.958682908213, 0.776570032389, 0.224210315347, -0.649670563770, -1.066205901500]),
        (Muon, true, [3, 2], 5e-3, [-0.148068353881, 0.843339573960, 0.866115283687, 0.314118088553, -0.662598908408, -1.130301964896]),
    ];
    for (kind, nesterov, shape, tolerance, expected) in cases {
        let weight_decay = if kind == Sgd { 0.0 } else { 0.1 };
        let table = OptimizerTable { kind, nesterov, weight_decay, muon_lr_ratio: 1.0, ..Default::default() };
        let optimizer = new(&table);
        let (name, shape) = ("matrix", shape.to_vec());
        let segment = Segment { name, shape, offset: 0, init: Init::Zeros, decay: true, matrices: 1 };
        let layout = Layout { segments: vec![segment] };
        let row = |f: &dyn Fn(f64) -> f64| {
            let values: Vec<f64> = (0..6).map(|i| f(i as f64)).collect();
            Tensor::from_slice(&values, (1, 6), &Device::Cpu).unwrap()
        };
        let theta = row(&f64::sin);
        let moments: Vec<_> = optimizer.moments().iter().map(|_| row(&|_| 0.0)).collect();
        let hyper = Hyper { lr: 0.1, gradient_scale: 1.0, eps_scale: 1.0 };
        for t in 0..3 {
            let grad = row(&|i| (i * i + t as f64).cos());
            optimizer.step(&Shard::whole(&layout), &[0], &[t], &theta, &grad, &moments, &hyper).unwrap();
        }
        for (got, expected) in values(&theta).into_iter().zip(expected) {
            assert!((got - expected).abs() < tolerance, "{kind} nesterov {nesterov}: {got} is not {expected}");
        }
    }
}

#[test]
fn clipping_bounds_the_norm_and_hides_nothing() {
    assert_eq!(gradient_scale(4.0, 1.0), 0.25);
    assert_eq!(gradient_scale(0.5, 1.0), 1.0);
    assert_eq!(gradient_scale(0.0, 1.0), 1.0);
    assert_eq!(gradient_scale(4.0, 0.0), 1.0);
    assert!(gradient_scale(f64::NAN, 1.0).is_nan());
}
