use super::Layout;
use crate::config::{Config, Integrator, Parametrization};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Shape of the net, from a config and the vocabulary.
#[derive(Clone, Debug)]
pub struct Spec {
    pub vocab: usize,
    pub width: usize,
    pub heads: usize,
    pub context: usize,
    pub depth: usize,
    pub integrator: Integrator,
    pub parametrization: Parametrization,
    pub tied: bool,
    pub init_std: f64,
    pub recompute: bool,
}

impl Spec {
    /// `config.model.vocab` must be resolved.
    pub fn new(_config: &Config) -> Spec {
        todo!()
    }
}

/// Views of the parameters (or, alike, the gradients) of one net: a list of trajectory rows and the ends.
pub struct Params {
    /* blocks: Vec<BlockViews>, ends: EndsViews */ pub h: f64,
}

impl Params {
    /// Views, no copies, of `rows` of `trajectory` [_, P] and of `ends` [1, E]; `h` is the step size of a net of these rows.
    pub fn view(_spec: &Spec, _trajectory: &Tensor, _rows: &[usize], _ends: &Tensor, _h: f64) -> Result<Params> {
        todo!()
    }
    pub fn rows(&self) -> usize {
        todo!()
    }
}

/// Part of the gradient that is final: the backward pass will not touch it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Gradient of the net's n-th block, n = 0..rows (position in the net, not row of the trajectory).
    Block(usize),
    Ends,
}

/// Forward pass and discrete adjoint of an ODE Transformer, with the workspace of one micro-batch.
pub struct Net {
    _private: (),
}

impl Net {
    /// Workspace for up to `max_rows` blocks and `micro_batch` sequences.
    pub fn new(_spec: &Spec, _max_rows: usize, _micro_batch: usize, _dtype: DType, _device: &Device) -> Result<Net> {
        todo!()
    }
    /// Σ over tokens of the cross-entropy, forward only. tokens and targets hold `sequences * context` entries, sequences ≤ micro_batch.
    pub fn loss(&mut self, _params: &Params, _tokens: &[u32], _targets: &[u32]) -> Result<f64> {
        todo!()
    }
    /// As [`Net::loss`], and grads += scale * gradient. Calls `ready` as soon as a part of the gradient is final, and
    /// `progress` between operations (communication may be moved on there).
    pub fn loss_and_gradient(
        &mut self,
        _params: &Params,
        _grads: &Params,
        _tokens: &[u32],
        _targets: &[u32],
        _scale: f64,
        _ready: &mut dyn FnMut(Ready) -> Result<()>,
    ) -> Result<f64> {
        todo!()
    }
}

/// The initial ends [1, E] and trajectory [depth, P], from `seed`: every segment of every row drawn from its own stream.
pub fn initialize(_spec: &Spec, _seed: u64, _dtype: DType, _device: &Device) -> Result<(Tensor, Tensor)> {
    let _ = Layout::block;
    todo!()
}
