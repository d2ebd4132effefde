//! `vcycle study`: a grid of runs, and what they show together.

mod dry_run;
mod file;
mod page;
mod plan;
mod report;
mod runner;
mod state;

use crate::error::{Context, Outcome, Result};
use crate::run::resolve_vocab;
use file::Study;
use state::State;
use std::path::{Path, PathBuf};

/// Run a grid of configs, seeds and overrides, and report what it shows
///
/// A study file names a config, seeds, and arms that differ in a few keys; docs/STUDIES.md explains it:
///   config = "configs/study.toml"
///   seeds = [1, 2, 3]
///   baseline = "flat"
///   [arms.flat]
///   sweep = { optimizer.lr = [1e-3, 2e-3, 4e-3] }
///   [arms.cascade]
///   set = { levels.count = 3, cycle.kind = "cascade" }
///
/// The best value of the baseline's sweep, found with the first seed, holds for all arms.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Do the runs of a study that are not yet finished
    ///
    /// Each is a `vcycle train` of its own in DIR/ARM/[KEY=VALUE/]seed-N. A study may be stopped at any moment: the same
    /// command goes on where it was. SIGTERM, SIGINT and SIGUSR1 end it with checkpoints of all runs and exit status 75. A
    /// run that fails does not keep the others from running.
    Run(RunArgs),
    /// Show losses and savings with mean and standard deviation over seeds
    ///
    /// Savings are those of `vcycle compare`, each seed of an arm against the same seed of the baseline: what it had spent
    /// when the fine net first was at or under the baseline's final validation loss. A mean is given where every seed got
    /// there.
    Report(ReportArgs),
}

#[derive(clap::Args, Debug)]
struct RunArgs {
    /// Study file (TOML).
    study: PathBuf,
    /// Only list the runs, how far they are and what they cost.
    #[arg(long)]
    dry_run: bool,
    /// Only this arm, and the sweep it waits for; may be repeated.
    #[arg(long, value_name = "ARM")]
    only: Vec<String>,
    /// Delete runs of another config that are in the way and do them anew.
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args, Debug)]
struct ReportArgs {
    /// Study file (TOML).
    study: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Write a report with plots to this HTML file, and its plots beside it as SVG files.
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<Outcome> {
    match args.command {
        Command::Run(args) => run_study(&args),
        Command::Report(args) => report_study(&args),
    }
}

fn run_study(args: &RunArgs) -> Result<Outcome> {
    let mut study = Study::load(&args.study)?;
    let mut arms: Vec<usize> = args.only.iter().map(|name| study.arm(name)).collect::<Result<_>>()?;
    if arms.is_empty() {
        arms = (0..study.arms.len()).collect();
    }
    for run in &mut study.runs {
        resolve_vocab(&mut run.config).with_context(|| run.name.clone())?;
    }
    let states = states(&study, args.force && !args.dry_run)?;
    if args.dry_run {
        print!("{}", dry_run::text(&study, &arms, &states));
        return Ok(Outcome::Done);
    }
    runner::run(&study, &arms, states)
}

fn report_study(args: &ReportArgs) -> Result<Outcome> {
    let study = Study::load(&args.study)?;
    let states = states(&study, false)?;
    let report = report::Report::new(&study, &states)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    if let Some(out) = &args.out {
        page::write(&report, out)?;
    }
    Ok(Outcome::Done)
}

/// How far each run of `study` is; with `force`, directories that hold something else are emptied.
fn states(study: &Study, force: bool) -> Result<Vec<State>> {
    let read = |run: &plan::Run| match State::read(run) {
        Err(why) if force => {
            tracing::info!("replacing {}: {why:#}", run.dir.display());
            remove(&run.dir)?;
            Ok(State::New)
        }
        state => state.with_context(|| run.name.clone()),
    };
    study.runs.iter().map(read).collect()
}

fn remove(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("cannot delete {}", dir.display()))
}
