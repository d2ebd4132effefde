//! The plots of a report, as SVG text that reads on white; [`super::html`] recolours them for dark pages.
//!
//! A series is a run, or the runs of several seeds: those are thin lines in one colour, their mean a thick one.

use super::run::Run;
use crate::error::Result;
use crate::run::history::Metrics;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// Text and axes, faint lines, ground: on a light page and on a dark one.
pub const INK: [RGBColor; 2] = [RGBColor(0x24, 0x29, 0x2F), RGBColor(0xD0, 0xD7, 0xDE)];
pub const FAINT: [RGBColor; 2] = [RGBColor(0xE4, 0xE8, 0xEC), RGBColor(0x2B, 0x32, 0x3B)];
pub const GROUND: [RGBColor; 2] = [RGBColor(0xFF, 0xFF, 0xFF), RGBColor(0x15, 0x1A, 0x21)];
/// The baseline, then the others in turn.
pub const SERIES: [[RGBColor; 2]; 7] = [
    [RGBColor(0x6E, 0x77, 0x81), RGBColor(0x9B, 0xA5, 0xB1)],
    [RGBColor(0x09, 0x69, 0xDA), RGBColor(0x58, 0xA6, 0xFF)],
    [RGBColor(0xBC, 0x4C, 0x00), RGBColor(0xF0, 0x88, 0x3E)],
    [RGBColor(0x1A, 0x7F, 0x37), RGBColor(0x3F, 0xB9, 0x50)],
    [RGBColor(0x82, 0x50, 0xDF), RGBColor(0xBC, 0x8C, 0xFF)],
    [RGBColor(0xBF, 0x39, 0x89), RGBColor(0xF7, 0x78, 0xBA)],
    [RGBColor(0x1B, 0x7C, 0x83), RGBColor(0x56, 0xD4, 0xDD)],
];

/// Colours of the series at `index` (0 = baseline); the others share them out in turn.
pub fn colors(index: usize) -> [RGBColor; 2] {
    if index == 0 { SERIES[0] } else { SERIES[1 + (index - 1) % (SERIES.len() - 1)] }
}

const WIDTH: u32 = 820;
pub const HEIGHT: u32 = 430;
const PANEL_HEIGHT: u32 = 240;
const FONT: (&str, u32) = ("sans-serif", 15);
/// More switches than this are not marked one by one: they would cover the curve.
const MARKED_SWITCHES: usize = 24;
/// A validation plot's top over the loss to meet: the coarse levels show, and one per cent of the loss can be seen.
const ZOOM: f64 = 1.6;
/// The same for training losses, which are noisier and differ more between levels.
const TRAIN_ZOOM: f64 = 1.8;

type Point = (f64, f64);
pub type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One run, or the runs of several seeds.
pub struct Series<'a> {
    pub label: String,
    pub traces: Vec<Trace<'a>>,
}

/// A run, and the step at which it met the loss to meet.
pub struct Trace<'a> {
    pub run: &'a Run,
    pub met: Option<u64>,
}

/// The loss to meet, drawn as a dashed line.
pub struct Target {
    pub loss: f64,
    pub label: String,
}

/// A plot: what to call its file after `report-`, its heading, and its SVG.
pub struct Plot {
    pub name: &'static str,
    pub title: &'static str,
    pub svg: String,
}

/// What validation loss is drawn against.
struct Axis {
    name: &'static str,
    title: &'static str,
    /// Without its unit.
    label: &'static str,
    /// Units in rising order with their size.
    units: &'static [(&'static str, f64)],
    of: fn(&Metrics) -> f64,
}

