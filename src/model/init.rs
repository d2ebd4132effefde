//! Initial parameters.

use super::{Init, Layout, Spec};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

/// The initial ends [1, E] and trajectory [depth, P].
///
/// Every segment of every row has its own stream of one ChaCha generator seeded with `seed`, so that a row does not
/// depend on how many others there are or on the number of threads.
pub fn initialize(spec: &Spec, seed: u64, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
    let ends = rows(&Layout::ends(spec), 1, Streams { seed, first: 0 });
    let trajectory = rows(&Layout::block(spec), spec.depth, Streams { seed, first: 1 });
    let tensor = |values: Vec<f32>, rows: usize| -> Result<Tensor> {
        let shape = (rows, values.len() / rows);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
    };
    Ok((tensor(ends, 1)?, tensor(trajectory, spec.depth)?))
}

/// Random streams numbered by row (`first` is the number of row 0) and segment.
#[derive(Clone, Copy)]
struct Streams {
    seed: u64,
    first: u64,
}

impl Streams {
    fn get(self, row: usize, segment: usize) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(((self.first + row as u64) << 8) | segment as u64);
        rng
    }
}

/// `count` initial rows of a layout, one after the other.
fn rows(layout: &Layout, count: usize, streams: Streams) -> Vec<f32> {
    let mut values = vec![0.0; count * layout.len()];
    values.par_chunks_mut(layout.len()).enumerate().for_each(|(row, values)| {
        for (index, segment) in layout.segments.iter().enumerate() {
            let values = &mut values[segment.offset..][..segment.len()];
            match segment.init {
                Init::Normal(std) => normal(values, std, streams.get(row, index)),
                Init::Zeros => {}
                Init::LayerNorm => values[..segment.len() / 2].fill(1.0),
            }
        }
    });
    values
}

fn normal(values: &mut [f32], std: f64, mut rng: ChaCha8Rng) {
    values.fill_with(|| (std * rng.sample::<f64, _>(StandardNormal)) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| v as f64).sum::<f64>() / n;
        let variance = values.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n;
        (mean, variance.sqrt())
    }

    #[test]
    fn segments_have_their_deviation() {
        let spec = Spec { width: 64, depth: 8, ..Spec::small() };
        let layout = Layout::block(&spec);
        let values = rows(&layout, 1, Streams { seed: 3, first: 1 });
        for segment in &layout.segments {
            let (mean, std) = moments(&values[segment.offset..][..segment.len()]);
            let expected = match segment.name {
                "attn/qkv/weight" | "mlp/fc/weight" => 0.02,
                "attn/proj/weight" | "mlp/proj/weight" => 0.005,
                "ln1" | "ln2" => 0.5,
                _ => 0.0,
            };
            // 5 standard errors of a standard deviation over 64² values
            assert!((std - expected).abs() <= 0.056 * expected, "{}: {std}", segment.name);
            assert!(segment.init == Init::LayerNorm || mean.abs() <= 0.08 * expected, "{}: {mean}", segment.name);
        }
    }

    #[test]
    fn a_row_depends_on_the_seed_and_its_index_only() {
        let spec = Spec::small();
        let layout = Layout::block(&spec);
        let (two, three) =
            (rows(&layout, 2, Streams { seed: 7, first: 1 }), rows(&layout, 3, Streams { seed: 7, first: 1 }));
        assert_eq!(two, three[..two.len()]);
        assert_ne!(two[..layout.len()], two[layout.len()..]);
        assert_ne!(two, rows(&layout, 2, Streams { seed: 8, first: 1 }));
    }

    /// The same seed gives the same net on every machine and in every later version.
    #[test]
    fn values_are_portable() {
        let mut values = [0.0; 3];
        normal(&mut values, 1.0, Streams { seed: 1337, first: 1 }.get(0, 1));
        assert_eq!(values, [0.7576245, 0.05720165, 1.1535772]);
    }
}
