use super::places::{Places, Round, upto};
use super::{Coset, Groups, Op};
use crate::data::share;
use std::ops::Range;

/// Which trajectory an op of a round works on: beside each other, the fine level and a coarse one are both at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The level that the run is on; beside a coarse level, the fine one.
    Main,
    /// The coarse level beside it.
    Coarse,
}

/// What one rank does. Executing the list of every rank carries out the plan; no rank decides anything on its own.
#[derive(Clone, Debug, PartialEq)]
pub enum LocalOp {
    /// The gradient of one net on one global batch, the sequences from `first` on, counted from the round's start: its rows are
    /// summed over the group. The ends too, unless they are `shared`: then they add up over the group's nets and wait for
    /// `ShareGradient`.
    Gradient { level: usize, coset: Coset, first: u64, shared: bool },
    /// Ends' gradient = Σ over all ranks.
    ShareGradient,
    /// Losses, gradient norms, idle times, wishes to save or stop: all ranks know those of all.
    Meet,
    /// One optimizer step on these nets of `level` and on the ends, whose gradient is that of `nets` nets together.
    Update { level: usize, cosets: Vec<Coset>, nets: usize },
    /// The ends as they are now are where each net starts from.
    Fork,
    /// Optimizer steps in a row on one net.
    Smooth(Smooth),
    /// The ends as they are now are the result of one net; the next one starts from the fork.
    Bank,
    /// Ends and their moments = mean over the results of all `nets` nets, which `steps` steps have led to.
    ShareEnds { level: usize, nets: usize, steps: u64 },
    /// A level switch.
    Switch { side: Side, op: Op },
    /// The rows of every coset, with their moments, go from the group that trained them to all ranks.
    Assemble { level: usize },
    /// Both sides' results go to all ranks; θ ← θ_F + α P (θ_C − R θ⁰), as far as it lowers the loss on a held-out batch.
    Accept,
}

/// Optimizer steps in a row by one group, without any other group.
#[derive(Clone, Debug, PartialEq)]
pub struct Smooth {
    pub side: Side,
    pub level: usize,
    pub coset: Coset,
    pub steps: u64,
    /// Step i reads a global batch from sequence `first + i · stride` of its side on, counted from the round's start.
    pub first: u64,
    pub stride: u64,
    /// Steps that the net has had since the last switch; `None`: the run's own count goes on.
    pub since: Option<u64>,
    /// The run's steps of the round that have passed at step i: [`Smooth::passed`].
    done: u64,
    of: u64,
    round_steps: u64,
}

impl Smooth {
    /// Steps of the whole round, those of all groups, that have passed when step `i` begins: learning rates follow them.
    pub fn passed(&self, i: u64) -> u64 {
        upto(self.round_steps, self.done + i, self.of)
    }
}

/// Who does an op together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Each rank for itself; nothing is communicated.
    Rank,
    /// The ranks of a group.
    Group,
    /// All ranks.
    All,
}

impl LocalOp {
    pub fn scope(&self) -> Scope {
        match self {
            LocalOp::Update { .. } | LocalOp::Fork | LocalOp::Bank => Scope::Rank,
            LocalOp::Gradient { .. } | LocalOp::Smooth(_) | LocalOp::Switch { .. } => Scope::Group,
            LocalOp::ShareGradient | LocalOp::ShareEnds { .. } => Scope::All,
            LocalOp::Meet | LocalOp::Assemble { .. } | LocalOp::Accept => Scope::All,
        }
    }
}

/// The part of `plan` that `rank` carries out: each op with the groups that work at that time. Pure.
pub fn localize(plan: &[Op], places: &Places, rank: usize) -> Vec<(Groups, LocalOp)> {
    let mut list = Vec::new();
    for op in plan {
        let mut done = 0;
        while done < op.length() {
            let round = places.round(op, done);
            list.extend(places.local(&round, rank).into_iter().map(|op| (round.groups.clone(), op)));
            done += round.advance;
        }
    }
    list
}

