//! `metrics.jsonl`, the history of a run: one [`Metrics`] a line.
//!
//! A process may be killed in the middle of a line. The torn last line is not an error: [`read`] leaves it out and
//! [`Log::open`] cuts it off before it appends. Anything else that is not a metrics line is an error that names it.

use super::balance::Balance;
use crate::error::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The file of a run directory that this module reads and writes.
pub const FILE_NAME: &str = "metrics.jsonl";

/// One line of `metrics.jsonl`: the state of a run after optimizer step `step`. Sums count from the start of the run,
/// over all its resumptions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Optimizer steps done, over all levels; never decreases from line to line.
    pub step: u64,
    /// Index of the cycle.
    pub cycle: u64,
    /// What the step was part of, such as `smooth`.
    pub op: String,
    /// Level trained, 0 = finest.
    pub level: usize,
    /// Coset trained; null where the level has none.
    pub coset: Option<usize>,
    /// Blocks of the net trained.
    pub rows: usize,
    /// Training loss, nats a token; NaN (null in JSON) when it diverged.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// Validation loss of the fine net, nats a token; null unless evaluated after this step.
    pub val_loss: Option<f64>,
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Model FLOPs of blocks and head. (A u64 ends at 18 EFLOP, a few GPU-days.)
    #[serde(deserialize_with = "whole")]
    pub flops_total: u128,
    /// Model FLOPs of the blocks alone.
    #[serde(deserialize_with = "whole")]
    pub flops_blocks: u128,
    /// Wall-clock seconds.
    pub elapsed_s: f64,
    /// Since the line before.
    pub tokens_per_s: f64,
    /// Model FLOP utilisation, a fraction; null where the device's peak is not known.
    pub mfu: Option<f64>,
    /// The most memory that a rank has had at once, in bytes: resident, or on a GPU of its tensors; null where that is not known.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// How the ranks spent the time since the line before; null for one rank.
    #[serde(default)]
    pub ranks: Option<Balance>,
}

/// JSON has no NaN; serde_json writes null for it.
fn nan_if_null<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// A count, also when another program wrote it as 1.5e12.
fn whole<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<u128, D::Error> {
    let number = serde_json::Number::deserialize(from)?;
    let float = || number.as_f64().filter(|x| *x >= 0.0).map(|x| x as u128);
    number.as_u128().or_else(float).ok_or_else(|| serde::de::Error::custom(format!("{number} is not a count")))
}

/// All lines of the `metrics.jsonl` at `path`.
pub fn read(path: &Path) -> Result<Vec<Metrics>> {
    Ok(parse(path)?.into_iter().map(|line| line.metrics).collect())
}

struct Line {
    metrics: Metrics,
    /// Offset in the file of the byte after the line's last one, line break included.
    end: u64,
}

fn parse(path: &Path) -> Result<Vec<Line>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the metrics {}", path.display()))?;
    let mut lines: Vec<Line> = Vec::new();
    let mut end = 0;
    for (index, text) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let here = || format!("{}, line {}", path.display(), index + 1);
        end += text.len() as u64;
        let metrics: Metrics = match serde_json::from_slice(text) {
            Ok(metrics) => metrics,
            // No proper prefix of a JSON object is one: the writer was killed inside this line.
            Err(e) if e.is_eof() && end == bytes.len() as u64 && !text.ends_with(b"\n") => break,
            Err(_) if text.trim_ascii().is_empty() => continue,
            Err(e) => return Err(e).with_context(|| format!("{}: expected a line of metrics", here())),
        };
        if let Some(before) = lines.last() {
            let (last, step) = (before.metrics.step, metrics.step);
            ensure!(step >= last, "{}: step {step} after step {last}; was it written by two runs at once?", here());
        }
        lines.push(Line { metrics, end });
    }
    Ok(lines)
}

