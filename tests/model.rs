//! The explicit adjoint against three independent answers (finite differences, candle's autograd, PyTorch), and the laws
//! of the net: order of the integrators, recompute, accumulation, no allocation in a step.

use candle_core::{D, DType, Device, Tensor, Var};
use std::alloc::{GlobalAlloc, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use vcycle::config::{Integrator, Parametrization};
use vcycle::error::{Context, Result};
use vcycle::model::{Init, Layout, Net, Params, Ready, Spec};
use vcycle::ops::matrix::Factors;

const INTEGRATORS: [Integrator; 3] = [Integrator::Euler, Integrator::Split, Integrator::Heun];

fn small(integrator: Integrator) -> Spec {
    Spec {
        vocab: 11,
        width: 8,
        heads: 2,
        context: 5,
        depth: 3,
        integrator,
        parametrization: Parametrization::Standard,
        tied: true,
        init_std: 0.02,
        recompute: false,
        dtype: DType::F32,
        factors: Factors::Exact,
    }
}

/// Every integrator, head and use of memory.
fn all_specs() -> impl Iterator<Item = Spec> {
    INTEGRATORS.into_iter().flat_map(|integrator| {
        [(true, false), (true, true), (false, false), (false, true)].map(|(tied, recompute)| Spec {
            tied,
            recompute,
            ..small(integrator)
        })
    })
}

/// A net with parameters and a batch.
struct Problem {
    spec: Spec,
    h: f64,
    trajectory: Tensor,
    ends: Tensor,
    tokens: Vec<u32>,
    targets: Vec<u32>,
}

/// uint32 hash of (stream, index), as in tests/oracle/gpt_oracle.py.
fn noise(stream: u32, index: u32) -> u32 {
    let mut x = index.wrapping_mul(0x9E37_79B1).wrapping_add(stream.wrapping_mul(0x85EB_CA77));
    x ^= x >> 15;
    x = x.wrapping_mul(0x2C1B_3C6D);
    x ^= x >> 12;
    x = x.wrapping_mul(0x297A_2D39);
    x ^ (x >> 15)
}

/// Uniform in ±scale/2.
fn uniform(stream: u32, index: usize, scale: f32) -> f32 {
    scale * ((noise(stream, index as u32) >> 8) as f32 / (1 << 24) as f32 - 0.5)
}

/// A row in which every parameter, biases too, has an effect.
fn row(layout: &Layout, stream: u32, scale: f32) -> Vec<f32> {
    let mut values: Vec<f32> = (0..layout.len()).map(|i| uniform(stream, i, scale)).collect();
    for segment in layout.segments.iter().filter(|s| s.init == Init::LayerNorm) {
        values[segment.offset..][..segment.len() / 2].iter_mut().for_each(|w| *w += 1.0);
    }
    values
}

impl Problem {
    fn new(spec: Spec, h: f64, sequences: usize, dtype: DType) -> Result<Problem> {
        let scale = 2.0 / (spec.width as f32).sqrt();
        let (block, ends) = (Layout::block(&spec), Layout::ends(&spec));
        let rows = (0..spec.depth).flat_map(|n| row(&block, 1 + n as u32, scale)).collect();
        let tensor = |values: Vec<f32>, len| -> Result<Tensor> {
            Ok(Tensor::from_vec(values, ((), len), &Device::Cpu)?.to_dtype(dtype)?)
        };
        let n = sequences * spec.context;
        let mut tokens: Vec<u32> = (0..2 * n as u32).map(|i| noise(1000, i) % spec.vocab as u32).collect();
        let targets = tokens.split_off(n);
        Ok(Problem {
            trajectory: tensor(rows, block.len())?,
            ends: tensor(row(&ends, 0, scale), ends.len())?,
            spec,
            h,
            tokens,
            targets,
        })
    }

    fn net(&self) -> Result<Net> {
        let sequences = self.tokens.len() / self.spec.context;
        Net::new(&self.spec, self.spec.depth, sequences, self.trajectory.dtype(), &Device::Cpu)
    }

    fn rows(&self) -> Vec<usize> {
        (0..self.spec.depth).collect()
    }

    fn params(&self) -> Result<Params> {
        Params::view(&self.spec, &self.trajectory, &self.rows(), &self.ends, self.h)
    }

    fn answer(&self) -> Result<Answer> {
        let mut answer = Answer::zeros(self)?;
        let grads = answer.views(self)?;
        answer.loss = self.net()?.loss_and_gradient(&self.params()?, &grads, &self.tokens, &self.targets, 1.0, None)?;
        Ok(answer)
    }
}

/// Loss, and gradients of the shape of the parameters.
struct Answer {
    loss: f64,
    trajectory: Tensor,
    ends: Tensor,
}

impl Answer {
    fn zeros(problem: &Problem) -> Result<Answer> {
        Ok(Answer { loss: 0.0, trajectory: problem.trajectory.zeros_like()?, ends: problem.ends.zeros_like()? })
    }

    fn views(&self, problem: &Problem) -> Result<Params> {
        Params::view(&problem.spec, &self.trajectory, &problem.rows(), &self.ends, problem.h)
    }

    /// (name, values) of every segment of every row.
    fn segments(&self, spec: &Spec) -> Result<Vec<(String, Vec<f64>)>> {
        let mut all = Vec::new();
        for (layout, tensor, name) in
            [(Layout::block(spec), &self.trajectory, "blocks"), (Layout::ends(spec), &self.ends, "ends")]
        {
            for (row, values) in tensor.to_dtype(DType::F64)?.to_vec2::<f64>()?.into_iter().enumerate() {
                for s in &layout.segments {
                    all.push((format!("{name}/{row}/{}", s.name), values[s.offset..][..s.len()].to_vec()));
                }
            }
        }
        Ok(all)
    }

    /// The largest ‖a − b‖ / ‖b‖ over segments, after checking the loss; panics above `tolerance`.
    fn assert_close(&self, expected: &Answer, spec: &Spec, tolerance: f64) -> Result<f64> {
        let case = format!("{:?}, tied {}, recompute {}", spec.integrator, spec.tied, spec.recompute);
        let (a, b) = (self.loss, expected.loss);
        assert!((a - b).abs() <= tolerance * b.abs(), "{case}: loss {a}, expected {b}");
        let mut worst: f64 = 0.0;
        for ((name, a), (_, b)) in self.segments(spec)?.iter().zip(expected.segments(spec)?) {
            let difference: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            let relative = norm(&difference) / norm(&b);
            assert!(relative <= tolerance, "{case}: {name} differs by {relative:e}");
            worst = worst.max(relative);
        }
        Ok(worst)
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

// --- three independent answers ---

/// ⟨∇L, v⟩ = (L(θ + εv) − L(θ − εv)) / 2ε + O(ε²), v random in one segment of one row.
#[test]
fn gradients_are_finite_differences() -> Result<()> {
    const EPSILON: f64 = 1e-4;
    for spec in all_specs() {
        let problem = Problem::new(spec, 0.7, 2, DType::F64)?;
        let answer = problem.answer()?;
        let mut net = problem.net()?;
        let (block, ends) = (Layout::block(&problem.spec), Layout::ends(&problem.spec));
        let mut segments = answer.segments(&problem.spec)?.into_iter();
        for (layout, base) in [(&block, &problem.trajectory), (&ends, &problem.ends)] {
            for row in 0..base.dim(0)? {
                for segment in &layout.segments {
                    let (name, gradient) = segments.next().expect("as many as segments");
                    let start = row * layout.len() + segment.offset;
                    let v: Vec<f64> = (0..segment.len()).map(|i| uniform(77, start + i, 2.0) as f64).collect();
                    let mut loss_at = |epsilon: f64| -> Result<f64> {
                        let mut values = base.flatten_all()?.to_vec1::<f64>()?;
                        values[start..][..v.len()].iter_mut().zip(&v).for_each(|(x, v)| *x += epsilon * v);
                        let moved = Tensor::from_vec(values, base.shape(), &Device::Cpu)?;
                        let (trajectory, ends) =
                            if layout == &block { (&moved, &problem.ends) } else { (&problem.trajectory, &moved) };
                        let params = Params::view(&problem.spec, trajectory, &problem.rows(), ends, problem.h)?;
                        net.loss(&params, &problem.tokens, &problem.targets)
                    };
                    let expected = (loss_at(EPSILON)? - loss_at(-EPSILON)?) / (2.0 * EPSILON);
                    let derivative: f64 = gradient.iter().zip(&v).map(|(g, v)| g * v).sum();
                    // The usual size of ⟨g, v⟩: it may be small by chance.
                    let size = norm(&gradient) * norm(&v) / (v.len() as f64).sqrt();
                    assert!(
                        (derivative - expected).abs() <= 1e-6 * size,
                        "{:?}: {name}: {derivative} is not {expected}",
                        problem.spec
                    );
                }
            }
        }
    }
    Ok(())
}

/// The net once more in candle operations that have a backward.
mod plain {
    use super::*;

    fn layer_norm(x: &Tensor, ln: &Tensor) -> Result<Tensor> {
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centered.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        Ok(centered.broadcast_div(&deviation)?.broadcast_mul(&ln.get(0)?)?.broadcast_add(&ln.get(1)?)?)
    }

    fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&weight.t()?)?.broadcast_add(bias)?)
    }

    fn gelu(x: &Tensor) -> Result<Tensor> {
        let cubic = (x + ((x.sqr()? * x)? * 0.044715)?)?;
        let tanh = (cubic * (2.0 / std::f64::consts::PI).sqrt())?.tanh()?;
        Ok(((x * 0.5)? * (tanh + 1.0)?)?)
    }

    struct Block<'a> {
        spec: &'a Spec,
        layout: Layout,
        row: Tensor,
    }

    impl Block<'_> {
        fn get(&self, name: &str) -> Result<Tensor> {
            let s = self.layout.segments.iter().find(|s| s.name == name).with_context(|| name.to_owned())?;
            Ok(self.row.narrow(0, s.offset, s.len())?.reshape(s.shape.as_slice())?)
        }

        fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
            linear(x, &self.get(&format!("{name}/weight"))?, &self.get(&format!("{name}/bias"))?)
        }

        fn sa(&self, x: &Tensor) -> Result<Tensor> {
            let Spec { context, heads, width, .. } = *self.spec;
            let batch = x.dim(0)? / context;
            let qkv = self.linear(&layer_norm(x, &self.get("ln1")?)?, "attn/qkv")?;
            let head = |i: usize| -> Result<Tensor> {
                let part = qkv.narrow(1, i * width, width)?;
                Ok(part.reshape((batch, context, heads, width / heads))?.transpose(1, 2)?.contiguous()?)
            };
            let (q, k, v) = (head(0)?, head(1)?, head(2)?);
            let scores = (q.matmul(&k.t()?)? / ((width / heads) as f64).sqrt())?;
            let causal = Tensor::tril2(context, DType::F64, x.device())?;
            let exp = scores.exp()?.broadcast_mul(&causal)?;
            let p = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
            self.linear(&p.matmul(&v)?.transpose(1, 2)?.reshape(x.shape())?, "attn/proj")
        }

        fn ff(&self, x: &Tensor) -> Result<Tensor> {
            let u = layer_norm(x, &self.get("ln2")?)?;
            self.linear(&gelu(&self.linear(&u, "mlp/fc")?)?, "mlp/proj")
        }

        fn field(&self, x: &Tensor) -> Result<Tensor> {
            let a = self.sa(x)?;
            Ok((&a + self.ff(&(x + &a)?)?)?)
        }

        fn step(&self, h: f64, x: &Tensor) -> Result<Tensor> {
            Ok(match self.spec.integrator {
                Integrator::Euler => (x + (self.field(x)? * h)?)?,
                Integrator::Split => {
                    let x = (x + (self.sa(x)? * h)?)?;
                    (&x + (self.ff(&x)? * h)?)?
                }
                Integrator::Heun => {
                    let k1 = self.field(x)?;
                    let k2 = self.field(&(x + (&k1 * h)?)?)?;
                    (x + ((k1 + k2)? * (h / 2.0))?)?
                }
            })
        }
    }

    pub fn answer(p: &Problem) -> Result<Answer> {
        let trajectory = Var::from_tensor(&p.trajectory)?;
        let ends = Var::from_tensor(&p.ends)?;
        let outer = Block { spec: &p.spec, layout: Layout::ends(&p.spec), row: ends.get(0)? };
        let tokens = Tensor::new(p.tokens.as_slice(), &Device::Cpu)?;
        let targets = Tensor::new(p.targets.as_slice(), &Device::Cpu)?.unsqueeze(1)?;
        let sequences = p.tokens.len() / p.spec.context;
        let wte = outer.get("wte")?;
        let mut x = (wte.index_select(&tokens, 0)? + outer.get("wpe")?.repeat((sequences, 1))?)?;
        for n in 0..p.spec.depth {
            let block = Block { spec: &p.spec, layout: Layout::block(&p.spec), row: trajectory.get(n)? };
            x = block.step(p.h, &x)?;
        }
        let head = if p.spec.tied { wte } else { outer.get("head")? };
        let logits = layer_norm(&x, &outer.get("ln_f")?)?.matmul(&head.t()?)?;
        let loss = (logits.exp()?.sum_keepdim(1)?.log()? - logits.gather(&targets, 1)?)?.sum_all()?;
        let grads = loss.backward()?;
        let gradient = |v: &Var| grads.get(v).cloned().context("a gradient");
        Ok(Answer { loss: loss.to_scalar()?, trajectory: gradient(&trajectory)?, ends: gradient(&ends)? })
    }
}

