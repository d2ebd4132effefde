//! What a study shows: time, efficiency and communication against ranks, a row for each mode, number of ranks and level.

use super::file::{Mode, Point, Run, Study};
use super::measure::{Sample, is_finished, samples};
use crate::cli::machine::{Forecast, LevelForecast, Machine};
use crate::cli::report::run::{self, Settings};
use crate::cli::report::statistics::Statistic;
use crate::cli::text::{percent, seconds, table};
use crate::config;
use crate::error::Result;
use crate::run::history;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write;

/// [`Serialize`] gives `--json`.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub title: String,
    /// The machine that was predicted for.
    pub machine: Option<String>,
    pub rows: Vec<Row>,
    /// Why the figures may not mean what they seem to.
    pub warnings: Vec<String>,
    /// That of the first run of each point.
    #[serde(skip)]
    pub provenance: Vec<(String, Settings)>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub mode: Mode,
    #[serde(flatten)]
    pub point: Point,
    pub ranks: usize,
    pub level: usize,
    pub blocks: usize,
    /// Null where no run has figures yet.
    pub measured: Option<Measured>,
    pub predicted: Option<Predicted>,
}

/// Mean and deviation over the runs of a kind.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub runs: usize,
    pub step_s: Statistic,
    pub tokens_per_s: Statistic,
    pub tokens_per_s_rank: Statistic,
    /// Tokens/s a rank over those of the fewest ranks in the same mode and level; null while those are not measured.
    pub efficiency: Option<Statistic>,
    /// Share of the time in which even the slowest rank waits for communication.
    pub exposed: Statistic,
    /// Share of the time that the mean rank waits for the slowest, besides.
    pub imbalance: Statistic,
    pub flops_per_s_rank: Statistic,
    pub mfu: Option<Statistic>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Predicted {
    pub step_s: f64,
    pub tokens_per_s_rank: f64,
    /// As the measured one.
    pub efficiency: f64,
    pub exposed: f64,
}

impl Report {
    /// From the runs of `study`, finished or not; beside them what the model says of `machine`.
    pub fn measured(study: &Study, machine: Option<&Machine>) -> Result<Report> {
        let mut report = Report { title: format!("Scaling of {}", study.title), ..Report::default() };
        report.machine = machine.map(|machine| machine.name.clone());
        let steps = study.base_config()?.run.steps;
        let (mut all, mut open) = (0, 0);
        for &point in &study.points {
            let runs = study.runs(point);
            (all, open) = (all + runs.len(), open + runs.iter().filter(|run| !is_finished(&run.dir, steps)).count());
            for &mode in &study.modes {
                report.add_point(study, mode, point, &runs, machine)?;
            }
        }
        if open > 0 {
            report.warnings.push(format!("{open} of {all} runs are not finished"));
        }
        report.finish();
        Ok(report)
    }

    /// The rows of one mode and point, a level each.
    fn add_point(
        &mut self,
        study: &Study,
        mode: Mode,
        point: Point,
        runs: &[Run],
        machine: Option<&Machine>,
    ) -> Result<()> {
        let begun = |run: &&Run| run.mode == mode && run.dir.join(history::FILE_NAME).is_file();
        let runs: Vec<run::Run> =
            runs.iter().filter(begun).map(|run| run::Run::load(&run.dir)).collect::<Result<_>>()?;
        if let Some(first) = runs.first().filter(|_| self.provenance.iter().all(|(name, _)| *name != point.name())) {
            self.provenance.push((point.name(), first.provenance.clone()));
        }
        let samples: Vec<Vec<Sample>> = runs.iter().map(samples).collect();
        let config = config::load(&study.config_file(mode, point), &[])?;
        let forecast = machine.map(|machine| Forecast::new(&config, machine, point.ranks())).transpose()?;
        for level in 0..config.levels.count {
            let of_level = |samples: &Vec<Sample>| samples.iter().find(|sample| sample.level == level).copied();
            let samples: Vec<Sample> = samples.iter().filter_map(of_level).collect();
            let predicted = forecast.as_ref().map(|forecast| &forecast.levels[level]);
            self.rows.push(Row {
                mode,
                point,
                ranks: point.ranks(),
                level,
                blocks: config.rows(level),
                measured: Measured::of(&samples, point.ranks()),
                predicted: predicted.map(|level| Predicted::of(level, point.ranks())),
            });
        }
        Ok(())
    }

