//! `study run`: each run is this program as a child process, several at once.
//!
//! What is finished is read from the run directories, so a study may be killed at any moment. A child holds a lock on the
//! file of its output for as long as it lives, and is told to stop when the study dies: no run is ever written by two.

use super::file::Study;
use super::plan::{Choice, Run, shown};
use super::state::{State, last_error, output_file};
use crate::cli::text::duration;
use crate::error::{Context, Outcome, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, TryLockError};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often children are looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long a run that another process is still writing is waited for: a checkpoint's time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Does the runs of `arms` that are not yet finished.
pub fn run(study: &Study, arms: &[usize], states: Vec<State>) -> Result<Outcome> {
    let stop = signalled().context("cannot register signal handlers")?;
    let attempted = vec![false; study.runs.len()];
    let mut runner =
        Runner { study, arms, states, attempted, active: Vec::new(), failures: Vec::new(), stopped: false, stop };
    runner.announce();
    runner.work();
    runner.conclude()
}

/// Set by SIGTERM, SIGINT and SIGUSR1. A second SIGINT ends the process at once.
fn signalled() -> std::io::Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, 130, flag.clone())?;
    for signal in [SIGTERM, SIGINT, SIGUSR1] {
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}

struct Runner<'a> {
    study: &'a Study,
    arms: &'a [usize],
    /// Of each of the study's runs, as are the next.
    states: Vec<State>,
    /// Started by this process, whatever came of it.
    attempted: Vec<bool>,
    active: Vec<(usize, Child)>,
    /// `NAME: why`
    failures: Vec<String>,
    /// Some run ended with a checkpoint before its last step.
    stopped: bool,
    stop: Arc<AtomicBool>,
}

impl Runner<'_> {
    fn needed(&self) -> Vec<(usize, bool)> {
        self.study.needed(self.arms, &self.states)
    }

    /// `[runs with a result/all]`
    fn progress(&self) -> String {
        let needed = self.needed();
        let settled = needed.iter().filter(|&&(run, is_chosen)| is_chosen && self.states[run].is_settled()).count();
        format!("[{settled}/{}]", needed.len())
    }

    fn announce(&self) {
        let Study { title, dir, parallel, ranks, .. } = self.study;
        let ranks = if *ranks > 1 { format!(" of {ranks} ranks each") } else { String::new() };
        tracing::info!("{} {title}: runs in {}, {parallel} at once{ranks}", self.progress(), dir.display());
    }

    /// Starts what can be started and waits for it, until nothing is left to start.
    fn work(&mut self) {
        let mut told = false;
        loop {
            let stop = self.stop.load(Ordering::Relaxed);
            if stop && !told {
                tracing::info!("stopping {} runs, each with a checkpoint", self.active.len());
                self.active.iter().for_each(|(_, child)| tell_to_stop(child));
                told = true;
            }
            while !stop && self.active.len() < self.study.parallel && self.start_next() {}
            if self.active.is_empty() {
                return;
            }
            std::thread::sleep(POLL);
            self.reap();
        }
    }

    /// Starts the next run that is ready; false if there is none.
    fn start_next(&mut self) -> bool {
        let ready =
            |&&(run, is_chosen): &&(usize, bool)| is_chosen && !self.attempted[run] && !self.states[run].is_settled();
        let Some(&(index, _)) = self.needed().iter().find(ready) else { return false };
        let run = &self.study.runs[index];
        let again = if self.states[index] == State::New { "" } else { " again" };
        tracing::info!("{} {}: started{again}", self.progress(), run.name);
        self.attempted[index] = true;
        match start(self.study, run, &self.stop) {
            Ok(Some(child)) => self.active.push((index, child)),
            // Stopped while it waited.
            Ok(None) => {}
            Err(error) => self.fail(index, &format!("{error:#}")),
        }
        true
    }

    /// Takes note of the children that have ended.
    fn reap(&mut self) {
        let mut ended: Vec<(usize, std::io::Result<ExitStatus>)> = Vec::new();
        self.active.retain_mut(|(run, child)| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                ended.push((*run, Ok(status)));
                false
            }
            Err(error) => {
                ended.push((*run, Err(error)));
                false
            }
        });
        for (run, status) in ended {
            match State::read(&self.study.runs[run]).and_then(|state| Ok((state, status?))) {
                Ok((state, status)) => self.ended(run, state, status),
                Err(error) => self.fail(run, &format!("{error:#}")),
            }
        }
    }

    fn ended(&mut self, index: usize, state: State, status: ExitStatus) {
        let run = &self.study.runs[index];
        self.states[index] = state;
        let name = &run.name;
        match state {
            State::Finished(cost) => {
                let (progress, time) = (self.progress(), duration(cost.elapsed_s));
                tracing::info!("{progress} {name}: val loss {:.4}, {time}", cost.val_loss);
            }
            // A learning rate that is too high is a result of a sweep.
            State::Diverged if self.is_trial(index) => tracing::info!("{} {name}: diverged", self.progress()),
            State::Stopped { .. } if status.code() == Some(75) => {
                tracing::info!("{} {name}: stopped with a checkpoint", self.progress());
                self.stopped = true;
            }
            _ if self.stop.load(Ordering::Relaxed) && last_error(&run.dir).is_none() => {
                tracing::info!("{} {name}: stopped", self.progress());
            }
            _ => {
                let error = last_error(&run.dir);
                let why =
                    error.unwrap_or_else(|| format!("{status}; its output is in {}", output_file(&run.dir).display()));
                self.fail(index, &why);
            }
        }
    }

    fn is_trial(&self, run: usize) -> bool {
        self.study.trials(self.study.runs[run].arm).any(|trial| trial == run)
    }

    fn fail(&mut self, run: usize, why: &str) {
        let name = &self.study.runs[run].name;
        tracing::error!("{} {name}: {why}", self.progress());
        self.failures.push(name.clone());
    }

    /// The outcome of the whole.
    fn conclude(self) -> Result<Outcome> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(Outcome::Interrupted);
        }
        if !self.failures.is_empty() {
            bail!("{} runs failed: {}", self.failures.len(), self.failures.join("; "));
        }
        if self.stopped {
            return Ok(Outcome::Interrupted);
        }
        for &arm in self.arms {
            let name = &self.study.arms[arm].name;
            match self.study.choice(arm, &self.states) {
                Choice::Failed => bail!("every trial of the sweep for {name} diverged: try other values"),
                Choice::Point(point) if self.study.tuner(arm) == Some(arm) => {
                    tracing::info!("the sweep of {name} chose {}", shown(&point));
                }
                _ => {}
            }
        }
        let diverged = |&(run, _): &(usize, bool)| self.states[run] == State::Diverged && !self.is_trial(run);
        let diverged: Vec<&str> =
            self.needed().iter().filter(|run| diverged(run)).map(|&(run, _)| &*self.study.runs[run].name).collect();
        if !diverged.is_empty() {
            bail!("{} runs diverged: {}", diverged.len(), diverged.join("; "));
        }
        Ok(Outcome::Done)
    }
}

