//! The report of a study as an HTML page with its plots.

use super::report::{ARM_HEADINGS, Arm, Report, SEED_HEADINGS, TRIAL_HEADINGS};
use crate::cli::report::plots::{self, Plot};
use crate::cli::report::{self, html, run::Settings};
use crate::error::{Context, Result};
use std::path::Path;

/// Writes `report` to `out`, and its plots beside it.
pub fn write(report: &Report, out: &Path) -> Result<()> {
    let (series, target) = report
        .series()
        .context("nothing to plot yet: no run of the baseline is finished; `vcycle study run` goes on")?;
    report::write(out, &plots::all(&series, &target)?, |plots| page(report, plots))
}

const LEAD: &str = "<p class=quiet>Mean ± standard deviation over seeds. A saving is what a run had spent when the fine net first \
    was at or under the final validation loss (nats a token) of the same seed of the baseline, as a share of what that spent in \
    all. It is given where every seed got there.</p>\n";
const NOTES: &str = "<p class=quiet>FLOPs are model FLOPs: 6 a matmul parameter and token, and 12·N·d·T a token for attention. \
    Time is each run's own wall-clock; runs that ran side by side shared the machine. Jump at switches: the largest rise of the \
    fine net's validation loss between the evaluations around a switch of level.</p>\n";
const CURVES: &str = "<p class=quiet>Thin lines are seeds, thick ones their mean; a ring is where a seed met the loss of its \
    baseline.</p>\n";

fn page(report: &Report, plots: &[Plot]) -> String {
    let mut body = LEAD.to_owned();
    body.extend(report.warnings.iter().map(|warning| html::warning(warning)));
    body.extend(report.arms.iter().map(tiles));
    body += "<h2>Arms</h2>\n";
    body += &html::table(&ARM_HEADINGS, &report.arm_rows(), true);
    body += NOTES;
    if !report.sweeps.is_empty() {
        body += "<h2>Sweeps</h2>\n";
        body += &html::table(&TRIAL_HEADINGS, &report.trial_rows(), false);
    }
    body += &html::figures(plots);
    body += CURVES;
    body += "<h2>Runs</h2>\n";
    body += &html::table(&SEED_HEADINGS, &report.seed_rows(), false);
    let columns = |of: fn(&Arm) -> Option<&Settings>| -> Vec<(String, &Settings)> {
        let none: &Settings = const { &Settings::new() };
        report.arms.iter().map(|arm| (arm.arm.clone(), of(arm).unwrap_or(none))).collect()
    };
    let configs = columns(|arm| arm.runs.first().map(|seed| &seed.run.config));
    body += &html::settings("What differs in the configs", "The configs are the same.", &configs, true);
    let provenance = columns(|arm| arm.runs.first().map(|seed| &seed.run.provenance));
    body += &html::settings("Provenance of the first seeds", "The runs have no provenance.", &provenance, false);
    html::page(&report.title, &body)
}

/// The savings of an arm, large; nothing for the baseline and where a seed fell short.
fn tiles(arm: &Arm) -> String {
    let figures = [
        (arm.flops_saved_total, "of all FLOPs saved"),
        (arm.flops_saved_blocks, "of the blocks' FLOPs saved"),
        (arm.wall_clock_saved, "of the time saved"),
    ];
    let figures: Vec<_> = figures.iter().filter_map(|(saved, what)| Some(((*saved)?.percent(), *what))).collect();
    html::tiles(&arm.arm, &figures)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn a_report_is_one_page_with_its_plots_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("report.html");
        write(&report(), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        assert_eq!((page.matches("<figure>").count(), page.matches("class=tiles").count()), (5, 1));
        assert!(page.contains("not reached") && !page.contains("src=") && !page.contains("href="));
        assert!(dir.path().join("report-flops.svg").is_file());
    }

    #[test]
    fn without_a_finished_baseline_there_is_nothing_to_plot() {
        let mut report = report();
        report.arms[0].val_loss = None;
        let e = write(&report, Path::new("x.html")).unwrap_err().to_string();
        assert!(e.contains("no run of the baseline is finished"), "{e}");
    }
}
