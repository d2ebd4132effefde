//! `vcycle bench overhead`

use super::{Common, FINE, Subject, configure, median};
use crate::cli::text::{percent, table};
use crate::config::Config;
use crate::cycle::{Side, tokens_per_step};
use crate::error::{Outcome, Result};
use crate::run::history::{Log, Metrics};
use crate::run::{self, Target};
use serde::Serialize;
use std::io::Write;
use std::time::Instant;

/// What a run does between steps, in steps of the fine net.
///
/// The config is the default with 50,257 tokens and two levels: 12 and 6 blocks, width 256, T = 256, B = 16, an evaluation
/// of 64 sequences every 100 steps, a line of metrics every 10.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Times that each thing is done; medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
}

const COARSE: Target = Target { level: 1, coset: 0 };

/// One thing that a run does.
#[derive(Serialize)]
struct Row {
    what: &'static str,
    /// Median.
    seconds: f64,
    /// In steps of the fine net.
    steps: f64,
    /// Of the training time, at the config's intervals.
    share: Option<f64>,
}

/// Seconds of each thing, a value a time.
#[derive(Default)]
struct Seconds {
    fine_step: Vec<f64>,
    coarse_step: Vec<f64>,
    descent: Vec<f64>,
    ascent: Vec<f64>,
    evaluation: Vec<f64>,
    metrics: Vec<f64>,
}

/// The seed paper's net on two levels.
const CONFIG: &[&str] = &["model.vocab=50257", "levels.count=2", "cycle.kind=cascade"];

pub fn run(args: &Args) -> Result<Outcome> {
    let overrides = args.common.overrides.iter().map(String::as_str);
    let (config, folder) = configure(CONFIG.iter().copied().chain(overrides))?;
    run::use_threads(config.parallel.threads, 1)?;
    let mut log = Log::open(&folder.path().join("metrics.jsonl"), 0)?;
    let mut subject = Subject::new((config, folder))?;
    subject.warm_up(FINE)?;
    let mut seconds = Seconds::default();
    for _ in 0..args.times {
        visit(&mut subject, &mut log, &mut seconds)?;
    }
    let rows = rows(&subject.config, seconds);
    let text = if args.common.json { serde_json::to_string(&rows)? + "\n" } else { text(&rows) };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// Each thing once, with a visit to the coarse level.
fn visit(subject: &mut Subject, log: &mut Log, seconds: &mut Seconds) -> Result<()> {
    seconds.fine_step.push(subject.step(FINE)?);
    let metrics = metrics(&subject.config);
    seconds.metrics.push(timed(|| log.append(&metrics))?);
    seconds.evaluation.push(timed(|| subject.learner.evaluate(&mut subject.comm).map(drop))?);
    let first = subject.steps * subject.config.data.batch as u64;
    let coherence = subject.config.levels.coherence.then_some(first);
    seconds.descent.push(timed(|| subject.learner.descend(&mut subject.comm, Side::Main, COARSE.level, coherence))?);
    seconds.coarse_step.push(subject.step(COARSE)?);
    seconds.ascent.push(timed(|| subject.learner.ascend(Side::Main, FINE.level))?);
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

fn rows(config: &Config, seconds: Seconds) -> Vec<Row> {
    let Seconds { fine_step, coarse_step, descent, ascent, evaluation, metrics } = seconds;
    let fine = median(fine_step);
    let row = |what, values: Vec<f64>, every: u64| {
        let seconds = median(values);
        let share = (every > 0).then(|| seconds / (every as f64 * fine));
        Row { what, seconds, steps: seconds / fine, share }
    };
    vec![
        row("step, fine", vec![fine], 0),
        row("step, coarse", coarse_step, 0),
        row("descent", descent, 0),
        row("ascent", ascent, 0),
        row("evaluation", evaluation, config.log.eval_every),
        row("line of metrics", metrics, config.log.every_steps),
    ]
}

fn text(rows: &[Row]) -> String {
    let mut lines = vec![["", "ms", "fine steps", "of training"].map(str::to_owned)];
    lines.extend(rows.iter().map(|row| {
        let share = row.share.map_or(String::new(), percent);
        [row.what.to_owned(), format!("{:.3}", row.seconds * 1e3), format!("{:.3}", row.steps), share]
    }));
    table(&lines)
}

/// A line with every field filled.
fn metrics(config: &Config) -> Metrics {
    Metrics {
        step: 1,
        cycle: 0,
        op: "smooth".to_owned(),
        level: 0,
        coset: None,
        rows: config.model.depth,
        loss: 10.123_456_789,
        val_loss: Some(10.123_456_789),
        lr: config.optimizer.lr,
        grad_norm: 1.234_567_89,
        tokens: tokens_per_step(config, 0),
        flops_total: 1 << 60,
        flops_blocks: 1 << 59,
        elapsed_s: 12.345_678_9,
        tokens_per_s: 1_234.567_89,
        mfu: Some(0.789),
        memory_bytes: Some(1 << 40),
        ranks: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_net_is_measured() {
        let small =
            ["model.vocab=64", "model.width=16", "model.heads=2", "model.depth=2", "data.context=8", "data.batch=2"];
        let (config, folder) = configure(CONFIG.iter().copied().chain(small).chain(["log.eval_sequences=2"])).unwrap();
        let mut log = Log::open(&folder.path().join("metrics.jsonl"), 0).unwrap();
        let mut subject = Subject::new((config, folder)).unwrap();
        let mut seconds = Seconds::default();
        visit(&mut subject, &mut log, &mut seconds).unwrap();
        let rows = rows(&subject.config, seconds);
        assert!(!rows.is_empty() && rows.iter().all(|row| row.steps.is_finite() && row.steps >= 0.0));
    }
}
