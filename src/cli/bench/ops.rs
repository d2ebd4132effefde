//! `vcycle bench ops`

use super::{Common, FINE, PAPER, Subject, configure, median, profiled};
use crate::cli::text::{percent, seconds, table};
use crate::config::Config;
use crate::error::{Outcome, Result};
use crate::model::{Layout, Net, Shard, Spec};
use crate::ops::profile::Entry;
use crate::ops::replay::Replay;
use crate::ops::{access, attention, classifier, embedding, gelu, layer_norm, linear, norm, residual};
use crate::optim::{self, Hyper};
use crate::run;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// Each op of a training step by itself, against the peak of matrix products and the speed of a copy.
///
/// The config is that of `bench step`; give the shape of yours by --set. An op's FLOPs are those of its products, in attention of the pairs that are not
/// masked; its bytes are what it must read and write, each tensor once. An op is done many times in a row on the same tensors: those that fit a
/// cache stay there, and may beat the copy, which does not fit. On a GPU the calls are one CUDA graph, but for the classifier's and those over all
/// parameters, which the host waits for.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Only ops with this in their name: `attention`, `linear::forward`.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Times that each op's calls are timed; medians count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let overrides = PAPER.iter().copied().chain(args.common.overrides.iter().map(String::as_str));
    let (config, folder) = configure(overrides)?;
    run::use_threads(config.parallel.threads, 1)?;
    let mut subject = Subject::new((config.clone(), folder))?;
    subject.warm_up(FINE)?;
    let (device, spec) = (subject.learner.device().clone(), subject.learner.spec().clone());
    let step_s = median((0..args.times).map(|_| subject.step(FINE)).collect::<Result<Vec<_>>>()?);
    let (_, entries) = profiled(&device, || subject.step(FINE))?;
    let gemm_peak_flops = subject.gemm_peak()?;
    // The ops need its memory.
    drop(subject);
    let copy_bytes_per_s = copy_speed(&device, args.times)?;
    let sequences = run::micro_batch(&config, 1);
    let mut bench = Bench { args, device, config, spec, entries, sequences, timed: Vec::new() };
    bench.step()?;
    let report = Report {
        step_s,
        gemm_peak_flops,
        copy_bytes_per_s,
        whole: args.only.is_none(),
        missing: bench.missing(),
        ops: bench.timed,
    };
    let text = if args.common.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// What is printed; field names are those of `--json`.
#[derive(Serialize)]
struct Report {
    /// Of a training step as a whole.
    step_s: f64,
    gemm_peak_flops: f64,
    /// Read and written.
    copy_bytes_per_s: f64,
    /// No op was left out on demand.
    #[serde(skip)]
    whole: bool,
    /// Ops that a step calls and that are not timed here.
    missing: Vec<&'static str>,
    ops: Vec<Timed>,
}

/// An op at one shape.
#[derive(Serialize)]
struct Timed {
    op: &'static str,
    /// Shape of the weight in a matrix product; [0, 0] for other ops.
    weight: [usize; 2],
    /// In a step. What goes over all parameters counts as one call.
    calls: u64,
    /// Of a call.
    seconds: f64,
    /// Of a call, 0 where there are no products.
    flops: usize,
    /// Of a call.
    bytes: usize,
}

impl Timed {
    fn new(Work { op, weight, flops, bytes, .. }: Work, calls: u64, seconds: f64) -> Timed {
        Timed { op, weight, calls, seconds, flops, bytes }
    }
}

/// What a call of an op does.
#[derive(Clone, Copy)]
struct Work {
    op: &'static str,
    weight: [usize; 2],
    flops: usize,
    bytes: usize,
    over: Over,
}

/// What a call goes over.
#[derive(Clone, Copy, PartialEq)]
enum Over {
    Activations,
    /// All parameters, in one or more calls of the op. Some read a result back, which no graph can.
    Parameters,
}