const FLOP_UNITS: &[(&str, f64)] =
    &[("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15), ("EFLOP", 1e18), ("ZFLOP", 1e21)];

const AXES: [Axis; 4] = [
    Axis {
        name: "flops",
        title: "Validation loss against FLOPs (blocks and head)",
        label: "model FLOPs, blocks and head",
        units: FLOP_UNITS,
        of: |m| m.flops_total as f64,
    },
    Axis {
        name: "flops-blocks",
        title: "Validation loss against FLOPs of the blocks alone",
        label: "model FLOPs, blocks alone",
        units: FLOP_UNITS,
        of: |m| m.flops_blocks as f64,
    },
    Axis {
        name: "time",
        title: "Validation loss against time",
        label: "wall-clock time",
        units: &[("s", 1.0), ("min", 60.0), ("h", 3600.0), ("days", 86400.0)],
        of: |m| m.elapsed_s,
    },
    Axis {
        name: "steps",
        title: "Validation loss against steps",
        label: "optimizer steps, all levels",
        units: &[("", 1.0)],
        of: |m| m.step as f64,
    },
];

/// All plots of a report: validation loss against each axis, then training loss with the levels.
pub fn all(series: &[Series], target: &Target) -> Result<Vec<Plot>> {
    let validation = AXES.iter().map(|axis| {
        let svg = draw(HEIGHT, |area| validation(&area, series, target, axis))?;
        Ok(Plot { name: axis.name, title: axis.title, svg })
    });
    let training = || {
        let panels = series.iter().enumerate();
        let panels: Vec<Panel> =
            panels.filter_map(|(i, s)| Some((colors(i)[0], &*s.label, s.traces.first()?.run))).collect();
        let svg = draw(PANEL_HEIGHT * panels.len() as u32, |area| training(&area, &panels, target))?;
        Ok(Plot { name: "train", title: "Training loss and the net that is trained", svg })
    };
    validation.chain(std::iter::once_with(training)).collect()
}

/// An SVG of `height` pixels that `content` fills.
pub fn draw(height: u32, content: impl FnOnce(Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    area.fill(&GROUND[0])?;
    content(area)?;
    Ok(svg)
}

/// Validation losses of all series against `axis`, zoomed in on the loss to meet.
fn validation(area: &Area, series: &[Series], target: &Target, axis: &Axis) -> Result<()> {
    let ends = series.iter().flat_map(|s| &s.traces).filter_map(|trace| trace.run.history.last());
    let x_max = ends.map(axis.of).fold(0.0, f64::max);
    let &(unit, size) = axis.units.iter().rev().find(|(_, size)| x_max >= 2.0 * size).unwrap_or(&axis.units[0]);
    let label = if unit.is_empty() { axis.label.to_owned() } else { format!("{} [{unit}]", axis.label) };
    let x = |line: &Metrics| (axis.of)(line) / size;
    let means: Vec<Vec<Point>> = series.iter().map(|s| mean(&s.traces, x)).collect();

    let losses = zoomed(&means, target.loss * ZOOM);
    let x_range = 0.0..(x_max / size * 1.02).max(f64::MIN_POSITIVE);
    let mut chart = chart(area, x_range, losses.clone(), &label, "validation loss [nats/token]")?;
    let line = [(0.0, target.loss), (x_max / size * 1.02, target.loss)];
    chart.draw_series(DashedLineSeries::new(line, 6, 4, INK[0].stroke_width(1)))?;
    for (index, (s, mean)) in series.iter().zip(&means).enumerate() {
        let color = colors(index)[0];
        let seen = |at: &Point| at.1 <= losses.end;
        let many = s.traces.len() > 1;
        for trace in &s.traces {
            let curve = curve(trace.run, x);
            if many {
                curve_below(&mut chart, losses.end, &curve, color.mix(0.45).stroke_width(1))?;
            }
            let met = trace.run.evaluations().find(|(line, _)| Some(line.step) == trace.met);
            let radius = if many { 5 } else { 7 };
            chart.draw_series(met.map(|(line, loss)| Circle::new((x(line), loss), radius, color.stroke_width(2))))?;
        }
        curve_below(&mut chart, losses.end, mean, color.stroke_width(2))?;
        chart.draw_series(mean.iter().copied().filter(seen).map(|at| Circle::new(at, 2, color.filled())))?;
        let switches = s.traces.first().map_or(Vec::new(), |trace| switches(trace.run));
        let switches = switches.into_iter().filter_map(|line| on(mean, x(line)));
        chart.draw_series(switches.filter(seen).map(|at| TriangleMarker::new(at, 6, color.filled())))?;
    }
    legend(&mut chart, series, target)
}

/// Evaluations of `run` against `x`.
fn curve(run: &Run, x: impl Fn(&Metrics) -> f64) -> Vec<Point> {
    run.evaluations().map(|(line, loss)| (x(line), loss)).collect()
}

/// Means over the runs at each step at which all of them were evaluated.
fn mean(traces: &[Trace], x: impl Fn(&Metrics) -> f64) -> Vec<Point> {
    let Some((first, others)) = traces.split_first() else { return Vec::new() };
    let evaluations = first.run.evaluations().filter_map(|(line, loss)| {
        let mut sum = (x(line), loss);
        for trace in others {
            let (line, loss) = trace.run.evaluations().find(|(other, _)| other.step == line.step)?;
            sum = (sum.0 + x(line), sum.1 + loss);
        }
        Some((sum.0 / traces.len() as f64, sum.1 / traces.len() as f64))
    });
    evaluations.collect()
}

/// Colour and name of a series, and its first run.
type Panel<'a> = (RGBColor, &'a str, &'a Run);

/// Training losses, a panel a series, over bands that show which net is trained.
fn training(area: &Area, panels: &[Panel], target: &Target) -> Result<()> {
    let step_max = panels.iter().filter_map(|(.., run)| run.history.last()).map(|m| m.step).max().unwrap_or(0);
    let losses =
        |run: &Run| run.history.iter().filter(|m| m.loss.is_finite()).map(|m| (m.step as f64, m.loss)).collect();
    let curves: Vec<Vec<Point>> = panels.iter().map(|(.., run)| losses(run)).collect();
    let losses = zoomed(&curves, target.loss * TRAIN_ZOOM);
    let areas = area.split_evenly((panels.len(), 1));
    for (area, (&(color, name, run), curve)) in areas.iter().zip(panels.iter().zip(&curves)) {
        let label = format!("optimizer steps of {name}");
        let x_range = 0.0..(step_max as f64).max(1.0);
        let mut chart = chart(area, x_range, losses.clone(), &label, "training loss [nats/token]")?;
        bands(&mut chart, run, step_max as f64, losses.clone(), color)?;
        curve_below(&mut chart, losses.end, curve, color.stroke_width(1))?;
    }
    Ok(())
}

/// A tinted band a phase, darker on coarser levels, and the number of blocks where there is room for it.
fn bands(chart: &mut Chart, run: &Run, step_max: f64, losses: Range<f64>, color: RGBColor) -> Result<()> {
    let mut start = 0.0;
    for phase in run.phases() {
        let (level, rows, end) = (phase[0].level, phase[0].rows, phase[phase.len() - 1].step as f64);
        let tint = color.mix((0.1 * level as f64).min(0.5));
        chart.draw_series([Rectangle::new([(start, losses.start), (end, losses.end)], tint.filled())])?;
        let text = format!("{rows} block{}", if rows == 1 { "" } else { "s" });
        // Half an em a letter is about what a sans-serif takes.
        let room = (end - start) / step_max.max(1.0) * f64::from(WIDTH - 100);
        if room > text.len() as f64 * 0.55 * f64::from(FONT.1) {
            let style = FONT.into_font().color(&INK[0]).pos(Pos::new(HPos::Center, VPos::Top));
            let top = losses.end - 0.03 * (losses.end - losses.start);
            chart.draw_series([Text::new(text, ((start + end) / 2.0, top), style)])?;
        }
        start = end;
    }
    Ok(())
}

/// Axes and grid of a plot, with plotters' own number of ticks.
fn chart<'a, 'b>(
    area: &'a Area<'b>,
    x: Range<f64>,
    y: Range<f64>,
    x_label: &str,
    y_label: &str,
) -> Result<Chart<'a, 'b>> {
    chart_with(area, x, y, x_label, y_label, (11, &|value| short(*value)))
}

/// As [`chart`], with at most so many ticks on the x axis, named by the function.
pub fn chart_with<'a, 'b>(
    area: &'a Area<'b>,
    x: Range<f64>,
    y: Range<f64>,
    x_label: &str,
    y_label: &str,
    (x_ticks, x_name): (usize, &dyn Fn(&f64) -> String),
) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(22)
        .x_label_area_size(48)
        .y_label_area_size(66)
        .build_cartesian_2d(x, y)?;
    let text = FONT.into_font().color(&INK[0]);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT[0])
        .axis_style(INK[0])
        .label_style(text.clone())
        .axis_desc_style(text)
        .x_desc(x_label)
        .y_desc(y_label)
        .x_labels(x_ticks)
        .y_labels(7)
        .x_label_formatter(&x_name)
        .y_label_formatter(&|value| short(*value))
        .draw()?;
    Ok(chart)
}

/// Series by colour, then the marks.
fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, series: &[Series], target: &Target) -> Result<()> {
    let ink = INK[0];
    for (index, s) in series.iter().enumerate() {
        let style = colors(index)[0].stroke_width(3);
        let none = LineSeries::new(std::iter::empty::<Point>(), style);
        let label = s.label.as_str();
        chart.draw_series(none)?.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    let none = || LineSeries::new(std::iter::empty::<Point>(), ink);
    chart
        .draw_series(none())?
        .label(target.label.as_str())
        .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 18, y)], 6, 4, ink.stroke_width(1)));
    chart
        .draw_series(none())?
        .label("first at or under it")
        .legend(move |(x, y)| Circle::new((x + 9, y), 6, ink.stroke_width(2)));
    if series.iter().flat_map(|s| &s.traces).any(|trace| !switches(trace.run).is_empty()) {
        chart
            .draw_series(none())?
            .label("switch of level")
            .legend(move |(x, y)| TriangleMarker::new((x + 9, y), 6, ink.filled()));
    }
    labels(chart, SeriesLabelPosition::UpperRight)
}

