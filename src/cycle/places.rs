use super::{Coset, Groups, Op, level_flops};
use crate::config::{Config, Placement};
use crate::error::{Result, ensure};
use crate::model::Spec;

/// Which ranks work on what: the rounds of each op, and the groups that carry them out at the same time.
///
/// A function of the config and of the number of ranks alone, the same on every rank.
pub struct Places {
    placement: Placement,
    ranks: usize,
    /// `parallel.groups`; empty: by FLOPs.
    given: Vec<usize>,
    sync_every: u64,
    factor: usize,
    /// B_l: sequences of a global batch on each level, finest first.
    batches: Vec<u64>,
    /// FLOPs of an optimizer step on one net of each level, finest first.
    step_flops: Vec<f64>,
}

/// What all ranks do from one meeting to the next: a step, a switch, or `parallel.sync_every` steps of each group.
#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    pub groups: Groups,
    /// What all ranks do, or, beside a coarse level, the fine level's group: a switch, or a smooth of this round's steps.
    pub main: Op,
    /// What the coarse level's group does beside it.
    pub coarse: Vec<Op>,
    /// Steps that the first smooth of `coarse` has had before this round.
    pub(super) since: u64,
    /// How far the round brings the position: steps of a smooth, 1 of another op.
    pub advance: u64,
    /// It is the last one of its op.
    pub ends: bool,
}

impl Round {
    /// Optimizer steps, those of all groups together.
    pub fn steps(&self) -> u64 {
        self.main.steps() + self.coarse_steps()
    }

    /// The level of the first coarse step, and the steps there since the last switch.
    pub fn coarse_start(&self) -> Option<(usize, u64)> {
        let first = self.coarse.iter().position(|op| op.steps() > 0)?;
        match self.coarse[first] {
            Op::Smooth { level, .. } => Some((level, if first == 0 { self.since } else { 0 })),
            _ => None,
        }
    }

    pub fn coarse_steps(&self) -> u64 {
        self.coarse.iter().map(Op::steps).sum()
    }
}

impl Places {
    /// # Errors
    /// `parallel.groups` is for another number of ranks.
    pub fn new(config: &Config, spec: &Spec, ranks: usize) -> Result<Places> {
        let given = &config.parallel.groups;
        let sum: usize = given.iter().sum();
        ensure!(
            given.is_empty() || sum == ranks,
            "parallel.groups = {given:?} is for {sum} ranks, but there are {ranks}: make the sizes add up to {ranks}, or leave the key out"
        );
        let flops = |level| level_flops(config, spec, level).total as f64;
        Ok(Places {
            placement: config.parallel.placement,
            ranks,
            given: given.clone(),
            sync_every: config.parallel.sync_every,
            factor: config.levels.factor,
            batches: (0..config.levels.count).map(|level| config.batch(level) as u64).collect(),
            step_flops: (0..config.levels.count).map(flops).collect(),
        })
    }

    pub fn ranks(&self) -> usize {
        self.ranks
    }

    pub(super) fn sync_every(&self) -> u64 {
        self.sync_every
    }

    /// Nets that a smooth of `coset` on `level` trains: all cosets, or one net.
    pub fn nets(&self, level: usize, coset: Coset) -> usize {
        if coset == Coset::All { self.factor.pow(level as u32) } else { 1 }
    }

    /// Optimizer steps of all nets of the main side together.
    pub fn net_steps(&self, round: &Round) -> u64 {
        match round.main {
            Op::Smooth { level, coset, steps } => steps * self.nets(level, coset) as u64,
            _ => 0,
        }
    }

    /// B_l.
    pub(super) fn batch(&self, level: usize) -> u64 {
        self.batches[level]
    }

    /// Sequences that a round reads on the main and on the coarse side.
    pub fn sequences(&self, round: &Round) -> [u64; 2] {
        let of = |op: &Op| match *op {
            Op::Smooth { level, coset, steps } => steps * self.nets(level, coset) as u64 * self.batch(level),
            _ => 0,
        };
        [of(&round.main), round.coarse.iter().map(of).sum()]
    }

    /// The groups that carry `op` out: one of all ranks, unless the placement puts parts of it side by side.
    pub fn groups(&self, op: &Op) -> Groups {
        match op {
            Op::Smooth { level, coset: Coset::All, .. } if self.placement == Placement::Cosets => {
                let nets = self.nets(*level, Coset::All);
                self.given().unwrap_or_else(|| Groups::equal(self.ranks, self.ranks.min(nets)))
            }
            Op::Beside { .. } if self.ranks > 1 => {
                self.given().unwrap_or_else(|| Groups::balanced(self.ranks, self.sides(op)))
            }
            _ => Groups::one(self.ranks),
        }
    }

    fn given(&self) -> Option<Groups> {
        (!self.given.is_empty()).then(|| Groups::new(self.given.clone()))
    }

    /// FLOPs of the fine and of the coarse side of a `Beside`.
    fn sides(&self, op: &Op) -> [f64; 2] {
        let Op::Beside { fine, coarse, .. } = op else { return [0.0; 2] };
        [self.step_flops[0] * *fine as f64, coarse.iter().map(|op| self.flops(op)).sum()]
    }

