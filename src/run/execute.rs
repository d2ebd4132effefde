//! Carries out what [`Places`] gives this rank to do.

use super::gradient::{Ends, Target, square_of_ends, square_of_gradient, square_of_rows};
use super::learner::{Correction, Learner, StepReport};
use super::progress::{COARSE_SEQUENCES, Progress, coset_at};
use super::teams::{self, Teams};
use crate::comm::{Communicator, Exchange, Reduction};
use crate::config::Config;
use crate::cycle::{Coset, Groups, LocalOp, Op, Places, Round, Side, Smooth, own_cosets};
use crate::error::{Context, Result};
use crate::levels::{Half, Snapshot};
use crate::ops::access;
use crate::optim;
use candle_core::{Device, Tensor};
use std::time::{Duration, Instant};

/// One rank's net with the ranks that it works with.
pub struct Executor {
    pub learner: Learner,
    places: Places,
    teams: Teams,
    /// Results that not all ranks have yet.
    apart: Option<Apart>,
    fork: Fork,
    idle: Idle,
}

/// What the groups have worked out and the others do not know.
#[derive(Clone)]
enum Apart {
    Cosets { groups: Groups, level: usize },
    Sides { groups: Groups },
}

/// What a round is done with.
pub struct Now<'a> {
    pub config: &'a Config,
    /// As it was before the round.
    pub progress: &'a Progress,
    pub round: &'a Round,
    /// This rank's wishes to stop and to save: 1 = yes.
    pub wishes: [f64; 2],
}

/// What a round of optimizer steps did; the same on every rank.
#[derive(Clone, Debug, Default)]
pub struct RoundReport {
    /// Mean of the steps on the level that the run is on.
    pub main: StepReport,
    /// Mean of the steps on coarse levels beside it.
    pub coarse: Option<StepReport>,
    /// Wishes of all ranks, summed.
    pub wishes: [f64; 2],
    pub correction: Option<Correction>,
    /// With the last round of an op that groups did side by side.
    pub waits: Option<Waits>,
}

/// How long groups waited for each other.
#[derive(Clone, Debug)]
pub struct Waits {
    pub groups: Groups,
    pub seconds: f64,
    /// Share of the time in which the root of each group waited for other groups or exchanged results with them.
    pub shares: Vec<f64>,
}

impl std::fmt::Display for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "of {:.1} s,", self.seconds)?;
        for (group, (ranks, share)) in self.groups.sizes().iter().zip(&self.shares).enumerate() {
            let (comma, ranks) = (
                if group > 0 { "," } else { "" },
                if *ranks == 1 { "1 rank".into() } else { format!("{ranks} ranks") },
            );
            write!(f, "{comma} group {group} ({ranks}) waited {:.1}%", 100.0 * share)?;
        }
        Ok(())
    }
}

/// The ends as they were where each net of a round starts, and the sum of what the nets made of them: θ_e, then moments.
#[derive(Default)]
struct Fork {
    start: Vec<Vec<f32>>,
    sums: Vec<Vec<f32>>,
    updates: u64,
}

/// Time spent in meetings of all ranks during the current op.
struct Idle {
    start: Instant,
    /// Of this rank, since it last told the others.
    waited: Duration,
    /// Seconds by group.
    sums: Vec<f64>,
}

/// What this rank adds to the sums of a meeting, by side: main, coarse.
#[derive(Default)]
struct Tally {
    loss: [f64; 2],
    /// Squares of gradient norms, each counted by one rank, or by each in the columns that it updates.
    squares: [f64; 2],
    /// Square of the shared gradient of the ends, counted alike.
    ends: f64,
}