/// The box with the names of the series.
pub fn labels<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Result<()> {
    chart
        .configure_series_labels()
        .position(position)
        .margin(8)
        .legend_area_size(26)
        .label_font(FONT.into_font().color(&INK[0]))
        .background_style(GROUND[0].mix(0.85))
        .border_style(FAINT[0])
        .draw()?;
    Ok(())
}

/// Draws the parts of `curve` at or under `top`, cut where it crosses.
fn curve_below(chart: &mut Chart, top: f64, curve: &[Point], style: ShapeStyle) -> Result<()> {
    for piece in below(top, curve) {
        chart.draw_series(LineSeries::new(piece, style))?;
    }
    Ok(())
}

/// The connected parts of `curve` at or under `top`.
fn below(top: f64, curve: &[Point]) -> Vec<Vec<Point>> {
    let mut pieces: Vec<Vec<Point>> = Vec::new();
    for (&a, &b) in curve.iter().zip(&curve[1.min(curve.len())..]) {
        if a.1 > top && b.1 > top {
            continue;
        }
        let cut = || (a.0 + (top - a.1) / (b.1 - a.1) * (b.0 - a.0), top);
        let (start, end) = (if a.1 > top { cut() } else { a }, if b.1 > top { cut() } else { b });
        match pieces.last_mut() {
            Some(piece) if piece.last() == Some(&start) => piece.push(end),
            _ => pieces.push(vec![start, end]),
        }
    }
    pieces
}

