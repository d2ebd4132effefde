//! Who works on what, as `vcycle plan` shows it.

use super::text::{percent, table, tera};
use crate::config::Config;
use crate::cycle::{self, Coset, Op, Places};
use crate::error::Result;
use crate::model::Spec;
use serde::Serialize;

/// The ops of a plan that groups of ranks do at the same time, equal ones together.
#[derive(Serialize)]
pub struct PlaceRows {
    pub stages: Vec<StageRow>,
    /// Share of all ranks' time in which they wait for a slower group, were communication free.
    pub idle: f64,
}

#[derive(Clone, PartialEq, Serialize)]
pub struct StageRow {
    /// The run's step with which the first of these stages starts.
    from_step: u64,
    times: usize,
    /// Optimizer steps that one of them counts for in `run.steps`.
    steps: u64,
    groups: Vec<GroupRow>,
}

#[derive(Clone, PartialEq, Serialize)]
pub struct GroupRow {
    ranks: usize,
    /// `level 0, 10 steps`
    work: String,
    flops_a_rank: u128,
    /// Share of the stage's time.
    idle: f64,
}

impl PlaceRows {
    /// `None` if all ranks do everything together.
    pub fn new(config: &Config, spec: &Spec, ranks: usize) -> Result<Option<PlaceRows>> {
        let places = Places::new(config, spec, ranks)?;
        let plan = cycle::plan(config);
        let (mut stages, mut step): (Vec<StageRow>, u64) = (Vec::new(), 0);
        // Times in FLOPs a rank, weighted with the ranks.
        let (mut waited, mut all) = (0.0, 0.0);
        for op in &plan {
            let (groups, work, idle) = (places.groups(op), places.work(op), places.idle(op));
            let times: Vec<f64> = work.iter().zip(groups.sizes()).map(|(work, &n)| work / n as f64).collect();
            let slowest = times.iter().copied().fold(0.0, f64::max);
            all += slowest * ranks as f64;
            waited += idle.iter().zip(groups.sizes()).map(|(idle, &n)| idle * slowest * n as f64).sum::<f64>();
            if groups.len() > 1 {
                let row = |group: usize| GroupRow {
                    ranks: groups.sizes()[group],
                    work: describe(config, op, group, groups.len()),
                    flops_a_rank: times[group].round() as u128,
                    idle: idle[group],
                };
                let groups = (0..groups.len()).map(row).collect();
                let stage = StageRow { from_step: step + 1, times: 1, steps: op.steps(), groups };
                match stages.iter_mut().find(|seen| (seen.steps, &seen.groups) == (stage.steps, &stage.groups)) {
                    Some(seen) => seen.times += 1,
                    None => stages.push(stage),
                }
            }
            step += op.steps();
        }
        Ok((!stages.is_empty()).then(|| PlaceRows { stages, idle: waited / all }))
    }

    pub fn text(&self) -> String {
        let head = ["at the same time", "ranks", "from step", "times", "TFLOP a rank", "waits"].map(str::to_owned);
        let mut lines = vec![head];
        for StageRow { from_step, times, groups, .. } in &self.stages {
            for (group, GroupRow { ranks, work, flops_a_rank, idle }) in groups.iter().enumerate() {
                let once = |value: String| if group == 0 { value } else { String::new() };
                let (from, times) = (once(from_step.to_string()), once(times.to_string()));
                lines.push([work.clone(), ranks.to_string(), from, times, tera(*flops_a_rank), percent(*idle)]);
            }
        }
        format!("{}predicted from FLOPs alone: ranks wait {} of the time\n", table(&lines), percent(self.idle))
    }
}

/// What `group` of `groups` does of `op`.
fn describe(config: &Config, op: &Op, group: usize, groups: usize) -> String {
    match op {
        Op::Beside { fine, .. } if group == 0 => format!("level 0, {fine} steps"),
        Op::Beside { coarse, .. } => {
            let on = |level: usize| -> u64 {
                let of_level = |op: &&Op| matches!(op, Op::Smooth { level: l, .. } if *l == level);
                coarse.iter().filter(of_level).map(Op::steps).sum()
            };
            let levels = (1..config.levels.count).filter(|&level| on(level) > 0);
            levels.map(|level| format!("level {level}, {} steps", on(level))).collect::<Vec<_>>().join("; ")
        }
        Op::Smooth { level, coset: Coset::All, steps } => {
            let own = crate::data::share(config.levels.factor.pow(*level as u32), group, groups);
            let cosets: Vec<String> = own.map(|coset| coset.to_string()).collect();
            format!("level {level}, coset {}, {steps} steps", cosets.join(" "))
        }
        _ => "all".to_owned(),
    }
}