#[test]
fn gradients_are_those_of_autograd() -> Result<()> {
    for spec in all_specs() {
        let problem = Problem::new(spec, 0.7, 2, DType::F64)?;
        problem.answer()?.assert_close(&plain::answer(&problem)?, &problem.spec, 1e-9)?;
    }
    Ok(())
}

/// tests/oracle/gpt_oracle.py writes the fixture; VCYCLE_ORACLE names another one.
#[test]
fn loss_and_gradients_are_pytorch_s() -> Result<()> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt_oracle.npz");
    let path = std::env::var_os("VCYCLE_ORACLE").map_or(fixture, Into::into);
    let arrays: std::collections::HashMap<String, Tensor> = Tensor::read_npz(&path)?.into_iter().collect();
    let shape: Vec<usize> = arrays["shape"].to_vec1::<i64>()?.into_iter().map(|n| n as usize).collect();
    for (case, integrator, tied, h) in [
        ("euler-tied-1.0", Integrator::Euler, true, 1.0),
        ("split-untied-1.0", Integrator::Split, false, 1.0),
        ("heun-tied-1.0", Integrator::Heun, true, 1.0),
        ("euler-untied-0.5", Integrator::Euler, false, 0.5),
    ] {
        let [vocab, width, heads, context, depth, batch] = shape[..] else { panic!("shape {shape:?}") };
        let spec = Spec { vocab, width, heads, context, depth, tied, ..small(integrator) };
        let problem = Problem::new(spec, h, batch, DType::F32)?;
        let expected = |key: &str| arrays[&format!("{case}-{key}")].clone();
        let loss = expected("loss").to_scalar::<f64>()?;
        let expected = Answer { loss, trajectory: expected("trajectory"), ends: expected("ends") };
        let worst = problem.answer()?.assert_close(&expected, &problem.spec, 1e-4)?;
        println!("{case}: largest relative difference of a gradient {worst:.1e}");
    }
    Ok(())
}

