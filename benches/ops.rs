//! Time of each op at the shapes of a training step against its floor: `cargo bench --bench ops [-- FILTER]`.
//!
//! 12 blocks, width 256, 8 heads, context 256, 4 sequences, 50,257 tokens, f32. GFLOP/s count the products only.
use candle_core::{DType, Device, Tensor};
use std::time::Instant;
use vcycle::error::Result;
use vcycle::ops::matrix::Factors;
use vcycle::ops::*;

/// As in the binary: it decides what the scratch of the `gemm` crate costs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQUENCES: usize = 4;
const CONTEXT: usize = 256;
const N: usize = SEQUENCES * CONTEXT;
const D: usize = 256;
const HEADS: usize = 8;
const VOCAB: usize = 50257;
const CHUNK: usize = 512;
const BLOCKS: usize = 12;

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.5, shape, &Device::Cpu).expect("a tensor of the bench")
}

fn indices(n: usize, end: usize) -> Tensor {
    let values: Vec<u32> = (0..n).map(|i| ((i * 7919) % end) as u32).collect();
    Tensor::new(values, &Device::Cpu).expect("a tensor of the bench")
}

struct Report {
    filter: Option<String>,
    /// Milliseconds of one step.
    step: f64,
    step_cpu: f64,
}

/// CPU time of this process: on a busy machine it says more than the clock.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes into `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Least and median.
fn quantiles(mut times: Vec<f64>) -> [f64; 2] {
    times.sort_by(f64::total_cmp);
    [times[0], times[times.len() / 2]]
}

