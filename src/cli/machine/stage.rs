//! What groups of ranks take that work at the same time (docs/PLACEMENT.md).
//!
//! ```text
//! cosets, sync_every = 1   k steps of a group on one coset's rows, k = its cosets; then the ends' sum and the loss's over all
//! cosets, sync_every = w   k w steps of a group, ends included; then the sum of the ends and their moments over all
//! beside                   the longer of both sides' steps; the losses' sum over all each round
//! at the end, to all       cosets: every row and its moments; beside: both sides, and three forward passes of a batch
//! ```
//!
//! A group that waits for slower ones leaves them what it shares with them of a node: φ(n) in `file.rs`.

use super::forecast::{LevelForecast, Model, in_turn};
use crate::cycle::{Coset, Op, Places, own_cosets};
use serde::Serialize;

/// An op that groups of ranks do at the same time.
#[derive(Clone, Debug, Serialize)]
pub struct StageForecast {
    /// How often the cycle has it.
    pub times: usize,
    /// Optimizer steps that it counts for in `run.steps`.
    pub steps: u64,
    pub groups: Vec<GroupForecast>,
    /// Sums over all ranks, which all wait for.
    pub meetings_s: f64,
    /// What is sent to all ranks at the end, and the measurement of the correction.
    pub end_s: f64,
    pub seconds: f64,
    /// The same steps, one after another by all ranks.
    pub in_turn_s: f64,
    /// t(1 rank, the same steps) / (K seconds).
    pub efficiency: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupForecast {
    pub ranks: usize,
    pub compute_s: f64,
    pub update_s: f64,
    /// Sums over the group that computing does not hide.
    pub exposed_s: f64,
    /// Share of the stage in which it waits for a slower group.
    pub idle: f64,
}

impl StageForecast {
    /// `None` if all ranks do `op` together.
    pub(super) fn new(model: &Model, places: &Places, op: &Op) -> Option<StageForecast> {
        let groups = places.groups(op);
        if groups.len() == 1 {
            return None;
        }
        let sizes = groups.sizes().iter().copied().enumerate();
        let (mut groups, meetings_s, end_s): (Vec<GroupForecast>, f64, f64) = match op {
            Op::Beside { fine, coarse, rounds } => {
                let fine = [Op::Smooth { level: 0, coset: Coset::Index(0), steps: *fine }];
                let side = |(group, ranks)| steps(model, if group == 0 { &fine } else { coarse }, ranks, true);
                (sizes.map(side).collect(), *rounds as f64 * model.meeting(model.ranks), model.end_of_beside())
            }
            Op::Smooth { level, coset, steps: count } => {
                let (all, every) = (places.nets(*level, *coset), model.config.parallel.sync_every);
                let members = |group| own_cosets(&groups, all, groups.root(group)).len() as u64;
                let own = |(group, ranks)| {
                    let op = Op::Smooth { level: *level, coset: Coset::Index(0), steps: count * members(group) };
                    steps(model, &[op], ranks, every > 1)
                };
                let shared = if every > 1 { (1 + model.moments()) * model.ends() } else { model.ends() };
                let meeting = model.sum(shared, model.ranks) + model.meeting(model.ranks);
                let rows = (1 + model.moments()) * model.config.rows(0) * model.row();
                let meetings = count.div_ceil(every) as f64 * meeting;
                (sizes.map(own).collect(), meetings, model.broadcast(rows))
            }
            Op::Descend { .. } | Op::Ascend { .. } => return None,
        };
        share_nodes(model, &mut groups);
        let together = groups.iter().map(GroupForecast::seconds).fold(0.0, f64::max);
        let seconds = together + meetings_s + end_s;
        groups.iter_mut().for_each(|group| group.idle = (together - group.seconds()) / seconds);
        let levels = |ranks| -> Vec<LevelForecast> {
            let model = Model { ranks, ..*model };
            (0..model.config.levels.count).map(|level| LevelForecast::new(&model, level)).collect()
        };
        let [alone, in_turn_s] = [1, model.ranks].map(|ranks| in_turn(&levels(ranks), places, op));
        let efficiency = alone / (model.ranks as f64 * seconds);
        Some(StageForecast { times: 1, steps: op.steps(), groups, meetings_s, end_s, seconds, in_turn_s, efficiency })
    }

    /// Whether the other is the same but for its place in the plan.
    pub(super) fn is_like(&self, other: &StageForecast) -> bool {
        (self.steps, &self.groups) == (other.steps, &other.groups)
    }
}

impl GroupForecast {
    fn seconds(&self) -> f64 {
        self.compute_s + self.update_s + self.exposed_s
    }
}

/// `groups` as if all computed to the end → the last ones compute faster from when the first are done. While n of K ranks are left,
/// the share of a group's time in which it computes shrinks to φ(K)/φ(n).
fn share_nodes(model: &Model, groups: &mut [GroupForecast]) {
    let together = model.speed(model.ranks);
    let (mut left, mut ended) = (model.ranks, 0.0);
    let mut order: Vec<(f64, usize)> = groups.iter().map(GroupForecast::seconds).zip(0..).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let shares: Vec<f64> = groups.iter().map(|group| group.compute_s / group.seconds()).collect();
    for (place, &(end, first)) in order.iter().enumerate() {
        let saved = (end - ended) * (1.0 - together / model.speed(left));
        order[place..].iter().for_each(|&(_, group)| groups[group].compute_s -= saved * shares[group]);
        (left, ended) = (left - groups[first].ranks, end);
    }
}

/// The steps of `ops` by a group of `ranks` ranks.
fn steps(model: &Model, ops: &[Op], ranks: usize, ends: bool) -> GroupForecast {
    let mut group = GroupForecast { ranks, compute_s: 0.0, update_s: 0.0, exposed_s: 0.0, idle: 0.0 };
    for op in ops {
        if let Op::Smooth { level, steps, .. } = *op {
            let (step, steps) = (model.step(level, ranks, ends), steps as f64);
            group.compute_s += steps * step.compute_s;
            group.update_s += steps * step.update_s;
            group.exposed_s += steps * step.exposed_s;
        }
    }
    group
}

impl Model<'_> {
    /// `values` f32 from one rank to all.
    fn broadcast(&self, values: usize) -> f64 {
        self.machine.sum.broadcast_seconds(self.machine, 4.0 * values as f64, self.ranks)
    }

