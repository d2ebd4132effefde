//! The hierarchy of depth discretisations: levels, cosets, transfer operators, coherence, optimizer-state transfer.
//!
//! A trajectory is a tensor [N, P]; everything about depth is a matrix on its axis 0. `docs/MULTILEVEL.md` has the
//! mathematics.

mod beside;
mod coherence;
mod group;
mod hierarchy;
mod memory;
mod noise;
mod pull;
mod snapshot;
mod switch;
pub mod transfer;
mod unresolved;

pub use beside::Half;
pub use group::Group;
pub use hierarchy::Hierarchy;
pub use memory::{Memory, memory};
pub use snapshot::{Named, Snapshot};
pub use switch::Gradient;

#[cfg(test)]
mod tests;
