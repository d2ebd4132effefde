//! `vcycle bench`

mod allreduce;
mod breakdown;
mod machine;
mod ops;
mod overhead;
mod overlap;
mod scaling;
mod step;

use super::setting;
use crate::comm::{Communicator, Reduction, Solo, World};
use crate::config::{self, Config};
use crate::cycle::level_flops;
use crate::error::{Context, Outcome, Result};
use crate::ops::profile::{self, Entry};
use crate::run::{self, Learner, Target};
use candle_core::Device;
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use tempfile::TempDir;

/// Measure the speed of this machine at vcycle's work, on random tokens and, except for `machine`, `overlap` and `allreduce`, one rank.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(clap::Subcommand)]
enum Benchmark {
    /// A training step on the finest level: speed, time by op, memory.
    Step(step::Args),
    Ops(ops::Args),
    /// Time of a step against blocks, width, context, batch and vocabulary, beside the FLOP count.
    Scaling(scaling::Args),
    /// What a run does between steps: switches of level, evaluation, a line of metrics.
    Overhead(overhead::Args),
    Machine(machine::Args),
    Overlap(overlap::Args),
    Allreduce(allreduce::Args),
}

impl Args {
    /// Whether it is for all ranks of a job.
    pub fn is_collective(&self) -> bool {
        matches!(self.benchmark, Benchmark::Machine(_) | Benchmark::Overlap(_) | Benchmark::Allreduce(_))
    }
}

pub fn run(args: Args, world: &mut World) -> Result<Outcome> {
    match args.benchmark {
        Benchmark::Step(args) => step::run(args),
        Benchmark::Ops(args) => ops::run(&args),
        Benchmark::Scaling(args) => scaling::run(&args),
        Benchmark::Overhead(args) => overhead::run(&args),
        Benchmark::Machine(args) => machine::run(&args, world),
        Benchmark::Overlap(args) => overlap::run(&args, world),
        Benchmark::Allreduce(args) => allreduce::run(&args, world),
    }
}

/// What all benchmarks take.
#[derive(clap::Args)]
struct Common {
    /// Override a key of the benchmark's config.
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE", value_parser = setting)]
    overrides: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The seed paper's net: 12 blocks, width 256, 8 heads, T = 256 are the defaults.
const PAPER: &[&str] = &["model.vocab=50257", "data.batch=4"];

/// The fine net.
const FINE: Target = Target { level: 0, coset: 0 };

/// Steps before the first that is timed: they fault in the memory and find the scratch buffers' sizes.
const WARM_UP: usize = 2;

/// A net with its optimizer and random tokens, ready to train.
struct Subject {
    config: Config,
    learner: Learner,
    comm: Solo,
    steps: u64,
    /// Holds the tokens.
    _folder: TempDir,
}

impl Subject {
    /// What [`configure`] has prepared.
    fn new((config, folder): (Config, TempDir)) -> Result<Subject> {
        let device = run::device(&config)?;
        Subject::on(&device, (config, folder))
    }

    fn on(device: &Device, (config, folder): (Config, TempDir)) -> Result<Subject> {
        let learner = Learner::new(&config, device, 1, 0, 1)?;
        Ok(Subject { config, learner, comm: Solo::default(), steps: 0, _folder: folder })
    }

    /// Seconds of one optimizer step of `target`.
    fn step(&mut self, target: Target) -> Result<f64> {
        let start = Instant::now();
        let (first, lr) = (self.steps * self.config.data.batch as u64, self.config.optimizer.lr);
        self.learner.step(&mut self.comm, target, first, lr)?;
        // A GPU's ops return before their work is done.
        self.learner.device().synchronize()?;
        self.steps += 1;
        Ok(start.elapsed().as_secs_f64())
    }

    fn warm_up(&mut self, target: Target) -> Result<()> {
        (0..WARM_UP).try_for_each(|_| self.step(target).map(drop))
    }

    /// FLOP/s that products reach on the device of the net.
    fn gemm_peak(&mut self) -> Result<f64> {
        run::gemm_peak(&mut self.comm, self.learner.device(), self.learner.spec())
    }

    /// Model FLOPs of a step on the fine net.
    fn flops(&self) -> f64 {
        level_flops(&self.config, self.learner.spec(), 0).total as f64
    }
}

/// What `work` gives, and the ops that it calls on `device`.
fn profiled<R>(device: &Device, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<Entry>)> {
    profile::enable(device);
    profile::take();
    let done = work();
    profile::disable();
    Ok((done?, profile::take()))
}

/// The default config with `overrides`, the later ones winning, and the folder with its random tokens.
fn configure<'a>(overrides: impl IntoIterator<Item = &'a str>) -> Result<(Config, TempDir)> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut settings = vec![format!("data.dir={}", folder.path().display())];
    settings.extend(overrides.into_iter().map(str::to_owned));
    let config = config::parse("", &settings)?;
    write_random_data(folder.path(), &config)?;
    Ok((config, folder))
}

/// Does `work` with the ranks as a training run joins them: tensors on GPUs are exchanged by NCCL. Collective.
fn joined<R>(world: &mut World, device: &Device, work: impl FnOnce(&mut dyn Communicator) -> Result<R>) -> Result<R> {
    match run::group_of_gpus(world.communicator(), device)? {
        Some(mut gpus) => work(&mut *gpus),
        None => work(world.communicator()),
    }
}

/// The largest of all ranks' values.
fn agreed_max(comm: &mut dyn Communicator, value: f64) -> Result<f64> {
    let mut values = [value];
    comm.reduce(&mut values, Reduction::Max)?;
    Ok(values[0])
}

/// Seconds that `work` takes the slowest rank, all starting together.
fn slowest(comm: &mut dyn Communicator, work: impl FnOnce(&mut dyn Communicator) -> Result<()>) -> Result<f64> {
    comm.barrier()?;
    let start = Instant::now();
    work(comm)?;
    let own = start.elapsed().as_secs_f64();
    agreed_max(comm, own)
}

/// Two shards of tokens drawn without pattern, enough for a few batches and an evaluation.
fn write_random_data(folder: &Path, config: &Config) -> Result<()> {
    let vocab = config.model.vocab.unwrap_or(256) as u64;
    let sequences = (4 * config.data.batch).max(config.log.eval_sequences) + 1;
    let count = sequences * config.data.context;
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

/// The middle value; of two, the larger.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn milliseconds(seconds: f64) -> String {
    let decimals = if seconds < 0.1 { 2 } else { 1 };
    format!("{:.decimals$}", seconds * 1e3)
}
