//! Stochastic gradient descent with momentum, PyTorch's form, with decoupled weight decay.
//!
//! ```text
//! B ← μ B + g
//! U = g + μ B  (Nesterov)   or   B
//! θ ← (1 − η λ) θ − η U
//! ```

#[cfg(any(feature = "cuda", test))]
use super::pass::GpuRows;
use super::pass::{Elements, Rule, Step};
use super::{Hyper, Moment, Optimizer};
use crate::config::OptimizerTable;
use crate::error::Result;
use crate::model::{Segment, Shard};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::Gpu;
use crate::ops::real::Real;
use candle_core::Tensor;

pub struct Sgd {
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
}

impl Sgd {
    pub fn new(table: &OptimizerTable) -> Sgd {
        Sgd { momentum: table.momentum, nesterov: table.nesterov, weight_decay: table.weight_decay }
    }
}

impl Rule<2> for Sgd {
    const NAME: &str = "sgd";

    fn update<T: Real>(&self, segment: &Segment, _t: u64, hyper: &Hyper, elements: Elements<T, 2>) {
        let decay = if segment.decay { hyper.lr * self.weight_decay } else { 0.0 };
        let (keep, lr, scale) = (T::of(1.0 - decay), T::of(hyper.lr), T::of(hyper.gradient_scale));
        let (mu, nesterov) = (T::of(self.momentum), self.nesterov);
        elements.for_each(
            #[inline(always)]
            |g, [theta, b]| {
                let g = scale * g;
                let b = mu * b + g;
                let u = if nesterov { g + mu * b } else { b };
                [keep * theta - lr * u, b]
            },
        );
    }

    #[cfg(any(feature = "cuda", test))]
    fn launch(&self, gpu: &Gpu, rows: &GpuRows<2>) -> Result<()> {
        let stretches = rows.stretches(self.weight_decay, |_| true)?;
        let (scale, mu, lr) = (rows.hyper.gradient_scale as f32, self.momentum as f32, rows.hyper.lr as f32);
        let [theta, b] = rows.written;
        gpu.launch(Self::NAME, |k, stream| {
            let nesterov = self.nesterov.into();
            Ok(unsafe { (k.sgd)(scale, mu, nesterov, lr, &stretches, rows.grad, theta, b, rows.rows, stream) })
        })
    }
}

impl Optimizer for Sgd {
    fn name(&self) -> &'static str {
        Sgd::NAME
    }

    fn moments(&self) -> &'static [Moment] {
        &[Moment { name: "momentum", power: 1 }]
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
