//! What a study shows: losses, savings at strictly matched loss, and what its sweeps found.

use super::file::Study;
use super::plan::{Choice, Point, shown};
use super::state::State;
use crate::cli::report::plots::{Series, Target, Trace};
use crate::cli::report::run::{Cost, Run, Saving, incomparable};
use crate::cli::report::statistics::Statistic;
use crate::cli::text::{percent, table, tera};
use crate::error::Result;
use serde::Serialize;
use toml::Value;

/// [`Serialize`] gives `study report --json`.
#[derive(Serialize)]
pub struct Report {
    pub title: String,
    pub seeds: Vec<u64>,
    /// The baseline, then the others.
    pub arms: Vec<Arm>,
    pub sweeps: Vec<Sweep>,
    /// Why the figures may not mean what they seem to.
    pub warnings: Vec<String>,
}

/// One arm over its finished seeds.
#[derive(Serialize)]
pub struct Arm {
    pub arm: String,
    /// What a sweep chose for it.
    #[serde(serialize_with = "as_table")]
    pub tuned: Point,
    /// Final validation loss of the fine net.
    pub val_loss: Option<Statistic>,
    /// The same over the seeds that the baseline has finished too, less the baseline's.
    pub val_loss_above_baseline: Option<Statistic>,
    /// Seeds finished by it and by the baseline.
    pub compared: usize,
    /// How many of them met the baseline's final loss.
    pub reached: usize,
    /// Savings are null unless all of them did.
    pub flops_saved_total: Option<Statistic>,
    pub flops_saved_blocks: Option<Statistic>,
    pub wall_clock_saved: Option<Statistic>,
    /// Largest rise of the fine net's validation loss from the last evaluation before a switch of level to the first after it.
    pub jump: Option<Statistic>,
    pub runs: Vec<Seed>,
}

/// A finished run.
#[derive(Serialize)]
pub struct Seed {
    pub seed: u64,
    pub val_loss: f64,
    pub jump: Option<f64>,
    /// Against the same seed of the baseline; null for the baseline itself and where that is not finished.
    pub saving: Option<Saving>,
    #[serde(skip)]
    pub run: Run,
}

/// What the trials of an arm found.
#[derive(Serialize)]
pub struct Sweep {
    pub arm: String,
    pub seed: u64,
    pub trials: Vec<Trial>,
    /// Keys whose chosen value is the lowest or the highest that was tried.
    pub at_edge: Vec<String>,
}

#[derive(Serialize)]
pub struct Trial {
    #[serde(serialize_with = "as_table")]
    pub set: Point,
    /// Null where it is not finished, or diverged.
    pub val_loss: Option<f64>,
    pub diverged: bool,
    pub chosen: bool,
}

fn as_table<S: serde::Serializer>(point: &Point, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(point.iter().map(|(key, value)| (key, value)))
}

impl Report {
    /// Reads the metrics of all finished runs.
    pub fn new(study: &Study, states: &[State]) -> Result<Report> {
        let all: Vec<usize> = (0..study.arms.len()).collect();
        let mut arms: Vec<Arm> = Vec::new();
        for &arm in &all {
            let (point, runs) = match study.choice(arm, states) {
                Choice::Point(point) => (point.clone(), finished(study, arm, &point, states)?),
                Choice::Waiting | Choice::Failed => (Point::new(), Vec::new()),
            };
            arms.push(Arm::new(study.arms[arm].name.clone(), point, runs, arms.first()));
        }
        let needed = study.needed(&all, states);
        let sweeps: Vec<Sweep> = (0..study.arms.len()).filter_map(|arm| Sweep::of(study, arm, states)).collect();
        let undone = needed.iter().filter(|&&(run, is_chosen)| !is_chosen || !states[run].is_settled()).count();
        let mut warnings = Vec::new();
        if undone > 0 {
            warnings.push(format!("{undone} of {} runs are not finished", needed.len()));
        }
        warnings.extend(sweeps.iter().flat_map(Sweep::warnings));
        warnings.extend(incomparable_arms(&arms));
        Ok(Report { title: study.title.clone(), seeds: study.seeds.clone(), arms, sweeps, warnings })
    }

