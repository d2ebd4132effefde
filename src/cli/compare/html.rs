//! The report of a comparison as an HTML page.

use super::analysis::Comparison;
use super::table;
use crate::cli::report::html;
use crate::cli::report::plots::Plot;
use crate::cli::text::percent;

/// The whole page.
pub fn page(comparison: &Comparison, plots: &[Plot]) -> String {
    let title = format!("Savings at validation loss {:.4}", comparison.baseline.val_loss);
    let mut body = "<p class=quiet>What each run had spent when the fine net first was at or under the baseline's final validation loss \
                    (nats a token), as a share of what the baseline spent in all.</p>\n"
        .to_owned();
    body.extend(comparison.warnings.iter().map(|warning| html::warning(warning)));
    body += &tiles(comparison);
    body += "<h2>Table</h2>\n";
    body += &html::table(&table::HEADINGS, &table::rows(comparison), true);
    body += "<p class=quiet>From <i>at step</i> on: what it took to meet the baseline's final loss. FLOPs are model FLOPs: 6 a \
             matmul parameter and token, and 12·N·d·T a token for attention.</p>\n";
    body += &html::figures(plots);
    let configs = comparison.columns(|run| &run.config);
    body += &html::settings("What differs in the configs", "The configs are the same.", &configs, true);
    let provenance = comparison.columns(|run| &run.provenance);
    body += &html::settings("Provenance", "The runs have no provenance.", &provenance, false);
    html::page(&title, &body)
}

/// The savings of each run, large; or that it has none.
fn tiles(comparison: &Comparison) -> String {
    let mut out = String::new();
    for (label, saving) in comparison.labels().iter().skip(1).zip(&comparison.savings) {
        let figures = [
            (saving.flops_saved_total, "of all FLOPs saved"),
            (saving.flops_saved_blocks, "of the blocks' FLOPs saved"),
            (saving.wall_clock_saved, "of the time saved"),
        ];
        let figures: Vec<_> = figures.iter().filter_map(|(saved, what)| Some((percent((*saved)?), *what))).collect();
        out += &html::tiles(label, &figures);
    }
    out.extend(table::not_reached(comparison).map(|sentence| html::warning(&sentence)));
    out
}
