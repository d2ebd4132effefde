//! What a run of a config on K ranks of a machine will take, level by level.
//!
//! ```text
//! compute   t_c = ⌈B_l/K⌉ F_l / (B_l φ(n))      F_l: FLOPs of a step of B_l sequences, φ(n): FLOP/s of a rank while n of a node compute
//! update    t_u = 4 (5 + 2m) (N_l P + E) / μ    m moments; μ: bytes/s of memory
//! sums      the messages that gradient buckets make of N_l rows of P values and the ends' E, in their order
//! step      t = t_c + exposed + t_u             exposed: what of the sums ends after t_c, and the loss's own sum
//! ```
//!
//! A row is ready when its block is differentiated: a third of a micro-batch's time is forward, then come the head and
//! the blocks from the last to the first. Messages go one after another, though one's latencies may pass while the next is sent
//! (`sum.rs`); a sum that starts while ranks compute moves at `overlap` of its speed until t_c, or waits and takes more where that is
//! under 0. The update reads the gradient for its norm and zeroes it (2), reads θ, g and the moments and writes θ and the moments (3 + 2m).
//!
//! With `parallel.zero = 1` a rank does 1/K of the update, but zeroes the whole gradient. A sum is half of one, its scattered half;
//! the other half, the gather of the parameters, follows the update and is exposed.
//!
//! Ops that groups of ranks do at the same time are in `stage.rs`.

use super::stage::StageForecast;
use super::{Duration, Machine};
use crate::comm::Buckets;
use crate::config::Config;
use crate::cycle::{self, Op, Places};
use crate::error::Result;
use crate::model::{Layout, Spec};
use crate::{optim, run};
use serde::Serialize;

/// The forecast for one number of ranks.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    pub machine: String,
    pub ranks: usize,
    pub nodes: usize,
    pub levels: Vec<LevelForecast>,
    /// Ops that groups of ranks do at the same time, equal ones once.
    pub stages: Vec<StageForecast>,
    /// All steps of the cycle; no switches, evaluations or checkpoints.
    pub seconds: f64,
    /// As many steps on the fine level alone.
    pub flat_seconds: f64,
}

/// Seconds of one step on a level by all ranks, on the rank with the most sequences.
#[derive(Clone, Debug, Serialize)]
pub struct LevelForecast {
    pub level: usize,
    pub rows: usize,
    pub compute_s: f64,
    pub update_s: f64,
    /// All sums, hidden and exposed.
    pub sums_s: f64,
    pub exposed_s: f64,
    pub step_s: f64,
    /// t(1 rank, the same batch) / (K t(K ranks)).
    pub efficiency: f64,
    pub tokens_per_s: f64,
}

/// What a forecast is made from.
pub(super) struct Model<'a> {
    pub config: &'a Config,
    pub spec: &'a Spec,
    pub machine: &'a Machine,
    pub ranks: usize,
}

/// Seconds of a step of a group of ranks on one net, without the loss's sum.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub compute_s: f64,
    pub update_s: f64,
    pub sums_s: f64,
    pub exposed_s: f64,
}

/// A sum of `values` f32, ready at `ready` seconds.
struct Message {
    ready: f64,
    values: usize,
}

impl Forecast {
    /// `config` with its vocabulary resolved; `ranks` from 1 to its smallest batch.
    ///
    /// # Errors
    /// `parallel.groups` is for another number of ranks.
    pub fn new(config: &Config, machine: &Machine, ranks: usize) -> Result<Forecast> {
        let spec = Spec::new(config);
        let model = Model { config, spec: &spec, machine, ranks };
        let places = Places::new(config, &spec, ranks)?;
        let levels: Vec<LevelForecast> =
            (0..config.levels.count).map(|level| LevelForecast::new(&model, level)).collect();
        let (mut seconds, mut stages) = (0.0, Vec::<StageForecast>::new());
        for op in cycle::plan(config) {
            let Some(stage) = StageForecast::new(&model, &places, &op) else {
                seconds += in_turn(&levels, &places, &op);
                continue;
            };
            seconds += stage.seconds;
            match stages.iter_mut().find(|seen| seen.is_like(&stage)) {
                Some(seen) => seen.times += 1,
                None => stages.push(stage),
            }
        }
        let nodes = machine.shape(ranks).0;
        let flat_seconds = config.run.steps as f64 * levels[0].step_s;
        Ok(Forecast { machine: machine.name.clone(), ranks, nodes, levels, stages, seconds, flat_seconds })
    }
}

