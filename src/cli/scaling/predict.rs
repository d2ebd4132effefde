//! `vcycle scaling predict`

use super::file::{Mode, Point};
use super::report::{Predicted, Report, Row};
use super::{Output, counts, distinct, plots, write};
use crate::cli::ConfigArgs;
use crate::cli::machine::{Forecast, LevelForecast, Machine};
use crate::error::{Context, Result, ensure};
use crate::run::resolve_vocab;
use std::path::PathBuf;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The machine (TOML; docs/SCALING.md explains its keys).
    #[arg(long, value_name = "FILE.toml")]
    machine: PathBuf,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096")]
    ranks: Vec<usize>,
    /// `strong`: the config's batch on all; it stops at a sequence a rank. `weak`: the config's batch on the fewest.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["strong", "weak"])]
    modes: Vec<Mode>,
    /// Write the efficiencies as one picture to this file.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

pub fn run(args: &Args) -> Result<()> {
    let mut config = args.config.load()?;
    resolve_vocab(&mut config)?;
    ensure!(config.model.vocab.is_some(), "give model.vocab, or data at data.dir");
    let machine = Machine::load(&args.machine)?;
    let ranks = counts("--ranks", &args.ranks)?;
    let fewest = ranks[0];
    let title = args.config.config.file_stem().context("the config has no file name")?.to_string_lossy();
    let mut report = Report { title: format!("Scaling of {title}, predicted"), ..Report::default() };
    report.machine = Some(machine.name.clone());
    for mode in distinct(&args.modes) {
        for &ranks in ranks.iter().filter(|&&ranks| mode == Mode::Weak || ranks <= config.batches().0) {
            let forecast = Forecast::new(&mode.config(&config, fewest, ranks)?, &machine, ranks)?;
            report.rows.extend(rows(&forecast, &machine, mode));
        }
    }
    report.finish();
    args.output.write(&report)?;
    args.plot.as_ref().map_or(Ok(()), |file| write(file, &plots::efficiency(&report)?))
}

/// A row a level.
fn rows(forecast: &Forecast, machine: &Machine, mode: Mode) -> Vec<Row> {
    let ranks = forecast.ranks;
    let (nodes, ranks_per_node) = machine.shape(ranks);
    let row = |level: &LevelForecast| Row {
        mode,
        point: Point { nodes, ranks_per_node },
        ranks,
        level: level.level,
        blocks: level.rows,
        measured: None,
        predicted: Some(Predicted::of(level, ranks)),
    };
    forecast.levels.iter().map(row).collect()
}
