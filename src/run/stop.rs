//! When to write a checkpoint and when to stop: signals, wall-clock and step intervals.
//!
//! Signals and clocks differ between ranks; [`Schedule::wishes`] of all ranks are summed with the loss of each step, so that
//! all ranks act on the same step.

use crate::comm;
use crate::config::Config;
use crate::error::{Context, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a rank would like to happen after this step; 1 = yes, summed over ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wishes {
    pub stop: f64,
    pub save: f64,
}

/// Signals received and time passed in this process.
pub struct Schedule {
    signalled: Arc<AtomicBool>,
    started: Instant,
    last_save: Instant,
    stop_after: Option<Duration>,
    save_every: Option<Duration>,
    save_every_steps: u64,
    /// Only rank 0's clock counts.
    keeps_time: bool,
}

impl Schedule {
    /// Registers handlers for SIGTERM, SIGINT and SIGUSR1. A second SIGINT ends the process at once.
    pub fn new(config: &Config, rank: usize) -> Result<Schedule> {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
        let signalled = Arc::new(AtomicBool::new(false));
        let register = || -> std::io::Result<()> {
            signal_hook::flag::register_conditional_shutdown(SIGINT, 130, signalled.clone())?;
            for signal in [SIGTERM, SIGINT, SIGUSR1] {
                signal_hook::flag::register(signal, signalled.clone())?;
            }
            signal_hook::flag::register(SIGTERM, comm::told_to_end().clone())?;
            Ok(())
        };
        register().context("cannot register signal handlers")?;
        let minutes = |m: f64| (m > 0.0).then(|| Duration::from_secs_f64(60.0 * m));
        let now = Instant::now();
        Ok(Schedule {
            signalled,
            started: now,
            last_save: now,
            stop_after: minutes(config.run.max_minutes),
            save_every: minutes(config.checkpoint.every_minutes),
            save_every_steps: config.checkpoint.every_steps,
            keeps_time: rank == 0,
        })
    }

    /// This rank's wishes when the run has come from `before` to `step` steps.
    pub fn wishes(&self, before: u64, step: u64) -> Wishes {
        let passed = |since: Instant, limit: Option<Duration>| {
            self.keeps_time && limit.is_some_and(|limit| since.elapsed() >= limit)
        };
        let stop = self.signalled.load(Ordering::Relaxed) || passed(self.started, self.stop_after);
        let save = passed(self.last_save, self.save_every) || passes_multiple(before, step, self.save_every_steps);
        Wishes { stop: stop.into(), save: save.into() }
    }

    pub fn saved(&mut self) {
        self.last_save = Instant::now();
    }
}

/// Whether one of the steps after `before`, up to `step`, is a multiple of `every`; never if that is 0.
pub fn passes_multiple(before: u64, step: u64, every: u64) -> bool {
    every > 0 && step / every > before / every
}
