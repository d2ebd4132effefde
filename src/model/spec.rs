//! Shape of the net.

use crate::config::{Config, Integrator, Parametrization};

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
        }
    }
}
