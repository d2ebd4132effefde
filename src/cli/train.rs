//! `vcycle train`

use super::{ConfigArgs, default_run_dir};
use crate::comm::World;
use crate::error::{Outcome, Result};
use crate::run::{self, Console, Options};
use std::path::PathBuf;

/// Train the net of a config
///
/// Start it with mpirun or srun for several ranks: they share the global batch, and K ranks give the losses of one.
///   mpirun -n 2 vcycle train configs/quickstart.toml --set data.dir=data --run-dir runs/first
///
/// SIGTERM, SIGINT and SIGUSR1 on any rank, or `run.max_minutes`, end it with a checkpoint and exit status 75; the same
/// command with --resume goes on from there, bit for bit with the same number of ranks.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder for metrics, log and checkpoints. Default: runs/<name of the config>.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Go on from the newest intact checkpoint in the run directory; start anew if there is none.
    #[arg(long)]
    resume: bool,
}

/// Trains in `world`, the ranks of this job.
pub fn run(args: Args, world: &mut World) -> Result<Outcome> {
    let console = Console::install(world.rank());
    let config = world.agree(args.config.load())?;
    let threads = world.agree(run::use_threads(config.parallel.threads, world.local_size()))?;
    let options = Options {
        run_dir: args.run_dir.unwrap_or_else(|| default_run_dir(&args.config.config)),
        resume: args.resume,
        threads,
    };
    run::train(config, &options, world.communicator(), &console)
}
