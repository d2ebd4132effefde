//! The gradient of the mean loss over global batches, summed over ranks.

use crate::comm::{Buckets, Communicator, Exchange};
use crate::config::Config;
use crate::data::{Batch, Dataset, Sampler, Split, share};
use crate::error::{Result, ensure};
use crate::levels::{Group, Hierarchy};
use crate::model::{Net, Params, Ready, Rounded, Spec};
use crate::ops::{access, norm};
use candle_core::{DType, Device, Tensor};
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
    /// What the net takes in the place of parameters in f32, where it computes in another type.
    rounded: Option<Rounded>,
    sampler: Sampler,
    batch: Batch,
    sums: Buckets,
    scattered: Buckets,
    /// T
    context: usize,
    /// Sequences that are differentiated at once.
    micro_batch: usize,
}

/// What a gradient does with that of the ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// = the sum over the group.
    Sum,
    /// = this rank's part; [`Differentiator::share_ends`] sums it later.
    Start,
    /// += this rank's part.
    Add,
}

/// Which ranks get the sum of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receivers {
    All,
    /// Each rank the columns that it updates: all of them, unless optimizer state is sharded.
    Owners,
}

impl Differentiator {
    /// `smallest` and `largest`: ranks of the groups that share a global batch.
    pub fn new(
        config: &Config,
        spec: &Spec,
        device: &Device,
        smallest: usize,
        largest: usize,
    ) -> Result<Differentiator> {
        let (batch, _) = config.batches();
        ensure!(
            batch >= largest,
            "{} = {batch} is less than the {largest} ranks, and each needs a sequence: take a larger batch or fewer ranks",
            if batch == config.data.batch { "data.batch" } else { "the smallest of levels.batch" },
        );
        let micro_batch = micro_batch(config, smallest);
        let dataset = Dataset::open(&config.data.dir, Split::Train)?;
        Ok(Differentiator {
            net: Net::new(spec, spec.depth, micro_batch, spec.dtype, device)?,
            rounded: (spec.dtype != DType::F32).then(|| Rounded::new(spec, device)).transpose()?,
            sampler: Sampler::new(&dataset, config.data.context, config.run.seed)?,
            batch: Batch::default(),
            sums: Buckets::default(),
            scattered: Buckets::new(Exchange::Scatter),
            context: config.data.context,
            micro_batch,
        })
    }

    /// The training sequences.
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// grad = ∂L/∂θ of the target (=), on the `receivers`; L is the mean loss over `sequences` sequences from `first` on, at least
    /// one for each rank of `comm`. Returns this rank's share of L, in nats a token. Collective.
    #[allow(clippy::too_many_arguments)]
    pub fn gradient(
        &mut self,
        comm: &mut dyn Communicator,
        hierarchy: &Hierarchy,
        target: Target,
        first: u64,
        sequences: usize,
        ends: Ends,
        receivers: Receivers,
    ) -> Result<f64> {
        zero_gradient(hierarchy, target, ends != Ends::Add)?;
        let ranks = comm.size();
        let share = share(sequences, comm.rank(), ranks);
        let scale = 1.0 / (sequences * self.context) as f64;
        let Differentiator { net, rounded, sampler, batch, sums, scattered, micro_batch, .. } = self;
        let buckets = match receivers {
            Receivers::Owners if hierarchy.is_sharded() => scattered,
            _ => sums,
        };
        let params = as_computed(rounded, hierarchy.params(target.level, target.coset))?;
        let grads = hierarchy.grads(target.level, target.coset);
        let mut loss = 0.0;
        for start in share.clone().step_by(*micro_batch) {
            let end = share.end.min(start + *micro_batch);
            sampler.batch(first + start as u64, end - start, batch)?;
            let mut exchange = |part: Ready| match part {
                Ready::Block(n) => {
                    let row = hierarchy.row_indices(target.level, target.coset)[n];
                    add(buckets, comm, hierarchy.group(target.level), row)
                }
                Ready::Ends if ends == Ends::Sum => add(buckets, comm, hierarchy.ends(target.level), 0),
                Ready::Ends => Ok(()),
            };
            let exchanges = end == share.end && ranks > 1;
            let ready: Option<&mut dyn FnMut(Ready) -> Result<()>> = if exchanges { Some(&mut exchange) } else { None };
            loss += scale * net.loss_and_gradient(params, grads, &batch.tokens, &batch.targets, scale, ready)?;
        }
        buckets.finish(comm)?;
        Ok(loss)
    }