impl Work {
    /// `moved` are read or written; those that are both are in it twice.
    fn new(op: &'static str, moved: &[&Tensor]) -> Work {
        let bytes = moved.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        Work { op, weight: [0, 0], flops: 0, bytes, over: Over::Activations }
    }

    fn with_flops(self, flops: usize) -> Work {
        Work { flops, ..self }
    }

    fn over_parameters(self) -> Work {
        Work { over: Over::Parameters, ..self }
    }
}

/// Times ops at the shapes of a net.
struct Bench<'a> {
    args: &'a Args,
    device: Device,
    config: Config,
    spec: Spec,
    /// Of a step.
    entries: Vec<Entry>,
    /// Of a micro-batch.
    sequences: usize,
    timed: Vec<Timed>,
}

impl Bench<'_> {
    /// All ops of a step.
    fn step(&mut self) -> Result<()> {
        self.products()?;
        self.attention()?;
        self.head()?;
        self.rows()?;
        self.embedding()?;
        self.parameters()
    }

    /// In each block: y = x wᵀ + b and its adjoint; the projections are added to a state, and the bias of mlp/fc is GELU's.
    fn products(&mut self) -> Result<()> {
        let (n, factors) = (self.tokens(), self.spec.factors);
        for segment in Layout::block(&self.spec).segments.iter().filter(|segment| segment.matrices > 0) {
            let [o, i] = [segment.shape[0], segment.shape[1]];
            let [x, y, z, dx] = [self.real(&[n, i])?, self.real(&[n, o])?, self.real(&[n, o])?, self.real(&[n, i])?];
            let [w, b, dw, db] = [self.real(&[o, i])?, self.real(&[o])?, self.sums(&[o, i])?, self.sums(&[o])?];
            let b = (segment.name != "mlp/fc/weight").then_some(&b);
            let adds = segment.name.ends_with("proj/weight");
            let product = |op, moved: &[&Tensor]| Work { weight: [o, i], flops: 2 * n * i * o, ..Work::new(op, moved) };
            let moved = if adds { &[&x, &w, &z, &y][..] } else { &[&x, &w, &y] };
            let onto = adds.then_some(&z);
            self.time(product("linear::forward", moved), &|| linear::forward(factors, &x, &w, b, 1.0, onto, &y))?;
            self.time(product("linear::backward_input", &[&y, &w, &dx]), &|| {
                linear::backward_input(factors, &y, &w, 1.0, 0.0, &dx)
            })?;
            self.time(product("linear::backward_weight", &[&y, &x, &dw, &dw]), &|| {
                linear::backward_weight(factors, &y, &x, 1e-3, &dw, Some(&db))
            })?;
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        let (n, Spec { factors, context, heads, width: d, .. }) = (self.tokens(), self.spec.clone());
        let [qkv, dqkv, out, dout] =
            [self.real(&[n, 3 * d])?, self.real(&[n, 3 * d])?, self.real(&[n, d])?, self.real(&[n, d])?];
        let lse = self.sums(&[self.sequences, heads, context])?;
        // A product of two over all pairs of positions in a sequence takes 2 n T d, half of them are masked.
        let product = n * context * d;
        let forward = Work::new("attention::forward", &[&qkv, &out]).with_flops(2 * product);
        self.time(forward, &|| attention::forward(factors, &qkv, context, heads, &out, &lse))?;
        let backward = Work::new("attention::backward", &[&qkv, &out, &dout, &dqkv]).with_flops(5 * product);
        self.time(backward, &|| attention::backward(factors, &qkv, &out, &lse, &dout, context, heads, &dqkv))
    }

    /// The three products of the head, then the softmax between them by itself.
    fn head(&mut self) -> Result<()> {
        let (n, Spec { factors, vocab, width: d, .. }) = (self.tokens(), self.spec.clone());
        let [x, dx, w, dw] =
            [self.real(&[n, d])?, self.real(&[n, d])?, self.real(&[vocab, d])?, self.sums(&[vocab, d])?];
        let logits = self.real(&[Net::logit_rows(&self.spec, self.sequences), vocab])?;
        let (targets, total) = (self.indices()?, Tensor::zeros(1, DType::F64, &self.device)?);
        let products = Work::new(HEAD, &[&x, &w, &dx, &dw, &dw]).with_flops(6 * n * d * vocab);
        let softmax =
            Work { op: SOFTMAX, bytes: 2 * n * vocab * self.spec.dtype.size_in_bytes(), ..Work::new(SOFTMAX, &[]) };
        let Some(calls) = self.calls(&products) else { return Ok(()) };
        let mut seconds = Vec::new();
        // The first takes memory.
        for _ in 0..=self.args.times {
            let ((), entries) = profiled(&self.device, || {
                classifier::loss_and_gradient(factors, &x, &w, &targets, 1e-3, &logits, &total, &dx, &dw)
            })?;
            seconds.push(entries);
        }
        let of = |entries: &[Entry], op| entries.iter().find(|entry| entry.op == op).map_or(0.0, |entry| entry.seconds);
        let inside = seconds[1..].iter().map(|entries| of(entries, SOFTMAX));
        let beside = seconds[1..].iter().map(|entries| of(entries, HEAD) - of(entries, SOFTMAX));
        self.timed.push(Timed::new(products, calls, median(beside)));
        self.timed.push(Timed::new(softmax, calls, median(inside)));
        Ok(())
    }

    /// What goes over states, row by row.
    fn rows(&mut self) -> Result<()> {
        let (n, d) = (self.tokens(), self.spec.width);
        let [x, y, out] = [self.real(&[n, d])?, self.real(&[n, d])?, self.real(&[n, d])?];
        let [ln, stats, dln] = [self.real(&[2, d])?, self.sums(&[n, 2])?, self.sums(&[2, d])?];
        self.time(Work::new("layer_norm::forward", &[&x, &out]), &|| layer_norm::forward(&x, &ln, &out, &stats))?;
        self.time(Work::new("layer_norm::normalize", &[&x, &out]), &|| layer_norm::normalize(&x, &ln, &stats, &out))?;
        self.time(Work::new("layer_norm::backward", &[&x, &y, &out, &out]), &|| {
            layer_norm::backward(&y, &x, &ln, &stats, &out, &dln)
        })?;
        self.time(Work::new("residual::combine", &[&x, &y, &out]), &|| residual::combine(0.5, &x, 0.5, &y, &out))?;
        self.time(Work::new("residual::scale_add", &[&x, &out, &out]), &|| residual::scale_add(0.5, &out, 0.5, &x))?;
        self.time(Work::new("copy", &[&x, &out]), &|| access::copy(&x, &out))?;
        // The backward pass puts GELU's output in the place of its input. Without a bias it would end at numbers too small for a CPU's pace.
        let [x, b, out] = [self.real(&[n, 4 * d])?, (self.real(&[4 * d])? + 4.0)?, self.real(&[n, 4 * d])?];
        self.time(Work::new("gelu::forward", &[&x, &out]), &|| gelu::forward(&x, &b, &out))?;
        self.time(Work::new("gelu::backward", &[&x, &x, &out, &out]), &|| gelu::backward(&x, &b, &out))
    }

    fn embedding(&mut self) -> Result<()> {
        let (n, Spec { vocab, context, width: d, .. }) = (self.tokens(), self.spec.clone());
        let (tokens, x) = (self.indices()?, self.real(&[n, d])?);
        let [wte, wpe] = [self.real(&[vocab, d])?, self.real(&[context, d])?];
        let [dwte, dwpe] = [self.sums(&[vocab, d])?, self.sums(&[context, d])?];
        // A token's row of wte, or of its gradient, is one of x.
        self.time(Work::new("embedding::forward", &[&x, &wpe, &x]), &|| embedding::forward(&tokens, &wte, &wpe, &x))?;
        let rows = self.sums(&[n, d])?;
        self.time(Work::new("embedding::backward", &[&x, &rows, &rows, &dwpe, &dwpe]), &|| {
            embedding::backward(&tokens, &x, &dwte, &dwpe)
        })
    }

    /// What a step does to all parameters and their gradients.
    fn parameters(&mut self) -> Result<()> {
        let layouts = [(self.spec.depth, Layout::block(&self.spec)), (1, Layout::ends(&self.spec))];
        let of_shape = |dtype| {
            let tensors = layouts.iter().map(|(rows, layout)| {
                // Second moments are not negative.
                Ok(Tensor::rand(0f32, 1f32, (*rows, layout.len()), &self.device)?.to_dtype(dtype)?)
            });
            tensors.collect::<Result<Vec<Tensor>>>()
        };
        let optimizer = optim::new(&self.config.optimizer);
        let (theta, grads, rounded) = (of_shape(DType::F32)?, of_shape(DType::F32)?, of_shape(self.spec.dtype)?);
        let moments = (0..optimizer.moments().len()).map(|_| of_shape(DType::F32)).collect::<Result<Vec<_>>>()?;

        let read = grads.iter().collect::<Vec<_>>();
        let mut moved = read.clone();
        moved.extend(theta.iter().chain(moments.iter().flatten()).flat_map(|written| [written; 2]));
        let hyper = Hyper { lr: 1e-3, gradient_scale: 1.0, eps_scale: 1.0 };
        self.time(Work::new("optimizer", &moved).over_parameters(), &|| {
            layouts.iter().enumerate().try_for_each(|(k, (rows, layout))| {
                let (chosen, updates) = ((0..*rows).collect::<Vec<_>>(), vec![1; *rows]);
                let moments = moments.iter().map(|moment| moment[k].clone()).collect::<Vec<_>>();
                optimizer.step(&Shard::whole(layout), &chosen, &updates, &theta[k], &grads[k], &moments, &hyper)
            })
        })?;
        self.time(Work::new("norm::sum_of_squares", &read).over_parameters(), &|| {
            norm::sum_of_squares(&grads).map(drop)
        })?;
        let moved = [&read[..], &rounded.iter().collect::<Vec<_>>()].concat();
        self.time(Work::new("cast", &moved).over_parameters(), &|| {
            theta.iter().zip(&rounded).try_for_each(|(exact, rounded)| access::cast(exact, rounded))
        })?;
        self.time(Work::new("fill", &read).over_parameters(), &|| {
            grads.iter().try_for_each(|grad| access::fill(grad, 0.0))
        })
    }

    /// n: positions of a micro-batch.
    fn tokens(&self) -> usize {
        self.sequences * self.spec.context
    }

    /// A tensor of the net's dtype.
    fn real(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(self.sums(shape)?.to_dtype(self.spec.dtype)?)
    }

    /// A tensor of f32, as statistics and gradients of parameters are.
    fn sums(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::rand(-1f32, 1f32, shape, &self.device)?)
    }

    /// Tokens without pattern.
    fn indices(&self) -> Result<Tensor> {
        let tokens = (0..self.tokens()).map(|i| (i * 7919 % self.spec.vocab) as u32).collect::<Vec<_>>();
        Ok(Tensor::new(tokens, &self.device)?)
    }

    /// Times `run` if a step calls the op and the user asks for it.
    fn time(&mut self, work: Work, run: &dyn Fn() -> Result<()>) -> Result<()> {
        let Some(calls) = self.calls(&work) else { return Ok(()) };
        let seconds = seconds_of(&self.device, work.over, self.args.times, run)?;
        self.timed.push(Timed::new(work, calls, seconds));
        Ok(())
    }

    /// How often a step calls the op, if the user asks for it.
    fn calls(&self, work: &Work) -> Option<u64> {
        let wanted = self.args.only.as_ref().is_none_or(|text| work.op.contains(text.as_str()));
        let is_called = |entry: &&Entry| wanted && (entry.op, entry.weight) == (work.op, work.weight);
        let entry = self.entries.iter().find(is_called)?;
        Some(if work.over == Over::Parameters { 1 } else { entry.calls })
    }

    /// Ops that a step calls and that were not timed.
    fn missing(&self) -> Vec<&'static str> {
        let timed =
            |entry: &&Entry| self.timed.iter().any(|timed| (timed.op, timed.weight) == (entry.op, entry.weight));
        self.entries.iter().filter(|entry| self.args.only.is_none() && !timed(entry)).map(|entry| entry.op).collect()
    }
}

