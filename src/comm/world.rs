//! The job: all ranks of a run, from start to end.
//!
//! # How a job ends
//!
//! [`World::finish`] makes all ranks end alike.
//!
//! - Every rank succeeded: MPI is finalised and every rank exits with its code, 0 or 75. After the first rank exits with
//!   75, mpirun may kill the others: `finish` is the last thing a rank does.
//! - Every rank failed, in whatever place (a wrong config): rank 0 prints its error, every rank exits with 1.
//! - Some ranks failed, the others compute on or wait for them: a failing rank waits [`GRACE`] for the others, prints
//!   its error and ends the job with MPI_Abort and code 1. Of several that fail alike the lowest speaks first: see [`turn`].
//! - A rank is missing, and the others run into the time limit: the lowest that is there prints its error and ends the job.
//! - A panic on any thread of a rank ends the job in the same way at once (after [`GRACE`] on ranks other than 0).
//!
//! mpirun exits with the code of the first rank to fail. Open MPI's adds a notice about it ("MPI_ABORT was invoked",
//! "exited with non-zero status"), also for code 75; `mpirun --quiet` leaves it out.
//!
//! Set-up that may fail on one rank only (reading a file) goes through [`World::agree`], so that all ranks know at once.

use super::launch::Launch;
use super::{Communicator, Reduction, Solo, TimedOut, told_to_end};
use crate::error::{Error, Outcome, Result, anyhow, ensure, exit_code};
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a failing rank waits for all others to fail too. Longer than ranks drift apart between two collectives that
/// surround an error they all make; short enough that a job ends within seconds.
const GRACE: Duration = Duration::from_secs(1);

/// What to do when ranks do not find each other.
#[cfg(feature = "mpi")]
const CONNECT: &str = "launch with the mpirun of the MPI that vcycle was built with, or with an MPI plugin of `srun --mpi=list` (srun --mpi=pmix)";
#[cfg(not(feature = "mpi"))]
const CONNECT: &str = "this vcycle was built without MPI and runs one rank; build it with the feature `mpi`";

/// All ranks of the job.
pub struct World {
    all: Box<dyn Communicator>,
    /// The same ranks; used only to find out whether all have failed, when `all` may be in any state.
    failed: Box<dyn Communicator>,
    local_rank: usize,
    local_size: usize,
}

impl World {
    /// Starts MPI if this process was launched as an MPI job, else a job of one rank. Call it once, on the thread that
    /// will communicate; a panic on any thread then ends all ranks.
    pub fn init() -> Result<World> {
        let launch = Launch::of_this_process();
        World::start(launch).inspect_err(|_| {
            // The error is the same on every rank, and they cannot meet: rank 0 speaks, the others leave it the time.
            if launch.rank.is_some_and(|rank| rank != 0) {
                std::thread::sleep(GRACE);
                std::process::exit(1);
            }
        })
    }

    fn start(launch: Launch) -> Result<World> {
        let world = if launch.mpi { World::mpi()? } else { World::solo() };
        if let Some(launched) = launch.size {
            ensure!(
                launched == world.size(),
                "{launched} ranks were launched, but {} could connect: {CONNECT}",
                world.size()
            );
        }
        Ok(world)
    }

    /// A job of this process alone.
    pub fn solo() -> World {
        World { all: Box::new(Solo::default()), failed: Box::new(Solo::default()), local_rank: 0, local_size: 1 }
    }

    #[cfg(feature = "mpi")]
    fn mpi() -> Result<World> {
        use super::mpi::{Mpi, Session};
        let session = Session::start()?;
        let (all, mut failed) = (Mpi::world(&session)?, Mpi::world(&session)?);
        failed.set_timeout(GRACE);
        let (local_rank, local_size) = all.on_this_node()?;
        if all.size() > 1 {
            end_all_ranks_on_panic(all.rank());
        }
        Ok(World { all: Box::new(all), failed: Box::new(failed), local_rank, local_size })
    }

    #[cfg(not(feature = "mpi"))]
    fn mpi() -> Result<World> {
        Ok(World::solo())
    }

    pub fn rank(&self) -> usize {
        self.all.rank()
    }

    pub fn size(&self) -> usize {
        self.all.size()
    }

    /// Rank among the ranks on this node: which of its GPUs or core groups to use.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Number of ranks on this node.
    pub fn local_size(&self) -> usize {
        self.local_size
    }

    pub fn communicator(&mut self) -> &mut dyn Communicator {
        &mut *self.all
    }

    /// As [`agree`], over all ranks of the job.
    pub fn agree<T>(&mut self, result: Result<T>) -> Result<T> {
        agree(&mut *self.all, result)
    }

    /// Ends this rank's part in the job and returns its exit status; see the module's page. Prints the error, if any,
    /// once for all ranks.
    pub fn finish(mut self, result: Result<Outcome>) -> u8 {
        let code = exit_code(&result);
        if let Err(error) = result {
            let alone = match error.downcast_ref::<TimedOut>() {
                Some(limit) => Some(limit.turn),
                None => self.failed.barrier().is_err().then(|| turn(self.rank())),
            };
            if let Some(turn) = alone {
                if !ended_within(turn) {
                    print(self.rank(), &error);
                }
                self.all.abort(code.into());
            }
            if self.rank() == 0 {
                print(0, &error);
            }
            // The message is out before the first rank exits.
            let _ = self.failed.barrier();
        }
        code
    }
}

/// Whether another rank ends the job within `turn`.
fn ended_within(turn: Duration) -> bool {
    let start = Instant::now();
    told_to_end().store(false, Ordering::Relaxed);
    while start.elapsed() < turn && !told_to_end().load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5));
    }
    told_to_end().load(Ordering::Relaxed)
}

/// How long a rank leaves it to lower ones to end the job. They may be the ones that are gone.
fn turn(rank: usize) -> Duration {
    GRACE * rank.min(3) as u32
}

/// All ranks learn whether `result` is an error on any: it then is one on all, the lowest failing rank's, which is named
/// if it is not rank 0. Collective.
pub fn agree<T>(comm: &mut dyn Communicator, result: Result<T>) -> Result<T> {
    // max over failing ranks r of (size - r); 0 if there is none
    let (rank, size) = (comm.rank(), comm.size());
    let mut first = [if result.is_err() { (size - rank) as f64 } else { 0.0 }];
    comm.reduce(&mut first, Reduction::Max)?;
    if first[0] == 0.0 {
        return result;
    }
    let root = size - first[0] as usize;
    let mut message = result.as_ref().err().map(|error| named(rank, error).into_bytes()).unwrap_or_default();
    comm.broadcast(&mut message, root)?;
    match result {
        Err(error) if rank == root && rank == 0 => Err(error),
        _ => Err(anyhow!("{}", String::from_utf8_lossy(&message))),
    }
}

fn named(rank: usize, error: &Error) -> String {
    let text = format!("{error:#}");
    if rank == 0 || text.starts_with("rank ") { text } else { format!("rank {rank}: {text}") }
}

fn print(rank: usize, error: &Error) {
    // In one piece: other ranks and the launcher write to the same terminal. There is nothing to do if nobody reads it.
    let _ = std::io::stderr().write_all(format!("error: {}\n", named(rank, error)).as_bytes());
}

/// Without this the other ranks would wait for one that panicked until their time limit.
#[cfg(feature = "mpi")]
fn end_all_ranks_on_panic(rank: usize) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // All ranks may panic alike: the others give rank 0 the time to end them.
        if rank != 0 {
            std::thread::sleep(GRACE);
        }
        report(panic);
        super::mpi::abort(1)
    }));
}
