//! Where the time of a step goes, by part of the net.

use crate::config::Config;
use crate::cycle::level_flops;
use crate::model::{Layout, Spec};
use crate::ops::profile::Entry;
use serde::Serialize;

/// One part of a step; parts that are matrix products have a rate.
#[derive(Debug, PartialEq, Serialize)]
pub struct Part {
    pub part: &'static str,
    pub seconds: f64,
    /// Of the step's time.
    pub share: f64,
    /// Model FLOPs over seconds.
    pub flops_per_s: Option<f64>,
}

/// Matrix products, in the order of the forward pass, then the rest.
const PARTS: [&str; 14] = [
    "attn/qkv",
    "attention",
    "attn/proj",
    "mlp/fc",
    "mlp/proj",
    "head",
    "cross-entropy",
    "layer norm",
    "gelu",
    "residual",
    "embedding",
    "optimizer",
    "gradient norm",
    OTHER,
];
const HEAD: usize = 5;
const SOFTMAX: usize = 6;

/// What no op has counted.
const OTHER: &str = "other";

/// The parts of a step that took `seconds`, from its profile. They add up to it.
pub fn breakdown(config: &Config, spec: &Spec, seconds: f64, entries: &[Entry]) -> Vec<Part> {
    let blocks = Layout::block(spec);
    let mut own = PARTS.map(|name| entries.iter().filter(|e| part(e, &blocks) == name).map(|e| e.seconds).sum::<f64>());
    // The softmax is timed inside the classifier's op: the rest of that are the head's products.
    own[HEAD] -= own[SOFTMAX];
    own[PARTS.len() - 1] += seconds - own.iter().sum::<f64>();
    let rows = PARTS.iter().zip(own);
    rows.map(|(&part, own)| Part {
        part,
        seconds: own,
        share: own / seconds,
        flops_per_s: flops(part, config, spec, &blocks).map(|flops| flops / own),
    })
    .collect()
}

/// The part that an op belongs to. A product is known by the shape of its weight.
fn part(entry: &Entry, blocks: &Layout) -> &'static str {
    match entry.op.split("::").next().unwrap_or(entry.op) {
        "linear" => blocks
            .segments
            .iter()
            .find(|segment| segment.shape == entry.weight)
            .and_then(|segment| segment.name.strip_suffix("/weight"))
            .unwrap_or(OTHER),
        "classifier" if entry.op.ends_with("softmax") => "cross-entropy",
        "classifier" => "head",
        "attention" => "attention",
        "layer_norm" => "layer norm",
        "gelu" => "gelu",
        "residual" | "copy" => "residual",
        "embedding" => "embedding",
        "optimizer" => "optimizer",
        // What is filled in a step are gradients with zeros; the norm is for clipping.
        "norm" | "fill" => "gradient norm",
        _ => OTHER,
    }
}

/// Model FLOPs of a part in a step: those of [`level_flops`], by part.
fn flops(name: &str, config: &Config, spec: &Spec, blocks: &Layout) -> Option<f64> {
    let all = level_flops(config, spec, 0);
    let (d, context) = (spec.width as f64, spec.context as f64);
    // 72 d² + 12 d T for a block and token
    let of_blocks = |flops: f64| Some(all.blocks as f64 * flops / (72.0 * d * d + 12.0 * d * context));
    match name {
        "head" => Some((all.total - all.blocks) as f64),
        "attention" => of_blocks(12.0 * d * context),
        _ => {
            let segment = blocks.segments.iter().find(|s| s.name.strip_suffix("/weight") == Some(name))?;
            of_blocks(6.0 * segment.len() as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::configure;
    use super::*;

    #[test]
    fn parts_add_up_to_the_step_and_its_flops() {
        let (config, _folder) = configure(["model.vocab=512"]).unwrap();
        let spec = Spec::new(&config);
        let entry = |op, weight, seconds| Entry { op, weight, calls: 1, seconds };
        let entries = [
            entry("linear::forward", [768, 256], 1.0),
            entry("linear::backward_weight", [768, 256], 2.0),
            entry("classifier::loss_and_gradient", [0, 0], 5.0),
            entry("classifier::softmax", [0, 0], 1.5),
            entry("fill", [0, 0], 0.25),
        ];
        let parts = breakdown(&config, &spec, 10.0, &entries);
        let seconds = |name| parts.iter().find(|p| p.part == name).unwrap().seconds;
        assert_eq!(["attn/qkv", "head", "cross-entropy", OTHER].map(seconds), [3.0, 3.5, 1.5, 1.75]);
        assert_eq!(parts.iter().map(|p| p.seconds).sum::<f64>(), 10.0);
        let flops: f64 = PARTS.iter().filter_map(|name| flops(name, &config, &spec, &Layout::block(&spec))).sum();
        let expected = level_flops(&config, &spec, 0).total as f64;
        assert!((flops / expected - 1.0).abs() < 1e-12);
    }
}
