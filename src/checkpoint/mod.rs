//! Checkpoints: one visit of all state writes and reads it.
//!
//! A checkpoint is a folder `RUN/checkpoints/step-NNNNNNNN/`:
//!
//! | file | holds |
//! | --- | --- |
//! | `model.h5` | the fine net; config (TOML) and step as attributes |
//! | `state.h5` | optimizer moments, coarse levels, coherence terms |
//! | `progress.json` | every small value: position in the plan, sampler cursor, counters |
//! | `manifest.json` | size and SHA-256 of the others; written last |
//!
//! [`Writer`] copies the state into host buffers, the only thing that training waits for, and writes them from a thread
//! of its own under a temporary name; fsync and rename make it appear whole or not at all. [`latest`] finds the newest
//! checkpoint that is intact, [`Checkpoint::restore`] reads it back. `docs/CHECKPOINTS.md` is the format's description.
//!
//! HDF5 has one lock for the whole process: nothing else may use HDF5 in a hot path while a checkpoint is written.

mod folder;
mod manifest;
mod reader;
mod snapshot;
mod writer;

pub use folder::Folder;
pub use manifest::{Check, File, Manifest, NewerFormat};
pub use reader::{Checkpoint, Dataset, latest};
pub use writer::Writer;

use crate::error::{Context, Result};
use crate::model::Layout;
use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of the format that this vcycle writes; it reads this one and all before it.
pub const FORMAT_VERSION: u32 = 1;

/// All that a run must remember. `visit` names every piece once; a [`Visitor`] reads or writes it, so what is saved and
/// what is restored cannot differ.
///
/// A visit that reads must find its tensors allocated; what decides on them (say, whether a coherence term exists)
/// is a value visited before them. Writing visits on every rank, so that rank 0 can get from the others what it lacks; each rank
/// reads by itself.
pub trait State {
    fn visit(&mut self, visitor: &mut dyn Visitor) -> Result<()>;
}

/// Which file of a checkpoint a tensor goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// `model.h5`: the fine net, all that `vcycle eval` needs.
    Model,
    /// `state.h5`: coarse levels, optimizer moments, coherence terms.
    State,
}

impl Part {
    pub const ALL: [Part; 2] = [Part::Model, Part::State];

    /// Name of the part's file in a checkpoint.
    pub fn file(self) -> &'static str {
        match self {
            Part::Model => "model.h5",
            Part::State => "state.h5",
        }
    }
}

/// Reads or writes the pieces of a [`State`].
pub trait Visitor {
    /// Rows [R, P] (f32 or f64) as one dataset a segment of `layout`: `group/segment.name` is [R, ..shape], depth axis
    /// first. Reading writes into `tensor` in place.
    fn rows(&mut self, part: Part, group: &str, layout: &Layout, tensor: &Tensor) -> Result<()>;
    /// A small value (position, counters, cursor), kept as JSON in `progress.json`. Most states call [`value`].
    fn value(&mut self, name: &str, value: &mut serde_json::Value) -> Result<()>;
}

/// Visits `value` under `name`. Saving fails for a value that would not be read back, such as NaN, which JSON lacks.
pub fn value<T: Serialize + DeserializeOwned>(visitor: &mut dyn Visitor, name: &str, value: &mut T) -> Result<()> {
    let mut json = serde_json::to_value(&*value).with_context(|| format!("the value `{name}` has no form in JSON"))?;
    visitor.value(name, &mut json)?;
    *value = T::deserialize(&json).with_context(|| format!("the value `{name}` cannot be read from {json}"))?;
    Ok(())
}

/// Name of the file of all small values in a checkpoint.
const PROGRESS: &str = "progress.json";

/// Content of `progress.json`.
#[derive(serde::Serialize, serde::Deserialize)]
struct Progress {
    format_version: u32,
    step: u64,
    values: serde_json::Map<String, serde_json::Value>,
}

#[cfg(test)]
mod tests;