impl Report {
    /// Median time of `op`, which does `flop` floating-point operations and moves `bytes`, and happens `count` times a step.
    fn time(
        &mut self,
        name: &str,
        count: usize,
        flop: usize,
        bytes: usize,
        mut op: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        if self.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
            return Ok(());
        }
        op()?;
        let (mut wall, mut cpu) = (Vec::new(), Vec::new());
        let begin = Instant::now();
        while wall.len() < 5 || (begin.elapsed().as_secs_f64() < 0.5 && wall.len() < 1000) {
            let (start, cpu_start) = (Instant::now(), cpu_seconds());
            op()?;
            wall.push(start.elapsed().as_secs_f64());
            cpu.push(cpu_seconds() - cpu_start);
        }
        let [best, median] = quantiles(wall);
        let [best_cpu, median_cpu] = quantiles(cpu);
        self.step += median * 1e3 * count as f64;
        self.step_cpu += median_cpu * 1e3 * count as f64;
        println!(
            "{name:34} wall {:9.3} best {:9.3}  CPU {:9.3} best {:9.3} ms  {:6.1} GFLOP/s {:6.1} GB/s a CPU  × {count:2} = {:7.1} ms CPU",
            median * 1e3,
            best * 1e3,
            median_cpu * 1e3,
            best_cpu * 1e3,
            flop as f64 / median_cpu * 1e-9,
            bytes as f64 / median_cpu * 1e-9,
            median_cpu * 1e3 * count as f64
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let mut report = Report { filter, step: 0.0, step_cpu: 0.0 };
    let side = 2048;
    let [x, w, out] = [tensor(&[side, side]), tensor(&[side, side]), tensor(&[side, side])];
    // inside the pool, as a training step runs
    rayon::ThreadPoolBuilder::new().build()?.install(|| {
        report.time("peak: 2048³", 0, 2 * side * side * side, 0, || {
            linear::forward(Factors::Exact, &x, &w, None, 1.0, 0.0, &out)
        })?;
        products(&mut report)?;
        rows(&mut report)?;
        head(&mut report)
    })?;
    println!(
        "sum over a step: {:.1} ms, CPU {:.1} ms; {:.0} tokens/s",
        report.step,
        report.step_cpu,
        N as f64 / report.step * 1e3
    );
    Ok(())
}

fn products(report: &mut Report) -> Result<()> {
    for (name, i, o) in [("qkv", D, 3 * D), ("attn proj", D, D), ("fc", D, 4 * D), ("mlp proj", 4 * D, D)] {
        let [x, w, b, y] = [tensor(&[N, i]), tensor(&[o, i]), tensor(&[o]), tensor(&[N, o])];
        let flop = 2 * N * i * o;
        report.time(&format!("linear::forward {name}"), BLOCKS, flop, 0, || {
            linear::forward(Factors::Exact, &x, &w, Some(&b), 1.0, 0.0, &y)
        })?;
        report.time(&format!("linear::backward_input {name}"), BLOCKS, flop, 0, || {
            linear::backward_input(Factors::Exact, &y, &w, 1.0, 0.0, &x)
        })?;
        report.time(&format!("linear::backward_weight {name}"), BLOCKS, flop, 0, || {
            linear::backward_weight(Factors::Exact, &y, &x, 1e-9, &w, Some(&b))
        })?;
    }
    let [qkv, out, lse] = [tensor(&[N, 3 * D]), tensor(&[N, D]), tensor(&[SEQUENCES, HEADS, CONTEXT])];
    let [dout, dqkv] = [tensor(&[N, D]), tensor(&[N, 3 * D])];
    let product = N * CONTEXT * D;
    report.time("attention::forward", BLOCKS, 2 * product, 0, || {
        attention::forward(Factors::Exact, &qkv, CONTEXT, HEADS, &out, &lse)
    })?;
    report.time("attention::backward", BLOCKS, 5 * product, 0, || {
        attention::backward(Factors::Exact, &qkv, &out, &lse, &dout, CONTEXT, HEADS, &dqkv)
    })
}

fn rows(report: &mut Report) -> Result<()> {
    let [x, dy, ln, stats] = [tensor(&[N, D]), tensor(&[N, D]), tensor(&[2, D]), tensor(&[N, 2])];
    let [out, dln] = [tensor(&[N, D]), tensor(&[2, D])];
    let bytes = 4 * N * D;
    report.time("layer_norm::forward", 2 * BLOCKS + 1, 0, 2 * bytes, || layer_norm::forward(&x, &ln, &out, &stats))?;
    report.time("layer_norm::normalize", 2 * BLOCKS, 0, 2 * bytes, || layer_norm::normalize(&x, &ln, &stats, &out))?;
    report.time("layer_norm::backward", 2 * BLOCKS + 1, 0, 4 * bytes, || {
        layer_norm::backward(&dy, &x, &ln, &stats, &out, &dln)
    })?;
    report.time("residual::combine", 2 * BLOCKS, 0, 3 * bytes, || residual::combine(1.0, &x, 0.5, &dy, &out))?;
    report.time("residual::scale_add", BLOCKS, 0, 3 * bytes, || residual::scale_add(0.5, &out, 0.5, &x))?;
    let [x, b, out] = [tensor(&[N, 4 * D]), tensor(&[4 * D]), tensor(&[N, 4 * D])];
    report.time("gelu::forward", BLOCKS, 0, 8 * bytes, || gelu::forward(&x, &b, &out))?;
    report.time("gelu::backward", BLOCKS, 0, 16 * bytes, || gelu::backward(&x, &b, &out))
}

fn head(report: &mut Report) -> Result<()> {
    let [tokens, x, dx] = [indices(N, VOCAB), tensor(&[N, D]), tensor(&[N, D])];
    let [wte, dwte, wpe] = [tensor(&[VOCAB, D]), tensor(&[VOCAB, D]), tensor(&[CONTEXT, D])];
    let bytes = 4 * N * D;
    report.time("embedding::forward", 1, 0, 3 * bytes, || embedding::forward(&tokens, &wte, &wpe, &x))?;
    report.time("embedding::backward", 1, 0, 6 * bytes, || embedding::backward(&tokens, &x, &dwte, &wpe))?;
    let logits = Tensor::zeros((CHUNK, VOCAB), DType::F32, &Device::Cpu)?;
    let total = Tensor::zeros(1, DType::F64, &Device::Cpu)?;
    report.time("classifier::loss", 0, 2 * N * D * VOCAB, 0, || {
        classifier::loss(Factors::Exact, &x, &wte, &tokens, &logits).map(drop)
    })?;
    report.time("classifier::loss_and_gradient", 1, 6 * N * D * VOCAB, 0, || {
        classifier::loss_and_gradient(Factors::Exact, &x, &wte, &tokens, 1e-9, &logits, &total, &dx, &dwte)
    })?;
    let wte = [wte];
    report.time("norm::sum_of_squares [V, d]", 2, 0, 4 * VOCAB * D, || norm::sum_of_squares(&wte).map(drop))
}
