//! Training: the only place where data, model, levels, optimizer, cycle, ranks and checkpoints meet.
//!
//! [`train`] sets a run up and interprets its list of ops; [`Learner`] does the numerical work of an op; [`Progress`] knows
//! how far the run is; `recorder` writes metrics and the log; `stop` says when to save or stop.

mod console;
mod device;
mod directory;
mod environment;
mod gradient;
pub mod history;
mod learner;
mod progress;
mod recorder;
mod resolve;
mod stop;
mod train;

pub use console::Console;
pub use directory::{Difference, RunDirectory, differences};
pub use environment::{gemm_peak, use_threads};
pub use gradient::{Target, micro_batch};
pub use learner::{Learner, StepReport};
pub use progress::Progress;
pub use resolve::resolve_vocab;
pub use train::{DIVERGED, Options, train};