// --- laws ---

#[test]
fn recompute_changes_no_bit() -> Result<()> {
    for integrator in INTEGRATORS {
        let answer = |recompute| {
            let spec = Spec { recompute, ..small(integrator) };
            let answer = Problem::new(spec, 0.7, 2, DType::F32)?.answer()?;
            Ok::<_, vcycle::error::Error>((
                answer.loss,
                answer.trajectory.to_vec2::<f32>()?,
                answer.ends.to_vec2::<f32>()?,
            ))
        };
        assert!(answer(true)? == answer(false)?, "{integrator:?}");
    }
    Ok(())
}

/// Gradients add up over micro-batches of unequal length, each with its scale.
#[test]
fn micro_batches_add_up() -> Result<()> {
    for integrator in INTEGRATORS {
        let problem = Problem::new(small(integrator), 0.7, 3, DType::F64)?;
        let whole = problem.answer()?;
        let mut parts = Answer::zeros(&problem)?;
        let (params, grads, mut net) = (problem.params()?, parts.views(&problem)?, problem.net()?);
        let cut = 2 * problem.spec.context;
        for range in [0..cut, cut..problem.tokens.len()] {
            let (tokens, targets) = (&problem.tokens[range.clone()], &problem.targets[range]);
            parts.loss += net.loss_and_gradient(&params, &grads, tokens, targets, 0.5, None)?;
            assert!((net.loss(&params, tokens, targets)?).is_finite());
        }
        let doubled = Answer { loss: parts.loss, trajectory: (parts.trajectory * 2.0)?, ends: (parts.ends * 2.0)? };
        doubled.assert_close(&whole, &problem.spec, 1e-12)?;
    }
    Ok(())
}