    /// What the plots show: an arm a series, and the mean of the losses to meet. `None` while the baseline has no loss.
    pub fn series(&self) -> Option<(Vec<Series<'_>>, Target)> {
        let series = self.arms.iter().enumerate().map(|(index, arm)| {
            let met = |seed: &Seed| match &seed.saving {
                Some(saving) => saving.at,
                None if index == 0 => Cost::last(&seed.run),
                None => None,
            };
            let traces = arm.runs.iter().map(|seed| Trace { run: &seed.run, met: met(seed).map(|met| met.step) });
            Series { label: arm.arm.clone(), traces: traces.collect() }
        });
        let loss = self.arms[0].val_loss?.mean;
        Some((series.collect(), Target { loss, label: format!("final loss of {}, {loss:.4}", self.arms[0].arm) }))
    }

    /// All tables, for a terminal.
    pub fn text(&self) -> String {
        let mut out = format!("{}\n\n", self.title);
        out += &titled(&ARM_HEADINGS, self.arm_rows());
        if !self.sweeps.is_empty() {
            out += "\n";
            out += &titled(&TRIAL_HEADINGS, self.trial_rows());
        }
        out
    }

    pub fn arm_rows(&self) -> Vec<[String; 9]> {
        self.arms.iter().enumerate().map(|(index, arm)| arm.row(self.seeds.len(), index == 0)).collect()
    }

    pub fn trial_rows(&self) -> Vec<[String; 3]> {
        let row = |sweep: &Sweep, trial: &Trial| {
            let loss = trial.val_loss.map_or("not finished".to_owned(), |loss| format!("{loss:.4}"));
            let loss = if trial.diverged { "diverged".to_owned() } else { loss };
            let chosen = if trial.chosen { "best" } else { "" };
            [format!("{} {}", sweep.arm, shown(&trial.set)), loss, chosen.to_owned()]
        };
        self.sweeps.iter().flat_map(|sweep| sweep.trials.iter().map(move |trial| row(sweep, trial))).collect()
    }

    /// A row for each finished run.
    pub fn seed_rows(&self) -> Vec<[String; 8]> {
        let dash = || "–".to_owned();
        let row = |arm: &Arm, seed: &Seed| {
            let saving = seed.saving.as_ref();
            let at = |show: fn(&Cost) -> String| saving.and_then(|saving| saving.at.as_ref()).map_or_else(dash, show);
            let saved = |of: fn(&Saving) -> Option<f64>| saving.and_then(of).map_or_else(dash, percent);
            let step = match saving {
                Some(saving) if !saving.reached => "not reached".to_owned(),
                _ => at(|cost| cost.step.to_string()),
            };
            [
                format!("{} seed {}", arm.arm, seed.seed),
                format!("{:.4}", seed.val_loss),
                step,
                at(|cost| format!("{:.4}", cost.val_loss)),
                at(|cost| tera(cost.flops_total)),
                saved(|saving| saving.flops_saved_total),
                saved(|saving| saving.flops_saved_blocks),
                saved(|saving| saving.wall_clock_saved),
            ]
        };
        self.arms.iter().flat_map(|arm| arm.runs.iter().map(move |seed| row(arm, seed))).collect()
    }
}

/// The finished runs of `arm` at `point`, with their seeds in the order of the study.
fn finished(study: &Study, arm: usize, point: &Point, states: &[State]) -> Result<Vec<(u64, Run)>> {
    let runs = study
        .runs
        .iter()
        .zip(states)
        .filter(|(run, state)| run.arm == arm && run.point == *point && state.val_loss().is_some());
    runs.map(|(run, _)| Ok((run.seed, Run::load(&run.dir)?))).collect()
}