/// Starts `run` in a process group of its own, so that Ctrl-C reaches it through the study alone. `None` if `stop` was set
/// while another process still wrote it.
fn start(study: &Study, run: &Run, stop: &AtomicBool) -> Result<Option<Child>> {
    std::fs::create_dir_all(&run.dir)
        .with_context(|| format!("cannot make the run directory {}", run.dir.display()))?;
    let path = output_file(&run.dir);
    let context = || format!("cannot write {}", path.display());
    let output = File::options().create(true).append(true).open(&path).with_context(context)?;
    let since = Instant::now();
    // The child inherits the file and with it the lock.
    while let Err(TryLockError::WouldBlock) = output.try_lock() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if since.elapsed() > PATIENCE {
            return Err(anyhow!("another process is running it in {}: wait for it or stop it", run.dir.display()));
        }
        std::thread::sleep(POLL);
    }
    output.set_len(0).with_context(context)?;
    let mut command = command(study, run)?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
    stop_with_parent(&mut command);
    let program = command.get_program().display().to_string();
    command.spawn().map(Some).with_context(|| format!("cannot start {program}"))
}

/// `[mpirun ...] vcycle train CONFIG --set ... --run-dir DIR --resume`
fn command(study: &Study, run: &Run) -> Result<Command> {
    let vcycle = std::env::current_exe().context("cannot find the file of this program")?;
    let launcher = study.launcher.replace("{ranks}", &study.ranks.to_string());
    let mut words = launcher.split_whitespace();
    let mut command = match words.next().filter(|_| study.ranks > 1) {
        Some(launcher) => {
            let mut command = Command::new(launcher);
            command.args(words).arg(vcycle);
            command
        }
        None => Command::new(vcycle),
    };
    command.arg("train").arg(&run.config_file);
    command.args(run.overrides.iter().flat_map(|setting| ["--set", setting]));
    command.arg("--run-dir").arg(&run.dir).arg("--resume");
    Ok(command)
}

/// A signal that `train` takes as "write a checkpoint and stop", and that launchers pass on to all ranks.
const STOP: Signal = Signal::USR1;

fn tell_to_stop(child: &Child) {
    // It may just have ended.
    let _ = kill_process(Pid::from_child(child), STOP);
}

/// The child is told to stop when this process ends, however that is.
#[cfg(target_os = "linux")]
fn stop_with_parent(command: &mut Command) {
    let ask = || Ok(rustix::process::set_parent_process_death_signal(Some(STOP))?);
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

#[cfg(not(target_os = "linux"))]
fn stop_with_parent(_command: &mut Command) {}
