//! `vcycle bench`

use super::setting;
use crate::comm::Solo;
use crate::config::{self, Config};
use crate::cycle::tokens_per_step;
use crate::error::{Context, Outcome, Result};
use crate::model::{Spec, step_flops};
use crate::run::{self, Learner, Target};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

/// Measure the speed of this machine at vcycle's work, on one rank and random tokens.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure.
    name: Benchmark,
    /// Override a key of the benchmark's config (12 blocks, width 256, 8 heads, T = 256, B = 4, 50,257 tokens, AdamW).
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE", value_parser = setting)]
    overrides: Vec<String>,
    /// Optimizer steps that are timed, after two that are not; the median counts.
    #[arg(long, default_value_t = 7)]
    steps: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Benchmark {
    /// A whole training step on the finest level: forward, backward, clip, optimizer.
    Step,
}

/// The seed paper's net.
const BASE: &str = "
[data]
context = 256
batch = 4
[model]
vocab = 50257
width = 256
heads = 8
depth = 12
";

pub fn run(args: Args) -> Result<Outcome> {
    let Benchmark::Step = args.name;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let overrides = [vec![format!("data.dir={}", folder.path().display())], args.overrides].concat();
    let config = config::parse(BASE, &overrides)?;
    write_random_data(folder.path(), &config)?;
    let threads = run::use_threads(config.parallel.threads, 1)?;
    let peak = run::gemm_peak(&mut Solo::default())?;
    let seconds = time_steps(&config, args.steps)?;
    report(&config, threads, peak, seconds, args.json);
    Ok(Outcome::Done)
}

/// Median seconds of a step.
fn time_steps(config: &Config, steps: usize) -> Result<f64> {
    let comm = &mut Solo::default();
    let mut learner = Learner::new(config, comm)?;
    let mut seconds = Vec::new();
    for step in 0..steps as u64 + 2 {
        let start = Instant::now();
        let first = step * config.data.batch as u64;
        learner.step(comm, Target { level: 0, coset: 0 }, first, config.optimizer.lr, &mut [0.0; 2])?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let timed = &mut seconds[2..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[steps / 2])
}

fn report(config: &Config, threads: usize, peak: f64, seconds: f64, as_json: bool) {
    let tokens = tokens_per_step(config);
    let flops = step_flops(&Spec::new(config), config.model.depth, tokens).total as f64;
    let (tokens_per_s, rate) = (tokens as f64 / seconds, flops / seconds);
    if as_json {
        let report = json!({
            "step_s": seconds,
            "tokens_per_s": tokens_per_s,
            "flops_per_s": rate,
            "gemm_peak_flops": peak,
            "fraction_of_peak": rate / peak,
            "threads": threads,
        });
        println!("{report}");
    } else {
        println!(
            "step: {:.1} ms, {tokens_per_s:.0} tokens/s, {:.1} GFLOP/s, {:.0}% of this machine's {:.1} GFLOP/s in matrix products ({threads} threads)",
            seconds * 1e3,
            rate / 1e9,
            100.0 * rate / peak,
            peak / 1e9,
        );
    }
}

/// Two shards of tokens drawn without pattern, enough for a few batches.
fn write_random_data(folder: &Path, config: &Config) -> Result<()> {
    let vocab = config.model.vocab.unwrap_or(256) as u64;
    let count = 4 * (tokens_per_step(config) + config.data.context as u64);
    for split in ["train", "val"] {
        let path = folder.join(format!("{split}_000000.bin"));
        let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
        let header = [20_240_520, 1, u32::try_from(count).context("the benchmark's batch is too large")?];
        header
            .iter()
            .chain(std::iter::repeat(&0))
            .take(256)
            .try_for_each(|word| file.write_all(&word.to_le_bytes()))?;
        let mut state = 1u64;
        for _ in 0..count {
            // Knuth's MMIX generator; its high bits are good enough for a benchmark.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            file.write_all(&(((state >> 33) % vocab) as u16).to_le_bytes())?;
        }
        file.flush()?;
    }
    Ok(())
}
