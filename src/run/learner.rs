//! The numerical work of a run: gradient, update, switch, evaluation. Knows the net and its levels, not the plan.

use crate::comm::{Buckets, Communicator, Reduction};
use crate::config::{Config, Parametrization};
use crate::data::{Batch, Dataset, Sampler, Split};
use crate::error::{Result, bail, ensure};
use crate::levels::{Group, Hierarchy};
use crate::model::{Net, Params, Ready, Spec, initialize};
use crate::ops;
use crate::optim::{self, Hyper, Optimizer};
use candle_core::{DType, Device};
use std::ops::Range;

/// One rank's net, its levels and its optimizer.
pub struct Learner {
    spec: Spec,
    batch_size: usize,
    context: usize,
    eps_follows_h: bool,
    clip: f64,
    coherence: Option<u64>,
    net: Net,
    pub hierarchy: Hierarchy,
    pub optimizer: Box<dyn Optimizer>,
    buckets: Buckets,
    training: Sampler,
    validation: Validation,
    /// This rank's sequences of each global batch.
    share: Range<usize>,
    micro_batch: usize,
    batch: Batch,
}

/// What one optimizer step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean cross-entropy of the global batch before the update, in nats a token.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// Which rows of which level are trained.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub level: usize,
    pub coset: usize,
}

impl Learner {
    /// Builds and initialises everything for `config`, whose vocabulary is resolved.
    pub fn new(config: &Config, comm: &dyn Communicator) -> Result<Learner> {
        let device = device(config)?;
        let spec = Spec::new(config);
        let share = share(config.data.batch, comm)?;
        let micro_batch = match config.data.micro_batch {
            0 => share.len(),
            limit => limit.min(share.len()),
        };
        let optimizer = optim::new(&config.optimizer);
        let powers: Vec<i32> = optimizer.moments().iter().map(|m| m.power).collect();
        let (ends, trajectory) = initialize(&spec, config.run.seed, DType::F32, &device)?;
        let training = Dataset::open(&config.data.dir, Split::Train)?;
        let validation = Dataset::open(&config.data.dir, Split::Val)?;
        Ok(Learner {
            batch_size: config.data.batch,
            context: config.data.context,
            eps_follows_h: config.model.parametrization == Parametrization::CompleteP,
            clip: config.optimizer.clip,
            coherence: config.levels.coherence.then_some(config.levels.coherence_batches),
            net: Net::new(&spec, spec.depth, micro_batch, DType::F32, &device)?,
            hierarchy: Hierarchy::new(config, &spec, &powers, trajectory, ends)?,
            optimizer,
            buckets: Buckets::new(comm),
            training: Sampler::new(training, config.data.context, config.run.seed)?,
            validation: Validation::new(validation, config)?,
            spec,
            share,
            micro_batch,
            batch: Batch::default(),
        })
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// One optimizer step on the global batch that starts at sequence `first`, with the wishes of all ranks summed into
    /// `wishes` along the way.
    pub fn step(
        &mut self,
        comm: &mut dyn Communicator,
        target: Target,
        first: u64,
        lr: f64,
        wishes: &mut [f64; 2],
    ) -> Result<StepReport> {
        let loss = self.gradient(comm, target, first)?;
        self.hierarchy.correct_gradient(target.level)?;
        let grad_norm = self.gradient_norm(target)?;
        let mut sums = [loss, wishes[0], wishes[1]];
        comm.reduce(&mut sums, Reduction::Sum)?;
        *wishes = [sums[1], sums[2]];
        let report = StepReport { loss: sums[0], grad_norm };
        // Nothing is written into the parameters from a gradient that is not finite.
        if report.loss.is_finite() && grad_norm.is_finite() {
            self.update(target, lr, optim::gradient_scale(grad_norm, self.clip))?;
        }
        Ok(report)
    }

    /// grad = ∂L/∂θ of the mean loss L over the global batch, summed over ranks; returns this rank's share of L.
    fn gradient(&mut self, comm: &mut dyn Communicator, target: Target, first: u64) -> Result<f64> {
        let Target { level, coset } = target;
        self.hierarchy.zero_gradient(level, coset)?;
        let scale = 1.0 / (self.batch_size * self.context) as f64;
        let mut loss = 0.0;
        let mut start = self.share.start;
        while start < self.share.end {
            let count = self.micro_batch.min(self.share.end - start);
            let is_last = start + count == self.share.end;
            self.training.batch(first + start as u64, count, &mut self.batch)?;
            let Self { net, hierarchy, buckets, batch, .. } = self;
            let mut ready = |part: Ready| -> Result<()> {
                if is_last {
                    buckets.push(comm, gradient_part(hierarchy, target, part)?)?;
                }
                Ok(())
            };
            let (params, grads) = (hierarchy.params(level, coset), hierarchy.grads(level, coset));
            loss += net.loss_and_gradient(params, grads, &batch.tokens, &batch.targets, scale, &mut ready)?;
            start += count;
        }
        self.buckets.finish(comm)?;
        Ok(loss * scale)
    }

    /// ‖∂L/∂θ‖ over the trained rows and the ends; the same on every rank.
    fn gradient_norm(&self, target: Target) -> Result<f64> {
        let group = self.hierarchy.group(target.level);
        let mut sum = ops::norm::sum_of_squares(&self.hierarchy.ends.grad)?;
        for &row in self.hierarchy.row_indices(target.level, target.coset) {
            sum += ops::norm::sum_of_squares(&group.grad.narrow(0, row, 1)?)?;
        }
        Ok(sum.sqrt())
    }

    fn update(&mut self, target: Target, lr: f64, gradient_scale: f64) -> Result<()> {
        let eps_scale = if self.eps_follows_h { self.hierarchy.step_size(target.level) } else { 1.0 };
        let rows = self.hierarchy.row_indices(target.level, target.coset).to_vec();
        let optimizer = self.optimizer.as_ref();
        let mut apply = |group: &mut Group, rows: &[usize], eps_scale: f64| -> Result<()> {
            let hyper = Hyper { lr, gradient_scale, eps_scale };
            let updates: Vec<u64> = rows.iter().map(|&r| group.updates[r]).collect();
            optimizer.step(&group.layout, rows, &updates, &group.theta, &group.grad, &group.moments, &hyper)?;
            rows.iter().for_each(|&r| group.updates[r] += 1);
            Ok(())
        };
        apply(self.hierarchy.group_mut(target.level), &rows, eps_scale)?;
        apply(&mut self.hierarchy.ends, &[0], 1.0)
    }

    /// Restricts to level `to`. With coherence, its term is measured on the batches from sequence `first` on.
    pub fn descend(&mut self, comm: &mut dyn Communicator, to: usize, first: u64) -> Result<()> {
        self.hierarchy.descend(to)?;
        let Some(batches) = self.coherence else { return Ok(()) };
        todo!("{batches} {first} {}", comm.rank())
    }

    /// Prolongs to level `to`.
    pub fn ascend(&mut self, to: usize) -> Result<()> {
        self.hierarchy.ascend(to)
    }

    /// Mean validation loss, in nats a token, of the fine net as it would be if all ascents from `level` were done now.
    pub fn evaluate(&mut self, comm: &mut dyn Communicator, level: usize) -> Result<f64> {
        let params = self.hierarchy.fine(level)?;
        self.validation.loss(&mut self.net, params, comm, self.micro_batch, &mut self.batch)
    }
}

/// The validation sequences an evaluation reads, in order and unshuffled.
struct Validation {
    sampler: Sampler,
    sequences: usize,
    context: usize,
}

impl Validation {
    fn new(dataset: Dataset, config: &Config) -> Result<Validation> {
        let context = config.data.context;
        let sampler = Sampler::in_order(dataset, context)?;
        let available = sampler.sequences() as usize;
        let sequences = match config.log.eval_sequences {
            0 => available,
            wanted => wanted.min(available),
        };
        Ok(Validation { sampler, sequences, context })
    }

