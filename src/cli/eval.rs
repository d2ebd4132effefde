//! `vcycle eval`

use crate::checkpoint::{Check, Checkpoint};
use crate::comm::Solo;
use crate::config::{CosetPolicy, CycleKind, Dtype, Placement};
use crate::error::{Outcome, Result};
use crate::run::{self, Learner};
use serde_json::json;
use std::path::PathBuf;

/// Validation loss of the fine net in a run's newest intact checkpoint, or in the checkpoint given.
#[derive(clap::Args)]
pub struct Args {
    /// Run directory, or one checkpoint in it.
    path: PathBuf,
    /// Data to evaluate on instead of the run's.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Validation sequences to read; 0 = all of them. Default: as many as in training (log.eval_sequences).
    #[arg(long)]
    sequences: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let checkpoint = Checkpoint::open(&args.path, Check::Checksums)?;
    let mut config = checkpoint.config()?;
    // The fine net alone is wanted.
    (config.levels.count, config.levels.coset) = (1, CosetPolicy::First);
    (config.cycle.kind, config.parallel.placement) = (CycleKind::Flat, Placement::Sequential);
    // In f32, whatever products were rounded to in training.
    config.model.dtype = Dtype::F32;
    config.data.dir = args.data.unwrap_or(config.data.dir);
    config.log.eval_sequences = args.sequences.unwrap_or(config.log.eval_sequences);
    run::use_threads(config.parallel.threads, 1)?;
    run::resolve_vocab(&mut config)?;
    let mut learner = Learner::new(&config, &run::device(&config)?, 1, 0, 1)?;
    learner.load_model(&checkpoint)?;
    let val_loss = learner.evaluate(&mut Solo::default())?;
    if args.json {
        println!(
            "{}",
            json!({
                "checkpoint": checkpoint.path(),
                "step": checkpoint.step(),
                "val_loss": val_loss,
                "perplexity": val_loss.exp(),
                "bits_per_token": val_loss / std::f64::consts::LN_2,
                "tokens": learner.validation_tokens(),
            })
        );
    } else {
        println!(
            "{}: step {}, validation loss {val_loss:.4} nats a token (perplexity {:.3}, {:.4} bits a token) over {} tokens",
            checkpoint.path().display(),
            checkpoint.step(),
            val_loss.exp(),
            val_loss / std::f64::consts::LN_2,
            learner.validation_tokens(),
        );
    }
    Ok(Outcome::Done)
}