impl Executor {
    /// Splits the ranks as `plan` asks. Collective.
    pub fn new(comm: &mut dyn Communicator, learner: Learner, places: Places, plan: &[Op]) -> Result<Executor> {
        let teams = Teams::new(comm, places.divisions(plan))?;
        Ok(Executor { learner, places, teams, apart: None, fork: Fork::default(), idle: Idle::new(0) })
    }

    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Carries out a round, a switch or optimizer steps. Collective.
    pub fn execute(&mut self, comm: &mut dyn Communicator, now: &Now) -> Result<RoundReport> {
        let (round, mut tally, mut report) = (now.round, Tally::default(), RoundReport::default());
        if now.progress.position.step_in_op == 0 || self.idle.sums.len() != round.groups.len() {
            self.idle = Idle::new(round.groups.len());
        }
        for op in self.places.local(round, comm.rank()) {
            match op {
                LocalOp::Gradient { level, coset, first, shared } => self.gradient(
                    comm,
                    now,
                    Target { level, coset: self.coset(now, level, coset) },
                    first,
                    shared,
                    &mut tally,
                )?,
                LocalOp::ShareGradient => self.share_gradient(comm, now, &mut tally)?,
                LocalOp::Meet => self.meet(comm, now, &tally, &mut report)?,
                LocalOp::Update { level, cosets, nets } => {
                    if report.is_finite() {
                        let cosets: Vec<usize> = cosets.iter().map(|&coset| self.coset(now, level, coset)).collect();
                        let StepReport { lr, grad_norm, .. } = report.main;
                        self.learner.update(comm, level, &cosets, lr, grad_norm, nets)?;
                        self.count_others(round, level, nets, 1, comm.rank());
                    }
                }
                LocalOp::Fork => self.take_fork(now)?,
                LocalOp::Smooth(smooth) => self.smooth(comm, now, &smooth, &mut tally)?,
                LocalOp::Bank => self.bank(now, comm.rank())?,
                LocalOp::ShareEnds { level, nets, steps } => {
                    self.share_ends(comm, level, nets, steps)?;
                    self.count_others(round, level, nets, steps, comm.rank());
                }
                LocalOp::Switch { side, op } => self.switch(comm, now, side, &op)?,
                LocalOp::Assemble { .. } => self.gather(comm)?,
                LocalOp::Accept => report.correction = Some(self.accept(comm, now)?),
            }
        }
        if round.ends && round.groups.len() > 1 {
            report.waits = Some(self.idle.waits(&round.groups));
        }
        Ok(report)
    }

    /// All that a checkpoint or an evaluation of the fine net needs comes to every rank, rank 0 among them. Collective.
    pub fn gather(&mut self, comm: &mut dyn Communicator) -> Result<()> {
        match self.apart.clone() {
            None => {}
            Some(Apart::Cosets { groups, level }) => {
                self.assemble(comm, &groups, level)?;
                self.apart = None;
            }
            // Only the coarse side: rank 0 has the fine one, and both go on apart.
            Some(Apart::Sides { groups }) => self.exchange(comm, &groups, Half::Coarse)?,
        }
        Ok(())
    }

    /// Mean validation loss of the fine net; `None` on ranks that have no part in it. Collective.
    pub fn evaluate(&mut self, comm: &mut dyn Communicator) -> Result<Option<f64>> {
        match self.apart.clone() {
            Some(Apart::Sides { groups }) if groups.of(comm.rank()) > 0 => Ok(None),
            Some(Apart::Sides { groups }) => self.learner.evaluate(self.teams.own(comm, &groups)).map(Some),
            _ => {
                self.gather(comm)?;
                self.learner.evaluate(comm).map(Some)
            }
        }
    }

    fn coset(&self, now: &Now, level: usize, coset: Coset) -> usize {
        coset_at(coset, self.learner.hierarchy.cosets(level), now.config.run.seed, now.progress.step + 1)
    }