    /// Rows in the order of tables, their efficiencies, and warnings about what runs differ in.
    pub fn finish(&mut self) {
        self.rows.sort_by_key(|row| (row.mode as usize, row.level, row.ranks, row.point.nodes));
        for i in 0..self.rows.len() {
            let base = self.rows.iter().find(|base| (base.mode, base.level) == (self.rows[i].mode, self.rows[i].level));
            let Some(base) = base.cloned() else { continue };
            let row = &mut self.rows[i];
            if let (Some(measured), Some(base)) = (&mut row.measured, base.measured) {
                measured.efficiency = Some(measured.tokens_per_s_rank.scaled(1.0 / base.tokens_per_s_rank.mean));
            }
            if let (Some(predicted), Some(base)) = (&mut row.predicted, base.predicted) {
                predicted.efficiency = predicted.tokens_per_s_rank / base.tokens_per_s_rank;
            }
        }
        for key in ["version", "commit", "cpu", "mpi", "threads_per_rank"] {
            let values: BTreeSet<_> = self.provenance.iter().map(|(_, settings)| settings.get(key)).collect();
            if values.len() > 1 {
                self.warnings.push(format!("the runs differ in {key}, so their times cannot be compared"));
            }
        }
        let blank = self.rows.iter().filter(|row| row.measured.is_none() && row.predicted.is_none()).count();
        if blank > 0 {
            self.warnings
                .push(format!("{blank} rows have no figures: runs that have not begun, or too few steps on a level"));
        }
    }

    /// All tables, for a terminal.
    pub fn text(&self) -> String {
        let mut out = format!("{}\n", self.title);
        if self.rows.iter().any(|row| row.measured.is_some()) {
            out += &format!("\n{}", lines(&MEASURED, self.measured_rows()));
        }
        if let Some(machine) = &self.machine {
            out += &format!("\npredicted for {machine}\n{}", lines(&PREDICTED, self.predicted_rows()));
        }
        out
    }

    pub fn measured_rows(&self) -> Vec<[String; MEASURED.len()]> {
        let row = |row: &Row| {
            let Some(measured) = &row.measured else {
                let mut cells = std::array::from_fn(|_| "–".to_owned());
                cells[..3].clone_from_slice(&row.names());
                return cells;
            };
            let [mode, point, level] = row.names();
            [
                mode,
                point,
                level,
                measured.runs.to_string(),
                measured.step_s.scaled(1e3).rounded(2),
                measured.tokens_per_s.rounded(0),
                measured.tokens_per_s_rank.rounded(0),
                measured.efficiency.map_or("–".to_owned(), |efficiency| efficiency.percent()),
                measured.exposed.percent(),
                measured.imbalance.percent(),
                measured.flops_per_s_rank.scaled(1e-9).rounded(2),
                measured.mfu.map_or("–".to_owned(), |mfu| mfu.percent()),
            ]
        };
        self.rows.iter().map(row).collect()
    }

    pub fn predicted_rows(&self) -> Vec<[String; PREDICTED.len()]> {
        let row = |row: &Row| {
            let predicted = row.predicted.as_ref()?;
            let off = row.measured.as_ref().map(|measured| predicted.step_s / measured.step_s.mean - 1.0);
            let [mode, point, level] = row.names();
            Some([
                mode,
                point,
                level,
                seconds(predicted.step_s),
                off.map_or("–".to_owned(), percent),
                format!("{:.0}", predicted.tokens_per_s_rank),
                percent(predicted.efficiency),
                percent(predicted.exposed),
            ])
        };
        self.rows.iter().filter_map(row).collect()
    }

