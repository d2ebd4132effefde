//! Writes `metrics.jsonl`, the log and the progress bar. Only rank 0 has a recorder.

use super::balance::Balance;
use super::console::Console;
use super::directory::RunDirectory;
use super::history::{Log, Metrics};
use crate::config::Config;
use crate::error::{Context, Result};
use std::fs::OpenOptions;

/// Open files of one run.
pub struct Recorder {
    metrics: Log,
    console: Console,
    steps: u64,
}

impl Recorder {
    /// Opens the files for appending; metrics of steps after `resumed` are dropped, so that no step counts twice.
    pub fn open(directory: &RunDirectory, config: &Config, console: &Console, resumed: u64) -> Result<Recorder> {
        let log = directory.log_file();
        let appending = OpenOptions::new().create(true).append(true).open(&log);
        console.log_to(appending.with_context(|| format!("cannot open {} for appending", log.display()))?);
        console.start_bar(config.run.steps, resumed);
        Ok(Recorder {
            metrics: Log::open(&directory.metrics_file(), resumed)?,
            console: console.clone(),
            steps: config.run.steps,
        })
    }

    /// Writes one line of metrics, and one of log.
    pub fn record(&mut self, metrics: &Metrics) -> Result<()> {
        self.metrics.append(metrics)?;
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
        let ranks = m.ranks.map_or(String::new(), |ranks| {
            let Balance { waiting, slowest, .. } = ranks;
            let (waiting, excess) = (100.0 * waiting, 100.0 * ranks.excess());
            format!("  ranks wait {waiting:.0} %, rank {slowest} computes longest (+{excess:.0} %)")
        });
        let coset = m.coset.map_or(String::new(), |k| format!(" coset {k}"));
        format!(
            "step {:width$}/{}  level {}{coset} ({} blocks)  loss {:.4}{val}  lr {:.2e}  grad {:.2e}  {:.0} tokens/s  {:.3} TFLOP  {:.1} s{ranks}",
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
