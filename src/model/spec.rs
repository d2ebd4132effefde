//! Shape of the net.

use crate::config::{Config, DeviceKind, Dtype, Integrator, Parametrization};
use crate::ops::access;
use crate::ops::matrix::Factors;
use candle_core::{DType, Device};

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
    /// Element type of activations and of the weights that are read with them.
    pub dtype: DType,
    /// What a CPU rounds the factors of products to; a GPU multiplies what it is given.
    pub factors: Factors,
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
            dtype: match (model.dtype, config.parallel.device) {
                (Dtype::Bf16, DeviceKind::Cuda) => DType::BF16,
                (Dtype::Bf16, DeviceKind::Auto) if cfg!(feature = "cuda") => DType::BF16,
                _ => DType::F32,
            },
            factors: match model.dtype {
                Dtype::F32 => Factors::Exact,
                Dtype::Bf16 => Factors::Bf16,
            },
        }
    }

    /// The same net on `device`: what a CPU keeps is f32.
    pub fn on(self, device: &Device) -> Spec {
        let dtype = if access::computes_in_bf16(device) { self.dtype } else { DType::F32 };
        Spec { dtype, ..self }
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
            factors: Factors::Exact,
        }
    }
}
