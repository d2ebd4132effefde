//! Which runs a study consists of, and which of them its sweeps have chosen so far.
//!
//! The values that a sweep chooses are part of a run's folder: when more values are tried and another one is chosen, the
//! runs with the old one stay what they are.

use super::file::{Settings, Study};
use super::state::State;
use crate::config::{self, Config};
use crate::error::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Values of the swept keys, one of each; empty where nothing is swept.
pub type Point = Settings;

/// One run.
#[derive(Debug)]
pub struct Run {
    /// Index in [`Study::arms`].
    pub arm: usize,
    pub point: Point,
    pub seed: u64,
    /// `ARM [KEY=VALUE,...] seed N`
    pub name: String,
    pub dir: PathBuf,
    pub config_file: PathBuf,
    /// Each `table.key=value`.
    pub overrides: Vec<String>,
    /// What the two above give.
    pub config: Config,
}

/// What a sweep says of an arm's point.
#[derive(Debug, PartialEq)]
pub enum Choice {
    Point(Point),
    /// Some trial has no result yet.
    Waiting,
    /// No trial gave a loss.
    Failed,
}

/// Every run that `study` may ask for: each arm at each point that a sweep may choose for it, with each seed.
pub fn expand(study: &Study) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for arm in 0..study.arms.len() {
        for point in study.points(arm) {
            for &seed in &study.seeds {
                runs.push(Run::new(study, arm, point.clone(), seed)?);
            }
        }
    }
    let folders: BTreeSet<&PathBuf> = runs.iter().map(|run| &run.dir).collect();
    ensure!(folders.len() == runs.len(), "two values of a sweep give folders of the same name: write them another way");
    Ok(runs)
}

impl Run {
    fn new(study: &Study, arm: usize, point: Point, seed: u64) -> Result<Run> {
        let of = &study.arms[arm];
        let assign = |(key, value): &(String, toml::Value)| format!("{key}={value}");
        let mut overrides: Vec<String> = of.settings.iter().chain(&point).map(assign).collect();
        overrides.push(format!("run.seed={seed}"));
        let (mut dir, mut name) = (study.dir.join(&of.name), of.name.clone());
        if !point.is_empty() {
            dir.push(folder(&point));
            name = format!("{name} {}", shown(&point));
        }
        dir.push(format!("seed-{seed}"));
        let name = format!("{name} seed {seed}");
        let config = config::load(&of.config, &overrides).with_context(|| name.clone())?;
        Ok(Run { arm, point, seed, name, dir, config_file: of.config.clone(), overrides, config })
    }
}

/// `optimizer.lr=0.002, ...`
pub fn shown(point: &Point) -> String {
    let assignments = point.iter().map(|(key, value)| match value {
        // TOML's own form has no exponent.
        toml::Value::Float(value) => format!("{key}={value:?}"),
        value => format!("{key}={value}"),
    });
    assignments.collect::<Vec<_>>().join(", ")
}

/// [`shown`] as the name of a folder.
fn folder(point: &Point) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "=.+-,_".contains(c) { c } else { '_' };
    shown(point).replace(", ", ",").replace('"', "").chars().map(safe).collect()
}

impl Study {
    /// The arm whose sweep chooses values for `arm`: itself, or else the baseline.
    pub fn tuner(&self, arm: usize) -> Option<usize> {
        [arm, 0].into_iter().find(|&tuner| !self.arms[tuner].sweep.is_empty())
    }

    /// All points that the tuner of `arm` may choose, as they apply to it.
    fn points(&self, arm: usize) -> Vec<Point> {
        let mut points = vec![Point::new()];
        let sweep = self.tuner(arm).map_or(&[][..], |tuner| &self.arms[tuner].sweep);
        for (key, values) in sweep.iter().filter(|(key, _)| self.takes(arm, key)) {
            let with = |point: &Point, value: &toml::Value| [&point[..], &[(key.clone(), value.clone())]].concat();
            points = points.iter().flat_map(|point| values.iter().map(move |value| with(point, value))).collect();
        }
        points
    }

    /// Whether `arm` takes the value of `key` from a sweep; what it sets itself it does not.
    fn takes(&self, arm: usize, key: &str) -> bool {
        !self.arms[arm].own_keys.contains(key)
    }

    /// The runs of the sweep of `arm`: all its points with the first seed.
    pub fn trials(&self, arm: usize) -> impl Iterator<Item = usize> {
        let is_trial = move |run: &Run| run.arm == arm && run.seed == self.seeds[0];
        (0..self.runs.len()).filter(move |&i| !self.arms[arm].sweep.is_empty() && is_trial(&self.runs[i]))
    }

    /// The point of `arm` by what is known of its tuner's trials: that of the lowest final validation loss.
    pub fn choice(&self, arm: usize, states: &[State]) -> Choice {
        let Some(tuner) = self.tuner(arm) else { return Choice::Point(Point::new()) };
        if self.trials(tuner).any(|trial| !states[trial].is_settled()) {
            return Choice::Waiting;
        }
        let losses = self.trials(tuner).filter_map(|trial| Some((trial, states[trial].val_loss()?)));
        let best = losses.min_by(|a, b| a.1.total_cmp(&b.1));
        best.map_or(Choice::Failed, |(trial, _)| {
            let point = self.runs[trial].point.iter();
            Choice::Point(point.filter(|(key, _)| self.takes(arm, key)).cloned().collect())
        })
    }