#[test]
fn blocks_are_ready_from_the_last_to_the_first_and_then_left_alone() -> Result<()> {
    let problem = Problem::new(small(Integrator::Euler), 1.0, 1, DType::F32)?;
    let answer = Answer::zeros(&problem)?;
    let grads = answer.views(&problem)?;
    let mut seen = Vec::new();
    let mut ready = |part| {
        let values = match part {
            Ready::Block(n) => answer.trajectory.get(n)?.to_vec1::<f32>()?,
            Ready::Ends => answer.ends.get(0)?.to_vec1::<f32>()?,
        };
        seen.push((part, values));
        Ok(())
    };
    let (tokens, targets) = (&problem.tokens, &problem.targets);
    problem.net()?.loss_and_gradient(&problem.params()?, &grads, tokens, targets, 1.0, Some(&mut ready))?;
    let order: Vec<Ready> = seen.iter().map(|(part, _)| *part).collect();
    assert_eq!(order, [Ready::Block(2), Ready::Block(1), Ready::Block(0), Ready::Ends]);
    for (part, values) in &seen[..3] {
        let Ready::Block(n) = *part else { unreachable!() };
        assert_eq!(&answer.trajectory.get(n)?.to_vec1::<f32>()?, values);
    }
    Ok(())
}

#[test]
fn an_error_of_ready_ends_the_step() -> Result<()> {
    let problem = Problem::new(small(Integrator::Euler), 1.0, 1, DType::F32)?;
    let grads = Answer::zeros(&problem)?.views(&problem)?;
    let mut ready = |_| Err(vcycle::error::anyhow!("a rank was lost"));
    let (tokens, targets) = (&problem.tokens, &problem.targets);
    let result = problem.net()?.loss_and_gradient(&problem.params()?, &grads, tokens, targets, 1.0, Some(&mut ready));
    assert_eq!(result.unwrap_err().to_string(), "a rank was lost");
    Ok(())
}