/// Seconds of the steps of `op`, all by all ranks.
pub(super) fn in_turn(levels: &[LevelForecast], places: &Places, op: &Op) -> f64 {
    let smooth = |op: &Op| match *op {
        Op::Smooth { level, coset, steps } => steps as f64 * places.nets(level, coset) as f64 * levels[level].step_s,
        _ => 0.0,
    };
    op.smooths().iter().map(smooth).sum()
}

impl LevelForecast {
    pub(super) fn new(model: &Model, level: usize) -> LevelForecast {
        let Model { config, ranks, .. } = *model;
        let [alone, Step { compute_s, update_s, sums_s, exposed_s }] =
            [1, ranks].map(|ranks| Model { ranks, ..*model }.step(level, ranks, true));
        let exposed_s = exposed_s + model.meeting(ranks);
        let step_s = compute_s + exposed_s + update_s;
        LevelForecast {
            level,
            rows: config.rows(level),
            compute_s,
            update_s,
            sums_s,
            exposed_s,
            step_s,
            efficiency: alone.seconds() / (ranks as f64 * step_s),
            tokens_per_s: cycle::tokens_per_step(config, level) as f64 / step_s,
        }
    }

    /// Share of the step in which ranks wait for sums.
    pub fn exposed(&self) -> f64 {
        self.exposed_s / self.step_s
    }
}

impl Step {
    pub fn seconds(&self) -> f64 {
        self.compute_s + self.exposed_s + self.update_s
    }
}

impl Model<'_> {
    /// A step of `ranks` ranks on one net of `level`; the gradient of the ends is summed with the others, or left out.
    pub fn step(&self, level: usize, ranks: usize, ends: bool) -> Step {
        let compute_s = self.compute_seconds(level, ranks);
        let messages = self.messages(level, ranks, ends);
        let duration = |values: usize| self.duration(values, ranks);
        let scattered = if self.is_sharded(ranks) { 0.5 } else { 1.0 };
        let overlap = self.overlap(ranks);
        let sums_s = last_end(&messages, 0.0, overlap, duration);
        let end = last_end(&messages, compute_s, overlap, |values| scattered * duration(values));
        let gather_s = (1.0 - scattered) * sums_s;
        let exposed_s = if ranks > 1 { (end - compute_s).max(0.0) + gather_s } else { 0.0 };
        Step { compute_s, update_s: self.update_seconds(self.config.rows(level), ranks), sums_s, exposed_s }
    }

    /// ω of sums over `ranks` of all ranks. What they cost more beside computing, ω < 0, they take of cores that all ranks share:
    /// fewer ranks take less.
    fn overlap(&self, ranks: usize) -> f64 {
        let overlap = self.machine.overlap;
        if overlap < 0.0 { overlap * ranks as f64 / self.ranks as f64 } else { overlap }
    }

    /// How long a sum of `values` f32 over `ranks` ranks takes.
    fn duration(&self, values: usize, ranks: usize) -> Duration {
        self.machine.sum.duration(self.machine, 4.0 * values as f64, ranks)
    }

    /// Seconds of a sum of `values` f32 over `ranks` ranks, alone.
    pub fn sum(&self, values: usize, ranks: usize) -> f64 {
        self.duration(values, ranks).seconds()
    }

    /// The loss with two wishes, in f64: all ranks wait for it.
    pub fn meeting(&self, ranks: usize) -> f64 {
        self.sum(6, ranks)
    }

    /// t_c of a group of `ranks`, while all ranks compute.
    pub fn compute_seconds(&self, level: usize, ranks: usize) -> f64 {
        let batch = self.config.batch(level);
        let share = batch.div_ceil(ranks) as f64 / batch as f64;
        share * cycle::level_flops(self.config, self.spec, level).total as f64 / self.speed(self.ranks)
    }

    /// φ(n): FLOP/s of a rank while so many of all ranks compute, on each node its share of them.
    pub fn speed(&self, computing: usize) -> f64 {
        let on_a_node = self.machine.shape(self.ranks).1;
        self.machine.speed((computing * on_a_node) as f64 / self.ranks as f64)
    }

    /// t_u of so many rows and the ends.
    pub fn update_seconds(&self, rows: usize, ranks: usize) -> f64 {
        let own = if self.is_sharded(ranks) { 1.0 / ranks as f64 } else { 1.0 };
        let passes = 1.0 + own * (4 + 2 * self.moments()) as f64;
        4.0 * passes * (rows * self.row() + self.ends()) as f64 / self.machine.memory_bandwidth
    }

    /// Each rank updates its part of the parameters only.
    fn is_sharded(&self, ranks: usize) -> bool {
        self.config.parallel.zero == 1 && ranks > 1
    }

    /// m
    pub fn moments(&self) -> usize {
        optim::new(&self.config.optimizer).moments().len()
    }

    /// P
    pub fn row(&self) -> usize {
        Layout::block(self.spec).len()
    }

    /// E
    pub fn ends(&self) -> usize {
        Layout::ends(self.spec).len()
    }

    /// The sums of a step's gradient, in their order.
    fn messages(&self, level: usize, ranks: usize, ends: bool) -> Vec<Message> {
        let config = self.config;
        let (rows, blocks) = (config.rows(level), cycle::level_flops(config, self.spec, level).blocks);
        let end = self.compute_seconds(level, ranks);
        // Only the backward pass of the last micro-batch gives final rows.
        let (share, micro_batch) = (config.batch(level).div_ceil(ranks), run::micro_batch(config, ranks));
        let last = if share.is_multiple_of(micro_batch) { micro_batch } else { share % micro_batch };
        let part = last as f64 / (config.batch(level) * rows) as f64;
        let backward_of_a_block = 2.0 / 3.0 * part * blocks as f64 / self.speed(self.ranks);
        let widths: Vec<usize> = std::iter::repeat_n(self.row(), rows).chain(ends.then(|| self.ends())).collect();
        let ready = |added: usize| end - rows.saturating_sub(added) as f64 * backward_of_a_block;
        Buckets::cut(&widths).into_iter().map(|(added, values)| Message { ready: ready(added), values }).collect()
    }
}

