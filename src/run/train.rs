//! `train`: sets a run up, interprets its ops, saves and stops.

use super::balance::Balance;
use super::console::Console;
use super::device::{device, group_of_gpus};
use super::directory::RunDirectory;
use super::environment;
use super::execute::{Executor, Now, RoundReport};
use super::history::Metrics;
use super::learner::{Learner, StepReport};
use super::memory::memory;
use super::progress::{Progress, coset_at};
use super::recorder::Recorder;
use super::resolve::resolve_vocab;
use super::shards;
use super::stop::{Schedule, passes_multiple};
use crate::checkpoint::{self, Check, Checkpoint, Part, State, Visitor, Writer};
use crate::comm::{Communicator, Reduction, agree};
use crate::config::Config;
use crate::cycle::{self, Coset, Op, Places, Round};
use crate::error::{Context, Outcome, Result, anyhow};
use crate::levels::Snapshot;
use crate::model::{Flops, Spec};
use candle_core::{Device, Tensor};
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
    comm.set_timeout(Duration::from_secs_f64(config.parallel.timeout));
    let device = agree(comm, device(&config))?;
    let mut gpus = group_of_gpus(comm, &device)?;
    let comm: &mut dyn Communicator = match &mut gpus {
        Some(gpus) => &mut **gpus,
        None => comm,
    };
    let mut trainer = Trainer::set_up(config, &device, options, comm, console)?;
    let outcome = trainer.interpret(comm)?;
    trainer.finish(comm, outcome)?;
    Ok(outcome)
}

/// A run in progress on one rank.
struct Trainer {
    config: Config,
    executor: Executor,
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

/// A net that steps were done on.
#[derive(Clone, Copy)]
struct Trained {
    level: usize,
    /// `None` where the level has but one, or all are trained.
    coset: Option<usize>,
}

/// The nets of a round: on the level that the run is on, and beside it.
#[derive(Clone, Copy)]
struct Work {
    main: Trained,
    coarse: Option<Trained>,
}

/// Wall-clock of the run, and of the stretch since the last metrics line.
struct Clock {
    start: Instant,
    /// Seconds that the run had taken before this process.
    before: f64,
    line: Instant,
    line_tokens: u64,
    line_flops: u128,
    /// What this rank had waited in collectives at that line, in all and for sums of gradients.
    line_waited: [Duration; 2],
}

impl Trainer {
    fn set_up(
        mut config: Config,
        device: &Device,
        options: &Options,
        comm: &mut dyn Communicator,
        console: &Console,
    ) -> Result<Trainer> {
        agree(comm, resolve_vocab(&mut config))?;
        let is_root = comm.rank() == 0;
        let directory = RunDirectory::new(&options.run_dir);
        agree(comm, if is_root { directory.prepare(&config, options.resume) } else { Ok(()) })?;
        let mut progress = Progress::new(cycle::plan(&config));
        let places = Places::new(&config, &Spec::new(&config), comm.size())?;
        let smallest = places.smallest_group(&progress.plan);
        let learner = Learner::new(&config, device, smallest, comm.rank(), comm.size());
        let mut learner = agree(comm, learner)?;
        let resumed = newest_checkpoint(&options.run_dir, options.resume, comm)?;
        if let Some(checkpoint) = &resumed {
            let restored = restore(checkpoint, &config, &mut learner, &mut progress);
            agree(comm, restored)?;
        }
        let peak_flops = environment::gemm_peak(comm, learner.device(), learner.spec())?;
        let executor = Executor::new(comm, learner, places, &progress.plan)?;
        let hosts = environment::hosts(comm)?;
        let root = if is_root {
            directory.add_provenance(environment::provenance(hosts, options.threads, peak_flops, &config.data.dir))?;
            let recorder = Recorder::open(&directory, &config, console, progress.step)?;
            Some(Root { recorder, peak_flops })
        } else {
            None
        };
        let (now, flops) = (Instant::now(), progress.flops(&config, executor.learner.spec()));
        let mut trainer = Trainer {
            schedule: Schedule::new(&config, comm.rank())?,
            flops,
            clock: Clock {
                start: now,
                before: progress.elapsed_s,
                line: now,
                line_tokens: 0,
                line_flops: flops.total,
                line_waited: [comm.waited(), Duration::ZERO],
            },
            saved_step: resumed.map(|_| progress.step),
            writer: agree(comm, Writer::new(&options.run_dir, &config, is_root))?,
            config,
            executor,
            progress,
            root,
        };
        trainer.clock.line_tokens = trainer.tokens();
        trainer.announce(comm, options);
        Ok(trainer)
    }

