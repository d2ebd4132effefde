//! `vcycle bench step`

use super::breakdown::{Part, breakdown};
use super::{Common, FINE, PAPER, Subject, configure, median, milliseconds, profiled};
use crate::cli::plan::RankMemory;
use crate::cli::text::{bytes, percent, table};
use crate::cycle::tokens_per_step;
use crate::error::{Context, Outcome, Result};
use crate::ops::profile::Entry;
use crate::run;
use serde::Serialize;
use serde_json::json;
use std::io::{BufRead, Write};

/// One training step: forward, backward, clipping, optimizer.
///
/// The config is the default with 50,257 tokens and B = 4: 12 blocks, width 256, 8 heads, T = 256, AdamW. Prints the median
/// step, its time by op, and the memory beside what `vcycle plan` predicts.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Steps that are timed.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Read numbers from standard input, a line each; do as many steps and print their seconds as a line of JSON.
    ///
    /// For benches/compare_step.py, which runs this program and its rival in turn.
    #[arg(long, conflicts_with_all = ["steps", "json"])]
    serve: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let overrides = PAPER.iter().copied().chain(args.common.overrides.iter().map(String::as_str));
    let mut trial = Trial::new(overrides)?;
    if args.serve {
        trial.serve()?;
        return Ok(Outcome::Done);
    }
    let report = trial.report(args.steps as usize)?;
    let text = if args.common.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// A warm net, and how it came to be.
struct Trial {
    subject: Subject,
    threads: usize,
    /// Bytes resident before the net was built.
    before: u64,
}

/// What is printed; field names are those of `--json`.
#[derive(Serialize)]
struct Report {
    /// Median.
    step_s: f64,
    tokens_per_s: f64,
    flops_per_s: f64,
    gemm_peak_flops: f64,
    fraction_of_peak: f64,
    threads: usize,
    memory: Memory,
    /// Median of steps whose ops are timed. On a GPU each op then waits for its end, and a step takes longer.
    profiled_s: f64,
    /// Of that step.
    breakdown: Vec<Part>,
    ops: Vec<Entry>,
}

/// Bytes.
#[derive(Clone, Copy, Serialize)]
struct Memory {
    /// Resident before the net was built.
    before: u64,
    /// The most that was resident at once.
    peak: u64,
    /// What `vcycle plan` says that the net takes: to be compared with peak - before.
    predicted: u64,
}

impl Trial {
    fn new<'a>(overrides: impl IntoIterator<Item = &'a str>) -> Result<Trial> {
        let (config, folder) = configure(overrides)?;
        let threads = run::use_threads(config.parallel.threads, 1)?;
        let device = run::device(&config)?;
        let before = run::memory(&device)?.current;
        let mut subject = Subject::on(&device, (config, folder))?;
        subject.warm_up(FINE)?;
        Ok(Trial { subject, threads, before })
    }

    fn report(&mut self, steps: usize) -> Result<Report> {
        let on_gpu = !self.subject.learner.device().is_cpu();
        let unprofiled = (0..if on_gpu { steps } else { 0 }).map(|_| self.subject.step(FINE));
        let unprofiled = unprofiled.collect::<Result<Vec<_>>>()?;
        let device = self.subject.learner.device().clone();
        let profiles = (0..steps).map(|_| profiled(&device, || self.subject.step(FINE)));
        let mut profiles = profiles.collect::<Result<Vec<_>>>()?;
        profiles.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let (profiled_s, ops) = profiles.swap_remove(steps / 2);
        let step_s = if on_gpu { median(unprofiled) } else { profiled_s };
        let memory = self.memory()?;
        let gemm_peak_flops = self.subject.gemm_peak()?;
        let Subject { config, learner, .. } = &self.subject;
        let flops_per_s = self.subject.flops() / step_s;
        Ok(Report {
            step_s,
            tokens_per_s: tokens_per_step(config, 0) as f64 / step_s,
            flops_per_s,
            gemm_peak_flops,
            fraction_of_peak: flops_per_s / gemm_peak_flops,
            threads: self.threads,
            memory,
            profiled_s,
            breakdown: breakdown(config, learner.spec(), profiled_s, &ops),
            ops,
        })
    }

    fn memory(&self) -> Result<Memory> {
        let Subject { config, learner, .. } = &self.subject;
        let predicted = RankMemory::new(config, learner.spec(), 1, 1).total;
        Ok(Memory { before: self.before, peak: run::memory(learner.device())?.peak, predicted })
    }

    /// One line of JSON when ready, and one for each line of standard input.
    fn serve(&mut self) -> Result<()> {
        let greeting = json!({
            "threads": self.threads,
            "tokens_per_step": tokens_per_step(&self.subject.config, 0),
            "flops_per_step": self.subject.flops(),
            "memory": self.memory()?,
        });
        println!("{greeting}");
        for line in std::io::stdin().lock().lines() {
            let line = line.context("cannot read standard input")?;
            let steps = line.trim().parse::<usize>().ok();
            let steps = steps.with_context(|| format!("--serve reads a number of steps a line, not {line:?}"))?;
            let step_s = (0..steps).map(|_| self.subject.step(FINE)).collect::<Result<Vec<_>>>()?;
            println!("{}", json!({ "step_s": step_s, "gemm_peak_flops": self.subject.gemm_peak()? }));
        }
        Ok(())
    }
}

impl Report {
    fn text(&self) -> String {
        let Report {
            step_s,
            profiled_s,
            tokens_per_s,
            flops_per_s,
            gemm_peak_flops,
            fraction_of_peak,
            threads,
            memory,
            ..
        } = self;
        let mut lines = vec![["part", "ms", "share", "GFLOP/s"].map(str::to_owned)];
        lines.extend(self.breakdown.iter().map(|part| {
            let rate = part.flops_per_s.map_or(String::new(), giga);
            [part.part.to_owned(), milliseconds(part.seconds), percent(part.share), rate]
        }));
        lines.push([
            "together".to_owned(),
            milliseconds(*profiled_s),
            percent(1.0),
            giga(flops_per_s * step_s / profiled_s),
        ]);
        format!(
            "{} ms a step, {tokens_per_s:.0} tokens/s, {:.1} GFLOP/s: {} of the {:.1} GFLOP/s that this machine reaches in matrix products ({threads} threads)\n\n\
             {}\n\
             memory: {} over the {} before the net was built; vcycle plan predicts {}\n",
            milliseconds(*step_s),
            flops_per_s / 1e9,
            percent(*fraction_of_peak),
            gemm_peak_flops / 1e9,
            table(&lines),
            bytes(memory.peak - memory.before),
            bytes(memory.before),
            bytes(memory.predicted),
        )
    }
}

fn giga(flops_per_s: f64) -> String {
    format!("{:.1}", flops_per_s / 1e9)
}
