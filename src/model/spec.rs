//! Shape of the net.

use crate::config::{Config, Dtype, Integrator, Parametrization};
use candle_core::DType;

/// Shape of the net, from a config and the vocabulary.
#[derive(Clone, Debug)]
pub struct Spec {
    /// V: rows of the token embedding, padding included.
    pub vocab: usize,
    /// d: channels of the state.
    pub width: usize,
    pub heads: usize,
    /// T: tokens in a sequence.
    pub context: usize,
    /// N: blocks on the finest level.
    pub depth: usize,
    pub integrator: Integrator,
    pub parametrization: Parametrization,
    /// The head is the token embedding's matrix.
    pub tied: bool,
    pub init_std: f64,
    pub recompute: bool,
    /// Element type of activations and of the weights in products.
    pub dtype: DType,
}

impl Spec {
    /// `config.model.vocab` must be resolved.
    pub fn new(config: &Config) -> Spec {
        let model = &config.model;
        Spec {
            vocab: model.vocab.expect("the vocabulary is resolved from the data before a net is built"),
            width: model.width,
            heads: model.heads,
            context: config.data.context,
            depth: model.depth,
            integrator: model.integrator,
            parametrization: model.parametrization,
            tied: model.tied,
            init_std: model.init_std,
            recompute: model.recompute,
            dtype: match model.dtype {
                Dtype::F32 => DType::F32,
                Dtype::Bf16 => DType::BF16,
            },
        }
    }

    /// A net small enough for tests.
    #[cfg(test)]
    pub fn small() -> Spec {
        Spec {
            vocab: 11,
            width: 8,
            heads: 2,
            context: 5,
            depth: 3,
            integrator: Integrator::Euler,
            parametrization: Parametrization::Standard,
            tied: true,
            init_std: 0.02,
            recompute: false,
            dtype: DType::F32,
        }
    }
}
