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
mod mover;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod parcel;
mod pool;
pub mod ring;
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
use std::fmt::{Display, Formatter};
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
/// `progress`, `wait`, `set_timeout` and `abort`) in the same order. One thread of the caller's uses it.
///
/// A reduction gives the same bits on every rank, and the same bits again when it is repeated. After an error a group is
/// of no more use: end the job.
pub trait Communicator {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// A collective that does not complete within this time is an error that names it, early enough for the job to end in time.
    /// Default: 600 s.
    fn set_timeout(&mut self, timeout: Duration);
    /// What this rank has spent waiting in collectives so far, over all groups of the job.
    fn waited(&self) -> Duration;
    /// Starts an exchange of f32 tensors of any shapes, contiguous, the same on all ranks. Nobody else touches them until
    /// [`Communicator::wait`].
    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket>;
    /// Moves started exchanges on; cheap; call it often while computing. (With MPI a thread does so too.)
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

/// What a rank does with the end of a time limit T, so that all ranks have ended when it is over: two seconds are left for the
/// launcher, which kills the last of them.
///
/// ```text
/// T − 4r   asks the others what they wait in        r = 1 s, and T/8 where that is less
/// T − 3r   gives up
/// + r/4    for each lower rank that has answered, 3 at most: says why, and ends the job
/// ```
#[cfg(feature = "mpi")]
struct Ending {
    call: Duration,
    give_up: Duration,
    turn: Duration,
}

#[cfg(feature = "mpi")]
impl Ending {
    fn of(timeout: Duration) -> Ending {
        let r = (timeout / 8).min(Duration::from_secs(1));
        Ending { call: timeout - 4 * r, give_up: timeout - 3 * r, turn: r / 4 }
    }
}

/// The error of a collective that ran into its time limit.
#[derive(Debug)]
struct TimedOut {
    message: String,
    /// How long lower ranks have to end the job first.
    turn: Duration,
}

impl TimedOut {
    /// `why`: what is known of it.
    fn new(rank: usize, op: &dyn Display, timeout: Duration, why: &str, turn: Duration) -> TimedOut {
        let limit = timeout.as_secs_f64();
        let message = format!(
            "rank {rank} waited too long in the collective `{op}`: {why} (parallel.timeout = {limit} s is the limit)"
        );
        TimedOut { message, turn }
    }
}

impl Display for TimedOut {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TimedOut {}

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