/// Of [`Report::arm_rows`].
pub const ARM_HEADINGS: [&str; 9] = [
    "arm",
    "seeds",
    "final val loss",
    "over baseline's",
    "reached it",
    "FLOPs saved",
    "in blocks",
    "time saved",
    "jump at switches",
];
/// Of [`Report::trial_rows`].
pub const TRIAL_HEADINGS: [&str; 3] = ["sweep", "final val loss", ""];
/// Of [`Report::seed_rows`]; from `at step` on: where it met the baseline's final loss.
pub const SEED_HEADINGS: [&str; 8] =
    ["run", "final val loss", "at step", "val loss", "TFLOP total", "FLOPs saved", "in blocks", "time saved"];

fn titled<const N: usize>(headings: &[&str; N], mut rows: Vec<[String; N]>) -> String {
    rows.insert(0, headings.map(str::to_owned));
    table(&rows)
}

impl Arm {
    /// `runs` by seed; without a `baseline` it is the baseline.
    fn new(arm: String, tuned: Point, runs: Vec<(u64, Run)>, baseline: Option<&Arm>) -> Arm {
        let runs = runs.into_iter().filter_map(|(seed, run)| {
            let paired = baseline.and_then(|baseline| baseline.runs.iter().find(|other| other.seed == seed));
            let target = paired.and_then(|paired| Cost::last(&paired.run));
            let saving = target.map(|target| Saving::of(&run, &target));
            Some(Seed { seed, val_loss: Cost::last(&run)?.val_loss, jump: jump(&run), saving, run })
        });
        let runs: Vec<Seed> = runs.collect();
        let savings: Vec<&Saving> = runs.iter().filter_map(|seed| seed.saving.as_ref()).collect();
        let reached = savings.iter().filter(|saving| saving.reached).count();
        let mean = |of: fn(&Saving) -> Option<f64>| {
            let values: Option<Vec<f64>> = savings.iter().map(|saving| of(saving)).collect();
            Statistic::of(values?)
        };
        let above = runs.iter().filter_map(|seed| {
            let paired = baseline?.runs.iter().find(|other| other.seed == seed.seed)?;
            Some(seed.val_loss - paired.val_loss)
        });
        Arm {
            arm,
            tuned,
            val_loss: Statistic::of(runs.iter().map(|seed| seed.val_loss)),
            val_loss_above_baseline: Statistic::of(above),
            compared: savings.len(),
            reached,
            flops_saved_total: mean(|saving| saving.flops_saved_total),
            flops_saved_blocks: mean(|saving| saving.flops_saved_blocks),
            wall_clock_saved: mean(|saving| saving.wall_clock_saved),
            jump: Statistic::of(runs.iter().filter_map(|seed| seed.jump)),
            runs,
        }
    }

    fn row(&self, seeds: usize, is_baseline: bool) -> [String; 9] {
        let dash = || "–".to_owned();
        let loss = |of: Option<Statistic>| of.map_or_else(dash, |of| of.text());
        let missed = self.reached < self.compared;
        let saved = |of: Option<Statistic>| match of {
            Some(of) => of.percent(),
            None if missed => "not reached".to_owned(),
            None => dash(),
        };
        let reached = if is_baseline { "baseline".to_owned() } else { format!("{}/{}", self.reached, self.compared) };
        [
            self.arm.clone(),
            format!("{}/{seeds}", self.runs.len()),
            loss(self.val_loss),
            loss(self.val_loss_above_baseline),
            reached,
            saved(self.flops_saved_total),
            saved(self.flops_saved_blocks),
            saved(self.wall_clock_saved),
            loss(self.jump),
        ]
    }
}

/// Largest rise of the validation loss between neighbouring evaluations of which the second is on another level.
fn jump(run: &Run) -> Option<f64> {
    let evaluations: Vec<_> = run.evaluations().collect();
    let switches = evaluations.windows(2).filter(|pair| pair[0].0.level != pair[1].0.level);
    switches.map(|pair| pair[1].1 - pair[0].1).reduce(f64::max)
}