    fn flops(&self, op: &Op) -> f64 {
        match op {
            Op::Smooth { level, coset, steps } => {
                self.step_flops[*level] * (*steps * self.nets(*level, *coset) as u64) as f64
            }
            Op::Beside { .. } => self.sides(op).iter().sum(),
            Op::Descend { .. } | Op::Ascend { .. } => 0.0,
        }
    }

    /// FLOPs that each group of [`Places::groups`] does for `op`.
    pub fn work(&self, op: &Op) -> Vec<f64> {
        let groups = self.groups(op);
        match op {
            Op::Beside { .. } if groups.len() == 2 => self.sides(op).to_vec(),
            Op::Smooth { level, coset, steps } if groups.len() > 1 => {
                let nets = self.nets(*level, *coset);
                let share = |group| crate::data::share(nets, group, groups.len()).len();
                let flops = self.step_flops[*level] * *steps as f64;
                (0..groups.len()).map(|group| flops * share(group) as f64).collect()
            }
            _ => vec![self.flops(op)],
        }
    }

    /// Share of the time of `op` that each group waits for the slowest, were ranks equally fast and communication free.
    pub fn idle(&self, op: &Op) -> Vec<f64> {
        let groups = self.groups(op);
        let times: Vec<f64> = self.work(op).iter().zip(groups.sizes()).map(|(work, &n)| work / n as f64).collect();
        let slowest = times.iter().copied().fold(0.0, f64::max);
        times.iter().map(|time| if slowest > 0.0 { 1.0 - time / slowest } else { 0.0 }).collect()
    }

    /// Every way in which `plan` divides the ranks, in the order of first use; without the one of a single group.
    pub fn divisions(&self, plan: &[Op]) -> Vec<Groups> {
        let mut all = Vec::new();
        for groups in plan.iter().map(|op| self.groups(op)).filter(|groups| groups.len() > 1) {
            if !all.contains(&groups) {
                all.push(groups);
            }
        }
        all
    }

    /// Ranks of the smallest group in any division: its ranks read the largest share of a batch.
    pub fn smallest_group(&self, plan: &[Op]) -> usize {
        let sizes = self.divisions(plan).into_iter().flat_map(|groups| groups.sizes().to_vec());
        sizes.min().unwrap_or(self.ranks)
    }

    /// The round of `op` after `done` units of it (steps of a smooth, rounds of a `Beside`).
    pub fn round(&self, op: &Op, done: u64) -> Round {
        let plain = |main: Op, advance: u64| Round {
            groups: self.groups(op),
            main,
            coarse: Vec::new(),
            since: 0,
            advance,
            ends: done + advance >= op.length(),
        };
        match op {
            Op::Smooth { level, coset, steps } => {
                let most = if *coset == Coset::All { self.sync_every } else { 1 };
                let steps = most.min(steps - done);
                plain(Op::Smooth { level: *level, coset: *coset, steps }, steps)
            }
            Op::Descend { .. } | Op::Ascend { .. } => plain(op.clone(), 1),
            Op::Beside { fine, coarse, rounds } => {
                let total: u64 = coarse.iter().map(Op::steps).sum();
                let part = |total| (upto(total, done, *rounds), upto(total, done + 1, *rounds));
                let ((begin, end), (from, to)) = (part(*fine), part(total));
                let (coarse, since) = slice(coarse, from, to, to == total);
                let main = Op::Smooth { level: 0, coset: Coset::Index(0), steps: end - begin };
                Round { coarse, since, ..plain(main, 1) }
            }
        }
    }
}

/// The smooths that `done` units of `op` are.
pub fn done(op: &Op, done: u64) -> Vec<Op> {
    match op {
        Op::Smooth { level, coset, .. } => vec![Op::Smooth { level: *level, coset: *coset, steps: done }],
        Op::Beside { fine, coarse, rounds } => {
            let steps = upto(coarse.iter().map(Op::steps).sum(), done, *rounds);
            let fine = Op::Smooth { level: 0, coset: Coset::Index(0), steps: upto(*fine, done, *rounds) };
            std::iter::once(fine).chain(slice(coarse, 0, steps, false).0).collect()
        }
        Op::Descend { .. } | Op::Ascend { .. } => Vec::new(),
    }
}

/// Steps of `total` done after `round` of `rounds`.
pub(super) fn upto(total: u64, round: u64, rounds: u64) -> u64 {
    (u128::from(total) * u128::from(round) / u128::from(rounds)) as u64
}

/// What brings `ops` from `from` steps done to `to`, and the steps that its first smooth has had before. A switch is done
/// just before the step after it; the switches at the end with `last`.
fn slice(ops: &[Op], from: u64, to: u64, last: bool) -> (Vec<Op>, u64) {
    let (mut done, mut part, mut since) = (0, Vec::new(), 0);
    for op in ops {
        match op {
            Op::Smooth { level, coset, steps } => {
                let (begin, end) = (from.max(done), to.min(done + steps));
                if begin < end {
                    if part.is_empty() {
                        since = begin - done;
                    }
                    part.push(Op::Smooth { level: *level, coset: *coset, steps: end - begin });
                }
                done += steps;
            }
            _ if (from <= done && done < to) || (last && done == to) => part.push(op.clone()),
            _ => {}
        }
    }
    (part, since)
}
