//! `vcycle bench scaling`

use super::{Common, FINE, Subject, configure, median, milliseconds};
use crate::cli::text::table;
use crate::config::Config;
use crate::error::{Outcome, Result};
use crate::run;
use serde::Serialize;
use std::io::Write;
use tempfile::TempDir;

/// A step's time against N, d, T, B and V, one varied at a time, beside the FLOP count.
///
/// The net is small: 4 blocks, width 256, T = 128, B = 4, 8,192 tokens, heads of 32. Steps of it and of the varied net
/// alternate, so that both see the same machine.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Steps of each net that are timed.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
}

const BASE: [(&str, usize); 6] = [
    ("model.depth", 4),
    ("model.width", 256),
    ("data.context", 128),
    ("data.batch", 4),
    ("model.vocab", 8192),
    ("model.heads", 8),
];

/// The last key of the base, the heads, follows the width.
const VARIED: usize = BASE.len() - 1;
const HEAD_DIM: usize = 32;

/// A varied net against the base.
#[derive(Serialize)]
struct Row {
    key: &'static str,
    value: usize,
    /// Median.
    step_s: f64,
    /// Varied over base.
    flops_ratio: f64,
    time_ratio: f64,
}

pub fn run(args: &Args) -> Result<Outcome> {
    let (config, folder) = case(BASE, args)?;
    run::use_threads(config.parallel.threads, 1)?;
    let mut base = Subject::new((config, folder))?;
    base.warm_up(FINE)?;
    let mut rows = Vec::new();
    for (index, (_, value)) in BASE.iter().enumerate().take(VARIED) {
        for (times, over) in [(1, 2), (2, 1), (4, 1)] {
            rows.push(compare(&mut base, index, value * times / over, args)?);
        }
    }
    let text = if args.common.json { serde_json::to_string(&rows)? + "\n" } else { text(&rows) };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

fn case(values: [(&str, usize); BASE.len()], args: &Args) -> Result<(Config, TempDir)> {
    let settings = values.map(|(key, value)| format!("{key}={value}"));
    configure(settings.iter().chain(&args.common.overrides).map(String::as_str))
}

/// `base` against the net whose `index`-th key has this value.
fn compare(base: &mut Subject, index: usize, value: usize, args: &Args) -> Result<Row> {
    let mut values = BASE;
    values[index].1 = value;
    let width = values.iter().find(|(key, _)| *key == "model.width").map_or(0, |(_, width)| *width);
    values[VARIED].1 = width / HEAD_DIM;
    let mut varied = Subject::new(case(values, args)?)?;
    varied.warm_up(FINE)?;
    let mut seconds = Vec::new();
    for _ in 0..args.steps {
        seconds.push((base.step(FINE)?, varied.step(FINE)?));
    }
    let step_s = median(seconds.iter().map(|s| s.1));
    Ok(Row {
        key: values[index].0,
        value,
        step_s,
        flops_ratio: varied.flops() / base.flops(),
        time_ratio: step_s / median(seconds.iter().map(|s| s.0)),
    })
}

fn text(rows: &[Row]) -> String {
    let mut lines = vec![["setting", "ms", "FLOPs ratio", "time ratio", "time / FLOPs"].map(str::to_owned)];
    lines.extend(rows.iter().map(|Row { key, value, step_s, flops_ratio, time_ratio }| {
        let ratios = [*flops_ratio, *time_ratio, time_ratio / flops_ratio].map(|ratio| format!("{ratio:.2}"));
        let [flops, time, both] = ratios;
        [format!("{key} = {value}"), milliseconds(*step_s), flops, time, both]
    }));
    let base = BASE.map(|(key, value)| format!("{key} = {value}")).join(", ");
    format!("ratios to a net with {base}\n\n{}", table(&lines))
}