/// One warning an arm and reason, not one a seed.
fn incomparable_arms(arms: &[Arm]) -> Vec<String> {
    let mut warnings = Vec::new();
    for arm in &arms[1..] {
        for seed in &arm.runs {
            let paired = arms[0].runs.iter().find(|other| other.seed == seed.seed);
            let why = paired.map_or(Vec::new(), |paired| incomparable(&paired.run, &seed.run));
            warnings.extend(why.into_iter().map(|why| format!("{}: {why}", arm.arm)));
        }
    }
    warnings.dedup();
    warnings
}

impl Sweep {
    /// Of `arm`, if it has one.
    fn of(study: &Study, arm: usize, states: &[State]) -> Option<Sweep> {
        let chosen = match study.choice(arm, states) {
            Choice::Point(point) => Some(point),
            Choice::Waiting | Choice::Failed => None,
        };
        let trials = study.trials(arm).map(|trial| Trial {
            set: study.runs[trial].point.clone(),
            val_loss: states[trial].val_loss(),
            diverged: states[trial] == State::Diverged,
            chosen: chosen.as_ref() == Some(&study.runs[trial].point),
        });
        let trials: Vec<Trial> = trials.collect();
        let swept = study.arms[arm].sweep.iter();
        let at_edge = swept.filter(|(key, values)| is_at_edge(key, values, chosen.as_ref()));
        let at_edge = at_edge.map(|(key, _)| key.clone()).collect();
        let name = study.arms[arm].name.clone();
        (!trials.is_empty()).then(|| Sweep { arm: name, seed: study.seeds[0], trials, at_edge })
    }

    fn warnings(&self) -> impl Iterator<Item = String> {
        let chosen = self.trials.iter().find(|trial| trial.chosen);
        let warning = move |key: &String| {
            let best: Point =
                chosen.iter().flat_map(|trial| &trial.set).filter(|(name, _)| name == key).cloned().collect();
            format!("{}: the best, {}, is at the edge of what was tried: try values beyond it", self.arm, shown(&best))
        };
        self.at_edge.iter().map(warning)
    }
}

/// Whether the chosen value of `key` is the lowest or highest of several numbers.
fn is_at_edge(key: &str, values: &[Value], chosen: Option<&Point>) -> bool {
    let number = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64));
    let numbers: Option<Vec<f64>> = values.iter().map(number).collect();
    let best = chosen.and_then(|point| point.iter().find(|(name, _)| name == key)).and_then(|(_, value)| number(value));
    let (Some(numbers), Some(best)) = (numbers, best) else { return false };
    let inside = numbers.iter().any(|n| *n < best) && numbers.iter().any(|n| *n > best);
    numbers.len() > 1 && !inside
}

#[cfg(test)]
pub mod tests {
    use super::super::file::tests::study;
    use super::super::state::tests::finished;
    use super::*;
    use crate::cli::report::run::tests::{CONFIG, metrics, run};

    /// Runs of three steps of cost `cost` with these losses.
    fn arm(name: &str, cost: u128, losses: &[[f64; 3]], baseline: Option<&Arm>) -> Arm {
        let history = |losses: &[f64; 3]| {
            let line = |(i, &loss): (usize, &f64)| metrics(100 * (i as u64 + 1), usize::from(i == 0), cost, Some(loss));
            losses.iter().enumerate().map(line).collect()
        };
        let runs = losses.iter().enumerate().map(|(seed, losses)| (seed as u64, run(name, history(losses), CONFIG)));
        Arm::new(name.to_owned(), Point::new(), runs.collect(), baseline)
    }