    /// All figures, a line a row.
    pub fn csv(&self) -> String {
        let statistics = [
            "step_s",
            "tokens_per_s",
            "tokens_per_s_rank",
            "efficiency",
            "exposed",
            "imbalance",
            "flops_per_s_rank",
            "mfu",
        ];
        let mut out = "mode,nodes,ranks_per_node,ranks,level,blocks,runs".to_owned();
        statistics.iter().for_each(|name| out += &format!(",{name}_mean,{name}_sd"));
        out += ",predicted_step_s,predicted_tokens_per_s_rank,predicted_efficiency,predicted_exposed\n";
        for row in &self.rows {
            let Row { mode, point, ranks, level, blocks, measured, predicted } = row;
            let (nodes, per_node) = (point.nodes, point.ranks_per_node);
            let runs = measured.as_ref().map_or(0, |measured| measured.runs);
            let _ = write!(out, "{},{nodes},{per_node},{ranks},{level},{blocks},{runs}", mode.name());
            for value in measured.as_ref().map_or([None; 8], Measured::all) {
                let cell = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
                let _ = write!(out, ",{},{}", cell(value.map(|v| v.mean)), cell(value.and_then(|v| v.sd)));
            }
            let _ = match predicted {
                Some(Predicted { step_s, tokens_per_s_rank, efficiency, exposed }) => {
                    writeln!(out, ",{step_s},{tokens_per_s_rank},{efficiency},{exposed}")
                }
                None => writeln!(out, ",,,,"),
            };
        }
        out
    }
}

/// Of [`Report::measured_rows`].
pub const MEASURED: [&str; 12] = [
    "mode",
    "nodes x ranks",
    "level",
    "runs",
    "step [ms]",
    "tokens/s",
    "a rank",
    "efficiency",
    "exposed",
    "imbalance",
    "GFLOP/s a rank",
    "MFU",
];
/// Of [`Report::predicted_rows`].
pub const PREDICTED: [&str; 8] =
    ["mode", "nodes x ranks", "level", "step", "off by", "tokens/s a rank", "efficiency", "exposed"];

fn lines<const N: usize>(head: &[&str; N], rows: Vec<[String; N]>) -> String {
    table(&std::iter::once(head.map(str::to_owned)).chain(rows).collect::<Vec<_>>())
}

impl Row {
    fn names(&self) -> [String; 3] {
        [self.mode.name().to_owned(), self.point.name(), format!("{} ({} blocks)", self.level, self.blocks)]
    }
}

impl Measured {
    /// Of a level's samples, a run each.
    fn of(samples: &[Sample], ranks: usize) -> Option<Measured> {
        let statistic = |of: fn(&Sample) -> f64| Statistic::of(samples.iter().map(of));
        let a_rank = 1.0 / ranks as f64;
        Some(Measured {
            runs: samples.len(),
            step_s: statistic(|sample| sample.step_s)?,
            tokens_per_s: statistic(|sample| sample.tokens_per_s)?,
            tokens_per_s_rank: statistic(|sample| sample.tokens_per_s)?.scaled(a_rank),
            efficiency: None,
            exposed: statistic(|sample| sample.exposed)?,
            imbalance: statistic(|sample| sample.imbalance)?,
            flops_per_s_rank: statistic(|sample| sample.flops_per_s)?.scaled(a_rank),
            mfu: Statistic::of(samples.iter().filter_map(|sample| sample.mfu)),
        })
    }

    fn all(&self) -> [Option<Statistic>; 8] {
        let Measured { step_s, tokens_per_s, tokens_per_s_rank, exposed, imbalance, flops_per_s_rank, .. } = *self;
        let [step_s, tokens_per_s, tokens_per_s_rank] = [step_s, tokens_per_s, tokens_per_s_rank].map(Some);
        let [exposed, imbalance, flops_per_s_rank] = [exposed, imbalance, flops_per_s_rank].map(Some);
        [step_s, tokens_per_s, tokens_per_s_rank, self.efficiency, exposed, imbalance, flops_per_s_rank, self.mfu]
    }
}

