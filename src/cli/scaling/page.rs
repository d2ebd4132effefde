//! The report of a study as an HTML page with its plots.

use super::plots;
use super::report::{MEASURED, PREDICTED, Report};
use crate::cli::report::plots::Plot;
use crate::cli::report::{self, html};
use crate::error::Result;
use std::path::Path;

/// Writes `report` to `out`, and its plots beside it.
pub fn write(report: &Report, out: &Path) -> Result<()> {
    report::write(out, &plots::all(report)?, |plots| page(report, plots))
}

const LEAD: &str = "<p class=quiet>Mean ± standard deviation over repeated runs. Strong: the same global batch on all ranks; weak: \
    the same sequences a rank. Efficiency is a rank's tokens/s over those with the fewest ranks. Exposed: share of the time in \
    which even the slowest rank waits for communication; imbalance: what the mean rank waits besides, for the slowest. FLOPs \
    are model FLOPs; MFU is their share of what the ranks' matrix products reach.</p>\n";
const MODEL: &str = "<p class=quiet>By the α-β model of docs/SCALING.md; off by: predicted over measured step.</p>\n";

fn page(report: &Report, plots: &[Plot]) -> String {
    let mut body = LEAD.to_owned();
    body.extend(report.warnings.iter().map(|warning| html::warning(warning)));
    if report.rows.iter().any(|row| row.measured.is_some()) {
        body += "<h2>Measured</h2>\n";
        body += &html::table(&MEASURED, &report.measured_rows(), false);
    }
    if let Some(machine) = &report.machine {
        body += &format!("<h2>Predicted for {}</h2>\n{MODEL}", html::escape(machine));
        body += &html::table(&PREDICTED, &report.predicted_rows(), false);
    }
    body += &html::figures(plots);
    if !report.provenance.is_empty() {
        let columns: Vec<_> = report.provenance.iter().map(|(point, settings)| (point.clone(), settings)).collect();
        body += &html::settings("Provenance of the first runs", "The runs have no provenance.", &columns, false);
    }
    html::page(&report.title, &body)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::finished;
    use super::*;

    #[test]
    fn a_report_is_one_page_with_provenance_and_plots_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("report.html");
        write(&Report::measured(&finished(dir.path()), None).unwrap(), &out).unwrap();
        let page = std::fs::read_to_string(&out).unwrap();
        assert_eq!(page.matches("<figure>").count(), 3);
        assert!(page.contains("hosts.a") && page.contains("80.0 ± 11.3 %") && !page.contains("Predicted for"));
        assert!(dir.path().join("report-efficiency.svg").is_file());
    }
}
