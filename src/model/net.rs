//! Forward pass and discrete adjoint.
//!
//! ```text
//! x_0 = wte[tokens] + wpe,   x_{n+1} = Φ(x_n; θ_n, h),   L = Σ −log softmax(LN_f(x_N) Wᵀ)[targets]
//!
//! λ_N = ∂L/∂x_N,   λ_n = (∂Φ/∂x_n)ᵀ λ_{n+1},   ∂L/∂θ_n = (∂Φ/∂θ_n)ᵀ λ_{n+1}
//! ```

use super::Spec;
use super::block::Field;
use super::integrator::one_step;
use super::params::Params;
use super::tape::{self, Extent, Workspace};
use crate::error::{Result, ensure};
use crate::ops::{access, classifier, embedding, layer_norm};
use candle_core::{DType, Device, Tensor};

/// Part of the gradient that is final: the backward pass will not touch it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// Gradient of the net's n-th block, n = 0..rows (position in the net, not row of the trajectory).
    Block(usize),
    Ends,
}

/// Forward pass and discrete adjoint of an ODE Transformer, with the workspace of one micro-batch.
pub struct Net {
    spec: Spec,
    extent: Extent,
    dtype: DType,
    buffers: Vec<Tensor>,
    /// Views of the buffers for 1, 2, … sequences, made when first used.
    workspaces: Vec<Option<Workspace>>,
}

impl Net {
    /// Workspace for up to `max_rows` blocks and `micro_batch` sequences. All memory is taken here.
    pub fn new(spec: &Spec, max_rows: usize, micro_batch: usize, dtype: DType, device: &Device) -> Result<Net> {
        ensure!(micro_batch > 0, "a micro-batch has at least one sequence");
        let extent = Extent::new(spec, max_rows, micro_batch);
        let buffers = tape::allocate(spec, extent, dtype, device)?;
        let workspaces = (0..micro_batch).map(|_| None).collect();
        Ok(Net { spec: spec.clone(), extent, dtype, buffers, workspaces })
    }

    /// Bytes that [`Net::new`] takes for f32.
    pub fn workspace_bytes(spec: &Spec, max_rows: usize, micro_batch: usize) -> u64 {
        let extent = Extent::new(spec, max_rows, micro_batch);
        tape::bytes(spec, extent, DType::F32).expect("counting takes no memory")
    }

    /// Bytes that the ops' own scratch adds to that in the first step, for f32: as good as all of it is the classifier's.
    pub fn scratch_bytes(spec: &Spec, micro_batch: usize) -> u64 {
        let chunk = Extent::new(spec, 0, micro_batch).chunk();
        classifier::scratch_bytes(chunk, spec.width, spec.vocab, DType::F32.size_in_bytes()) as u64
    }

    /// Σ over tokens of the cross-entropy, forward only. `tokens` and `targets` hold `sequences * context` entries,
    /// sequences ≤ `micro_batch`.
    pub fn loss(&mut self, params: &Params, tokens: &[u32], targets: &[u32]) -> Result<f64> {
        let pass = self.pass(params, tokens, targets)?;
        pass.forward()?;
        let w = pass.work;
        classifier::loss(&w.scratch.normed, &params.ends.head, &w.targets, &w.logits)
    }

    /// As [`Net::loss`], and grads += scale · gradient. Calls `ready` as soon as a part of the gradient is final: blocks
    /// from the last to the first, then the ends. The caller who accumulates over micro-batches heeds only the last's calls.
    pub fn loss_and_gradient(
        &mut self,
        params: &Params,
        grads: &Params,
        tokens: &[u32],
        targets: &[u32],
        scale: f64,
        ready: &mut dyn FnMut(Ready) -> Result<()>,
    ) -> Result<f64> {
        ensure!(grads.rows() == params.rows(), "{} rows but gradients of {}", params.rows(), grads.rows());
        let pass = self.pass(params, tokens, targets)?;
        pass.forward()?;
        pass.adjoint(grads, scale, ready)
    }

    /// Checks the arguments and brings the batch to the device.
    fn pass<'a>(&'a mut self, params: &'a Params, tokens: &[u32], targets: &[u32]) -> Result<Pass<'a>> {
        let Net { spec, extent, dtype, buffers, workspaces } = self;
        let sequences = tokens.len() / spec.context;
        ensure!(
            tokens.len() == sequences * spec.context && targets.len() == tokens.len(),
            "{} tokens and {} targets are not whole sequences of {}",
            tokens.len(),
            targets.len(),
            spec.context
        );
        ensure!(
            (1..=extent.sequences).contains(&sequences) && params.rows() <= extent.rows,
            "{sequences} sequences and {} blocks do not fit a workspace for {} and {}",
            params.rows(),
            extent.sequences,
            extent.rows
        );
        let work = match &mut workspaces[sequences - 1] {
            Some(work) => work,
            empty => empty.insert(Workspace::view(spec, extent.first(spec, sequences), *dtype, buffers)?),
        };
        access::upload_u32(tokens, &work.tokens)?;
        access::upload_u32(targets, &work.targets)?;
        Ok(Pass { spec, params, work })
    }
}