impl Predicted {
    pub fn of(level: &LevelForecast, ranks: usize) -> Predicted {
        Predicted {
            step_s: level.step_s,
            tokens_per_s_rank: level.tokens_per_s / ranks as f64,
            efficiency: 1.0,
            exposed: level.exposed(),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::file::tests::{config, study};
    use super::*;
    use crate::cli::machine;
    use crate::cli::report::run::tests::metrics;
    use crate::run::Balance;
    use crate::run::history::{Log, Metrics};

    /// A study of two points whose runs are done: two nodes take 1/1.6 of the time of one with the same batch, and two repeats
    /// differ a little.
    pub fn finished(dir: &std::path::Path) -> Study {
        let study = study(dir);
        std::fs::create_dir_all(dir.join("configs")).unwrap();
        std::fs::write(dir.join("config.toml"), config::to_toml(&config())).unwrap();
        for &point in &study.points {
            for mode in Mode::ALL {
                let config = mode.config(&config(), 2, point.ranks()).unwrap();
                std::fs::write(study.config_file(mode, point), config::to_toml(&config)).unwrap();
            }
            for run in study.runs(point) {
                std::fs::create_dir_all(&run.dir).unwrap();
                let slower = if run.name.ends_with('2') { 0.9 } else { 1.1 };
                let tokens_per_s = 1000.0 * slower * if point.nodes == 2 { 1.6 } else { 1.0 };
                let mut log = Log::open(&run.dir.join("metrics.jsonl"), 0).unwrap();
                for step in 1..=20 {
                    let ranks = Some(Balance { waiting: 0.3, exposed: 0.1, slowest: 1, slowest_computes: 0.9 });
                    let line = metrics(step, usize::from(step <= 10), 1, (step == 20).then_some(2.0));
                    log.append(&Metrics { tokens_per_s, ranks, mfu: Some(0.5), ..line }).unwrap();
                }
                std::fs::write(run.dir.join("provenance.json"), r#"[{"version": "1", "hosts": {"a": 2}}]"#).unwrap();
            }
        }
        study
    }

    #[test]
    fn efficiency_is_that_of_a_rank_against_the_fewest() {
        let dir = tempfile::tempdir().unwrap();
        let report = Report::measured(&finished(dir.path()), Some(&machine::test_machine())).unwrap();
        assert_eq!((report.rows.len(), report.warnings.len()), (8, 0), "{:?}", report.warnings);
        let row = report.rows.iter().find(|row| row.mode == Mode::Weak && row.level == 1 && row.ranks == 4).unwrap();
        let measured = row.measured.as_ref().unwrap();
        let efficiency = measured.efficiency.unwrap();
        assert!(
            (efficiency.mean - 0.8).abs() < 1e-12 && (efficiency.sd.unwrap() - 0.8 * 0.2 / 2f64.sqrt()).abs() < 1e-12
        );
        assert!((measured.exposed.mean - 0.1).abs() < 1e-12 && (measured.imbalance.mean - 0.2).abs() < 1e-12);
        assert!((measured.tokens_per_s_rank.mean - 400.0).abs() < 1e-9 && measured.runs == 2);
        let text = report.text();
        for expected in ["80.0 ± 11.3 %", "2x2", "0 (4 blocks)", "predicted for test"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let csv = report.csv();
        let columns: BTreeSet<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert_eq!((csv.lines().count(), columns.len()), (9, 1), "{csv}");
    }

    #[test]
    fn what_is_not_done_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let study = finished(dir.path());
        std::fs::remove_dir_all(study.dir.join("runs/weak-2x2-1")).unwrap();
        std::fs::remove_dir_all(study.dir.join("runs/weak-2x2-2")).unwrap();
        let report = Report::measured(&study, None).unwrap();
        assert!(report.warnings[0].contains("2 of 8 runs are not finished"), "{:?}", report.warnings);
        assert!(report.warnings[1].contains("2 rows have no figures"), "{:?}", report.warnings);
    }
}
