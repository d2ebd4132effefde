//! What a comparison says: savings at matched validation loss, and whether the runs can be compared at all.

use crate::cli::report::plots::{Series, Target, Trace};
use crate::cli::report::run::{Cost, Run, Saving, Settings, incomparable};
use crate::error::{Context, Result};
use serde::Serialize;
use std::collections::BTreeSet;

/// A baseline and the runs measured against it. [`Serialize`] gives the JSON contract.
#[derive(Serialize)]
pub struct Comparison {
    /// The baseline's last evaluation: the loss to meet, and its cost.
    pub baseline: Cost,
    /// One for each run after the first.
    #[serde(rename = "runs")]
    pub savings: Vec<Saving>,
    /// The baseline, then the others.
    #[serde(skip)]
    pub runs: Vec<Run>,
    /// Why the figures may not mean what they seem to.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

impl Comparison {
    /// Of `runs`, the first is the baseline.
    pub fn new(runs: Vec<Run>) -> Result<Comparison> {
        let baseline = Cost::last(&runs[0]).with_context(|| {
            format!("the baseline {} has no evaluation: no line of its metrics has a val_loss", runs[0].name)
        })?;
        let savings = runs[1..].iter().map(|run| Saving::of(run, &baseline)).collect();
        let warnings = warnings(&runs, &baseline);
        Ok(Comparison { baseline, savings, runs, warnings })
    }

    /// Short names of all runs: the last part of their paths where that tells them apart.
    pub fn labels(&self) -> Vec<String> {
        let last = |run: &Run| Some(run.dir.file_name()?.to_string_lossy().into_owned());
        let short: Option<Vec<String>> = self.runs.iter().map(last).collect();
        let distinct = |names: &Vec<String>| names.iter().collect::<BTreeSet<_>>().len() == names.len();
        short.filter(distinct).unwrap_or_else(|| self.runs.iter().map(|run| run.name.clone()).collect())
    }

    /// What the plots show: each run by itself, the baseline first, and the loss to meet.
    pub fn series(&self) -> (Vec<Series<'_>>, Target) {
        let met = std::iter::once(Some(self.baseline)).chain(self.savings.iter().map(|saving| saving.at));
        let traces = self.runs.iter().zip(met).map(|(run, met)| Trace { run, met: met.map(|met| met.step) });
        let series = self.labels().into_iter().zip(traces);
        let series = series.map(|(label, trace)| Series { label, traces: vec![trace] }).collect();
        let loss = self.baseline.val_loss;
        (series, Target { loss, label: format!("baseline's final loss, {loss:.4}") })
    }

    /// What `of` holds, a labelled column a run.
    pub fn columns(&self, of: fn(&Run) -> &Settings) -> Vec<(String, &Settings)> {
        self.labels().into_iter().zip(self.runs.iter().map(of)).collect()
    }
}

fn warnings(runs: &[Run], baseline: &Cost) -> Vec<String> {
    let mut warnings = Vec::new();
    let first = &runs[0];
    if let Some(steps) = first.config.get("run.steps").filter(|steps| **steps != baseline.step.to_string()) {
        let step = baseline.step;
        warnings.push(format!(
            "{}: its last evaluation is at step {step} of {steps}; savings are against that",
            first.name
        ));
    }
    for run in &runs[1..] {
        warnings.extend(incomparable(first, run).into_iter().map(|why| format!("{}: {why}", run.name)));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::report::run::tests::{CONFIG, baseline, metrics, run};

    #[test]
    fn json_is_the_contract() {
        let never = run("never", vec![metrics(100, 1, 1, Some(1.6)), metrics(300, 0, 1, None)], CONFIG);
        let comparison = Comparison::new(vec![baseline(), never]).unwrap();
        assert_eq!(
            serde_json::to_string(&comparison).unwrap(),
            r#"{"baseline":{"val_loss":1.5,"flops_total":2400000000000000,"flops_blocks":1200000000000000,"elapsed_s":600.0},"#
                .to_owned()
                + r#""runs":[{"run":"never","reached":false,"flops_saved_total":null,"flops_saved_blocks":null,"wall_clock_saved":null}]}"#
        );
    }

    #[test]
    fn missing_evaluations_are_an_error_in_the_baseline_and_not_reached_in_a_run() {
        let silent = || run("silent", vec![metrics(100, 0, 1, None)], CONFIG);
        let e = Comparison::new(vec![silent(), baseline()]).err().unwrap().to_string();
        assert!(e.contains("baseline silent has no evaluation"), "{e}");
        let comparison = Comparison::new(vec![baseline(), silent()]).unwrap();
        assert!(!comparison.savings[0].reached);
        assert!(comparison.warnings[0].contains("no evaluation"), "{:?}", comparison.warnings);
    }

    #[test]
    fn a_baseline_that_was_stopped_is_called_so() {
        let mut stopped = baseline();
        stopped.history.pop();
        let warnings = Comparison::new(vec![stopped]).unwrap().warnings;
        assert!(warnings[0].contains("step 200 of 300"), "{warnings:?}");
    }
}