/// A `metrics.jsonl` open for appending.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// Opens or creates the file at `path` for a run that goes on after step `step` (0: starts). Lines after that step,
    /// written between the checkpoint and the kill, are cut off: those steps will be done again.
    pub fn open(path: &Path, step: u64) -> Result<Log> {
        let kept = match path.exists() {
            true => parse(path)?.into_iter().take_while(|line| line.metrics.step <= step).last(),
            false => None,
        };
        // Step 0 has an evaluation of its own, which a run that starts afresh writes again.
        let end = kept.filter(|_| step > 0).map_or(0, |line| line.end);
        let context = || format!("cannot write the metrics {}", path.display());
        let open = || {
            let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            file.set_len(end)?;
            file.seek(SeekFrom::Start(end.saturating_sub(1)))?;
            let mut last = [b'\n'];
            if file.read(&mut last)? == 1 && last != *b"\n" {
                file.write_all(b"\n")?;
            }
            Ok::<_, std::io::Error>(file)
        };
        Ok(Log { file: open().with_context(context)?, path: path.to_owned() })
    }

    /// Appends one line, in one write, so that a kill leaves a torn last line at most.
    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        let line = format!("{}\n", serde_json::to_string(metrics)?);
        let context = || format!("cannot write the metrics {}", self.path.display());
        self.file.write_all(line.as_bytes()).with_context(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> Metrics {
        Metrics {
            step,
            cycle: 0,
            op: "smooth".to_owned(),
            level: 1,
            coset: None,
            rows: 4,
            loss: 2.5,
            val_loss: Some(2.25),
            lr: 1e-3,
            grad_norm: 0.5,
            tokens: 2048 * step,
            flops_total: u128::from(u64::MAX) * 10 + u128::from(step),
            flops_blocks: 7,
            elapsed_s: 0.1 * step as f64,
            tokens_per_s: 640.0,
            mfu: None,
            memory_bytes: Some(1 << 40),
            ranks: Some(Balance { waiting: 0.25, exposed: 0.125, slowest: 3, slowest_computes: 0.875 }),
        }
    }

    fn written(steps: &[u64]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let mut log = Log::open(&path, 0).unwrap();
        steps.iter().for_each(|&step| log.append(&metrics(step)).unwrap());
        (dir, path)
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(|m| m.step).collect()
    }

    #[test]
    fn keys_are_in_the_order_of_the_contract() {
        let line = serde_json::to_string(&Metrics { flops_total: 9, ..metrics(1) }).unwrap();
        let keys: Vec<String> = serde_json::from_str::<serde_json::Map<_, _>>(&line).unwrap().keys().cloned().collect();
        let contract = "step cycle op level coset rows loss val_loss lr grad_norm tokens flops_total flops_blocks \
                        elapsed_s tokens_per_s mfu memory_bytes ranks";
        assert_eq!(keys.join(" "), contract);
    }

    #[test]
    fn what_is_written_reads_back() {
        let (_dir, path) = written(&[1, 2]);
        // More FLOPs than a u64 holds come back as the nearest f64.
        let line = read(&path).unwrap().remove(1);
        assert!((line.flops_total as f64 / metrics(2).flops_total as f64 - 1.0).abs() < 1e-15);
        assert_eq!(Metrics { flops_total: 0, ..line }, Metrics { flops_total: 0, ..metrics(2) });
    }

    #[test]
    fn a_diverged_loss_is_nan_and_counts_may_be_written_as_floats() {
        let text = serde_json::to_string(&Metrics { loss: f64::NAN, ..metrics(1) }).unwrap();
        let text = text.replace("\"flops_blocks\":7", "\"flops_blocks\":1.5e12");
        let line: Metrics = serde_json::from_str(&text).unwrap();
        assert!(line.loss.is_nan());
        assert_eq!(line.flops_blocks, 1_500_000_000_000);
        assert!(serde_json::from_str::<Metrics>(&text.replace("1.5e12", "-1")).is_err());
    }

    #[test]
    fn a_line_torn_anywhere_is_left_out_and_cut_off() {
        let (_dir, path) = written(&[10, 20]);
        let whole = std::fs::read(&path).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for torn in first..whole.len() - 1 {
            std::fs::write(&path, &whole[..torn]).unwrap();
            assert_eq!(steps(&path), [10], "torn after {torn} bytes");
        }
        Log::open(&path, 10).unwrap().append(&metrics(11)).unwrap();
        assert_eq!(steps(&path), [10, 11]);
    }

    #[test]
    fn a_last_line_without_a_line_break_is_kept() {
        let (_dir, path) = written(&[10, 20]);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.trim_end()).unwrap();
        Log::open(&path, 20).unwrap().append(&metrics(30)).unwrap();
        assert_eq!(steps(&path), [10, 20, 30]);
    }

    #[test]
    fn a_damaged_line_that_is_not_the_last_is_an_error_that_names_it() {
        let (_dir, path) = written(&[10, 20, 30]);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("\"step\":20", "\"stop\":20", 1)).unwrap();
        let e = format!("{:#}", read(&path).unwrap_err());
        assert!(e.contains("metrics.jsonl, line 2") && e.contains("`step`"), "{e}");
    }

    #[test]
    fn a_step_that_goes_back_is_an_error() {
        let (_dir, path) = written(&[10, 20, 15]);
        let e = format!("{:#}", read(&path).unwrap_err());
        assert!(e.contains("line 3: step 15 after step 20"), "{e}");
    }

    #[test]
    fn a_resumed_run_never_counts_a_step_twice() {
        let (_dir, path) = written(&[0, 10, 20, 30]);
        Log::open(&path, 20).unwrap().append(&metrics(30)).unwrap();
        assert_eq!(steps(&path), [0, 10, 20, 30]);
        Log::open(&path, 0).unwrap();
        assert!(steps(&path).is_empty());
    }
}