#[test]
fn what_does_not_fit_the_workspace_is_an_error() -> Result<()> {
    let problem = Problem::new(small(Integrator::Euler), 1.0, 2, DType::F32)?;
    let (params, mut net) = (problem.params()?, problem.net()?);
    let tokens = [0; 15];
    assert!(net.loss(&params, &tokens[..10], &tokens[..10]).is_ok());
    for (tokens, targets) in [(&tokens[..], &tokens[..]), (&tokens[..0], &tokens[..0]), (&tokens[..10], &tokens[..5])] {
        assert!(net.loss(&params, tokens, targets).is_err());
    }
    assert!(net.loss(&params, &tokens[..9], &tokens[..9]).is_err());
    let deeper = Params::view(&problem.spec, &problem.trajectory, &[0, 1, 2, 2], &problem.ends, 1.0)?;
    assert!(net.loss(&deeper, &tokens[..10], &tokens[..10]).is_err());
    Ok(())
}

/// Losses of nets made of `rows` of one problem's trajectory.
struct Depths {
    problem: Problem,
    net: Net,
}

impl Depths {
    fn new(integrator: Integrator, max_rows: usize) -> Result<Depths> {
        let problem = Problem::new(small(integrator), 1.0, 2, DType::F64)?;
        let net = Net::new(&problem.spec, max_rows, 2, DType::F64, &Device::Cpu)?;
        Ok(Depths { problem, net })
    }

    fn loss(&mut self, rows: &[usize], h: f64) -> Result<f64> {
        let p = &self.problem;
        let params = Params::view(&p.spec, &p.trajectory, rows, &p.ends, h)?;
        self.net.loss(&params, &p.tokens, &p.targets)
    }
}

fn order(integrator: Integrator) -> f64 {
    match integrator {
        Integrator::Euler | Integrator::Split => 1.0,
        Integrator::Heun => 2.0,
    }
}

