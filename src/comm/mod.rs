//! Communication between ranks.

use crate::error::Result;

/// Handle of a reduction that was started and not yet waited for.
#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy)]
pub struct Ticket(pub u64);

/// Element-wise reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    Sum,
    Max,
}

/// A group of ranks. All ranks call the collectives in the same order. One host thread uses it.
pub trait Communicator {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Starts the sum of `data` over all ranks; the communicator owns the buffer until [`Communicator::wait`].
    fn start_sum(&mut self, data: Vec<f32>) -> Result<Ticket>;
    /// Moves started reductions on; cheap; call it often while computing.
    fn progress(&mut self) -> Result<()>;
    /// Finishes a started reduction and gives the buffer back with the sums.
    fn wait(&mut self, ticket: Ticket) -> Result<Vec<f32>>;
    /// Blocking reduction of a few numbers.
    fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()>;
    /// `data` of `root` to all ranks; the others' content and length are replaced.
    fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()>;
    fn barrier(&mut self) -> Result<()>;
    /// Ranks with the same colour form a new group, ordered by rank; `None` joins none. Every rank calls it.
    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>>;
    /// Ends every rank of the job at once.
    fn abort(&self, code: i32) -> !;
}
