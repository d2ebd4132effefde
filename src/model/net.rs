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
use crate::ops::{access, classifier, embedding, layer_norm, replay::Replay};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

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
    /// Views of the buffers for a number of sequences of a length, made when first used.
    workspaces: HashMap<[usize; 2], Workspace>,
    replay: Replay,
}

impl Net {
    /// Workspace for up to `max_rows` blocks and `micro_batch` sequences. All memory is taken here.
    pub fn new(spec: &Spec, max_rows: usize, micro_batch: usize, dtype: DType, device: &Device) -> Result<Net> {
        ensure!(micro_batch > 0, "a micro-batch has at least one sequence");
        let extent = Extent::new(spec, max_rows, micro_batch);
        let buffers = tape::allocate(spec, extent, dtype, device)?;
        Ok(Net { spec: spec.clone(), extent, dtype, buffers, workspaces: HashMap::new(), replay: Replay::default() })
    }

    /// Bytes that [`Net::new`] takes for `spec.dtype`.
    pub fn workspace_bytes(spec: &Spec, max_rows: usize, micro_batch: usize) -> u64 {
        let extent = Extent::new(spec, max_rows, micro_batch);
        tape::bytes(spec, extent, spec.dtype).expect("counting takes no memory")
    }

    /// Bytes that the ops' own scratch adds to that in the first step: as good as all of it is the classifier's.
    pub fn scratch_bytes(spec: &Spec, micro_batch: usize) -> u64 {
        let chunk = Net::logit_rows(spec, micro_batch);
        classifier::scratch_bytes(chunk, spec.width, spec.vocab, spec.dtype.size_in_bytes()) as u64
    }

    /// Positions whose logits are held at once.
    pub fn logit_rows(spec: &Spec, micro_batch: usize) -> usize {
        Extent::new(spec, 0, micro_batch).chunk()
    }

    /// Σ over tokens of the cross-entropy, forward only. `tokens` and `targets` hold whole sequences of
    /// `params.context()`, no more entries than `micro_batch` sequences of the spec's length.
    pub fn loss(&mut self, params: &Params, tokens: &[u32], targets: &[u32]) -> Result<f64> {
        let (pass, _) = self.pass(params, tokens, targets)?;
        pass.forward()?;
        let w = pass.work;
        classifier::loss(pass.spec.factors, &w.scratch.normed, &params.ends.head, &w.targets, &w.logits)
    }

    /// As [`Net::loss`], and grads += scale · gradient. Calls `ready` as soon as a part of the gradient is final: blocks
    /// from the last to the first, then the ends. Where nobody asks (all micro-batches but the last), a GPU does all in one go.
    pub fn loss_and_gradient(
        &mut self,
        params: &Params,
        grads: &Params,
        tokens: &[u32],
        targets: &[u32],
        scale: f64,
        ready: Option<&mut dyn FnMut(Ready) -> Result<()>>,
    ) -> Result<f64> {
        ensure!(grads.rows() == params.rows(), "{} rows but gradients of {}", params.rows(), grads.rows());
        let (pass, replay) = self.pass(params, tokens, targets)?;
        pass.gradient(grads, scale, replay, ready)
    }

    /// Checks the arguments and brings the batch to the device.
    fn pass<'a>(
        &'a mut self,
        params: &'a Params,
        tokens: &[u32],
        targets: &[u32],
    ) -> Result<(Pass<'a>, &'a mut Replay)> {
        let Net { spec, extent, dtype, buffers, workspaces, replay } = self;
        let context = params.context()?;
        ensure!(
            !tokens.is_empty() && tokens.len().is_multiple_of(context) && targets.len() == tokens.len(),
            "{} tokens and {} targets are not whole sequences of {context}",
            tokens.len(),
            targets.len(),
        );
        ensure!(
            tokens.len() <= extent.sequences * spec.context && params.rows() <= extent.rows,
            "{} tokens and {} blocks do not fit a workspace for {} and {}",
            tokens.len(),
            params.rows(),
            extent.sequences * spec.context,
            extent.rows
        );
        let sequences = tokens.len() / context;
        let work = match workspaces.entry([sequences, context]) {
            Entry::Occupied(work) => work.into_mut(),
            Entry::Vacant(empty) => {
                let spec = Spec { context, ..spec.clone() };
                empty.insert(Workspace::view(&spec, extent.first(&spec, sequences), *dtype, buffers)?)
            }
        };
        access::upload_u32(tokens, &work.tokens)?;
        access::upload_u32(targets, &work.targets)?;
        Ok((Pass { spec, context, params, work }, replay))
    }
}

/// One forward pass, and the way back.
struct Pass<'a> {
    spec: &'a Spec,
    context: usize,
    params: &'a Params,
    work: &'a Workspace,
}