    /// The ends' gradient on `level` = its sum over all ranks of `comm`, on those that update it. Collective.
    pub fn share_ends(&mut self, comm: &mut dyn Communicator, hierarchy: &Hierarchy, level: usize) -> Result<()> {
        let buckets = if hierarchy.is_sharded() { &mut self.scattered } else { &mut self.sums };
        add(buckets, comm, hierarchy.ends(level), 0)?;
        buckets.finish(comm)
    }

    /// Sequences of the training data in one epoch.
    pub fn epoch(&self) -> u64 {
        self.sampler.windows()
    }

    /// Seconds that sums have kept this rank waiting so far.
    pub fn exposed_seconds(&self) -> f64 {
        self.sums.exposed_seconds() + self.scattered.exposed_seconds()
    }

    /// Σ over tokens of the cross-entropy of the sequences `range` of `sampler`, forward only.
    pub fn loss(&mut self, params: &Params, sampler: &Sampler, range: Range<u64>) -> Result<f64> {
        let params = as_computed(&mut self.rounded, params)?;
        let mut sum = 0.0;
        for first in range.clone().step_by(self.micro_batch) {
            sampler.batch(first, self.micro_batch.min((range.end - first) as usize), &mut self.batch)?;
            sum += self.net.loss(params, &self.batch.tokens, &self.batch.targets)?;
        }
        Ok(sum)
    }
}

/// `params` in the element type that the net computes in.
fn as_computed<'a>(rounded: &'a mut Option<Rounded>, params: &'a Params) -> Result<&'a Params> {
    rounded.as_mut().map_or(Ok(params), |rounded| rounded.copy_of(params))
}

/// The gradient of one row is final.
fn add(buckets: &mut Buckets, comm: &mut dyn Communicator, group: &Group, row: usize) -> Result<()> {
    buckets.add(comm, &group.grad, row, &group.shard.ranks)
}

/// Sequences that the rank with the largest share differentiates at once, if `ranks` share a global batch.
pub fn micro_batch(config: &Config, ranks: usize) -> usize {
    let (_, largest) = config.batches();
    let largest_share = largest.div_ceil(ranks);
    match config.data.micro_batch {
        0 => largest_share,
        limit => limit.min(largest_share),
    }
}

/// ‖∂L/∂θ‖² of the target and the ends, from summed gradients: the same on every rank of the group or, where each updates some
/// columns only, of those.
pub fn square_of_gradient(hierarchy: &Hierarchy, target: Target) -> Result<f64> {
    norm::sum_of_squares(&[own_ends(hierarchy, target.level)?, own_rows(hierarchy, target)?].concat())
}

/// The same of the ends alone.
pub fn square_of_ends(hierarchy: &Hierarchy, level: usize) -> Result<f64> {
    norm::sum_of_squares(&own_ends(hierarchy, level)?)
}

/// The same of the target's rows alone.
pub fn square_of_rows(hierarchy: &Hierarchy, target: Target) -> Result<f64> {
    norm::sum_of_squares(&own_rows(hierarchy, target)?)
}

/// This rank's columns of the ends' gradient.
fn own_ends(hierarchy: &Hierarchy, level: usize) -> Result<Vec<Tensor>> {
    own(hierarchy.ends(level), &[0])
}

/// The same of the target's rows.
fn own_rows(hierarchy: &Hierarchy, target: Target) -> Result<Vec<Tensor>> {
    own(hierarchy.group(target.level), hierarchy.row_indices(target.level, target.coset))
}

fn own(group: &Group, rows: &[usize]) -> Result<Vec<Tensor>> {
    let rows = if group.shard.columns.is_empty() { &[] } else { rows };
    rows.iter().map(|&row| group.own_gradient(row)).collect()
}

/// grad = 0 of the target and, if `ends`, of the ends.
fn zero_gradient(hierarchy: &Hierarchy, target: Target, ends: bool) -> Result<()> {
    let grad = &hierarchy.group(target.level).grad;
    for rows in hierarchy.row_indices(target.level, target.coset).chunk_by(|row, next| *next == row + 1) {
        access::fill(&grad.narrow(0, rows[0], rows.len())?, 0.0)?;
    }
    if ends {
        access::fill(&hierarchy.ends(target.level).grad, 0.0)?;
    }
    Ok(())
}