    /// θ_F, e_F and θ_C, e_C, R θ⁰, e⁰, all but the last two with their moments; then the correction is measured.
    fn end_of_beside(&self) -> f64 {
        let (row, ends) = (self.row(), self.ends());
        let coarse: usize = (1..self.config.levels.count).map(|level| self.config.rows(level)).sum();
        let trained = (self.config.rows(0) + coarse) * row + 2 * ends;
        let entries = self.config.rows(1) * row + ends;
        // Two to four passes: without the correction, and with each α tried. Forward is a third of a step.
        let passes = 3.0 * (self.compute_seconds(0, self.ranks) / 3.0 + self.meeting(self.ranks));
        self.broadcast((1 + self.moments()) * trained + entries) + passes
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::machine;
    use super::super::{Forecast, Link, Machine};
    use super::StageForecast;
    use crate::config;

    fn forecast(extra: &str, ranks: usize, overlap: f64) -> Forecast {
        forecast_on(&Machine { overlap, ..machine() }, extra, ranks)
    }

    fn forecast_on(machine: &Machine, extra: &str, ranks: usize) -> Forecast {
        let text = format!(
            "[data]\ndir = 'x'\ncontext = 32\nbatch = 64\n[model]\nvocab = 64\nwidth = 64\nheads = 2\ndepth = 8\n\
             [levels]\ncount = 2\n{extra}\n[run]\nsteps = 40\n"
        );
        Forecast::new(&config::parse(&text, &[]).unwrap(), machine, ranks).unwrap()
    }

    const COSETS: &str = "transfer = 'injection'\ncoset = 'all'\nstate = 'keep'\n[cycle]\nkind = 'paper'\nfractions = [0.5, 0.5]\n\
                          [parallel]\nplacement = 'cosets'";
    const BESIDE: &str =
        "[cycle]\nkind = 'v'\npre = 2\ncoarse = 12\npost = 6\nfinish = 0.2\n[parallel]\nplacement = 'beside'";

    #[test]
    fn a_rank_a_coset_computes_as_much_as_all_in_turn_and_sums_the_ends_alone() {
        let forecast = forecast(COSETS, 2, 0.0);
        let (stage, coarse) = (&forecast.stages[0], &forecast.levels[1]);
        assert_eq!((forecast.stages.len(), stage.steps, stage.groups.len()), (1, 20, 2));
        for group in &stage.groups {
            assert!((group.compute_s / (20.0 * 2.0 * coarse.compute_s) - 1.0).abs() < 1e-12, "{group:?}");
            assert_eq!((group.exposed_s, group.idle), (0.0, 0.0));
        }
        assert!(stage.seconds < stage.in_turn_s && stage.efficiency < 1.0, "{stage:?}");
        let fine = 20.0 * forecast.levels[0].step_s;
        assert!((forecast.seconds - stage.seconds - fine).abs() < 1e-12 * forecast.seconds);
    }

    #[test]
    fn the_sides_of_a_stage_wait_for_the_slower_one() {
        let forecast = forecast(BESIDE, 4, 1.0);
        let stage = &forecast.stages[0];
        assert_eq!(stage.groups.iter().map(|group| group.ranks).sum::<usize>(), 4);
        let idle: Vec<f64> = stage.groups.iter().map(|group| group.idle).collect();
        assert!(idle.contains(&0.0) && idle.iter().any(|&idle| idle > 0.0), "{idle:?}");
        let slower = stage.groups.iter().map(|group| group.seconds()).fold(0.0, f64::max);
        assert_eq!(stage.seconds, slower + stage.meetings_s + stage.end_s);
        // One rank does both sides in turn.
        assert!(self::forecast(BESIDE, 1, 1.0).stages.is_empty());
    }

    #[test]
    fn what_a_group_leaves_of_its_node_speeds_up_the_others() {
        let free = Link { latency: 1e-30, bandwidth: 1e30 };
        let own = Machine { memory_bandwidth: 1e30, within: free, ..machine() };
        let shared = Machine { flops_alone: Some(4.0 * own.flops), ..own.clone() };
        let [own, shared] = [own, shared].map(|machine| forecast_on(&machine, BESIDE, 4).stages.remove(0));
        let compute = |of: &StageForecast| of.groups.iter().map(|group| group.compute_s).fold(0.0, f64::max);
        // Ranks that can use all of the node leave none of it idle: the last group ends when all work is done.
        let work: f64 = own.groups.iter().map(|group| group.ranks as f64 * group.compute_s).sum();
        assert!((compute(&shared) / (work / 4.0) - 1.0).abs() < 1e-9, "{shared:?}");
        assert!(compute(&shared) < 0.99 * compute(&own));
        // Up to twice its speed.
        let twice = Machine { flops_alone: Some(2e12), memory_bandwidth: 1e30, within: free, ..machine() };
        let twice = compute(&forecast_on(&twice, BESIDE, 4).stages[0]);
        assert!(compute(&shared) <= twice && twice < compute(&own), "{twice}");
    }
}