    /// Mean cross-entropy over the sequences, shared among the ranks.
    fn loss(
        &mut self,
        net: &mut Net,
        params: &Params,
        comm: &mut dyn Communicator,
        micro_batch: usize,
        batch: &mut Batch,
    ) -> Result<f64> {
        let share = split_evenly(self.sequences, comm.rank(), comm.size());
        let mut sum = 0.0;
        for first in share.clone().step_by(micro_batch) {
            let count = micro_batch.min(share.end - first);
            self.sampler.batch(first as u64, count, batch)?;
            sum += net.loss(params, &batch.tokens, &batch.targets)?;
        }
        let mut sums = [sum];
        comm.reduce(&mut sums, Reduction::Sum)?;
        Ok(sums[0] / (self.sequences * self.context) as f64)
    }
}

/// Only the CPU is built in so far.
fn device(config: &Config) -> Result<Device> {
    use crate::config::DeviceKind;
    match config.parallel.device {
        DeviceKind::Auto | DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Cuda => {
            bail!("parallel.device = \"cuda\": this version has no GPU kernels; use \"cpu\" or \"auto\"")
        }
    }
}

/// This rank's part of a global batch.
fn share(batch: usize, comm: &dyn Communicator) -> Result<Range<usize>> {
    ensure!(
        batch >= comm.size(),
        "data.batch = {batch} is less than the {} ranks: each needs at least one sequence; take a larger batch or fewer ranks",
        comm.size()
    );
    Ok(split_evenly(batch, comm.rank(), comm.size()))
}

/// The `part`-th of `parts` nearly equal ranges of `0..total`.
fn split_evenly(total: usize, part: usize, parts: usize) -> Range<usize> {
    total * part / parts..total * (part + 1) / parts
}
