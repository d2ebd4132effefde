//! Writes `metrics.jsonl`, the log and the progress bar. Only rank 0 has a recorder.

use super::console::Console;
use super::directory::{RunDirectory, write_whole};
use super::history::{self, Metrics};
use crate::config::Config;
use crate::error::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;

/// Open files of one run.
pub struct Recorder {
    metrics: File,
    console: Console,
    steps: u64,
    log_every: u64,
}

impl Recorder {
    /// Opens the files for appending; metrics of steps after `resumed` are dropped, so that no step counts twice.
    pub fn open(directory: &RunDirectory, config: &Config, console: &Console, resumed: u64) -> Result<Recorder> {
        drop_later_steps(directory, resumed)?;
        let append = |path: std::path::PathBuf| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| format!("cannot open {} for appending", path.display()))
        };
        console.log_to(append(directory.log_file())?);
        console.start_bar(config.run.steps, resumed);
        Ok(Recorder {
            metrics: append(directory.metrics_file())?,
            console: console.clone(),
            steps: config.run.steps,
            log_every: config.log.every_steps,
        })
    }

    /// True if `step` has a line in the metrics even without an evaluation.
    pub fn is_due(&self, step: u64) -> bool {
        step == self.steps || step == 1 || (self.log_every > 0 && step.is_multiple_of(self.log_every))
    }

    /// Writes one line of metrics, and one of log.
    pub fn record(&mut self, metrics: &Metrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics)?;
        line.push('\n');
        self.metrics.write_all(line.as_bytes()).context("cannot write metrics.jsonl")?;
        tracing::info!("{}", self.log_line(metrics));
        Ok(())
    }

    pub fn advance(&self, step: u64, loss: f64) {
        self.console.advance_bar(step, || format!("loss {loss:.4}"));
    }

    pub fn finish(&self) {
        self.console.finish_bar();
    }

    fn log_line(&self, m: &Metrics) -> String {
        let width = self.steps.to_string().len();
        let val = m.val_loss.map_or(String::new(), |v| format!("  val {v:.4}"));
        let coset = m.coset.map_or(String::new(), |k| format!(" coset {k}"));
        format!(
            "step {:width$}/{}  level {}{coset} ({} blocks)  loss {:.4}{val}  lr {:.2e}  grad {:.2e}  {:.0} tokens/s  {:.3} TFLOP  {:.1} s",
            m.step,
            self.steps,
            m.level,
            m.rows,
            m.loss,
            m.lr,
            m.grad_norm,
            m.tokens_per_s,
            m.flops_total as f64 / 1e12,
            m.elapsed_s,
        )
    }
}

fn drop_later_steps(directory: &RunDirectory, resumed: u64) -> Result<()> {
    let file = directory.metrics_file();
    if !file.exists() {
        return Ok(());
    }
    let mut kept = String::new();
    for metrics in history::read(&file)?.iter().filter(|m| m.step <= resumed) {
        kept.push_str(&serde_json::to_string(metrics)?);
        kept.push('\n');
    }
    write_whole(&file, &kept)
}
