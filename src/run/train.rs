//! `train`: sets a run up, interprets its ops, saves and stops.

use super::console::Console;
use super::directory::RunDirectory;
use super::history::Metrics;
use super::learner::{Learner, StepReport, Target};
use super::progress::Progress;
use super::recorder::Recorder;
use super::stop::Schedule;
use super::{environment, resolve_vocab};
use crate::checkpoint::{self, State, Visitor};
use crate::comm::{Communicator, agree};
use crate::config::Config;
use crate::cycle::{self, Coset, Cycle, Op};
use crate::error::{Outcome, Result, anyhow, ensure};
use crate::model::{Flops, step_flops};
use crate::optim;
use std::path::PathBuf;
use std::time::Instant;

/// Where a run writes, and whether it continues one.
#[derive(Clone, Debug)]
pub struct Options {
    pub run_dir: PathBuf,
    pub resume: bool,
}

/// Trains `config` from its first op, or from the newest intact checkpoint, to its last. Collective.
pub fn train(config: Config, options: &Options, comm: &mut dyn Communicator, console: &Console) -> Result<Outcome> {
    let mut trainer = Trainer::set_up(config, options, comm, console)?;
    let outcome = trainer.interpret(comm)?;
    trainer.finish()?;
    Ok(outcome)
}

/// A run in progress on one rank.
struct Trainer {
    config: Config,
    cycle: &'static dyn Cycle,
    learner: Learner,
    progress: Progress,
    schedule: Schedule,
    /// Rank 0 only.
    recorder: Option<Recorder>,
    /// Rank 0 only.
    writer: Option<checkpoint::Writer>,
    /// FLOP/s of all ranks' GEMMs, the 1 of `mfu`.
    peak_flops: f64,
    /// Start of this process's training and `elapsed_s` then.
    clock: (Instant, f64),
    /// Step, tokens and seconds at the last metrics line, for tokens_per_s.
    last_line: (u64, f64),
    last_saved: Option<u64>,
}

/// The state of a run for a checkpoint: tensors of the learner, counters of the progress.
struct RunState<'a> {
    learner: &'a mut Learner,
    progress: &'a mut Progress,
}

impl State for RunState<'_> {
    fn visit(&mut self, visitor: &mut dyn Visitor) -> Result<()> {
        todo!()
    }
}

impl Trainer {
    fn set_up(mut config: Config, options: &Options, comm: &mut dyn Communicator, console: &Console) -> Result<Trainer> {
        agree(comm, resolve_vocab(&mut config))?;
        let is_root = comm.rank() == 0;
        let directory = match is_root {
            true => RunDirectory::prepare(&options.run_dir, &config, options.resume).map(Some),
            false => Ok(None),
        };
        let directory = agree(comm, directory)?;
        todo!()
    }

    /// Does the ops of the plan from the current position on.
    fn interpret(&mut self, comm: &mut dyn Communicator) -> Result<Outcome> {
        while let Some(&op) = self.progress.plan.get(self.progress.position.op) {
            match op {
                Op::Smooth { level, coset, steps } => {
                    if self.smooth(comm, level, coset, steps)? == Outcome::Interrupted {
                        return Ok(Outcome::Interrupted);
                    }
                }
                Op::Descend { to } => {
                    self.learner.descend(comm, to, self.progress.sequences)?;
                    self.progress.descents += u64::from(to == 1);
                    self.progress.count_switch();
                }
                Op::Ascend { to } => {
                    self.learner.ascend(to)?;
                    self.progress.count_switch();
                }
            }
            self.progress.position.advance();
        }
        self.save(comm)?;
        Ok(Outcome::Done)
    }

    /// The steps of one `Smooth` that are still to do.
    fn smooth(&mut self, comm: &mut dyn Communicator, level: usize, coset: Coset, steps: u64) -> Result<Outcome> {
        while self.progress.position.step_in_op < steps {
            let wishes = self.step(comm, level, coset)?;
            todo!()
        }
        Ok(Outcome::Done)
    }
}
