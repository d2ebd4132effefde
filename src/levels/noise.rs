//! Noise on twins, which are copies of each other after an ascent.

use super::{Group, Hierarchy};
use crate::error::Result;
use crate::ops::residual::scale_add;
use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

impl Hierarchy {
    /// θ_cn+j += ν s (ξ_j - ξ̄) for the c twins that each coarse row has become on `level`; ν = `levels.noise`, s the root mean
    /// square of each hidden matrix, ξ normal. The twins' mean stays what it is.
    ///
    /// A function of the seed, the level and the updates so far: every rank adds the same, and so does a resumed run.
    pub(super) fn part_twins(&self, level: usize) -> Result<()> {
        if self.rules.noise == 0.0 {
            return Ok(());
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        // Initial parameters have streams of small numbers.
        rng.set_stream(1 << 63 | self.ends(level).updates[0] << 8 | level as u64);
        let group = self.group(level);
        let noise = noise(group, self.rules.noise, self.rules.factor, &mut rng)?.to_dtype(group.theta.dtype())?;
        scale_add(1.0, &group.theta, 1.0, &noise.to_device(group.theta.device())?)
    }
}

/// ν s (ξ_j - ξ̄) for all twins of `group` [R, P], on the CPU.
fn noise(group: &Group, share: f64, twins: usize, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let (rows, width) = group.theta.dims2()?;
    let theta = group.theta.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut noise = vec![0f32; rows * width];
    for first in (0..rows).step_by(twins) {
        for matrix in group.layout.segments.iter().filter(|segment| segment.matrices > 0) {
            let start = first * width + matrix.offset;
            let square: f64 = theta[start..][..matrix.len()].iter().map(|&x| x as f64 * x as f64).sum();
            let scale = share * (square / matrix.len() as f64).sqrt();
            for i in start..start + matrix.len() {
                let xi: Vec<f64> = (0..twins).map(|_| rng.sample(StandardNormal)).collect();
                let mean = xi.iter().sum::<f64>() / twins as f64;
                xi.iter().enumerate().for_each(|(j, xi)| noise[i + j * width] = (scale * (xi - mean)) as f32);
            }
        }
    }
    Ok(Tensor::from_vec(noise, (rows, width), &candle_core::Device::Cpu)?)
}