    fn gradient(
        &mut self,
        comm: &mut dyn Communicator,
        now: &Now,
        target: Target,
        first: u64,
        shared: bool,
        tally: &mut Tally,
    ) -> Result<()> {
        let groups = &now.round.groups;
        let own = own_cosets(groups, self.places.nets(target.level, Coset::All), comm.rank());
        let ends = match shared {
            false => Ends::Sum,
            true if target.coset == own.start => Ends::Start,
            true => Ends::Add,
        };
        let counts = groups.is_root(comm.rank()) || self.learner.hierarchy.is_sharded();
        let first = sequence(now, Side::Main, first);
        tally.loss[0] += self.learner.gradient(self.teams.own(comm, groups), target, first, ends)?;
        let hierarchy = &self.learner.hierarchy;
        let square = if shared { square_of_rows(hierarchy, target) } else { square_of_gradient(hierarchy, target) }?;
        tally.squares[0] += if counts { square } else { 0.0 };
        Ok(())
    }

    /// g_e = Σ_k g_{e,k} over all nets; its mean enters the norm.
    fn share_gradient(&mut self, comm: &mut dyn Communicator, now: &Now, tally: &mut Tally) -> Result<()> {
        let Op::Smooth { level, coset, .. } = now.round.main else { return Ok(()) };
        let Learner { differentiator, hierarchy, .. } = &mut self.learner;
        self.idle.measure(|| differentiator.share_ends(comm, hierarchy, level))?;
        let nets = self.places.nets(level, coset) as f64;
        let counts = comm.rank() == 0 || hierarchy.is_sharded();
        tally.ends = if counts { square_of_ends(hierarchy, level)? / (nets * nets) } else { 0.0 };
        Ok(())
    }

    /// Every rank learns losses and norms, wishes and waiting times of all.
    ///
    /// The norm of several nets' gradient together is that of one net's in the mean: √(Σ_k ‖g_k‖² / K + ‖ḡ_e‖²).
    fn meet(&mut self, comm: &mut dyn Communicator, now: &Now, tally: &Tally, report: &mut RoundReport) -> Result<()> {
        let round = now.round;
        let group = round.groups.of(comm.rank());
        let Tally { loss, squares, ends } = tally;
        let mut sums = vec![now.wishes[0], now.wishes[1], loss[0], loss[1], squares[0], squares[1], *ends];
        let numbers = sums.len();
        sums.resize(numbers + round.groups.len(), 0.0);
        let waited = std::mem::take(&mut self.idle.waited);
        if round.groups.is_root(comm.rank()) {
            sums[numbers + group] = waited.as_secs_f64();
        }
        self.idle.measure(|| comm.reduce(&mut sums, Reduction::Sum))?;
        self.idle.sums.iter_mut().zip(&sums[numbers..]).for_each(|(sum, seconds)| *sum += seconds);
        report.wishes = [sums[0], sums[1]];
        let ends = sums[6];
        let mean = |side: usize, steps: u64, ends: f64, lr: f64| StepReport {
            loss: sums[2 + side] / steps as f64,
            grad_norm: (sums[4 + side] / steps as f64 + ends).sqrt(),
            lr,
        };
        let lr = learning_rate(now, level_of(&round.main), 0, now.progress.since_switch);
        report.main = mean(0, self.places.net_steps(round), ends, lr);
        report.coarse = round
            .coarse_start()
            .map(|(level, since)| mean(1, round.coarse_steps(), 0.0, learning_rate(now, level, 0, Some(since))));
        if round.groups.len() > 1 {
            let groups = round.groups.clone();
            self.apart = Some(match (&round.coarse[..], &round.main) {
                ([], Op::Smooth { level, .. }) => Apart::Cosets { groups, level: *level },
                _ => Apart::Sides { groups },
            });
        }
        Ok(())
    }

    /// Counts the updates of cosets that other groups train, so that counts are the same on every rank.
    fn count_others(&mut self, round: &Round, level: usize, nets: usize, steps: u64, rank: usize) {
        if nets > 1 {
            let own = own_cosets(&round.groups, nets, rank);
            let others = (0..nets).filter(|coset| !own.contains(coset));
            others.for_each(|coset| self.learner.hierarchy.count_elsewhere(level, coset, steps));
        }
    }