impl Places {
    /// What `rank` does in `round`.
    pub fn local(&self, round: &Round, rank: usize) -> Vec<LocalOp> {
        match &round.main {
            Op::Smooth { steps, .. } if !round.coarse.is_empty() => self.beside(round, *steps, rank),
            Op::Smooth { level, coset: Coset::All, steps } => self.cosets(round, *level, *steps, rank),
            Op::Smooth { level, coset, .. } => vec![
                LocalOp::Gradient { level: *level, coset: *coset, first: 0, shared: false },
                LocalOp::Meet,
                LocalOp::Update { level: *level, cosets: vec![*coset], nets: 1 },
            ],
            op => vec![LocalOp::Switch { side: Side::Main, op: op.clone() }],
        }
    }

    /// All cosets at the same time, each by the group that it belongs to; a group with several trains them in turn.
    fn cosets(&self, round: &Round, level: usize, steps: u64, rank: usize) -> Vec<LocalOp> {
        let (groups, nets) = (&round.groups, self.nets(level, Coset::All));
        let own = own_cosets(groups, nets, rank);
        let first = |k: usize| k as u64 * self.batch(level);
        let mut ops = if self.sync_every() == 1 {
            let gradient = |k| LocalOp::Gradient { level, coset: Coset::Index(k), first: first(k), shared: true };
            let update = LocalOp::Update { level, cosets: own.clone().map(Coset::Index).collect(), nets };
            own.map(gradient).chain([LocalOp::ShareGradient, LocalOp::Meet, update]).collect()
        } else {
            let smooth = |k| {
                LocalOp::Smooth(Smooth {
                    side: Side::Main,
                    level,
                    coset: Coset::Index(k),
                    steps,
                    first: first(k),
                    stride: first(nets),
                    since: None,
                    done: 0,
                    of: steps,
                    round_steps: steps,
                })
            };
            let mut ops = vec![LocalOp::Fork];
            ops.extend(own.flat_map(|k| [smooth(k), LocalOp::Bank]));
            ops.extend([LocalOp::ShareEnds { level, nets, steps }, LocalOp::Meet]);
            ops
        };
        if round.ends {
            ops.push(LocalOp::Assemble { level });
        }
        ops
    }

    /// The fine level by the first group, the coarse one by the last; one group does both. There the coarse side comes first,
    /// as it must: its descent reads θ⁰, which the fine side changes.
    fn beside(&self, round: &Round, steps: u64, rank: usize) -> Vec<LocalOp> {
        let (groups, round_steps) = (&round.groups, round.steps());
        let group = groups.of(rank);
        let mut ops = Vec::new();
        if group + 1 == groups.len() {
            let (of, mut done, mut since, mut first) = (round.coarse_steps(), 0, round.since, 0);
            for op in &round.coarse {
                let Op::Smooth { level, coset, steps } = *op else {
                    ops.push(LocalOp::Switch { side: Side::Coarse, op: op.clone() });
                    since = 0;
                    continue;
                };
                let (side, since) = (Side::Coarse, Some(since));
                let stride = self.batch(level);
                ops.push(LocalOp::Smooth(Smooth {
                    side,
                    level,
                    coset,
                    steps,
                    first,
                    stride,
                    since,
                    done,
                    of,
                    round_steps,
                }));
                (done, first) = (done + steps, first + steps * stride);
            }
        }
        if group == 0 && steps > 0 {
            let (side, coset) = (Side::Main, Coset::Index(0));
            let smooth = Smooth {
                side,
                level: 0,
                coset,
                steps,
                first: 0,
                stride: self.batch(0),
                since: None,
                done: 0,
                of: steps,
                round_steps,
            };
            ops.push(LocalOp::Smooth(smooth));
        }
        ops.push(LocalOp::Meet);
        if round.ends {
            ops.push(LocalOp::Accept);
        }
        ops
    }
}

/// The cosets that the group of `rank` trains.
pub fn own_cosets(groups: &Groups, nets: usize, rank: usize) -> Range<usize> {
    share(nets, groups.of(rank), groups.len())
}