const HEAD: &str = "classifier::loss_and_gradient";
const SOFTMAX: &str = "classifier::softmax";

/// Of a call in a row of calls, the median of so many rows.
fn seconds_of(device: &Device, over: Over, times: u32, run: &dyn Fn() -> Result<()>) -> Result<f64> {
    /// Of a row.
    const LENGTH_S: f64 = 0.02;
    let (mut replay, on_device) = (Replay::default(), Tensor::zeros(1, DType::F32, device)?);
    let mut row = |calls: usize| {
        let start = Instant::now();
        let calls_in_a_row = || (0..calls).try_for_each(|_| run());
        match over {
            Over::Activations => {
                replay.pass(&[calls as u64], std::iter::once(&on_device))?.stretch(&calls_in_a_row)?;
            }
            Over::Parameters => calls_in_a_row()?,
        }
        // A GPU's ops return before their work is done.
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    // The first loads what the op needs, and the second of a length is captured before it is launched.
    row(1)?;
    let calls = (LENGTH_S / row(1)?).clamp(1.0, 1000.0) as usize;
    row(calls)?;
    row(calls)?;
    Ok(median((0..times).map(|_| row(calls)).collect::<Result<Vec<_>>>()?))
}

/// Bytes/s, read and written, of a copy that fits no cache.
fn copy_speed(device: &Device, times: u32) -> Result<f64> {
    const VALUES: usize = 64 << 20;
    let [from, to] = [Tensor::zeros(VALUES, DType::F32, device)?, Tensor::zeros(VALUES, DType::F32, device)?];
    let bytes = Work::new("copy", &[&from, &to]).bytes as f64;
    Ok(bytes / seconds_of(device, Over::Activations, times, &|| access::copy(&from, &to))?)
}

impl Report {
    fn text(&self) -> String {
        let Report { step_s, gemm_peak_flops, copy_bytes_per_s, .. } = self;
        let giga = |per_s: f64| format!("{:.1}", per_s / 1e9);
        let mut lines =
            vec![["op", "of a call", "calls", "GFLOP/s", "of the peak", "GB/s", "of a copy"].map(str::to_owned)];
        lines.extend(self.ops.iter().map(|timed| {
            let (flops_per_s, bytes_per_s) = (timed.flops as f64 / timed.seconds, timed.bytes as f64 / timed.seconds);
            let products = |text: String| if timed.flops > 0 { text } else { String::new() };
            let [o, i] = timed.weight;
            [
                if o > 0 { format!("{} {o}×{i}", timed.op) } else { timed.op.to_owned() },
                seconds(timed.seconds),
                timed.calls.to_string(),
                products(giga(flops_per_s)),
                products(percent(flops_per_s / gemm_peak_flops)),
                giga(bytes_per_s),
                percent(bytes_per_s / copy_bytes_per_s),
            ]
        }));
        let mut text = format!(
            "{} GFLOP/s in large products, {} GB/s in a large copy\n\n{}\n",
            giga(*gemm_peak_flops),
            giga(*copy_bytes_per_s),
            table(&lines)
        );
        if self.whole {
            let together = self.ops.iter().map(|timed| timed.calls as f64 * timed.seconds).sum::<f64>();
            text += &format!("all calls of a step: {}; the step: {}\n", seconds(together), seconds(*step_s));
        }
        if !self.missing.is_empty() {
            text += &format!("not timed: {}\n", self.missing.join(", "));
        }
        text
    }
}