    fn smooth(&mut self, comm: &mut dyn Communicator, now: &Now, smooth: &Smooth, tally: &mut Tally) -> Result<()> {
        let &Smooth { side, level, coset, steps, first, stride, since, .. } = smooth;
        let counts = now.round.groups.is_root(comm.rank());
        let target = Target { level, coset: self.coset(now, level, coset) };
        let team = self.teams.own(comm, &now.round.groups);
        for i in 0..steps {
            let since = since.or(now.progress.since_switch).map(|since| since + i);
            let lr = learning_rate(now, level, smooth.passed(i), since);
            let step = self.learner.step(team, target, sequence(now, side, first + i * stride), lr)?;
            tally.loss[side as usize] += step.loss;
            tally.squares[side as usize] += if counts { step.grad_norm.powi(2) } else { 0.0 };
        }
        Ok(())
    }

    fn switch(&mut self, comm: &mut dyn Communicator, now: &Now, side: Side, op: &Op) -> Result<()> {
        if side == Side::Main {
            self.gather(comm)?;
        }
        let team = self.teams.own(comm, &now.round.groups);
        match *op {
            Op::Descend { to } => {
                let coherence = now.config.is_coherent(now.progress.step).then(|| sequence(now, side, 0));
                self.learner.descend(team, side, to, coherence)
            }
            Op::Ascend { to } => self.learner.ascend(side, to),
            Op::Smooth { .. } | Op::Beside { .. } => unreachable!("localised as smooths"),
        }
    }

    /// Remembers the ends of the level.
    fn take_fork(&mut self, now: &Now) -> Result<()> {
        let ends = self.learner.hierarchy.ends(level_of(&now.round.main));
        self.fork.updates = ends.updates[0];
        let copies = ends_tensors(ends).into_iter().map(|tensor| Ok(access::read::<f32>(tensor)?.to_vec()));
        self.fork.start = copies.collect::<Result<_>>()?;
        self.fork.sums = self.fork.start.iter().map(|values| vec![0.0; values.len()]).collect();
        Ok(())
    }

    /// sums += ends, counted by one rank a group; ends = those of the fork.
    fn bank(&mut self, now: &Now, rank: usize) -> Result<()> {
        let level = level_of(&now.round.main);
        let ends = self.learner.hierarchy.ends(level);
        if now.round.groups.is_root(rank) {
            for (tensor, sums) in ends_tensors(ends).into_iter().zip(&mut self.fork.sums) {
                sums.iter_mut().zip(access::read::<f32>(tensor)?.iter()).for_each(|(sum, x)| *sum += x);
            }
        }
        teams::set(&ends_tensors(ends), &self.fork.start)?;
        self.learner.hierarchy.set_ends_updates(level, self.fork.updates);
        Ok(())
    }

    /// Ends = (Σ over all nets) / nets, θ_e and moments alike.
    fn share_ends(&mut self, comm: &mut dyn Communicator, level: usize, nets: usize, steps: u64) -> Result<()> {
        let sums = std::mem::take(&mut self.fork.sums);
        let tensor = |sum: Vec<f32>| {
            let len = sum.len();
            Tensor::from_vec(sum, len, &Device::Cpu)
        };
        let sums = sums.into_iter().map(tensor).collect::<candle_core::Result<Vec<_>>>()?;
        self.idle.measure(|| {
            let ticket = comm.start(Exchange::Sum, vec![sums.clone()])?;
            comm.wait(ticket)
        })?;
        let mean = |sum: &Tensor| Ok(access::read::<f32>(sum)?.iter().map(|x| x / nets as f32).collect());
        let means = sums.iter().map(mean).collect::<Result<Vec<Vec<f32>>>>()?;
        let hierarchy = &mut self.learner.hierarchy;
        teams::set(&ends_tensors(hierarchy.ends(level)), &means)?;
        hierarchy.set_ends_updates(level, self.fork.updates + steps);
        Ok(())
    }

