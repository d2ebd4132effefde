//! Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g
//! v ← β₂ v + (1 − β₂) g²
//! θ ← (1 − η λ) θ − η m̂ / (√v̂ + ε),   m̂ = m / (1 − β₁ᵗ),   v̂ = v / (1 − β₂ᵗ)
//! ```
//!
//! t counts the updates of the row, this one included.

#[cfg(any(feature = "cuda", test))]
use super::pass::GpuRows;
use super::pass::{Elements, Rule, Step};
use super::{Hyper, Moment, Optimizer};
use crate::config::OptimizerTable;
use crate::error::Result;
use crate::model::{Segment, Shard};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::{AdamWRule, Gpu};
use crate::ops::real::Real;
use candle_core::Tensor;

pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
}

impl AdamW {
    pub fn new(table: &OptimizerTable) -> AdamW {
        let &OptimizerTable { beta1, beta2, eps, weight_decay, .. } = table;
        AdamW { beta1, beta2, eps, weight_decay }
    }

    /// η / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ)
    fn corrected(&self, t: u64, hyper: &Hyper) -> (f64, f64) {
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        (hyper.lr / correction(self.beta1), correction(self.beta2).sqrt().recip())
    }

    /// Updates the segments of the rows that `chosen` names, on a GPU.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn launch_on(&self, gpu: &Gpu, rows: &GpuRows<3>, chosen: impl Fn(&Segment) -> bool) -> Result<()> {
        let stretches = rows.stretches(self.weight_decay, chosen)?;
        let (step_size, root_correction) = self.corrected(rows.t, rows.hyper);
        let rule = AdamWRule {
            scale: rows.hyper.gradient_scale as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            step_size: step_size as f32,
            root_correction: root_correction as f32,
            eps: (self.eps * rows.hyper.eps_scale) as f32,
        };
        let [theta, m, v] = rows.written;
        gpu.launch(Self::NAME, |k, stream| {
            Ok(unsafe { (k.adamw)(rule, &stretches, rows.grad, theta, m, v, rows.rows, stream) })
        })
    }
}

impl Rule<3> for AdamW {
    const NAME: &str = "adamw";

    fn update<T: Real>(&self, segment: &Segment, t: u64, hyper: &Hyper, elements: Elements<T, 3>) {
        let decay = if segment.decay { hyper.lr * self.weight_decay } else { 0.0 };
        let (step_size, root_correction) = self.corrected(t, hyper);
        let (keep, scale) = (T::of(1.0 - decay), T::of(hyper.gradient_scale));
        let (one_minus_beta1, beta2) = (T::of(1.0 - self.beta1), T::of(self.beta2));
        let one_minus_beta2 = T::of(1.0 - self.beta2);
        let (step_size, root_correction) = (T::of(step_size), T::of(root_correction));
        let eps = T::of(self.eps * hyper.eps_scale);
        elements.for_each(
            #[inline(always)]
            |g, [theta, m, v]| {
                let g = scale * g;
                let m = m + one_minus_beta1 * (g - m);
                let v = beta2 * v + one_minus_beta2 * (g * g);
                [keep * theta - step_size * m / (v.sqrt() * root_correction + eps), m, v]
            },
        );
    }

    #[cfg(any(feature = "cuda", test))]
    fn launch(&self, gpu: &Gpu, rows: &GpuRows<3>) -> Result<()> {
        self.launch_on(gpu, rows, |_| true)
    }
}

impl Optimizer for AdamW {
    fn name(&self) -> &'static str {
        AdamW::NAME
    }

    fn moments(&self) -> &'static [Moment] {
        &[Moment { name: "m", power: 1 }, Moment { name: "v", power: 2 }]
    }

    fn step(
        &self,
        shard: &Shard,
        rows: &[usize],
        updates: &[u64],
        theta: &Tensor,
        grad: &Tensor,
        moments: &[Tensor],
        hyper: &Hyper,
    ) -> Result<()> {
        Step { shard, rows, updates, theta, grad, moments, hyper }.apply(self)
    }
}
