//! The report as one HTML page that needs no other file and no network.

use super::analysis::{Comparison, Run, Settings};
use super::plots::{self, Plot};
use super::table;
use crate::cli::text::percent;
use plotters::style::RGBColor;
use std::fmt::Write;

/// The whole page.
pub fn page(comparison: &Comparison, plots: &[Plot]) -> String {
    let title = format!("Savings at validation loss {:.4}", comparison.baseline.val_loss);
    let mut body = format!("<h1>{title}</h1>\n");
    body += "<p class=quiet>What each run had spent when the fine net first was at or under the baseline's final validation loss \
             (nats a token), as a share of what the baseline spent in all.</p>\n";
    for warning in &comparison.warnings {
        let _ = writeln!(body, "<p class=warning><b>Warning.</b> {}</p>", escape(warning));
    }
    body += &tiles(comparison);
    body += &savings(comparison);
    body += "<h2>Plots</h2>\n";
    for Plot { title, svg, .. } in plots {
        let _ = writeln!(body, "<figure><h3>{title}</h3>\n{svg}</figure>");
    }
    body += &settings(comparison, "What differs in the configs", "The configs are the same.", |run| &run.config, true);
    body += &settings(comparison, "Provenance", "The runs have no provenance.", |run| &run.provenance, false);
    format!(
        "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n\
         <meta name=viewport content=\"width=device-width, initial-scale=1\">\n<title>vcycle: {title}</title>\n\
         <style>\n{}{}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
        include_str!("report.css"),
        dark_plots()
    )
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
        let tiles: String = figures
            .iter()
            .filter_map(|(saved, what)| Some(format!("<div class=tile><b>{}</b>{what}</div>", percent((*saved)?))))
            .collect();
        if !tiles.is_empty() {
            let _ = writeln!(out, "<h2>{}</h2>\n<div class=tiles>{tiles}</div>", escape(label));
        }
    }
    for sentence in table::not_reached(comparison) {
        let _ = writeln!(out, "<p class=warning>{}</p>", escape(&sentence));
    }
    out
}

fn savings(comparison: &Comparison) -> String {
    let head: String = table::HEADINGS.iter().map(|heading| format!("<th>{heading}</th>")).collect();
    let mut body = String::new();
    for (index, [label, cells @ ..]) in table::rows(comparison).iter().enumerate() {
        let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        let _ = writeln!(body, "<tr><th>{}{}</th>{cells}</tr>", swatch(index), escape(label));
    }
    format!(
        "<h2>Table</h2>\n<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n\
         <p class=quiet>From <i>at step</i> on: what it took to meet the baseline's final loss. FLOPs are model FLOPs: 6 a \
         matmul parameter and token, and 12·N·d·T a token for attention.</p>\n"
    )
}

/// A table of what `of` holds, a column a run; with `differing`, only of what is not the same in all.
fn settings(
    comparison: &Comparison,
    title: &str,
    if_empty: &str,
    of: fn(&Run) -> &Settings,
    differing: bool,
) -> String {
    let rows = comparison.settings(of, differing);
    if rows.is_empty() {
        return format!("<h2>{title}</h2>\n<p class=quiet>{if_empty}</p>\n");
    }
    let labels = comparison.labels();
    let head = labels.iter().enumerate().map(|(index, label)| format!("<th>{}{}</th>", swatch(index), escape(label)));
    let mut body = String::new();
    for (key, values) in rows {
        let cells: String = values.iter().map(|value| format!("<td>{}</td>", escape(value.unwrap_or("–")))).collect();
        let _ = writeln!(body, "<tr><th>{}</th>{cells}</tr>", escape(key));
    }
    format!(
        "<h2>{title}</h2>\n<div class=scroll><table class=settings><thead><tr><th></th>{}</tr></thead>\n\
         <tbody>{body}</tbody></table></div>\n",
        head.collect::<String>()
    )
}

/// A square in the colour of the run at `index`.
fn swatch(index: usize) -> String {
    format!(
        "<svg class=swatch width=12 height=12><rect width=12 height=12 rx=2 fill=\"{}\"/></svg> ",
        hex(plots::colors(index)[0])
    )
}

/// CSS that turns each colour of the plots into its like for dark pages.
fn dark_plots() -> String {
    let mut css = String::from("@media (prefers-color-scheme: dark) {\n");
    for [light, dark] in plots::SERIES.into_iter().chain([plots::INK, plots::FAINT, plots::GROUND]) {
        let (light, dark) = (hex(light), hex(dark));
        let _ =
            writeln!(css, "svg [fill=\"{light}\"] {{ fill: {dark} }} svg [stroke=\"{light}\"] {{ stroke: {dark} }}");
    }
    css + "}\n"
}

/// As plotters writes a colour.
fn hex(RGBColor(r, g, b): RGBColor) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::analysis::tests::{metrics, run};
    use super::*;

    #[test]
    fn names_and_settings_are_escaped_and_every_plot_colour_has_a_dark_one() {
        let config = "data.dir = '<script>'";
        let runs = ["base", "<b>"].map(|name| run(name, vec![metrics(100, 0, 1, Some(2.0))], config));
        let [base, mut other] = runs;
        other.config.insert("run.seed".to_owned(), "a & b".to_owned());
        let comparison = Comparison::new(vec![base, other]).unwrap();
        let plots = plots::all(&comparison).unwrap();
        let page = page(&comparison, &plots);
        assert!(page.contains("&lt;b&gt;") && page.contains("a &amp; b"));
        assert!(!page.contains("<script>"), "only what differs is listed, and escaped");
        let known = dark_plots();
        for color in plots.iter().flat_map(|plot| plot.svg.split("=\"#").skip(1)).map(|rest| &rest[..6]) {
            assert!(known.contains(color), "#{color} stays as it is on dark pages");
        }
    }
}
