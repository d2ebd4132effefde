//! `vcycle scaling`: how fast one config trains on 1, 2, 4, ... nodes, measured under Slurm or predicted by a model.

mod file;
mod init;
mod measure;
mod page;
mod plots;
mod predict;
mod report;
mod submit;

use super::machine::Machine;
use crate::error::{Context, Outcome, Result, ensure};
use file::{Mode, Study};
use report::Report;
use std::path::{Path, PathBuf};

/// Measure or predict how a config scales with nodes and ranks
///
/// A study is a folder: `init` writes it, `submit` gives its job arrays to Slurm, `report` reads the runs, finished or not:
///   vcycle scaling init configs/gpt2-124m-cascade.toml --out scaling --nodes 1,2,4,8 --ranks-per-node 8
///   vcycle scaling submit scaling -- --partition=long
///   vcycle scaling report scaling --out scaling/report.html
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Write a study: a config for each number of ranks, and a job array for each number of nodes
    Init(init::Args),
    /// Submit the job arrays of a study, without the runs that are finished
    Submit(submit::Args),
    /// Show time, efficiency and exposed communication against ranks, mean and standard deviation over repeats
    Report(ReportArgs),
    /// Show the same as an α-β model of a machine predicts it; nothing is run
    Predict(predict::Args),
}

#[derive(clap::Args, Debug)]
struct ReportArgs {
    /// Folder of the study.
    study: PathBuf,
    /// Beside what was measured, what the model says of the machine in this file.
    #[arg(long, value_name = "FILE.toml")]
    machine: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Where a report goes.
#[derive(clap::Args, Debug)]
struct Output {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write the table with all figures to this file.
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
    /// Write a report with plots to this HTML file, and its plots beside it as SVG files.
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<Outcome> {
    match args.command {
        Command::Init(args) => init::run(&args)?,
        Command::Submit(args) => submit::run(&args)?,
        Command::Report(args) => {
            let machine = args.machine.as_deref().map(Machine::load).transpose()?;
            let report = Report::measured(&Study::load(&args.study)?, machine.as_ref())?;
            args.output.write(&report)?;
        }
        Command::Predict(args) => predict::run(&args)?,
    }
    Ok(Outcome::Done)
}

impl Output {
    fn write(&self, report: &Report) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report)?);
        } else {
            print!("{}", report.text());
        }
        for warning in &report.warnings {
            eprintln!("warning: {warning}");
        }
        if let Some(path) = &self.csv {
            std::fs::write(path, report.csv()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.out.as_ref().map_or(Ok(()), |out| page::write(report, out))
    }
}

/// The modes that a command was asked for, each once.
fn distinct(modes: &[Mode]) -> Vec<Mode> {
    Mode::ALL.into_iter().filter(|mode| modes.contains(mode)).collect()
}

/// Writes a file of a study.
fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Counts in rising order, each once.
fn counts(option: &str, given: &[usize]) -> Result<Vec<usize>> {
    let mut counts = given.to_vec();
    counts.sort_unstable();
    counts.dedup();
    ensure!(
        counts.first().is_some_and(|&least| least > 0),
        "{option}: expected counts from 1 on, as in {option} 1,2,4"
    );
    Ok(counts)
}
