//! Training: the only place where data, model, levels, optimizer, cycle, ranks and checkpoints meet.
//!
//! [`train`] sets a run up and goes through its plan, round by round; `execute` carries out this rank's part of a round, with
//! the groups of ranks of `teams`; [`Learner`] does the numerical work; [`Progress`] knows how far the run is; `shards` joins what ranks keep columns of; `recorder` writes metrics and the log; `stop` says when to save or stop.

mod balance;
mod console;
mod device;
mod directory;
mod environment;
mod execute;
mod gradient;
pub mod history;
mod learner;
mod memory;
mod progress;
mod recorder;
mod resolve;
mod shards;
mod stop;
mod teams;
mod train;

pub use balance::Balance;
pub use console::Console;
pub use device::{device, group_of_gpus};
pub use directory::{Difference, RunDirectory, differences};
pub use environment::{cpu_model, gemm_peak, use_threads};
pub use gradient::{Ends, Receivers, Target, micro_batch};
pub use learner::{Learner, StepReport};
pub use memory::memory;
pub use progress::Progress;
pub use resolve::resolve_vocab;
pub use train::{DIVERGED, Options, train};
