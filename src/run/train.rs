//! `train`: sets a run up, interprets its ops, saves and stops.

use super::console::Console;
use super::device::refuse_shared_gpus;
use super::directory::RunDirectory;
use super::environment;
use super::gradient::Target;
use super::history::Metrics;
use super::learner::{Learner, StepReport};
use super::progress::{Progress, coset_at};
use super::recorder::Recorder;
use super::resolve::resolve_vocab;
use super::stop::{Schedule, Wishes};
use crate::checkpoint::{self, Check, Checkpoint, Part, State, Visitor, Writer};
use crate::comm::{Communicator, agree};
use crate::config::Config;
use crate::cycle::{self, Coset, Op};
use crate::error::{Context, Outcome, Result, anyhow};
use crate::levels::Snapshot;
use crate::model::{Flops, step_flops};
use crate::optim;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How the error of a run whose loss is no longer a number starts.
pub const DIVERGED: &str = "training diverged at step";

/// Where a run writes, and whether it continues one.
#[derive(Clone, Debug)]
pub struct Options {
    pub run_dir: PathBuf,
    /// Go on from the newest intact checkpoint in `run_dir`; without one, start.
    pub resume: bool,
    /// Threads that this rank computes with, for the provenance.
    pub threads: usize,
}

/// Trains `config` to the last op of its plan. Collective over `comm`.
pub fn train(config: Config, options: &Options, comm: &mut dyn Communicator, console: &Console) -> Result<Outcome> {
    let mut trainer = Trainer::set_up(config, options, comm, console)?;
    let outcome = trainer.interpret(comm)?;
    trainer.finish(comm, outcome)?;
    Ok(outcome)
}

/// A run in progress on one rank.
struct Trainer {
    config: Config,
    learner: Learner,
    progress: Progress,
    schedule: Schedule,
    writer: Writer,
    /// What only rank 0 has.
    root: Option<Root>,
    /// FLOPs of all steps done: a function of the progress, kept because metrics need it often.
    flops: Flops,
    clock: Clock,
    saved_step: Option<u64>,
}

/// Rank 0 writes for all.
struct Root {
    recorder: Recorder,
    /// FLOP/s that all ranks' matrix products reach together, the 1 of `mfu`.
    peak_flops: f64,
}

/// Wall-clock of the run, and of the stretch since the last metrics line.
struct Clock {
    start: Instant,
    /// Seconds that the run had taken before this process.
    before: f64,
    line: Instant,
    line_step: u64,
}

impl Trainer {
    fn set_up(
        mut config: Config,
        options: &Options,
        comm: &mut dyn Communicator,
        console: &Console,
    ) -> Result<Trainer> {
        comm.set_timeout(Duration::from_secs_f64(config.parallel.timeout));
        agree(comm, resolve_vocab(&mut config))?;
        let is_root = comm.rank() == 0;
        let directory = RunDirectory::new(&options.run_dir);
        agree(comm, if is_root { directory.prepare(&config, options.resume) } else { Ok(()) })?;
        let learner = Learner::new(&config, comm);
        let mut learner = agree(comm, learner)?;
        refuse_shared_gpus(comm, learner.hierarchy.ends().theta.device())?;
        let mut progress = Progress::new(cycle::plan(&config));
        let resumed = newest_checkpoint(&options.run_dir, options.resume, comm)?;
        if let Some(checkpoint) = &resumed {
            let restored = restore(checkpoint, &config, &mut learner, &mut progress);
            agree(comm, restored)?;
        }
        let peak_flops = environment::gemm_peak(comm)?;
        let root = if is_root {
            directory.add_provenance(environment::provenance(&*comm, options.threads, peak_flops, &config.data.dir))?;
            let recorder = Recorder::open(&directory, &config, console, progress.step)?;
            Some(Root { recorder, peak_flops })
        } else {
            None
        };
        let (now, step) = (Instant::now(), progress.step);
        let trainer = Trainer {
            schedule: Schedule::new(&config, comm.rank())?,
            flops: progress.flops(&config, learner.spec()),
            clock: Clock { start: now, before: progress.elapsed_s, line: now, line_step: step },
            saved_step: resumed.map(|_| step),
            writer: agree(comm, Writer::new(&options.run_dir, &config, is_root))?,
            config,
            learner,
            progress,
            root,
        };
        trainer.announce(comm, options);
        Ok(trainer)
    }

