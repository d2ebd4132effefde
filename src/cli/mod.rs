//! The commands of `vcycle`, one a file.

mod bench;
mod checkpoint;
mod compare;
mod data;
mod doctor;
mod eval;
mod machine;
mod places;
mod plan;
mod report;
mod scaling;
mod study;
mod text;
mod train;

use crate::comm::World;
use crate::error::{Outcome, Result, exit_code};
use crate::run::Console;
use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};

/// Train deep ODE Transformers faster, on several discretisations of depth.
///
/// A decoder is explicit Euler on dx/dt = F(x, θ(t)). Coarser steps in t give cheaper nets with the same embeddings;
/// training across them reaches the same loss with fewer FLOPs.
///
/// A first run:
///   vcycle data prepare texts/ --out data
///   vcycle plan configs/quickstart.toml --set data.dir=data
///   mpirun -n 2 vcycle train configs/quickstart.toml --set data.dir=data --run-dir runs/first
#[derive(Parser)]
#[command(version, max_term_width = 100, verbatim_doc_comment)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Turn text into token shards, or look into them.
    Data(data::Args),
    // Without a comment here the one of its arguments is the help.
    Plan(plan::Args),
    Train(train::Args),
    /// Validation loss of a trained net.
    Eval(eval::Args),
    /// What runs saved against a baseline, at matched validation loss.
    Compare(compare::Args),
    Study(study::Args),
    Scaling(scaling::Args),
    /// Measure the speed of this machine at vcycle's work.
    Bench(bench::Args),
    /// List, verify or show checkpoints.
    Checkpoint(checkpoint::Args),
    /// Check that this machine is fit to train on.
    Doctor(doctor::Args),
    /// Print the config reference (docs/CONFIG.md) as Markdown.
    ConfigReference,
}

/// Reads the command line and runs the command. Returns the exit status: 0 done, 1 error, 75 stopped after a checkpoint;
/// wrong usage prints help and exits 2.
pub fn main() -> u8 {
    let Cli { command } = Cli::parse();
    if !command.is_collective() {
        if !matches!(command, Command::Study(_)) {
            end_with_the_reader();
        }
        Console::install(0);
        return finish(run(command, &mut World::solo()));
    }
    match World::init() {
        Ok(mut world) => {
            let result = run(command, &mut world);
            world.finish(result)
        }
        Err(error) => finish(Err(error)),
    }
}

/// `vcycle ... | head` ends without a word, as other programs do: Rust ignores SIGPIPE, and printing would panic. Not for
/// commands that go on for hours: those must not end because nobody reads.
fn end_with_the_reader() {
    // SAFETY: sets a disposition before any thread is started.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

impl Command {
    /// Whether it runs on all ranks of a job, not on each alone.
    fn is_collective(&self) -> bool {
        match self {
            Command::Train(_) => true,
            Command::Bench(args) => args.is_collective(),
            _ => false,
        }
    }
}

fn run(command: Command, world: &mut World) -> Result<Outcome> {
    match command {
        Command::Train(args) => train::run(args, world),
        Command::Data(args) => data::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Study(args) => study::run(args),
        Command::Scaling(args) => scaling::run(args),
        Command::Bench(args) => bench::run(args, world),
        Command::Checkpoint(args) => checkpoint::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::ConfigReference => {
            print!("{}", crate::config::reference());
            Ok(Outcome::Done)
        }
    }
}

/// Prints an error, with the chain of its causes in one line.
fn finish(result: Result<Outcome>) -> u8 {
    if let Err(error) = &result {
        eprintln!("error: {error:#}");
    }
    exit_code(&result)
}

/// A config file with overrides, as several commands take it.
#[derive(Args, Debug)]
struct ConfigArgs {
    /// Config file (TOML); docs/CONFIG.md lists every key.
    config: PathBuf,
    /// Override a key of the config; may be repeated.
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE", value_parser = setting)]
    overrides: Vec<String>,
}

impl ConfigArgs {
    fn load(&self) -> Result<crate::config::Config> {
        crate::config::load(&self.config, &self.overrides)
    }
}

/// The shape of a `--set`; whether the key exists is for the config to say.
fn setting(text: &str) -> std::result::Result<String, String> {
    let well_formed = text.split_once('=').is_some_and(|(path, _)| path.contains('.'));
    well_formed.then(|| text.to_owned()).ok_or("expected table.key=value, as in optimizer.lr=3e-4".to_owned())
}

/// `runs/NAME` for the config `…/NAME.toml`.
fn default_run_dir(config: &Path) -> PathBuf {
    Path::new("runs").join(config.file_stem().unwrap_or_default())
}
