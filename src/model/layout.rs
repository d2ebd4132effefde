//! Where each parameter lies in a row of the trajectory, or in the flat tensor of the ends.

use super::Spec;
use crate::config::Parametrization;

/// How a segment is initialised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    Zeros,
    /// A layer norm [2, d]: weight (row 0) one, bias (row 1) zero.
    LayerNorm,
}

/// One named parameter inside a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Path in a checkpoint below `/blocks` or `/ends`: `attn/qkv/weight`.
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// First element in the row.
    pub offset: usize,
    pub init: Init,
    /// Weight decay acts on matrices only.
    pub decay: bool,
    /// Hidden matrices of equal height that it is, one below the other: those that Muon orthogonalises (not embeddings, not
    /// the head). 0 if it is none.
    pub matrices: usize,
}

impl Segment {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The segments of a row, in order, without gaps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    pub segments: Vec<Segment>,
}

impl Layout {
    /// One block, P elements.
    ///
    /// `standard` divides the deviation of the two projections into the residual stream by √(2N) (GPT-2); with
    /// `completep` the step size h = 1/N does that work and no initialisation depends on depth.
    pub fn block(spec: &Spec) -> Layout {
        let (d, std) = (spec.width, spec.init_std);
        let residual_std = match spec.parametrization {
            Parametrization::Standard => std / (2.0 * spec.depth as f64).sqrt(),
            Parametrization::CompleteP => std,
        };
        let mut layout = Layout::default();
        layout.layer_norm("ln1", d);
        layout.linear(["attn/qkv/weight", "attn/qkv/bias"], 3, [3 * d, d], std);
        layout.linear(["attn/proj/weight", "attn/proj/bias"], 1, [d, d], residual_std);
        layout.layer_norm("ln2", d);
        layout.linear(["mlp/fc/weight", "mlp/fc/bias"], 1, [4 * d, d], std);
        layout.linear(["mlp/proj/weight", "mlp/proj/bias"], 1, [d, 4 * d], residual_std);
        layout
    }

    /// The ends, E elements: token embedding, learned positions, final layer norm and, if untied, the head. All
    /// matrices have the deviation `init_std`, the positions too (as in nanoGPT; OpenAI's code draws them with 0.01).
    pub fn ends(spec: &Spec) -> Layout {
        let (d, std) = (spec.width, spec.init_std);
        let mut layout = Layout::default();
        layout.embedding("wte", spec.vocab, d, std);
        layout.embedding("wpe", spec.context, d, std);
        layout.layer_norm("ln_f", d);
        if !spec.tied {
            layout.embedding("head", spec.vocab, d, std);
        }
        layout
    }

    /// P (or E): elements of a row.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.segments.iter().map(Segment::len).sum()
    }

    fn push(&mut self, name: &'static str, shape: Vec<usize>, init: Init, decay: bool, matrices: usize) {
        let offset = self.len();
        self.segments.push(Segment { name, shape, offset, init, decay, matrices });
    }

    fn layer_norm(&mut self, name: &'static str, d: usize) {
        self.push(name, vec![2, d], Init::LayerNorm, false, 0);
    }

    fn linear(&mut self, [weight, bias]: [&'static str; 2], matrices: usize, [outputs, inputs]: [usize; 2], std: f64) {
        self.push(weight, vec![outputs, inputs], Init::Normal(std), true, matrices);
        self.push(bias, vec![outputs], Init::Zeros, false, 0);
    }

    fn embedding(&mut self, name: &'static str, rows: usize, d: usize, std: f64) {
        self.push(name, vec![rows, d], Init::Normal(std), true, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_lie_end_to_end() {
        for tied in [true, false] {
            let spec = Spec { tied, ..Spec::small() };
            for layout in [Layout::block(&spec), Layout::ends(&spec)] {
                let mut end = 0;
                for segment in &layout.segments {
                    assert_eq!(segment.offset, end, "{}", segment.name);
                    end += segment.len();
                }
                assert_eq!(layout.len(), end);
            }
        }
    }

    #[test]
    fn gpt2_has_its_known_number_of_parameters() {
        let spec = Spec { vocab: 50257, width: 768, heads: 12, context: 1024, depth: 12, ..Spec::small() };
        assert_eq!(Layout::ends(&spec).len() + 12 * Layout::block(&spec).len(), 124_439_808);
    }

    #[test]
    fn matrices_decay_and_hidden_matrices_are_orthogonalized() {
        let spec = Spec { tied: false, ..Spec::small() };
        let names = |layout: &Layout, pick: fn(&Segment) -> bool| -> Vec<&str> {
            layout.segments.iter().filter(|s| pick(s)).map(|s| s.name).collect()
        };
        let hidden = ["attn/qkv/weight", "attn/proj/weight", "mlp/fc/weight", "mlp/proj/weight"];
        assert_eq!(names(&Layout::block(&spec), |s| s.decay), hidden);
        assert_eq!(names(&Layout::block(&spec), |s| s.matrices > 0), hidden);
        assert_eq!(names(&Layout::ends(&spec), |s| s.decay), ["wte", "wpe", "head"]);
        assert!(names(&Layout::ends(&spec), |s| s.matrices > 0).is_empty());
    }
}
