//! The gradient of the mean loss over global batches, summed over ranks.

use crate::comm::{Buckets, Communicator};
use crate::config::Config;
use crate::data::{Batch, Dataset, Sampler, Split, share};
use crate::error::{Result, ensure};
use crate::levels::Hierarchy;
use crate::model::{Net, Params, Ready, Spec};
use crate::ops::{access, norm};
use candle_core::{DType, Device};
use std::ops::Range;

/// The net that is trained: coset `coset` of level `level`.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub level: usize,
    pub coset: usize,
}

/// One rank's net, its sequences of each global batch and its part in the reduction.
pub struct Differentiator {
    net: Net,
    sampler: Sampler,
    batch: Batch,
    buckets: Buckets,
    /// T
    context: usize,
    /// Sequences that are differentiated at once.
    micro_batch: usize,
}

impl Differentiator {
    pub fn new(config: &Config, spec: &Spec, device: &Device, comm: &dyn Communicator) -> Result<Differentiator> {
        let (smallest, _) = config.batches();
        ensure!(
            smallest >= comm.size(),
            "{} = {smallest} is less than the {} ranks, and each needs a sequence: take a larger batch or fewer ranks",
            if smallest == config.data.batch { "data.batch" } else { "the smallest of levels.batch" },
            comm.size()
        );
        let micro_batch = micro_batch(config, comm.size());
        let dataset = Dataset::open(&config.data.dir, Split::Train)?;
        Ok(Differentiator {
            net: Net::new(spec, spec.depth, micro_batch, DType::F32, device)?,
            sampler: Sampler::new(&dataset, config.data.context, config.run.seed)?,
            batch: Batch::default(),
            buckets: Buckets::default(),
            context: config.data.context,
            micro_batch,
        })
    }

    /// grad = ∂L/∂θ of the target (=), L the mean loss over `sequences` sequences from `first` on, at least one for each
    /// rank; returns this rank's share of L, in nats a token. Collective.
    pub fn gradient(
        &mut self,
        comm: &mut dyn Communicator,
        hierarchy: &Hierarchy,
        target: Target,
        first: u64,
        sequences: usize,
    ) -> Result<f64> {
        zero_gradient(hierarchy, target)?;
        let share = share(sequences, comm.rank(), comm.size());
        let scale = 1.0 / (sequences * self.context) as f64;
        let Differentiator { net, sampler, batch, buckets, micro_batch, .. } = self;
        let (params, grads) =
            (hierarchy.params(target.level, target.coset), hierarchy.grads(target.level, target.coset));
        let mut loss = 0.0;
        for start in share.clone().step_by(*micro_batch) {
            let end = share.end.min(start + *micro_batch);
            sampler.batch(first + start as u64, end - start, batch)?;
            let mut ready = |part: Ready| match (end == share.end, part) {
                (false, _) => Ok(()),
                (true, Ready::Block(n)) => {
                    let row = hierarchy.row_indices(target.level, target.coset)[n];
                    buckets.add(comm, &hierarchy.group(target.level).grad, row)
                }
                (true, Ready::Ends) => buckets.add(comm, &hierarchy.ends().grad, 0),
            };
            loss += scale * net.loss_and_gradient(params, grads, &batch.tokens, &batch.targets, scale, &mut ready)?;
        }
        buckets.finish(comm)?;
        Ok(loss)
    }

    /// Sequences of the training data in one epoch.
    pub fn epoch(&self) -> u64 {
        self.sampler.windows()
    }

    /// Seconds that reductions have kept this rank waiting so far.
    pub fn exposed_seconds(&self) -> f64 {
        self.buckets.exposed_seconds()
    }

    /// Σ over tokens of the cross-entropy of the sequences `range` of `sampler`, forward only.
    pub fn loss(&mut self, params: &Params, sampler: &Sampler, range: Range<usize>) -> Result<f64> {
        let mut sum = 0.0;
        for first in range.clone().step_by(self.micro_batch) {
            sampler.batch(first as u64, self.micro_batch.min(range.end - first), &mut self.batch)?;
            sum += self.net.loss(params, &self.batch.tokens, &self.batch.targets)?;
        }
        Ok(sum)
    }
}

/// Sequences that the rank with the largest share differentiates at once.
pub fn micro_batch(config: &Config, ranks: usize) -> usize {
    let (_, largest) = config.batches();
    let largest_share = largest.div_ceil(ranks);
    match config.data.micro_batch {
        0 => largest_share,
        limit => limit.min(largest_share),
    }
}

/// ‖∂L/∂θ‖ of the target and the ends, from reduced gradients: the same on every rank.
pub fn gradient_norm(hierarchy: &Hierarchy, target: Target) -> Result<f64> {
    let grad = &hierarchy.group(target.level).grad;
    let mut sum = norm::sum_of_squares(&hierarchy.ends().grad)?;
    for &row in hierarchy.row_indices(target.level, target.coset) {
        sum += norm::sum_of_squares(&grad.narrow(0, row, 1)?)?;
    }
    Ok(sum.sqrt())
}

/// grad = 0 of the target and the ends.
fn zero_gradient(hierarchy: &Hierarchy, target: Target) -> Result<()> {
    let grad = &hierarchy.group(target.level).grad;
    for &row in hierarchy.row_indices(target.level, target.coset) {
        access::fill(&grad.narrow(0, row, 1)?, 0.0)?;
    }
    access::fill(&hierarchy.ends().grad, 0.0)
}
