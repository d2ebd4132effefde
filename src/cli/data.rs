//! `vcycle data prepare` and `vcycle data inspect`.

use crate::data::{self, Options, tokenizer::Spec};
use crate::error::{Outcome, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Turn text into shards of tokens
    Prepare(PrepareArgs),
    /// Verify a dataset or a shard and show what is in it
    Inspect(InspectArgs),
}

#[derive(clap::Args, Debug)]
struct PrepareArgs {
    /// Files or folders: .jsonl (field `text`), .parquet (column `text`), .bin (shards of llm.c or nanoGPT); all else is text
    #[arg(required = true)]
    input: Vec<PathBuf>,
    /// Folder to create for the dataset
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// gpt2, bytes, or a Hugging Face tokenizer.json
    #[arg(long, value_name = "NAME|FILE.json", default_value = "gpt2")]
    tokenizer: Spec,
    /// Share of the documents held out for validation, chosen by hash; not used if a file val.* stands beside train.*
    #[arg(long, value_name = "F", default_value_t = 0.01)]
    val_fraction: f64,
    /// Extensions to take from folders [default: txt,md,rs,jsonl,parquet,bin]
    #[arg(long, value_name = "EXT", value_delimiter = ',')]
    ext: Option<Vec<String>>,
}

#[derive(clap::Args, Debug)]
struct InspectArgs {
    /// A dataset's folder, or one shard
    path: PathBuf,
}

pub fn run(args: Args) -> Result<Outcome> {
    match args.command {
        Command::Prepare(args) => prepare(args),
        Command::Inspect(InspectArgs { path }) => {
            print!("{}", data::inspect(&path)?);
            Ok(Outcome::Done)
        }
    }
}

fn prepare(args: PrepareArgs) -> Result<Outcome> {
    let PrepareArgs { input: inputs, out, tokenizer, val_fraction, ext: extensions } = args;
    let start = Instant::now();
    let options = Options { inputs, out, tokenizer, val_fraction, extensions };
    let meta = data::prepare(&options, &mut progress())?;

    let (seconds, megabytes) = (start.elapsed().as_secs_f64(), (meta.train.bytes + meta.val.bytes) as f64 / 1e6);
    for (name, split) in [("train", &meta.train), ("val", &meta.val)] {
        let (tokens, documents, shards) = (split.tokens, split.documents, split.shards.len());
        println!(
            "{name:<5}  {tokens} tokens  {documents} documents  {:.1} MB  {shards} shards",
            split.bytes as f64 / 1e6
        );
    }
    let speed = megabytes / seconds;
    println!("{}: {megabytes:.1} MB in {seconds:.1} s, {speed:.1} MB/s", options.out.display());
    Ok(Outcome::Done)
}

/// Shows bytes read of bytes in all: a bar on a terminal, else a line every ten seconds.
fn progress() -> Box<dyn FnMut(u64, u64)> {
    if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}  {bytes_per_sec}  {eta} left");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        return Box::new(move |read, total| {
            bar.set_length(total);
            bar.set_position(read);
            if read == total {
                bar.finish_and_clear();
            }
        });
    }
    let mut shown = Instant::now();
    Box::new(move |read, total| {
        if shown.elapsed() > Duration::from_secs(10) {
            shown = Instant::now();
            eprintln!("read {:.1} of {:.1} MB", read as f64 / 1e6, total as f64 / 1e6);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args as _, FromArgMatches};

    fn vcycle_data(line: &str) -> Result<Outcome> {
        let command = Args::augment_args(clap::Command::new("data"));
        let matches = command.try_get_matches_from(std::iter::once("data").chain(line.split(' ')))?;
        run(Args::from_arg_matches(&matches)?)
    }

    #[test]
    fn a_folder_is_prepared_and_inspected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        for name in ["train.a", "val.a", "train.b", "c.txt"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        vcycle_data(&format!("prepare {path} --out {path}/out --tokenizer bytes --ext a,b")).unwrap();
        vcycle_data(&format!("inspect {path}/out")).unwrap();
        let meta = data::Meta::read(&dir.path().join("out")).unwrap().unwrap();
        assert_eq!((meta.train.documents, meta.val.documents), (2, 1));
    }

    #[test]
    fn wrong_usage_is_refused() {
        let message = vcycle_data("prepare x --out y --tokenizer gpt3").unwrap_err().to_string();
        assert!(message.contains("unknown tokenizer `gpt3`"), "{message}");
        assert!(vcycle_data("prepare --out y").is_err());
    }
}
