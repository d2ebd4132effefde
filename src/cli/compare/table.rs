//! The table of a comparison: its rows, and as text for a terminal.

use super::analysis::Comparison;
use crate::cli::report::run::Cost;
use crate::cli::text::{duration, percent, table, tera};
use std::fmt::Write;

/// Column headings of [`rows`].
pub const HEADINGS: [&str; 10] = [
    "run",
    "final val loss",
    "at step",
    "val loss",
    "TFLOP total",
    "saved total",
    "TFLOP blocks",
    "saved blocks",
    "time",
    "time saved",
];

/// One row a run, the baseline first. From `at step` on: what it took to meet the baseline's final loss.
pub fn rows(comparison: &Comparison) -> Vec<[String; 10]> {
    let row = |label: String, last: Option<Cost>, met: Option<Cost>, [total, blocks, time]: [String; 3]| {
        let last = last.map_or("none".to_owned(), |cost| format!("{:.4}", cost.val_loss));
        let at = |show: fn(&Cost) -> String| met.as_ref().map_or("–".to_owned(), show);
        let step = if met.is_some() { at(|cost| cost.step.to_string()) } else { "not reached".to_owned() };
        [
            label,
            last,
            step,
            at(|cost| format!("{:.4}", cost.val_loss)),
            at(|cost| tera(cost.flops_total)),
            total,
            at(|cost| tera(cost.flops_blocks)),
            blocks,
            at(|cost| duration(cost.elapsed_s)),
            time,
        ]
    };
    let mut labels = comparison.labels().into_iter();
    let baseline = Some(comparison.baseline);
    // The baseline saves nothing by definition; the word says which row it is.
    let none = ["baseline", "–", "–"].map(str::to_owned);
    let first = row(labels.next().unwrap_or_default(), baseline, baseline, none);
    let others = labels.zip(&comparison.savings).map(|(label, saving)| {
        let saved = [saving.flops_saved_total, saving.flops_saved_blocks, saving.wall_clock_saved];
        row(label, saving.last, saving.at, saved.map(|fraction| fraction.map_or("–".to_owned(), percent)))
    });
    std::iter::once(first).chain(others).collect()
}

/// The table with columns aligned, then a sentence for each run that never met the baseline's loss.
pub fn text(comparison: &Comparison) -> String {
    let mut lines = rows(comparison);
    lines.insert(0, HEADINGS.map(str::to_owned));
    let mut out = table(&lines);
    for sentence in not_reached(comparison) {
        let _ = writeln!(out, "{sentence}");
    }
    out
}

/// A plain sentence for each run that never met the baseline's final loss.
pub fn not_reached(comparison: &Comparison) -> impl Iterator<Item = String> {
    let missed = comparison.savings.iter().filter(|saving| !saving.reached);
    missed.map(|saving| {
        let end =
            saving.last.map_or("it was never evaluated".to_owned(), |cost| format!("it ended at {:.4}", cost.val_loss));
        format!(
            "{} never reached the baseline's final validation loss of {:.4}: {end}. It saved nothing.",
            saving.run, comparison.baseline.val_loss
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::report::run::tests::{metrics, run};

    #[test]
    fn columns_are_aligned_and_a_run_that_falls_short_is_said_so() {
        let base = run("runs/base", vec![metrics(300, 0, 4, Some(1.5))], "");
        let half = run("runs/half", vec![metrics(300, 0, 2, Some(1.5))], "");
        let short = run("runs/short", vec![metrics(300, 0, 1, Some(1.7))], "");
        let text = text(&Comparison::new(vec![base, half, short]).unwrap());
        let lines: Vec<&str> = text.lines().collect();
        let widths: Vec<usize> = lines[..4].iter().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|&width| width == widths[0]), "{text}");
        assert!(lines[2].starts_with("half") && lines[2].ends_with("5.0 min      50.0 %"), "{text}");
        assert!(lines[3].contains("not reached"), "{text}");
        assert_eq!(
            lines[4],
            "runs/short never reached the baseline's final validation loss of 1.5000: it ended at 1.7000. It saved nothing."
        );
    }
}