/// One forward pass, and the way back.
struct Pass<'a> {
    spec: &'a Spec,
    params: &'a Params,
    work: &'a Workspace,
}

impl Pass<'_> {
    fn field(&self, n: usize) -> Field<'_> {
        Field {
            theta: &self.params.blocks[n],
            context: self.spec.context,
            heads: self.spec.heads,
            scratch: &self.work.scratch,
        }
    }

    /// x_{n+1} = Φ(x_n; θ_n, h)
    fn step(&self, n: usize) -> Result<()> {
        let w = self.work;
        let method = one_step(self.spec.integrator);
        method.forward(&self.field(n), self.params.h, &w.evaluations[n], &w.states[n + 1])
    }

    /// normed = LN_f(x_N)
    fn forward(&self) -> Result<()> {
        let (w, ends) = (self.work, &self.params.ends);
        embedding::forward(&w.tokens, &ends.wte, &ends.wpe, &w.states[0])?;
        for n in 0..self.params.rows() {
            self.step(n)?;
        }
        layer_norm::forward(self.last_state(), &ends.ln_f, &w.scratch.normed, &w.stats_f)
    }

    /// The loss, and grads += scale · gradient; `forward` has just run.
    fn adjoint(&self, grads: &Params, scale: f64, ready: &mut dyn FnMut(Ready) -> Result<()>) -> Result<f64> {
        let (w, rows) = (self.work, self.params.rows());
        let loss = self.head_adjoint(grads, scale)?;
        let method = one_step(self.spec.integrator);
        for n in (0..rows).rev() {
            // The shared activations still hold the last block's.
            if self.spec.recompute && n + 1 < rows {
                self.step(n)?;
            }
            method.adjoint(&self.field(n), &grads.blocks[n], self.params.h, &w.evaluations[n], &w.lambda)?;
            ready(Ready::Block(n))?;
        }
        embedding::backward(&w.tokens, &w.lambda, &grads.ends.wte, &grads.ends.wpe)?; // +=
        ready(Ready::Ends)?;
        Ok(loss)
    }

    /// The loss, and λ = scale · ∂L/∂x_N, the gradients of head and final layer norm +=. A tied head adds to that of wte.
    fn head_adjoint(&self, grads: &Params, scale: f64) -> Result<f64> {
        let (w, ends) = (self.work, &self.params.ends);
        let (normed, dnormed) = (&w.scratch.normed, &w.scratch.dnormed);
        let loss = classifier::loss_and_gradient(
            normed,
            &ends.head,
            &w.targets,
            scale,
            &w.logits,
            dnormed,          // =
            &grads.ends.head, // +=
        )?;
        access::fill(&w.lambda, 0.0)?;
        layer_norm::backward(dnormed, self.last_state(), &ends.ln_f, &w.stats_f, &w.lambda, &grads.ends.ln_f)?; // +=
        Ok(loss)
    }

    /// x_N
    fn last_state(&self) -> &Tensor {
        &self.work.states[self.params.rows()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Integrator;
    use crate::model::Layout;
    use crate::ops::testing::{assert_gpu_equals_cpu, random};

    /// The loss and the whole gradient, through every op in the order of a step.
    #[test]
    fn a_gpus_gradient_is_the_cpus() {
        for (integrator, tied) in [(Integrator::Euler, true), (Integrator::Split, false), (Integrator::Heun, true)] {
            let spec = Spec { integrator, tied, width: 16, depth: 2, ..Spec::small() };
            let (block, ends) = (Layout::block(&spec).len(), Layout::ends(&spec).len());
            let (theta, theta_ends) = (random(&[2, block], DType::F64, 1), random(&[1, ends], DType::F64, 2));
            let token = |i: usize| (i * i % spec.vocab) as u32;
            let tokens: Vec<u32> = (0..2 * spec.context).map(token).collect();
            let targets: Vec<u32> = (1..=2 * spec.context).map(token).collect();
            assert_gpu_equals_cpu(&format!("net, {integrator:?}"), [1e-5, 2e-2], |place| {
                let mut net = Net::new(&spec, 2, 2, place.elements, &place.device).unwrap();
                let (theta, theta_ends) = (place.input(&theta), place.input(&theta_ends));
                let (grad, grad_ends) = (place.sums_of(0.0, &[2, block]), place.sums_of(0.0, &[1, ends]));
                let params = |theta, ends| Params::view(&spec, theta, &[0, 1], ends, 0.5).unwrap();
                let (params, grads) = (params(&theta, &theta_ends), params(&grad, &grad_ends));
                let scale = 1.0 / tokens.len() as f64;
                let done = &mut |_| Ok(());
                let loss = net.loss_and_gradient(&params, &grads, &tokens, &targets, scale, done).unwrap();
                vec![Tensor::new(loss, &Device::Cpu).unwrap(), grad, grad_ends]
            });
        }
    }
}