    /// The rows of every coset, θ and moments, from the group that trained them to all ranks.
    fn assemble(&mut self, comm: &mut dyn Communicator, groups: &Groups, level: usize) -> Result<()> {
        let hierarchy = &self.learner.hierarchy;
        for group in 0..groups.len() {
            let root = groups.root(group);
            for coset in own_cosets(groups, hierarchy.cosets(level), root) {
                let rows = hierarchy.rows_of(level, coset)?;
                teams::broadcast(comm, &rows.iter().collect::<Vec<_>>(), root)?;
            }
        }
        Ok(())
    }

    /// One half of the hierarchy from the group that trained it to all ranks.
    fn exchange(&mut self, comm: &mut dyn Communicator, groups: &Groups, half: Half) -> Result<()> {
        let root = groups.root(if half == Half::Fine { 0 } else { groups.len() - 1 });
        let hierarchy = &mut self.learner.hierarchy;
        let mut counts = serde_json::to_vec(&hierarchy.snapshot())?;
        comm.broadcast(&mut counts, root)?;
        if comm.rank() != root {
            let snapshot: Snapshot = serde_json::from_slice(&counts).context("a snapshot of another rank")?;
            hierarchy.adopt(half, &snapshot)?;
        }
        teams::broadcast(comm, &hierarchy.half(half), root)
    }

    /// Both sides to all ranks, then the correction. The held-out batch is the one that the fine level reads next.
    fn accept(&mut self, comm: &mut dyn Communicator, now: &Now) -> Result<Correction> {
        let groups = &now.round.groups;
        if groups.len() > 1 {
            self.exchange(comm, groups, Half::Coarse)?;
            self.exchange(comm, groups, Half::Fine)?;
            self.apart = None;
        }
        let held_out = sequence(now, Side::Main, self.places.sequences(now.round)[0]);
        self.learner.correct(comm, now.config.levels.alpha, held_out)
    }
}

impl RoundReport {
    pub fn is_finite(&self) -> bool {
        self.main.is_finite() && self.coarse.is_none_or(|coarse| coarse.is_finite())
    }
}

impl Idle {
    fn new(groups: usize) -> Idle {
        Idle { start: Instant::now(), waited: Duration::ZERO, sums: vec![0.0; groups] }
    }

    /// Calls `meeting`, in which this rank waits for all others.
    fn measure<T>(&mut self, meeting: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = meeting();
        self.waited += start.elapsed();
        result
    }

    fn waits(&self, groups: &Groups) -> Waits {
        let seconds = self.start.elapsed().as_secs_f64();
        Waits { groups: groups.clone(), seconds, shares: self.sums.iter().map(|sum| sum / seconds).collect() }
    }
}

/// The number of a side's `count`-th sequence of the round.
fn sequence(now: &Now, side: Side, count: u64) -> u64 {
    match side {
        Side::Main => now.progress.sequences + count,
        Side::Coarse => COARSE_SEQUENCES + now.progress.coarse_sequences + count,
    }
}

/// The learning rate after `passed` steps of the round.
fn learning_rate(now: &Now, level: usize, passed: u64, since_switch: Option<u64>) -> f64 {
    let Config { run, schedule, optimizer, .. } = now.config;
    optim::learning_rate(schedule, optimizer.lr, now.progress.step + passed, run.steps, level, since_switch)
}

fn level_of(op: &Op) -> usize {
    if let Op::Smooth { level, .. } = *op { level } else { 0 }
}

/// θ_e and its moments.
fn ends_tensors(ends: &crate::levels::Group) -> Vec<&Tensor> {
    std::iter::once(&ends.theta).chain(&ends.moments).collect()
}