/// With θ constant in time, the error at t = ¼ falls as h^order. Euler and Heun solve dx/dt = F(x; θ); the splitting's
/// limit is another one, dx/dt = SA(LN x) + FF(LN x).
#[test]
fn integrators_have_their_order() -> Result<()> {
    for integrator in INTEGRATORS {
        let exact = if integrator == Integrator::Split { Integrator::Split } else { Integrator::Heun };
        let exact = Depths::new(exact, 1024)?.loss(&[0; 1024], 0.25 / 1024.0)?;
        let mut nets = Depths::new(integrator, 32)?;
        let mut error = |n: usize| Ok::<_, vcycle::error::Error>(nets.loss(&vec![0; n], 0.25 / n as f64)? - exact);
        let power = (error(16)? / error(32)?).log2();
        assert!((power - order(integrator)).abs() < 0.15, "{integrator:?}: {power}");
    }
    Ok(())
}

/// Two steps h/2 with the parameters of one step h: the function is kept up to h^(order + 1).
#[test]
fn halving_steps_nearly_keeps_the_function() -> Result<()> {
    for integrator in INTEGRATORS {
        let mut nets = Depths::new(integrator, 6)?;
        let mut change = |h: f64| {
            Ok::<_, vcycle::error::Error>(nets.loss(&[0, 1, 2], h)? - nets.loss(&[0, 0, 1, 1, 2, 2], h / 2.0)?)
        };
        let power = (change(0.004)? / change(0.002)?).log2();
        assert!((power - order(integrator) - 1.0).abs() < 0.15, "{integrator:?}: {power}");
    }
    Ok(())
}

#[test]
fn euler_is_split_at_unit_step() -> Result<()> {
    let answer = |integrator, h| Problem::new(small(integrator), h, 2, DType::F64)?.answer();
    let split = answer(Integrator::Split, 1.0)?;
    answer(Integrator::Euler, 1.0)?.assert_close(&split, &small(Integrator::Euler), 1e-13)?;
    assert!((answer(Integrator::Euler, 0.5)?.loss - answer(Integrator::Split, 0.5)?.loss).abs() > 1e-4);
    Ok(())
}

// --- memory ---

/// Counts large allocations on threads that ask for it, except those aligned to cache lines: the gemm crate packs
/// operands into such buffers and frees them within each product. Tensors and vectors are aligned to their elements.
struct Counting;

static LARGE: AtomicUsize = AtomicUsize::new(0);
static LARGE_BYTES: AtomicUsize = AtomicUsize::new(0);
thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: usize, align: usize) {
    if bytes >= 4096 && align < 64 && COUNTED.get() {
        LARGE.fetch_add(1, Ordering::Relaxed);
        LARGE_BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        count(layout.size(), layout.align());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: std::alloc::Layout) -> *mut u8 {
        count(layout.size(), layout.align());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: std::alloc::Layout, size: usize) -> *mut u8 {
        count(size, layout.align());
        unsafe { System.realloc(pointer, layout, size) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: std::alloc::Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// All tensors, the workspace's bytes and no others, are made in `Net::new`; a step that ran before makes none.
#[test]
fn a_warm_step_allocates_nothing() -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(|_| COUNTED.set(true)).build()?;
    let spec = Spec { vocab: 512, width: 64, heads: 4, context: 256, ..small(Integrator::Heun) };
    let problem = Problem::new(spec, 0.5, 2, DType::F32)?;
    let (params, answer) = (problem.params()?, Answer::zeros(&problem)?);
    let grads = answer.views(&problem)?;

    let predicted = Net::workspace_bytes(&problem.spec, problem.spec.depth, 2) as usize;
    let mut net = pool.install(|| problem.net())?;
    let made = LARGE_BYTES.load(Ordering::Relaxed);
    // Tokens, targets and the loss in f64 are too small to be counted, all other tensors are not.
    assert_eq!(made + 2 * 4 * problem.tokens.len() + 8, predicted);

    let mut step = |sequences: usize| -> Result<usize> {
        let n = sequences * problem.spec.context;
        let before = LARGE.load(Ordering::Relaxed);
        let (tokens, targets) = (&problem.tokens[..n], &problem.targets[..n]);
        pool.install(|| net.loss_and_gradient(&params, &grads, tokens, targets, 1.0, None))?;
        Ok(LARGE.load(Ordering::Relaxed) - before)
    };
    // A thread's own scratch grows when it first meets an operation; which thread does what varies.
    let mut free = || Ok::<_, vcycle::error::Error>(step(2)? + step(1)? == 0);
    for _ in 0..50 {
        if free()? {
            return Ok(());
        }
    }
    panic!("every one of 50 steps allocated");
}