    fn announce(&self, comm: &dyn Communicator, options: &Options) {
        let Trainer { config, learner, progress, .. } = self;
        let (spec, hierarchy) = (learner.spec(), &learner.hierarchy);
        let parameters = hierarchy.group(0).theta.elem_count() + hierarchy.ends().theta.elem_count();
        let levels: Vec<String> = (0..config.levels.count).map(|l| config.rows(l).to_string()).collect();
        tracing::info!(
            "run {}: {:.2} M parameters, {} blocks, width {}, {} ranks x {} threads",
            options.run_dir.display(),
            parameters as f64 / 1e6,
            levels.join(" / "),
            spec.width,
            comm.size(),
            options.threads,
        );
        let total: Flops = Progress { position: end(&progress.plan), ..progress.clone() }.flops(config, spec);
        tracing::info!(
            "cycle {}: {} steps of {} tokens (fine level), {:.3} TFLOP ({:.3} in blocks), an epoch is {} sequences",
            config.cycle.kind,
            config.run.steps,
            cycle::tokens_per_step(config, 0),
            total.total as f64 / 1e12,
            total.blocks as f64 / 1e12,
            learner.differentiator.epoch(),
        );
        if progress.step > 0 {
            tracing::info!("resumed at step {}", progress.step);
        }
    }

    /// Does the ops of the plan from the current position on.
    fn interpret(&mut self, comm: &mut dyn Communicator) -> Result<Outcome> {
        while let Some(op) = self.progress.op() {
            match op {
                Op::Smooth { level, coset, .. } => {
                    if self.smooth(comm, level, coset)? == Outcome::Interrupted {
                        return Ok(Outcome::Interrupted);
                    }
                }
                Op::Descend { to } => {
                    self.learner.descend(comm, to, self.progress.sequences)?;
                    self.progress.count_switch(op);
                }
                Op::Ascend { to } => {
                    self.learner.ascend(to)?;
                    self.progress.count_switch(op);
                }
            }
        }
        Ok(Outcome::Done)
    }

    /// One step of a smooth, and what is due after it.
    fn smooth(&mut self, comm: &mut dyn Communicator, level: usize, coset: Coset) -> Result<Outcome> {
        let step = self.progress.step + 1;
        let coset = coset_at(coset, self.learner.hierarchy.cosets(level), self.config.run.seed, step);
        let lr = self.learning_rate(level);
        let wishes = self.schedule.wishes(step);
        let mut wishes = [wishes.stop, wishes.save];
        let (target, first) = (Target { level, coset }, self.progress.sequences);
        let report = self.learner.step(comm, target, first, lr, &mut wishes)?;
        let wishes = Wishes { stop: wishes[0], save: wishes[1] };
        if !report.is_finite() {
            return agree(comm, Err(self.diverged(step, report)));
        }
        self.progress.count_step(self.config.batch(level) as u64);
        let tokens = cycle::tokens_per_step(&self.config, level);
        self.flops += step_flops(self.learner.spec(), self.config.rows(level), tokens);
        self.record(comm, target, lr, report)?;
        self.leave_if_spent(level, report.loss);
        if wishes.save > 0.0 || wishes.stop > 0.0 {
            self.save()?;
        }
        let is_last = self.progress.step == self.config.run.steps;
        Ok(if wishes.stop > 0.0 && !is_last { Outcome::Interrupted } else { Outcome::Done })
    }

    fn learning_rate(&self, level: usize) -> f64 {
        let Config { run, schedule, optimizer, .. } = &self.config;
        let Progress { step, since_switch, .. } = self.progress;
        optim::learning_rate(schedule, optimizer.lr, step, run.steps, level, since_switch)
    }

    fn diverged(&self, step: u64, report: StepReport) -> crate::error::Error {
        let last = match self.saved_step {
            Some(saved) => format!("the last checkpoint is of step {saved}"),
            None => "no checkpoint had been written".to_owned(),
        };
        anyhow!(
            "{DIVERGED} {step}: loss {}, gradient norm {}; no parameter was changed by that step and {last}. Lower optimizer.lr (now {}), set optimizer.clip or warm up longer",
            report.loss,
            report.grad_norm,
            self.config.optimizer.lr
        )
    }

    /// Evaluates and writes the step's metrics, where due.
    fn record(&mut self, comm: &mut dyn Communicator, target: Target, lr: f64, report: StepReport) -> Result<()> {
        let step = self.progress.step;
        let val_loss = if self.is_evaluated(step) { Some(self.learner.evaluate(comm)?) } else { None };
        self.progress.elapsed_s = self.clock.before + self.clock.start.elapsed().as_secs_f64();
        let Some(root) = &self.root else { return Ok(()) };
        root.recorder.advance(step, report.loss);
        if val_loss.is_none() && !root.recorder.is_due(step) {
            return Ok(());
        }
        let metrics = self.metrics(target, lr, report, val_loss, root.peak_flops);
        (self.clock.line, self.clock.line_step) = (Instant::now(), step);
        self.root.as_mut().map_or(Ok(()), |root| root.recorder.record(&metrics))
    }

    fn is_evaluated(&self, step: u64) -> bool {
        let every = self.config.log.eval_every;
        step == self.config.run.steps || (every > 0 && step.is_multiple_of(every))
    }

