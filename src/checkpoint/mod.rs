//! Checkpoints: one visit of all state writes and reads it.

use crate::error::Result;
use crate::model::Layout;
use candle_core::Tensor;

/// All that a run must remember. `visit` names every piece once; a [`Visitor`] reads or writes it, so what is saved and
/// what is restored cannot differ.
pub trait State {
    fn visit(&mut self, visitor: &mut dyn Visitor) -> Result<()>;
}

/// Which file of a checkpoint a tensor goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `model.h5`: the fine net, all that `vcycle eval` needs.
    Model,
    /// `state.h5`: coarse levels, optimizer moments, coherence terms.
    State,
}

/// Reads or writes the pieces of a [`State`].
pub trait Visitor {
    /// Rows [R, P] as one dataset a segment of `layout`: `group/segment.name` is [R, ..shape], depth axis first.
    /// Reading writes into `tensor` in place.
    fn rows(&mut self, part: Part, group: &str, layout: &Layout, tensor: &Tensor) -> Result<()>;
    /// A small value (position, counters, cursor), kept as JSON in `progress.json`.
    fn value(&mut self, name: &str, value: &mut serde_json::Value) -> Result<()>;
}
