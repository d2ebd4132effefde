//! Errors and exit codes.
//!
//! Every fallible function returns [`Result`]. A message says what was wrong and where (file and key), what was
//! expected and what to do; callers add the outer context with `anyhow::Context`. `main` prints the chain once, from
//! rank 0.

pub use anyhow::{Context, Error, Result, anyhow, bail, ensure};

/// How a command that did not fail ended; with [`exit_code`] this is the exit status of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All work is done: exit 0.
    Done,
    /// Stopped by a signal or the wall-time limit after writing a checkpoint: exit 75, "resubmit me".
    Interrupted,
}

/// Exit status: 0 done, 1 error, 75 stopped after a checkpoint (`EX_TEMPFAIL`). clap itself exits 2 on wrong usage.
pub fn exit_code(result: &Result<Outcome>) -> u8 {
    match result {
        Ok(Outcome::Done) => 0,
        Ok(Outcome::Interrupted) => 75,
        Err(_) => 1,
    }
}