    fn announce(&self, comm: &dyn Communicator, options: &Options) {
        let Trainer { config, executor: Executor { learner, .. }, progress, .. } = self;
        let (spec, hierarchy) = (learner.spec(), &learner.hierarchy);
        let parameters = hierarchy.group(0).theta.elem_count() + hierarchy.ends(0).theta.elem_count();
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

    /// Does the ops of the plan from the current position on, round by round.
    fn interpret(&mut self, comm: &mut dyn Communicator) -> Result<Outcome> {
        while let Some(op) = self.progress.op().cloned() {
            let round = self.executor.places().round(&op, self.progress.position.step_in_op);
            if round.steps() > 0 {
                if self.steps(comm, &round)? == Outcome::Interrupted {
                    return Ok(Outcome::Interrupted);
                }
            } else {
                let Trainer { config, executor, progress, .. } = self;
                executor.execute(comm, &Now { config, progress, round: &round, wishes: [0.0; 2] })?;
                progress.count_switch(&op);
            }
        }
        Ok(Outcome::Done)
    }

    /// The optimizer steps of a round, and what is due after them.
    fn steps(&mut self, comm: &mut dyn Communicator, round: &Round) -> Result<Outcome> {
        let before = self.progress.step;
        let wishes = self.schedule.wishes(before, before + round.steps());
        let work = self.work(round);
        let Trainer { config, executor, progress, .. } = self;
        let now = Now { config, progress, round, wishes: [wishes.stop, wishes.save] };
        let report = executor.execute(comm, &now)?;
        if !report.is_finite() {
            return agree(comm, Err(self.diverged(round, &report)));
        }
        let sequences = self.executor.places().sequences(round);
        self.progress.count_round(round, sequences);
        let spec = self.executor.learner.spec();
        let ops = std::iter::once(&round.main).chain(&round.coarse);
        self.flops += ops.map(|op| cycle::flops(&self.config, spec, op)).sum();
        self.log_groups(&report);
        self.record(comm, before, work, &report)?;
        self.leave_if_spent(comm, work.main.level)?;
        let [stop, save] = report.wishes;
        if save > 0.0 || stop > 0.0 {
            self.save(comm)?;
        }
        let is_last = self.progress.step == self.config.run.steps;
        Ok(if stop > 0.0 && !is_last { Outcome::Interrupted } else { Outcome::Done })
    }

    /// What a line of metrics says of the nets that `round` is about to train.
    fn work(&self, round: &Round) -> Work {
        let (hierarchy, seed) = (&self.executor.learner.hierarchy, self.config.run.seed);
        let net = |op: &Op| match *op {
            Op::Smooth { level, coset, .. } => {
                let cosets = hierarchy.cosets(level);
                let one = cosets > 1 && coset != Coset::All;
                Some(Trained { level, coset: one.then(|| coset_at(coset, cosets, seed, self.progress.step + 1)) })
            }
            _ => None,
        };
        let main = net(&round.main).expect("a round of steps smooths");
        Work { main, coarse: round.coarse.iter().filter_map(net).next_back() }
    }

    fn diverged(&self, round: &Round, report: &RoundReport) -> crate::error::Error {
        let step = self.progress.step + round.steps();
        let unchanged = if round.steps() == 1 { "no parameter was changed by that step and " } else { "" };
        let StepReport { loss, grad_norm, .. } = match report.coarse {
            Some(coarse) if report.main.is_finite() => coarse,
            _ => report.main,
        };
        let last = match self.saved_step {
            Some(saved) => format!("the last checkpoint is of step {saved}"),
            None => "no checkpoint had been written".to_owned(),
        };
        anyhow!(
            "{DIVERGED} {step}: loss {loss}, gradient norm {grad_norm}; {unchanged}{last}. Lower optimizer.lr (now {}), set optimizer.clip or warm up longer",
            self.config.optimizer.lr
        )
    }

    /// What came of working in groups, once an op that was done in groups is over.
    fn log_groups(&self, report: &RoundReport) {
        let step = self.progress.step;
        if let Some(waits) = &report.waits {
            tracing::info!("step {step}: {waits}");
        }
        if let Some(correction) = &report.correction {
            tracing::info!("step {step}: {correction}");
        }
    }

    /// Evaluates and writes the round's metrics, where due.
    fn record(&mut self, comm: &mut dyn Communicator, before: u64, work: Work, report: &RoundReport) -> Result<()> {
        let step = self.progress.step;
        let evaluated = step == self.config.run.steps || passes_multiple(before, step, self.config.log.eval_every);
        let val_loss = if evaluated { self.executor.evaluate(comm)? } else { None };
        self.progress.elapsed_s = self.clock.before + self.clock.start.elapsed().as_secs_f64();
        if let Some(root) = &self.root {
            root.recorder.advance(step, report.main.loss);
        }
        // Decided by steps alone: only the fine level's group evaluates while the sides are apart.
        if !evaluated && !self.is_logged(before, step) {
            return Ok(());
        }
        let waited = self.waited(comm);
        let since_line = |i: usize| waited[i].saturating_sub(self.clock.line_waited[i]);
        let ranks = Balance::measure(comm, [since_line(0), since_line(1)], self.clock.line.elapsed())?;
        // No run ends because the kernel does not tell.
        let mut most = [memory(self.executor.learner.device()).map_or(0, |memory| memory.peak) as f64];
        comm.reduce(&mut most, Reduction::Max)?;
        if let Some(peak_flops) = self.root.as_ref().map(|root| root.peak_flops) {
            let memory_bytes = Some(most[0] as u64).filter(|&bytes| bytes > 0);
            let main =
                Metrics { val_loss, memory_bytes, ranks, ..self.metrics("smooth", work.main, report.main, peak_flops) };
            let coarse = work.coarse.zip(report.coarse);
            let coarse = coarse.map(|(net, step)| self.metrics("beside", net, step, peak_flops));
            let lines = coarse.into_iter().chain([main]);
            self.root
                .as_mut()
                .map_or(Ok(()), |root| lines.into_iter().try_for_each(|line| root.recorder.record(&line)))?;
        }
        // With what measuring has waited, which is before the next line's time.
        let (tokens, flops, waited) = (self.tokens(), self.flops.total, self.waited(comm));
        let Clock { line, line_tokens, line_flops, line_waited, .. } = &mut self.clock;
        (*line, *line_tokens, *line_flops, *line_waited) = (Instant::now(), tokens, flops, waited);
        Ok(())
    }

    /// What this rank has waited in collectives so far, in all and for sums of gradients.
    fn waited(&self, comm: &dyn Communicator) -> [Duration; 2] {
        let exposed = self.executor.learner.differentiator.exposed_seconds();
        [comm.waited(), Duration::from_secs_f64(exposed)]
    }

    /// Whether the steps after `before`, up to `step`, have a line of metrics even without an evaluation: the same on every
    /// rank.
    fn is_logged(&self, before: u64, step: u64) -> bool {
        let Config { run, log, .. } = &self.config;
        step == run.steps || before == 0 || passes_multiple(before, step, log.every_steps)
    }

    /// Tokens trained on.
    fn tokens(&self) -> u64 {
        (self.progress.sequences + self.progress.coarse_sequences) * self.config.data.context as u64
    }

    fn metrics(&self, op: &str, net: Trained, report: StepReport, peak_flops: f64) -> Metrics {
        let (progress, clock) = (&self.progress, &self.clock);
        let seconds = clock.line.elapsed().as_secs_f64();
        Metrics {
            step: progress.step,
            cycle: progress.cycle(),
            op: op.to_owned(),
            level: net.level,
            coset: net.coset,
            rows: self.config.rows(net.level),
            loss: report.loss,
            val_loss: None,
            lr: report.lr,
            grad_norm: report.grad_norm,
            tokens: self.tokens(),
            flops_total: self.flops.total,
            flops_blocks: self.flops.blocks,
            elapsed_s: progress.elapsed_s,
            tokens_per_s: (self.tokens() - clock.line_tokens) as f64 / seconds,
            mfu: Some((self.flops.total - clock.line_flops) as f64 / seconds / peak_flops),
            memory_bytes: None,
            ranks: None,
        }
    }

    /// A measuring cycle may leave a coarse level before its steps are done. Collective.
    fn leave_if_spent(&mut self, comm: &mut dyn Communicator, level: usize) -> Result<()> {
        let Trainer { config, executor, progress, .. } = self;
        let (cycle, done) = (cycle::cycle(config.cycle.kind), progress.position.step_in_op);
        // 0: its steps are done anyway.
        if !cycle.measures() || level == 0 || done == 0 || !done.is_multiple_of(config.cycle.window) {
            return Ok(());
        }
        let (step, finer) = (progress.step, level - 1);
        let ratio = executor.learner.unresolved(comm, progress.sequences)?;
        tracing::info!(
            "step {step}: gradient of level {finer} that level {level} does not resolve, over what it does: {ratio:.2}"
        );
        progress.unresolved.push(ratio);
        progress.measured.push(finer);
        self.flops += cycle::level_flops(config, executor.learner.spec(), finer);
        if cycle.leave(config, &progress.unresolved) {
            tracing::info!(
                "step {step}: level {level} is left after {done} steps: level {finer} gives more for its work"
            );
            progress.leave(config);
        }
        Ok(())
    }

    /// Writes a checkpoint of the step just done, unless there is one. Collective.
    fn save(&mut self, comm: &mut dyn Communicator) -> Result<()> {
        let step = self.progress.step;
        if self.saved_step == Some(step) {
            return Ok(());
        }
        self.executor.gather(comm)?;
        let Trainer { executor, progress, writer, .. } = self;
        writer.save(step, &mut RunState { learner: &mut executor.learner, progress, comm: Some(comm) })?;
        self.schedule.saved();
        self.saved_step = Some(step);
        Ok(())
    }

    /// The last checkpoint, and the end of the background work.
    fn finish(mut self, comm: &mut dyn Communicator, outcome: Outcome) -> Result<()> {
        self.save(comm)?;
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
    checkpoint.restore(&mut RunState { learner, progress, comm: None })?;
    progress.check(config).context("the checkpoint's plan does not fit the config")
}

/// The state of a run: counters of the progress, tensors of the hierarchy.
struct RunState<'a> {
    learner: &'a mut Learner,
    progress: &'a mut Progress,
    /// To write: the ranks that have the columns of what rank 0 lacks. To read: `None`.
    comm: Option<&'a mut dyn Communicator>,
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
            let mut visit = |tensor: &Tensor| visitor.rows(part, &named.name, named.layout, tensor);
            match (named.shard, &mut self.comm) {
                (None, _) => visit(named.tensor)?,
                // One tensor at a time, and on rank 0 alone.
                (Some(shard), Some(comm)) => {
                    shards::join(&mut **comm, shard, named.tensor)?.iter().try_for_each(visit)?
                }
                (Some(shard), None) => shards::take(shard, named.tensor, visit)?,
            }
        }
        Ok(())
    }
}