    pub fn report() -> Report {
        let flat = arm("flat", 4, &[[3.0, 2.0, 1.5], [3.0, 2.0, 1.6]], None);
        let good = arm("good", 2, &[[2.0, 1.5, 1.4], [2.0, 1.8, 1.6]], Some(&flat));
        let half = arm("half", 2, &[[2.0, 1.5, 1.4], [2.0, 1.8, 1.7]], Some(&flat));
        let arms = vec![flat, good, half];
        Report { title: "Title".to_owned(), seeds: vec![0, 1], arms, sweeps: Vec::new(), warnings: Vec::new() }
    }

    #[test]
    fn savings_are_seed_against_seed_and_a_mean_needs_all_of_them() {
        let Report { arms, .. } = report();
        // At step 200 of cost 2 against 1200 in all, and at step 300.
        let expected = Statistic::of([1.0 - 400.0 / 1200.0, 0.5]);
        assert_eq!((arms[1].reached, arms[1].flops_saved_total, arms[1].wall_clock_saved), (2, expected, expected));
        assert_eq!((arms[2].reached, arms[2].compared, arms[2].flops_saved_blocks), (1, 2, None));
        let row = arms[2].row(2, false);
        assert_eq!([&*row[1], &*row[4], &*row[5], &*row[7]], ["2/2", "1/2", "not reached", "not reached"]);
        assert!((arms[1].val_loss_above_baseline.unwrap().mean + 0.05).abs() < 1e-12);
        assert!(arms[0].row(2, true).contains(&"baseline".to_owned()));
    }

    #[test]
    fn a_seed_that_the_baseline_has_not_finished_counts_for_the_loss_alone() {
        let flat = arm("flat", 4, &[[3.0, 2.0, 1.5]], None);
        let more = arm("more", 2, &[[2.0, 1.5, 1.4], [2.0, 1.8, 1.6]], Some(&flat));
        assert_eq!((more.compared, more.reached, more.val_loss), (1, 1, Statistic::of([1.4, 1.6])));
    }

    #[test]
    fn a_jump_is_the_largest_rise_at_a_switch_of_level() {
        let line = |i: u64, level, loss| metrics(i, level, 1, Some(loss));
        let history = vec![line(1, 2, 3.0), line(2, 1, 3.1), line(3, 1, 4.0), line(4, 0, 3.9)];
        assert!((jump(&run("r", history, "")).unwrap() - 0.1).abs() < 1e-12);
        assert_eq!(jump(&run("r", vec![line(1, 0, 3.0), line(2, 0, 4.0)], "")), None);
    }

    #[test]
    fn a_best_value_at_the_edge_is_said_so() {
        let study =
            study("[arms.flat]\nsweep.optimizer.lr = [4e-3, 1e-3, 2e-3]\nsweep.levels.state = ['scale']").unwrap();
        let trials: Vec<usize> = study.trials(0).collect();
        for (losses, warned) in [([1.0, 3.0, 2.0], true), ([2.0, 3.0, 1.0], false), ([2.0, 1.0, 3.0], true)] {
            let mut states: Vec<State> = study.runs.iter().map(|_| State::New).collect();
            trials.iter().zip(losses).for_each(|(&trial, loss)| states[trial] = finished(loss));
            let sweep = Sweep::of(&study, 0, &states).unwrap();
            assert_eq!(sweep.at_edge == ["optimizer.lr"], warned, "{losses:?}");
            assert_eq!(sweep.warnings().count(), usize::from(warned));
            assert_eq!(sweep.trials.iter().filter(|trial| trial.chosen).count(), 1);
        }
    }

    #[test]
    fn json_has_null_where_there_is_no_mean() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["arms"][2]["flops_saved_total"], serde_json::Value::Null);
        assert_eq!(json["arms"][1]["flops_saved_total"]["mean"].as_f64().map(|x| (x * 1e6).round()), Some(583333.0));
        assert_eq!(json["arms"][1]["runs"][1]["saving"]["reached"], true);
        assert_eq!(json["arms"][0]["runs"][0]["saving"], serde_json::Value::Null);
    }
}
