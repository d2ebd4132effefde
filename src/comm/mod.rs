//! Communication between ranks.
//!
//! [`World`] is the job: it starts MPI if a launcher started this process, and ends all ranks alike.
//! [`Communicator`] is a group of ranks; [`Buckets`] exchanges rows of tensors over one, sums gradients above all, while the
//! backward pass goes on.
//!
//! | implementation | ranks are |
//! | --- | --- |
//! | [`Solo`] | this process alone |
//! | [`thread`] | threads of one process, for tests |
//! | `mpi` (feature `mpi`) | processes under `mpirun` or `srun` |
//! | `nccl` (feature `cuda`) | those of another one, each with a GPU |

mod buckets;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod parcel;
mod pool;
#[cfg(feature = "mpi")]
mod roll_call;
mod solo;
pub mod thread;
mod world;

pub use buckets::Buckets;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
pub use solo::Solo;
pub use world::{World, agree};

use crate::error::{Result, ensure};
use candle_core::Tensor;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Handle of an exchange that was started and not yet waited for.
#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy)]
pub struct Ticket(pub u64);

/// Element-wise reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    Sum,
    /// Undefined where a value is NaN.
    Max,
}

/// What ranks make, in place, of tensors that all of them have. The tensors come in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exchange {
    /// Every tensor = its sum over all ranks.
    #[default]
    Sum,
    /// A part for each rank: on it the tensors = their sums over all ranks. What the other ranks have there is of no use
    /// afterwards.
    Scatter,
    /// A part for each rank: on all ranks the tensors = that rank's.
    Gather,
}

impl Exchange {
    /// As it is called in messages, with its number of elements.
    fn describe(self, len: usize) -> String {
        match self {
            Exchange::Sum => format!("sum of {len} values"),
            Exchange::Scatter => format!("scattered sum of {len} values"),
            Exchange::Gather => format!("gather of {len} values"),
        }
    }

    fn check(self, parts: &[Vec<Tensor>], ranks: usize) -> Result<()> {
        let count = parts.len();
        ensure!(self == Exchange::Sum || count == ranks, "{self:?}: {count} parts for {ranks} ranks");
        Ok(())
    }
}

/// A group of ranks. All ranks call the collectives (every method but `rank`, `size`, `waited`,
/// `progress`, `wait`, `set_timeout` and `abort`) in the same order. One host thread uses it.
///
/// A reduction gives the same bits on every rank, and the same bits again when it is repeated. After an error a group is
/// of no more use: end the job.
pub trait Communicator {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// A collective that does not complete within this time is an error that names it. Default: 600 s.
    fn set_timeout(&mut self, timeout: Duration);
    /// What this rank has spent waiting in collectives so far, over all groups of the job.
    fn waited(&self) -> Duration;
    /// Starts an exchange of f32 tensors of any shapes, contiguous, the same on all ranks. Nobody else touches them until
    /// [`Communicator::wait`].
    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket>;
    /// Moves started exchanges on; cheap; call it often while computing.
    fn progress(&mut self) -> Result<()>;
    /// Finishes a started exchange. Any order of tickets will do.
    fn wait(&mut self, ticket: Ticket) -> Result<()>;
    /// Blocking reduction of a few numbers.
    fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()>;
    /// `data` of `root` to all ranks; the others' content and length are replaced.
    fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()>;
    fn barrier(&mut self) -> Result<()>;
    /// Ranks with the same colour form a new group, ordered by rank; `None` joins none. Every rank calls it, and drops
    /// the groups it joined in the same order as the other ranks.
    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>>;
    /// Ends every rank of the job at once.
    fn abort(&self, code: i32) -> !;
}

/// Time limit of a collective until [`Communicator::set_timeout`] is called.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// The message of a collective that ran into the time limit, with what is known of `why`.
fn timed_out(rank: usize, op: &dyn std::fmt::Display, timeout: Duration, why: &str) -> crate::error::Error {
    crate::error::anyhow!(
        "rank {rank} waited {} s in the collective `{op}`: {why} (parallel.timeout sets this limit)",
        timeout.as_secs_f64()
    )
}

/// To be set by SIGTERM in a program that does not end at once by it: a rank that then waits for one that does not answer
/// says so before it is killed. For a launcher that has lost a rank sends it to the others.
pub fn told_to_end() -> &'static Arc<AtomicBool> {
    static TOLD: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    TOLD.get_or_init(Arc::default)
}

/// The MPI library and its version; `None` without MPI.
pub fn library() -> Option<String> {
    #[cfg(feature = "mpi")]
    return ::mpi::environment::library_version()
        .ok()
        .map(|version| version.trim_matches(['\0', '\n', ' ']).to_owned());
    #[cfg(not(feature = "mpi"))]
    None
}