    fn metrics(&self, target: Target, lr: f64, report: StepReport, val_loss: Option<f64>, peak_flops: f64) -> Metrics {
        let (config, progress) = (&self.config, &self.progress);
        let tokens_per_step = cycle::tokens_per_step(config, target.level);
        let rows = config.rows(target.level);
        let steps_per_s = (progress.step - self.clock.line_step) as f64 / self.clock.line.elapsed().as_secs_f64();
        let flops_per_s = step_flops(self.learner.spec(), rows, tokens_per_step).total as f64 * steps_per_s;
        Metrics {
            step: progress.step,
            cycle: progress.cycle(),
            op: "smooth".to_owned(),
            level: target.level,
            coset: (self.learner.hierarchy.cosets(target.level) > 1).then_some(target.coset),
            rows,
            loss: report.loss,
            val_loss,
            lr,
            grad_norm: report.grad_norm,
            tokens: progress.sequences * config.data.context as u64,
            flops_total: self.flops.total,
            flops_blocks: self.flops.blocks,
            elapsed_s: progress.elapsed_s,
            tokens_per_s: steps_per_s * tokens_per_step as f64,
            mfu: Some(flops_per_s / peak_flops),
        }
    }

    /// A measuring cycle may leave a coarse level before its steps are done.
    fn leave_if_spent(&mut self, level: usize, loss: f64) {
        let completed = self.progress.stay.add(loss, self.config.cycle.window);
        let cycle = cycle::cycle(self.config.cycle.kind);
        if completed && level > 0 && cycle.leave(&self.config, &self.progress.stay.losses) {
            self.progress.leave();
        }
    }

    /// Writes a checkpoint of the step just done, unless there is one.
    fn save(&mut self) -> Result<()> {
        let step = self.progress.step;
        if self.saved_step == Some(step) {
            return Ok(());
        }
        let Trainer { learner, progress, writer, .. } = self;
        writer.save(step, &mut RunState { learner, progress })?;
        self.schedule.saved();
        self.saved_step = Some(step);
        Ok(())
    }

    /// The last checkpoint, and the end of the background work.
    fn finish(mut self, comm: &mut dyn Communicator, outcome: Outcome) -> Result<()> {
        self.save()?;
        agree(comm, self.writer.finish())?;
        if let Some(root) = &self.root {
            root.recorder.finish();
        }
        let (step, seconds) = (self.progress.step, self.progress.elapsed_s);
        match outcome {
            Outcome::Done => tracing::info!("done: {step} steps in {seconds:.1} s"),
            Outcome::Interrupted => tracing::info!("stopped after step {step} with a checkpoint; go on with --resume"),
        }
        Ok(())
    }
}

/// The position after the last op.
fn end(plan: &[Op]) -> cycle::Position {
    cycle::Position { op: plan.len(), step_in_op: 0 }
}

/// The newest intact checkpoint, the same on every rank; `None` to start from the beginning. Collective.
fn newest_checkpoint(run_dir: &Path, resume: bool, comm: &mut dyn Communicator) -> Result<Option<Checkpoint>> {
    if !resume {
        return Ok(None);
    }
    // Rank 0 verifies the checksums; the others open what it found.
    let found = if comm.rank() == 0 { checkpoint::latest(run_dir) } else { Ok(None) };
    let found = agree(comm, found)?;
    let mut path = found.map_or(Vec::new(), |c| c.path().as_os_str().as_encoded_bytes().to_vec());
    comm.broadcast(&mut path, 0)?;
    if path.is_empty() {
        return Ok(None);
    }
    let path = PathBuf::from(String::from_utf8(path).context("the path of the checkpoint is not UTF-8")?);
    let opened = Checkpoint::open(&path, Check::Sizes);
    agree(comm, opened).map(Some)
}

fn restore(checkpoint: &Checkpoint, config: &Config, learner: &mut Learner, progress: &mut Progress) -> Result<()> {
    checkpoint.restore(&mut RunState { learner, progress })?;
    progress.check(config).context("the checkpoint's plan does not fit the config")
}

/// The state of a run: counters of the progress, tensors of the hierarchy.
struct RunState<'a> {
    learner: &'a mut Learner,
    progress: &'a mut Progress,
}

impl State for RunState<'_> {
    fn visit(&mut self, visitor: &mut dyn Visitor) -> Result<()> {
        let hierarchy = &mut self.learner.hierarchy;
        checkpoint::value(visitor, "progress", self.progress)?;
        let mut snapshot: Snapshot = hierarchy.snapshot();
        checkpoint::value(visitor, "levels", &mut snapshot)?;
        hierarchy.restore(&snapshot)?;
        for named in hierarchy.tensors()? {
            let part = if named.fine_net { Part::Model } else { Part::State };
            visitor.rows(part, &named.name, named.layout, named.tensor)?;
        }
        Ok(())
    }
}
