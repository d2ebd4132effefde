//! Curves against the number of ranks, on an axis of powers of two.

use super::report::{Report, Row};
use crate::cli::report::plots::{Area, HEIGHT, Plot, chart_with, colors, draw, labels};
use crate::cli::report::statistics::Statistic;
use crate::error::Result;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

/// A mode on a level: what was measured, with its deviation, and what was predicted.
struct Curve {
    label: String,
    measured: Vec<(usize, Statistic)>,
    predicted: Vec<(usize, f64)>,
}

/// What a plot shows of a row.
struct Figure {
    name: &'static str,
    title: &'static str,
    axis: &'static str,
    measured: fn(&Row) -> Option<Statistic>,
    predicted: fn(&Row) -> Option<f64>,
}

const FIGURES: [Figure; 3] = [
    Figure {
        name: "efficiency",
        title: "Efficiency",
        axis: "tokens/s a rank, over those of the fewest ranks [%]",
        measured: |row| Some(row.measured.as_ref()?.efficiency?.scaled(100.0)),
        predicted: |row| Some(100.0 * row.predicted.as_ref()?.efficiency),
    },
    Figure {
        name: "exposed",
        title: "Communication that computing does not hide",
        axis: "share of the step [%]",
        measured: |row| Some(row.measured.as_ref()?.exposed.scaled(100.0)),
        predicted: |row| Some(100.0 * row.predicted.as_ref()?.exposed),
    },
    Figure {
        name: "speed",
        title: "Speed of a rank",
        axis: "tokens/s a rank",
        measured: |row| Some(row.measured.as_ref()?.tokens_per_s_rank),
        predicted: |row| Some(row.predicted.as_ref()?.tokens_per_s_rank),
    },
];

/// All plots of `report`.
pub fn all(report: &Report) -> Result<Vec<Plot>> {
    let plot = |figure: &Figure| {
        let svg = draw(HEIGHT, |area| panel(&area, &curves(&report.rows, figure), figure.axis, None))?;
        Ok(Plot { name: figure.name, title: figure.title, svg })
    };
    FIGURES.iter().map(plot).collect()
}

/// The efficiencies of `report` as one picture with a panel a mode, as SVG.
pub fn efficiency(report: &Report) -> Result<String> {
    let mut modes: Vec<_> = report.rows.iter().map(|row| row.mode).collect();
    modes.dedup();
    draw(HEIGHT * modes.len() as u32, |area| {
        for (area, &mode) in area.split_evenly((modes.len(), 1)).iter().zip(&modes) {
            let rows: Vec<Row> = report.rows.iter().filter(|row| row.mode == mode).cloned().collect();
            panel(area, &curves(&rows, &FIGURES[0]), FIGURES[0].axis, Some(&format!("{} scaling: ", mode.name())))?;
        }
        Ok(())
    })
}

/// A curve for each mode and level of `rows`, which are sorted by them.
fn curves(rows: &[Row], figure: &Figure) -> Vec<Curve> {
    let curve = |rows: &[Row]| Curve {
        label: format!("{}, {} blocks", rows[0].mode.name(), rows[0].blocks),
        measured: rows.iter().filter_map(|row| Some((row.ranks, (figure.measured)(row)?))).collect(),
        predicted: rows.iter().filter_map(|row| Some((row.ranks, (figure.predicted)(row)?))).collect(),
    };
    rows.chunk_by(|a, b| (a.mode, a.level) == (b.mode, b.level)).map(curve).collect()
}

/// One chart; what was measured solid, what was predicted dashed.
fn panel(area: &Area, curves: &[Curve], axis: &str, prefix: Option<&str>) -> Result<()> {
    let log2 = |ranks: usize| (ranks as f64).log2();
    let top = |s: &Statistic| s.mean + s.sd.unwrap_or(0.0);
    let values =
        || curves.iter().flat_map(|c| c.measured.iter().map(|(_, s)| top(s)).chain(c.predicted.iter().map(|p| p.1)));
    let ranks = || curves.iter().flat_map(|c| c.measured.iter().map(|p| p.0).chain(c.predicted.iter().map(|p| p.0)));
    let (low, high) = (ranks().min().unwrap_or(1), ranks().max().unwrap_or(1));
    let x = log2(low) - 0.1..log2(high).max(log2(low) + 1.0) + 0.1;
    let y = 0.0..(1.08 * values().fold(0.0, f64::max)).max(1e-3);
    // Only whole powers of two are named.
    let power =
        |x: &f64| if (x - x.round()).abs() < 1e-6 { format!("{}", 2f64.powf(x.round())) } else { String::new() };
    let x_label = format!("{}ranks", prefix.unwrap_or_default());
    let mut chart = chart_with(area, x, y, &x_label, axis, (14, &power))?;
    for (index, curve) in curves.iter().enumerate() {
        let style = colors(index)[0].stroke_width(2);
        let measured: Vec<(f64, f64)> = curve.measured.iter().map(|(ranks, s)| (log2(*ranks), s.mean)).collect();
        let predicted: Vec<(f64, f64)> = curve.predicted.iter().map(|&(ranks, y)| (log2(ranks), y)).collect();
        let is_measured = !measured.is_empty();
        chart.draw_series(DashedLineSeries::new(predicted, 6, 4, style))?;
        chart.draw_series(measured.iter().map(|&at| Circle::new(at, 4, style.filled())))?;
        let bars = curve.measured.iter().filter_map(|(ranks, s)| {
            let sd = s.sd?;
            Some(PathElement::new([(log2(*ranks), s.mean - sd), (log2(*ranks), s.mean + sd)], style))
        });
        chart.draw_series(bars)?;
        let line = chart.draw_series(LineSeries::new(measured, style))?;
        if is_measured {
            line.label(curve.label.as_str()).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        } else {
            let label = format!("{}, predicted", curve.label);
            line.label(label).legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 18, y)], 6, 4, style));
        }
    }
    labels(&mut chart, SeriesLabelPosition::LowerLeft)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::finished;
    use super::*;
    use crate::cli::machine;

    #[test]
    fn every_plot_is_whole_and_names_its_curves() {
        let dir = tempfile::tempdir().unwrap();
        let study = finished(dir.path());
        for machine in [None, Some(&machine::test_machine())] {
            let report = Report::measured(&study, machine).unwrap();
            let mut svgs: Vec<String> = all(&report).unwrap().into_iter().map(|plot| plot.svg).collect();
            svgs.push(efficiency(&report).unwrap());
            for svg in svgs {
                assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
                assert!(svg.contains("weak, 2 blocks") && svg.contains("ranks"), "{svg}");
            }
        }
        assert!(all(&Report::default()).is_ok());
    }
}
