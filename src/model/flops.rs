//! Model FLOPs in the PaLM convention.

use super::Spec;
use super::integrator::one_step;

/// Model FLOPs, always as two figures. (A u64 would end at 18 EFLOP, some days of one GPU node.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    /// Work of the blocks alone.
    pub blocks: u128,
    /// Blocks and head.
    pub total: u128,
}

impl std::ops::AddAssign for Flops {
    fn add_assign(&mut self, other: Flops) {
        self.blocks += other.blocks;
        self.total += other.total;
    }
}

impl std::ops::Mul<u64> for Flops {
    type Output = Flops;

    fn mul(self, times: u64) -> Flops {
        Flops { blocks: self.blocks * u128::from(times), total: self.total * u128::from(times) }
    }
}

impl std::iter::Sum for Flops {
    fn sum<I: Iterator<Item = Flops>>(all: I) -> Flops {
        all.fold(Flops::default(), |mut sum, flops| {
            sum += flops;
            sum
        })
    }
}

/// FLOPs of one optimizer step with `rows` blocks over `tokens` tokens in sequences of T = `context` (forward and backward).
///
/// ```text
/// blocks = evaluations · rows · (6 · 12 d² + 12 d T) · tokens
/// total  = blocks + 6 V d · tokens
/// ```
///
/// 6 a matmul parameter and token; 12·d·T a block and token for attention, no causal halving; recomputed activations
/// do not count. Heun evaluates each block twice.
pub fn step_flops(spec: &Spec, rows: usize, context: usize, tokens: u64) -> Flops {
    let [vocab, d, context, rows] = [spec.vocab, spec.width, context, rows].map(|n| n as u128);
    let evaluations = one_step(spec.integrator).evaluations() as u128;
    let tokens = u128::from(tokens);
    let blocks = evaluations * rows * (6 * 12 * d * d + 12 * d * context) * tokens;
    Flops { blocks, total: blocks + 6 * vocab * d * tokens }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Integrator;

    #[test]
    fn the_paper_s_net() {
        let spec = Spec { vocab: 50257, width: 256, heads: 8, context: 256, depth: 12, ..Spec::small() };
        let flops = step_flops(&spec, 12, 256, 1);
        assert_eq!(flops.blocks, 12 * (72 * 65_536 + 12 * 65_536));
        assert_eq!(flops.total - flops.blocks, 6 * 50_257 * 256);
        assert_eq!(step_flops(&spec, 6, 256, 1).blocks * 2, flops.blocks);
        assert_eq!(step_flops(&spec, 12, 256, 1024).total, 1024 * flops.total);
        let heun = step_flops(&Spec { integrator: Integrator::Heun, ..spec }, 12, 256, 1);
        assert_eq!(heun.blocks, 2 * flops.blocks);
    }
}