/// The point of `curve` at `x`, between its evaluations by linear interpolation.
fn on(curve: &[Point], x: f64) -> Option<Point> {
    let after = curve.iter().position(|point| point.0 >= x)?;
    let (a, b) = (curve[after.saturating_sub(1)], curve[after]);
    let t = if b.0 > a.0 { (x - a.0) / (b.0 - a.0) } else { 1.0 };
    Some((x, a.1 + t * (b.1 - a.1)))
}

/// The last line before each switch of level, or none where they are too many to be marked.
fn switches(run: &Run) -> Vec<&Metrics> {
    let mut last: Vec<&Metrics> = run.phases().filter_map(|phase| phase.last()).collect();
    last.pop();
    if last.len() > MARKED_SWITCHES { Vec::new() } else { last }
}

/// A loss axis up to `top`, or as far as it takes to show something of every curve.
fn zoomed(curves: &[Vec<Point>], top: f64) -> Range<f64> {
    let losses = || curves.iter().flatten().map(|point| point.1);
    let lowest = |curve: &Vec<Point>| curve.iter().map(|point| point.1).reduce(f64::min);
    let (low, high) = (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
    let needed = curves.iter().filter_map(lowest).fold(f64::NEG_INFINITY, f64::max) * 1.05;
    let top = top.max(needed).min(high);
    let margin = (0.06 * (top - low)).max(1e-3);
    if low.is_finite() { low - margin..top + margin } else { 0.0..1.0 }
}

/// A tick label without the digits that floating-point steps leave behind.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
pub mod tests {
    use super::super::run::tests::{metrics, run};
    use super::*;

    fn target(loss: f64) -> Target {
        Target { loss, label: "final loss".to_owned() }
    }

    /// A baseline of one run and two seeds of a faster one.
    pub fn two_series<T>(f: impl FnOnce(&[Series], &Target) -> T) -> T {
        let fine = run("base", (1..=10).map(|i| metrics(100 * i, 0, 4, Some(1.0 + 4.0 / i as f64))).collect(), "");
        let coarse = |at: f64| {
            let line = |i: u64| metrics(100 * i, usize::from(i < 7), 2, Some(at + 5.0 / i as f64));
            run("fast", (1..=10).map(line).collect(), "")
        };
        let (a, b) = (coarse(0.9), coarse(0.7));
        let trace = |run, met| Trace { run, met };
        let series = [
            Series { label: "base".to_owned(), traces: vec![trace(&fine, Some(1000))] },
            Series { label: "<fast>".to_owned(), traces: vec![trace(&a, Some(1000)), trace(&b, None)] },
        ];
        f(&series, &target(1.4))
    }

    #[test]
    fn every_plot_is_whole_and_names_its_unit() {
        let plots = two_series(|series, target| all(series, target).unwrap());
        assert_eq!(
            plots.iter().map(|plot| plot.name).collect::<Vec<_>>(),
            ["flops", "flops-blocks", "time", "steps", "train"]
        );
        for plot in &plots {
            assert!(plot.svg.starts_with("<svg") && plot.svg.trim_end().ends_with("</svg>"), "{}", plot.name);
            assert!(plot.svg.contains("[nats/token]") && !plot.svg.contains("NaN"), "{}", plot.name);
        }
        assert!(plots[0].svg.contains("[PFLOP]") && plots[2].svg.contains("[min]"));
        assert!(plots[0].svg.contains("&lt;fast&gt;") && plots[0].svg.contains("switch of level"));
        assert!(plots[4].svg.contains("4 blocks"));
    }

    #[test]
    fn a_mean_is_over_the_evaluations_that_all_runs_have() {
        let lines = |steps: &[u64], loss: f64| steps.iter().map(|&step| metrics(step, 0, 1, Some(loss))).collect();
        let (a, b) = (run("a", lines(&[100, 200, 300], 1.0), ""), run("b", lines(&[100, 300], 2.0), ""));
        let traces = [&a, &b].map(|run| Trace { run, met: None });
        assert_eq!(mean(&traces, |line| line.step as f64), [(100.0, 1.5), (300.0, 1.5)]);
    }

    #[test]
    fn curves_are_cut_at_the_top() {
        let curve = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0), (3.0, 5.0), (4.0, 5.0), (5.0, 1.0)];
        let expected = [vec![(0.5, 3.0), (1.0, 2.0), (2.0, 1.0), (2.5, 3.0)], vec![(4.5, 3.0), (5.0, 1.0)]];
        assert_eq!(below(3.0, &curve), expected);
        assert_eq!(below(3.0, &[]), Vec::<Vec<Point>>::new());
    }

    #[test]
    fn a_switch_between_two_evaluations_lies_on_the_line_between_them() {
        let curve = [(1.0, 4.0), (3.0, 2.0)];
        assert_eq!(on(&curve, 1.5), Some((1.5, 3.5)));
        assert_eq!(on(&curve, 0.5), Some((0.5, 4.0)));
        assert_eq!(on(&curve, 3.5), None);
    }

    #[test]
    fn runs_with_nothing_to_draw_still_give_plots() {
        let runs = [run("a", vec![metrics(0, 0, 1, Some(2.0))], ""), run("b", vec![], "")];
        let series = |run| Series { label: "x".to_owned(), traces: vec![Trace { run, met: None }] };
        let lone = [series(&runs[0]), series(&runs[1]), Series { label: "none".to_owned(), traces: vec![] }];
        assert!(all(&lone, &target(2.0)).unwrap().iter().all(|plot| !plot.svg.contains("NaN")));
    }
}
