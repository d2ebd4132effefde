//! Training: the only place where data, model, levels, optimizer, cycle, ranks and checkpoints meet.
//!
//! [`train`] sets a run up and interprets its list of ops. [`learner`] does the numerical work of an op, [`progress`] knows
//! how far the run is, [`recorder`] writes metrics and the log, [`stop`] decides when to save or stop.

mod directory;
mod environment;
mod learner;
mod progress;
mod recorder;
mod resolve;
mod stop;
mod train;

pub mod history;

pub use directory::RunDirectory;
pub use environment::{cores, use_threads};
pub use learner::{Learner, evaluate_model};
pub use progress::Progress;
pub use resolve::resolve_vocab;
pub use train::{Options, train};