/// When the last of `messages` has been summed, if ranks compute until `computed`; all are ready by then.
fn last_end(messages: &[Message], computed: f64, overlap: f64, duration: impl Fn(usize) -> Duration) -> f64 {
    let (hidden, costs_more) = (overlap.max(0.0), (-overlap).max(0.0));
    let (mut free, mut end, mut all_busy_s) = (0.0f64, 0.0f64, 0.0);
    for message in messages {
        let (start, Duration { busy_s, tail_s }) = (message.ready.min(computed).max(free), duration(message.values));
        let can_hide = (computed - start).max(0.0) * hidden;
        free = if 0.0 < can_hide && busy_s <= can_hide {
            start + busy_s / hidden
        } else {
            start.max(computed) + busy_s - can_hide
        };
        end = end.max(free + tail_s);
        all_busy_s += busy_s;
    }
    let beside = messages.first().map_or(0.0, |first| (computed - first.ready).max(0.0));
    end + costs_more * all_busy_s.min(beside)
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::machine;
    use super::*;
    use crate::config;
    use proptest::prelude::*;

    fn config(extra: &str) -> Config {
        let text = "[data]\ndir = 'x'\ncontext = 32\nbatch = 64\n[model]\nvocab = 64\nwidth = 64\nheads = 2\ndepth = 8\n\
                    [levels]\ncount = 3\n[cycle]\nkind = 'cascade'\nfractions = [0.4, 0.3, 0.3]\n[run]\nsteps = 30\n";
        config::parse(&format!("{text}{extra}"), &[]).unwrap()
    }

    #[test]
    fn one_rank_computes_and_updates() {
        let (config, machine) = (config(""), machine());
        let forecast = Forecast::new(&config, &machine, 1).unwrap();
        for level in &forecast.levels {
            let flops = cycle::level_flops(&config, &Spec::new(&config), level.level).total as f64;
            assert!((level.compute_s - flops / 1e12).abs() < 1e-9 * level.compute_s, "{level:?}");
            assert_eq!((level.exposed_s, level.efficiency, level.sums_s), (0.0, 1.0, 0.0));
            assert_eq!(level.step_s, level.compute_s + level.update_s);
        }
        let each: f64 = forecast.levels.iter().zip([9.0, 9.0, 12.0]).map(|(level, steps)| steps * level.step_s).sum();
        assert!((forecast.seconds - each).abs() < 1e-12 && forecast.seconds < forecast.flat_seconds);
    }

    #[test]
    fn a_sum_moves_slower_while_ranks_compute() {
        let end_with = |tail_s, ready: &[f64], overlap| {
            let messages: Vec<Message> = ready.iter().map(|&ready| Message { ready, values: 1 }).collect();
            last_end(&messages, 10.0, overlap, |_| Duration { busy_s: 2.0, tail_s })
        };
        let end = |ready: &[f64], overlap| end_with(0.0, ready, overlap);
        assert_eq!(end(&[4.0], 1.0), 6.0);
        assert_eq!(end(&[4.0], 0.5), 8.0);
        assert_eq!(end(&[4.0], 0.0), 12.0);
        assert_eq!(end(&[4.0, 5.0], 0.5), 11.0);
        assert_eq!(end(&[9.0, 10.0], 1.0), 13.0);
        assert_eq!(end(&[], 1.0), 0.0);
        assert_eq!(end_with(3.0, &[9.0, 10.0], 1.0), 16.0);
        // It waits, and costs half of its time more as long as ranks compute.
        assert_eq!(end(&[4.0, 5.0], -0.5), 16.0);
        assert_eq!(end(&[9.0, 10.0], -0.5), 14.5);
        assert_eq!(end(&[10.0], -0.5), 12.0);
    }

    #[test]
    fn sums_of_fewer_ranks_cost_less_beside_computing() {
        let config = config("");
        let spec = Spec::new(&config);
        let exposed = |overlap, ranks| {
            let machine = Machine { overlap, ..machine() };
            Model { config: &config, spec: &spec, machine: &machine, ranks }.step(0, 2, true).exposed_s
        };
        assert_eq!(exposed(-1.0, 4), exposed(-0.5, 2));
        assert!(exposed(-1.0, 4) > exposed(0.0, 4));
    }

    #[test]
    fn a_rank_alone_may_be_faster() {
        let (config, shared) = (config(""), machine());
        let alone = Machine { flops_alone: Some(2e12), ..machine() };
        let [before, after] = [&shared, &alone].map(|machine| Forecast::new(&config, machine, 1).unwrap().levels);
        assert!((after[0].compute_s / before[0].compute_s - 0.5).abs() < 1e-12);
        // As long as all compute, their speed is the node's.
        let [before, after] = [&shared, &alone].map(|machine| Forecast::new(&config, machine, 4).unwrap().levels);
        assert_eq!(after[0].step_s, before[0].step_s);
        assert!(after[0].efficiency < before[0].efficiency);
    }

    proptest! {
        /// Nothing beats the ideal, and a faster network never makes a step slower.
        #[test]
        fn forecasts_are_ordered(ranks in 1usize..=64, overlap in -1.0f64..=1.0, speed in 1.0f64..100.0) {
            let (config, mut slow) = (config(""), machine());
            slow.overlap = overlap;
            let mut fast = slow.clone();
            for link in [&mut fast.within, &mut fast.between] {
                (link.latency, link.bandwidth) = (link.latency / speed, link.bandwidth * speed);
            }
            let levels = |machine| Forecast::new(&config, machine, ranks).unwrap().levels;
            for (slow, fast) in levels(&slow).iter().zip(levels(&fast)) {
                prop_assert!(slow.efficiency <= 1.0 + 1e-12 && slow.exposed_s >= 0.0);
                prop_assert!(fast.step_s <= slow.step_s * (1.0 + 1e-12));
                let most = 1.0 + (-overlap).max(0.0);
                prop_assert!(slow.exposed_s <= slow.sums_s * most * (1.0 + 1e-12) + 1e-3);
            }
        }
    }
}