impl Pass<'_> {
    fn field(&self, n: usize) -> Field<'_> {
        Field {
            theta: &self.params.blocks[n],
            context: self.context,
            heads: self.spec.heads,
            factors: self.spec.factors,
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

    /// The loss, and grads += scale · gradient.
    fn gradient(
        &self,
        grads: &Params,
        scale: f64,
        replay: &mut Replay,
        ready: Option<&mut dyn FnMut(Ready) -> Result<()>>,
    ) -> Result<f64> {
        let Pass { params, work: w, .. } = *self;
        let rows = params.rows();
        let sequences = w.tokens.elem_count() / self.context;
        let numbers = [sequences, self.context, usize::from(ready.is_some())].map(|number| number as u64);
        let numbers = [&numbers[..], &[scale.to_bits(), params.h.to_bits()]].concat();
        let mut pass = replay.pass(&numbers, params.storage().chain(grads.storage()))?;
        let there_and_head = || {
            self.forward()?;
            self.head_adjoint(grads, scale)
        };
        let embedding_adjoint = || embedding::backward(&w.tokens, &w.lambda, &grads.ends.wte, &grads.ends.wpe); // +=
        match ready {
            None => pass.stretch(&|| {
                there_and_head()?;
                (0..rows).rev().try_for_each(|n| self.block_adjoint(grads, n))?;
                embedding_adjoint()
            })?,
            Some(ready) => {
                pass.stretch(&there_and_head)?;
                for n in (0..rows).rev() {
                    pass.stretch(&|| self.block_adjoint(grads, n))?;
                    ready(Ready::Block(n))?;
                }
                pass.stretch(&embedding_adjoint)?;
                ready(Ready::Ends)?;
            }
        }
        // Only now: a GPU is given all of the way back before anyone waits for it.
        Ok(access::read::<f64>(&w.loss)?[0])
    }

    /// λ_n from λ_{n+1}, grads +=. The blocks after it have been done.
    fn block_adjoint(&self, grads: &Params, n: usize) -> Result<()> {
        let (w, method) = (self.work, one_step(self.spec.integrator));
        // The shared activations still hold the last block's.
        if self.spec.recompute && n + 1 < self.params.rows() {
            self.step(n)?;
        }
        method.adjoint(&self.field(n), &grads.blocks[n], self.params.h, &w.evaluations[n], &w.lambda)
    }

    /// The loss, and λ = scale · ∂L/∂x_N, the gradients of head and final layer norm +=. A tied head adds to that of wte.
    fn head_adjoint(&self, grads: &Params, scale: f64) -> Result<()> {
        let (w, ends) = (self.work, &self.params.ends);
        let (normed, dnormed) = (&w.scratch.normed, &w.scratch.dnormed);
        classifier::loss_and_gradient(
            self.spec.factors,
            normed,
            &ends.head,
            &w.targets,
            scale,
            &w.logits,
            &w.loss,          // =
            dnormed,          // =
            &grads.ends.head, // +=
        )?;
        access::fill(&w.lambda, 0.0)?;
        layer_norm::backward(dnormed, self.last_state(), &ends.ln_f, &w.stats_f, &w.lambda, &grads.ends.ln_f) // +=
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
    use crate::ops::matrix::Factors;
    use crate::ops::testing::{assert_all_close, assert_close, assert_gpu_equals_cpu, constant, on_gpu, random};

    /// Loss and gradient of short sequences are those of a net that has no later positions.
    #[test]
    fn a_shorter_context_leaves_out_the_later_positions() {
        let long = Spec { context: 6, ..Spec::small() };
        let short = Spec { context: 3, ..Spec::small() };
        let (block, [ends, short_ends]) = (Layout::block(&long).len(), [&long, &short].map(|s| Layout::ends(s).len()));
        let theta = random(&[2, block], DType::F64, 1);
        let theta_ends = random(&[1, ends], DType::F64, 2);
        // The ends begin with wte and wpe.
        let [kept, next] = [3, 6].map(|positions| (long.vocab + positions) * long.width);
        let without = |ends: &Tensor| {
            let part = |start, end| ends.narrow(1, start, end - start).unwrap();
            Tensor::cat(&[part(0, kept), part(next, ends.dim(1).unwrap())], 1).unwrap()
        };
        let tokens: Vec<u32> = (0..12).map(|i| i * i % 11).collect();
        let targets: Vec<u32> = (1..13).map(|i| i * i % 11).collect();
        let run = |spec: &Spec, theta_ends: &Tensor| {
            let mut net = Net::new(spec, 2, 12 / spec.context, DType::F64, &Device::Cpu).unwrap();
            let (grad, grad_ends) = (constant(0.0, &[2, block], DType::F64), theta_ends.zeros_like().unwrap());
            let params = |theta, ends| Params::view(spec, theta, &[0, 1], ends, 0.5).unwrap().with_context(3).unwrap();
            let (params, grads) = (params(&theta, theta_ends), params(&grad, &grad_ends));
            let loss = net.loss_and_gradient(&params, &grads, &tokens, &targets, 0.1, None).unwrap();
            assert_eq!(net.loss(&params, &tokens, &targets).unwrap(), loss);
            (loss, grad, grad_ends)
        };
        let (loss, grad, grad_ends) = run(&long, &theta_ends);
        let (short_loss, short_grad, short_grad_ends) = run(&short, &without(&theta_ends));
        assert_eq!((loss, short_grad_ends.dim(1).unwrap()), (short_loss, short_ends));
        assert_all_close(&[grad, without(&grad_ends)], &[short_grad, short_grad_ends], 0.0);
        let later = grad_ends.narrow(1, kept, next - kept).unwrap();
        assert_close(&later, &later.zeros_like().unwrap(), 0.0);
    }

    /// Every product of a step rounds its factors, and nothing else is changed: the gradient deviates as bf16 does.
    #[test]
    fn factors_in_bf16_move_the_gradient_a_little() {
        let exact = Spec { width: 16, depth: 2, ..Spec::small() };
        let rounded = Spec { factors: Factors::Bf16, ..exact.clone() };
        let theta = random(&[2, Layout::block(&exact).len()], DType::F32, 1);
        let theta_ends = random(&[1, Layout::ends(&exact).len()], DType::F32, 2);
        let tokens: Vec<u32> = (0..10).map(|i| i * i % 11).collect();
        let run = |spec: &Spec| {
            let mut net = Net::new(spec, 2, 2, DType::F32, &Device::Cpu).unwrap();
            let (grad, grad_ends) = (theta.zeros_like().unwrap(), theta_ends.zeros_like().unwrap());
            let params = |theta, ends| Params::view(spec, theta, &[0, 1], ends, 0.5).unwrap();
            let (params, grads) = (params(&theta, &theta_ends), params(&grad, &grad_ends));
            let loss = net.loss_and_gradient(&params, &grads, &tokens, &tokens, 0.1, None).unwrap();
            assert_eq!(net.loss(&params, &tokens, &tokens).unwrap(), loss);
            (loss, [grad, grad_ends])
        };
        let ((loss, gradient), (rounded_loss, rounded_gradient)) = (run(&exact), run(&rounded));
        assert!(loss != rounded_loss && (loss - rounded_loss).abs() < 2e-2 * loss, "{rounded_loss} is not {loss}");
        assert_all_close(&rounded_gradient, &gradient, 2e-2);
    }

    /// Micro-batches of two levels in turn: the first of a kind goes kernel by kernel, the next ones as graphs, one or one for each part.
    /// Bits are those of new nets, which go kernel by kernel always.
    #[test]
    fn a_gpus_gradient_repeats() {
        let spec = Spec { width: 16, depth: 2, ..Spec::small() };
        let sizes = [[2, Layout::block(&spec).len()], [1, Layout::ends(&spec).len()]];
        let tokens: Vec<u32> = (0..2 * spec.context).map(|i| (i * i % spec.vocab) as u32).collect();
        let gradients = |device: &Device, keep: bool, by_parts: bool| {
            let [theta, theta_ends] = sizes.map(|size| random(&size, DType::F32, 1).to_device(device).unwrap());
            let [grad, grad_ends] = sizes.map(|size| Tensor::zeros(&size, DType::F32, device).unwrap());
            let level = |rows: &[usize], h: f64| {
                let [params, grads] = [(&theta, &theta_ends), (&grad, &grad_ends)]
                    .map(|(rows_of, ends)| Params::view(&spec, rows_of, rows, ends, h).unwrap());
                (params, grads)
            };
            let levels = [level(&[0, 1], 0.5), level(&[1], 1.0)];
            let new = || Net::new(&spec, 2, 2, DType::F32, device).unwrap();
            let mut net = new();
            let mut bits = Vec::new();
            for scale in [0.1, 0.1, 0.1, 0.2] {
                for (params, grads) in &levels {
                    for sequences in [2, 1] {
                        if !keep {
                            net = new();
                        }
                        let tokens = &tokens[..sequences * spec.context];
                        let mut parts = 0;
                        let mut count = |_| {
                            parts += 1;
                            Ok(())
                        };
                        let ready: Option<&mut dyn FnMut(Ready) -> Result<()>> =
                            if by_parts { Some(&mut count) } else { None };
                        let loss = net.loss_and_gradient(params, grads, tokens, tokens, scale, ready);
                        bits.push(loss.unwrap().to_bits());
                        assert_eq!(parts, if by_parts { params.rows() + 1 } else { 0 });
                    }
                }
                let values = [&grad, &grad_ends].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap()).concat();
                bits.extend(values.into_iter().map(|x| u64::from(x.to_bits())));
            }
            bits
        };
        let new = on_gpu(|device| gradients(device, false, true));
        for by_parts in [true, false] {
            let kept = on_gpu(|device| gradients(device, true, by_parts));
            assert!(kept == new, "a graph does something else than its kernels");
        }
    }

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
                let loss = net.loss_and_gradient(&params, &grads, &tokens, &targets, scale, None).unwrap();
                vec![Tensor::new(loss, &Device::Cpu).unwrap(), grad, grad_ends]
            });
        }
    }
}