    /// The runs of `arms` and of the sweeps that they wait for, in the order in which they are to be run: the trials, then
    /// all arms seed by seed. False stands beside a run that waits for a sweep: it is at a point that may be chosen.
    pub fn needed(&self, arms: &[usize], states: &[State]) -> Vec<(usize, bool)> {
        let tuners: BTreeSet<usize> = arms.iter().filter_map(|&arm| self.tuner(arm)).collect();
        let mut needed: Vec<(usize, bool)> =
            tuners.iter().flat_map(|&tuner| self.trials(tuner)).map(|trial| (trial, true)).collect();
        for &seed in &self.seeds {
            for &arm in arms {
                let (point, is_chosen) = match self.choice(arm, states) {
                    Choice::Point(point) => (point, true),
                    Choice::Waiting | Choice::Failed => (self.points(arm).swap_remove(0), false),
                };
                let wanted = |run: &Run| run.arm == arm && run.seed == seed && run.point == point;
                let run = self.runs.iter().position(wanted);
                needed
                    .extend(run.filter(|run| needed.iter().all(|(known, _)| known != run)).map(|run| (run, is_chosen)));
            }
        }
        needed
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::study;
    use super::super::state::tests::finished;
    use super::*;

    const ARMS: &str = "
[arms.flat]
sweep = { optimizer.lr = [1e-3, 2e-3], optimizer.kind = ['adamw'] }
[arms.two]
set = { levels.count = 2, cycle.kind = 'cascade' }
[arms.own]
set = { optimizer.lr = 5e-3 }
";

    fn names(study: &Study, arms: &[usize], states: &[State], ready: bool) -> Vec<String> {
        let needed = study.needed(arms, states).into_iter().filter(|&(_, is_chosen)| is_chosen == ready);
        needed.map(|(run, _)| study.runs[run].dir.strip_prefix("studies/x").unwrap().display().to_string()).collect()
    }

    #[test]
    fn the_best_value_of_the_baseline_holds_for_all_arms_that_do_not_set_it() {
        let study = study(ARMS).unwrap();
        let mut states: Vec<State> = study.runs.iter().map(|_| State::New).collect();
        let trials = [
            "flat/optimizer.lr=0.001,optimizer.kind=adamw/seed-1",
            "flat/optimizer.lr=0.002,optimizer.kind=adamw/seed-1",
        ];
        assert_eq!(names(&study, &[0, 1, 2], &states, true), trials);
        assert_eq!(study.needed(&[0, 1, 2], &states).len(), 2 + 1 + 2 + 2, "a trial is also the run of its seed");
        for (trial, loss) in study.trials(0).collect::<Vec<_>>().into_iter().zip([1.7, 1.6]) {
            assert_eq!(study.choice(1, &states), Choice::Waiting);
            states[trial] = finished(loss);
        }
        let expected = [
            trials[0],
            trials[1],
            "two/optimizer.lr=0.002,optimizer.kind=adamw/seed-1",
            "own/optimizer.kind=adamw/seed-1",
            "flat/optimizer.lr=0.002,optimizer.kind=adamw/seed-2",
            "two/optimizer.lr=0.002,optimizer.kind=adamw/seed-2",
            "own/optimizer.kind=adamw/seed-2",
        ];
        assert_eq!(names(&study, &[0, 1, 2], &states, true), expected);
        assert_eq!(names(&study, &[2], &states, true), [expected[0], expected[1], expected[3], expected[6]]);
        let own = study.runs.iter().find(|run| run.arm == 2).unwrap();
        assert_eq!(own.config.optimizer.lr, 5e-3);
    }

    #[test]
    fn a_diverged_trial_is_not_chosen() {
        let study = study(ARMS).unwrap();
        let mut states: Vec<State> = study.runs.iter().map(|_| State::New).collect();
        let trials: Vec<usize> = study.trials(0).collect();
        states[trials[0]] = finished(3.0);
        states[trials[1]] = State::Diverged;
        assert!(matches!(study.choice(0, &states), Choice::Point(point) if point == study.runs[trials[0]].point));
        states[trials[0]] = State::Diverged;
        assert_eq!(study.choice(0, &states), Choice::Failed);
    }

    #[test]
    fn an_arm_with_a_sweep_of_its_own_is_tuned_on_its_own() {
        let study = study(&format!("{ARMS}[arms.swept]\nsweep.optimizer.lr = [1e-2, 2e-2]")).unwrap();
        assert_eq!((study.tuner(3), study.trials(3).count(), study.tuner(1)), (Some(3), 2, Some(0)));
    }

    #[test]
    fn without_a_sweep_all_runs_are_known() {
        let study = study("[arms.flat]\n[arms.b]\nset.run.steps = 5").unwrap();
        let states: Vec<State> = study.runs.iter().map(|_| State::New).collect();
        let expected = ["flat/seed-1", "b/seed-1", "flat/seed-2", "b/seed-2"];
        assert_eq!(names(&study, &[0, 1], &states, true), expected);
    }
}
