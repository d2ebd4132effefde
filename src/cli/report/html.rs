//! Parts of a report: one HTML page that needs no other file and no network.

use super::plots::{self, Plot};
use super::run::{self, Settings};
use plotters::style::RGBColor;
use std::fmt::Write;

/// The whole page around `body`, which starts with the title.
pub fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n\
         <meta name=viewport content=\"width=device-width, initial-scale=1\">\n<title>vcycle: {title}</title>\n\
         <style>\n{}{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n",
        include_str!("report.css"),
        dark_plots()
    )
}

pub fn warning(text: &str) -> String {
    format!("<p class=warning><b>Warning.</b> {}</p>\n", escape(text))
}

/// Figures in large type under the name of what they belong to; nothing where there are none.
pub fn tiles(label: &str, figures: &[(String, &str)]) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let tile = |(figure, what): &(String, &str)| format!("<div class=tile><b>{}</b>{what}</div>", escape(figure));
    let tiles: String = figures.iter().map(tile).collect();
    format!("<h2>{}</h2>\n<div class=tiles>{tiles}</div>\n", escape(label))
}

/// A table of text; with `swatches`, each line has the colour of its series.
pub fn table<const N: usize>(headings: &[&str; N], rows: &[[String; N]], swatches: bool) -> String {
    let head: String = headings.iter().map(|heading| format!("<th>{}</th>", escape(heading))).collect();
    let mut body = String::new();
    for (index, row) in rows.iter().enumerate() {
        let Some((label, cells)) = row.split_first() else { continue };
        let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        let swatch = if swatches { swatch(index) } else { String::new() };
        let _ = writeln!(body, "<tr><th>{swatch}{}</th>{cells}</tr>", escape(label));
    }
    format!("<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n")
}

pub fn figures(plots: &[Plot]) -> String {
    let figure = |Plot { title, svg, .. }: &Plot| format!("<figure><h3>{title}</h3>\n{svg}</figure>\n");
    "<h2>Plots</h2>\n".to_owned() + &plots.iter().map(figure).collect::<String>()
}

/// A table with a column for each series; with `differing`, only of what is not the same in all.
pub fn settings(title: &str, if_empty: &str, columns: &[(String, &Settings)], differing: bool) -> String {
    let rows = run::rows(&columns.iter().map(|(_, settings)| *settings).collect::<Vec<_>>(), differing);
    if rows.is_empty() {
        return format!("<h2>{title}</h2>\n<p class=quiet>{if_empty}</p>\n");
    }
    let head = columns.iter().enumerate();
    let head = head.map(|(index, (label, _))| format!("<th>{}{}</th>", swatch(index), escape(label)));
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

/// A square in the colour of the series at `index`.
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

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::plots::tests::two_series;
    use super::*;

    #[test]
    fn every_plot_colour_has_a_dark_one() {
        let plots = two_series(|series, target| plots::all(series, target).unwrap());
        let known = dark_plots();
        for color in plots.iter().flat_map(|plot| plot.svg.split("=\"#").skip(1)).map(|rest| &rest[..6]) {
            assert!(known.contains(color), "#{color} stays as it is on dark pages");
        }
    }

    #[test]
    fn text_is_escaped_wherever_it_stands() {
        let text = || "<script>&".to_owned();
        let settings = Settings::from([(text(), text())]);
        let parts = [
            page(&text(), ""),
            warning(&text()),
            tiles(&text(), &[(text(), "saved")]),
            table(&["a", "b"], &[[text(), text()]], true),
            self::settings("Title", "none", &[(text(), &settings)], false),
        ];
        for part in parts {
            assert!(part.contains("&lt;script&gt;&amp;") && !part.contains("<script>"), "{part}");
        }
    }
}
