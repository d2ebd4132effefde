//! The numerical work of a run: step, switch, evaluation. Knows the net and its levels, not the plan.

use super::gradient::{Differentiator, Ends, Receivers, Target, square_of_gradient};
use crate::checkpoint::Checkpoint;
use crate::comm::{Buckets, Communicator, Exchange, Reduction};
use crate::config::{Config, Parametrization};
use crate::cycle::Side;
use crate::data::{Dataset, Sampler, Split, share};
use crate::error::Result;
use crate::levels::{Gradient, Hierarchy};
use crate::model::{Spec, initialize};
use crate::optim::{self, Hyper, Optimizer};
use candle_core::{DType, Device, Tensor};

/// One rank's net, its levels and its optimizer.
pub struct Learner {
    spec: Spec,
    pub differentiator: Differentiator,
    pub hierarchy: Hierarchy,
    optimizer: Box<dyn Optimizer>,
    /// Brings updated parameters to the ranks that did not update them.
    gathered: Buckets,
    validation: Validation,
    clip: f64,
    /// CompleteP: Adam's ε is multiplied by h.
    eps_follows_h: bool,
    /// B_l of each level.
    batches: Vec<usize>,
    /// Sequences over which a coherence term is measured.
    coherence_sequences: usize,
}

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepReport {
    /// Mean cross-entropy of the global batch before the update, in nats a token.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    pub lr: f64,
}

impl StepReport {
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite()
    }
}

/// What came of the correction of the fine level by a coarse one. Losses are of the held-out batch, in nats a token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Correction {
    /// Of the fine net as its own group trained it.
    pub loss: f64,
    /// α and the loss of each net tried.
    pub tried: Vec<(f64, f64)>,
    /// The one of them that was taken.
    pub taken: Option<(f64, f64)>,
}

impl std::fmt::Display for Correction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tried: Vec<String> =
            self.tried.iter().map(|(alpha, loss)| format!("{loss:.4} with alpha {alpha}")).collect();
        match self.taken {
            Some((alpha, _)) => write!(f, "coarse correction taken with alpha {alpha}")?,
            None if self.tried.is_empty() => return write!(f, "coarse correction dropped: levels.alpha = 0"),
            None => write!(f, "coarse correction dropped")?,
        }
        write!(f, "; held-out loss {:.4} without, {}", self.loss, tried.join(", "))
    }
}

impl Learner {
    /// Builds and initialises everything on `device` for `config`, whose vocabulary is resolved, on rank `rank` of `ranks`; `smallest`: ranks
    /// of the smallest group that shares a global batch.
    pub fn new(config: &Config, device: &Device, smallest: usize, rank: usize, ranks: usize) -> Result<Learner> {
        let spec = Spec::new(config).on(device);
        let optimizer = optim::new(&config.optimizer);
        let moments: Vec<_> = optimizer.moments().iter().map(|m| (m.name, m.power)).collect();
        let division = optim::division(&config.parallel, &*optimizer, rank, ranks);
        let (ends, trajectory) = initialize(&spec, config.run.seed, DType::F32, device)?;
        Ok(Learner {
            differentiator: Differentiator::new(config, &spec, device, smallest, ranks)?,
            hierarchy: Hierarchy::new(config, &spec, &moments, division, trajectory, ends)?,
            optimizer,
            gathered: Buckets::new(Exchange::Gather),
            validation: Validation::new(config)?,
            clip: config.optimizer.clip,
            eps_follows_h: config.model.parametrization == Parametrization::CompleteP,
            batches: (0..config.levels.count).map(|level| config.batch(level)).collect(),
            coherence_sequences: config.levels.coherence_batches as usize * config.data.batch,
            spec,
        })
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What this rank computes on.
    pub fn device(&self) -> &Device {
        self.hierarchy.ends(0).theta.device()
    }

    /// The gradient of `target` on the global batch that starts at sequence `first` (=), less the coherence term, on the ranks that
    /// update it; this rank's share of the loss. Collective.
    pub fn gradient(&mut self, comm: &mut dyn Communicator, target: Target, first: u64, ends: Ends) -> Result<f64> {
        let (batch, receivers) = (self.batches[target.level], Receivers::Owners);
        let share = self.differentiator.gradient(comm, &self.hierarchy, target, first, batch, ends, receivers)?;
        self.hierarchy.correct_gradient(target.level)?;
        Ok(share)
    }

    /// One optimizer step of `target` on the global batch that starts at sequence `first`; the loss is this rank's share. A
    /// gradient that is not finite changes no parameter. Collective.
    pub fn step(&mut self, comm: &mut dyn Communicator, target: Target, first: u64, lr: f64) -> Result<StepReport> {
        let loss = self.gradient(comm, target, first, Ends::Sum)?;
        let mut square = [square_of_gradient(&self.hierarchy, target)?];
        if self.hierarchy.is_sharded() {
            comm.reduce(&mut square, Reduction::Sum)?;
        }
        let grad_norm = square[0].sqrt();
        if grad_norm.is_finite() {
            self.update(comm, target.level, &[target.coset], lr, grad_norm, 1)?;
        }
        Ok(StepReport { loss, grad_norm, lr })
    }

    /// θ ← θ + update, for the rows of these cosets and for the ends, whose gradient is the sum over `nets` nets; all are
    /// clipped as a gradient of norm `grad_norm`. Counts the update. Collective where each rank updates some columns only.
    pub fn update(
        &mut self,
        comm: &mut dyn Communicator,
        level: usize,
        cosets: &[usize],
        lr: f64,
        grad_norm: f64,
        nets: usize,
    ) -> Result<()> {
        let Learner { hierarchy, optimizer, gathered, .. } = self;
        let gradient_scale = optim::gradient_scale(grad_norm, self.clip);
        let (group, ends) = (hierarchy.group(level), hierarchy.ends(level));
        for &coset in cosets {
            let eps_scale = if self.eps_follows_h { hierarchy.params(level, coset).h } else { 1.0 };
            let rows = hierarchy.row_indices(level, coset);
            let hyper = Hyper { lr, gradient_scale, eps_scale };
            let updates = hierarchy.updates(level, coset);
            optimizer.step(&group.shard, rows, &updates, &group.theta, &group.grad, &group.moments, &hyper)?;
            if hierarchy.is_sharded() {
                rows.iter().try_for_each(|&row| gathered.add(comm, &group.theta, row, &group.shard.ranks))?;
            }
        }
        let hyper = Hyper { lr, gradient_scale: gradient_scale / nets as f64, eps_scale: 1.0 };
        optimizer.step(&ends.shard, &[0], &ends.updates, &ends.theta, &ends.grad, &ends.moments, &hyper)?;
        if hierarchy.is_sharded() {
            gathered.add(comm, &ends.theta, 0, &ends.shard.ranks)?;
            gathered.finish(comm)?;
        }
        hierarchy.count_update(level, cosets.iter().copied());
        hierarchy.pull(level)
    }

    /// Restricts to level `to`; a coherence term, if there is to be one, is measured on the sequences from `coherence` on. Collective.
    pub fn descend(
        &mut self,
        comm: &mut dyn Communicator,
        side: Side,
        to: usize,
        coherence: Option<u64>,
    ) -> Result<()> {
        let Learner { hierarchy, differentiator, coherence_sequences, .. } = self;
        let sequences = *coherence_sequences;
        let mut gradient = coherence.map(|first| on_all_ranks(differentiator, comm, first, move |_| sequences));
        let coherence = gradient.as_mut().map(|gradient| gradient as &mut Gradient);
        match side {
            Side::Main => hierarchy.descend(to, coherence),
            Side::Coarse => hierarchy.descend_beside(to, coherence),
        }
    }

    /// The unresolved ratio ρ of the current coarse level, on the next finer level's global batch from sequence `first` on.
    /// Collective.
    pub fn unresolved(&mut self, comm: &mut dyn Communicator, first: u64) -> Result<f64> {
        let Learner { hierarchy, differentiator, batches, .. } = self;
        hierarchy.unresolved(&mut on_all_ranks(differentiator, comm, first, |level| batches[level]))
    }

    /// Prolongs to level `to`.
    pub fn ascend(&mut self, side: Side, to: usize) -> Result<()> {
        match side {
            Side::Main => self.hierarchy.ascend(to),
            Side::Coarse => self.hierarchy.ascend_beside(to),
        }
    }

    /// Corrects the fine level by what was trained beside it: θ ← θ_F + α P (θ_C − R θ⁰), and the ends alike, with the first of
    /// α = `alpha`, `alpha` / 2, `alpha` / 4 that lowers the loss on the global batch from sequence `first` on; none if no
    /// one does, or if `alpha` is 0. Every rank holds both sides. Collective.
    pub fn correct(&mut self, comm: &mut dyn Communicator, alpha: f64, first: u64) -> Result<Correction> {
        const TRIES: i32 = 3;
        let mut correction = Correction::default();
        if alpha > 0.0 {
            let change = self.hierarchy.change_of_ends()?;
            correction.loss = self.held_out_loss(comm, None, first)?;
            for alpha in (0..TRIES).map(|halvings| alpha / 2f64.powi(halvings)) {
                let loss = self.held_out_loss(comm, Some((&change, alpha)), first)?;
                correction.tried.push((alpha, loss));
                if loss < correction.loss {
                    correction.taken = Some((alpha, loss));
                    break;
                }
            }
        }
        self.hierarchy.end_beside(correction.taken.is_some())?;
        Ok(correction)
    }

    /// Mean loss, in nats a token, of the fine net, or of the net corrected by (change of the ends, α), on the global batch from
    /// sequence `first` on. Collective.
    fn held_out_loss(
        &mut self,
        comm: &mut dyn Communicator,
        correction: Option<(&Tensor, f64)>,
        first: u64,
    ) -> Result<f64> {
        let Learner { hierarchy, differentiator, .. } = self;
        let params = match correction {
            Some((change, alpha)) => hierarchy.corrected(change, alpha)?,
            None => hierarchy.params(0, 0),
        };
        let sampler = differentiator.sampler().clone();
        let (sequences, context) = (self.batches[0], self.spec.context);
        let share = share(sequences, comm.rank(), comm.size());
        let mut sum = [differentiator.loss(params, &sampler, first + share.start as u64..first + share.end as u64)?];
        comm.reduce(&mut sum, Reduction::Sum)?;
        Ok(sum[0] / (sequences * context) as f64)
    }

    /// Mean validation loss, in nats a token, of the fine net as it would be if all ascents were done now. Collective.
    pub fn evaluate(&mut self, comm: &mut dyn Communicator) -> Result<f64> {
        let Validation { sampler, sequences } = &self.validation;
        let share = share(*sequences, comm.rank(), comm.size());
        let share = share.start as u64..share.end as u64;
        let mut sums = [self.differentiator.loss(self.hierarchy.fine()?, sampler, share)?];
        comm.reduce(&mut sums, Reduction::Sum)?;
        Ok(sums[0] / self.validation_tokens() as f64)
    }

    /// Takes the fine net over from a checkpoint, in place.
    pub fn load_model(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let (blocks, ends) = (self.hierarchy.group(0), self.hierarchy.ends(0));
        checkpoint.read_model(&[("blocks", &blocks.layout, &blocks.theta), ("ends", &ends.layout, &ends.theta)])
    }

    /// Tokens that an evaluation predicts.
    pub fn validation_tokens(&self) -> u64 {
        (self.validation.sequences * self.spec.context) as u64
    }
}

/// What leaves the gradient of a level's first net, on `sequences(level)` sequences from `first` on, in the tensors of every rank.
fn on_all_ranks<'a>(
    differentiator: &'a mut Differentiator,
    comm: &'a mut dyn Communicator,
    first: u64,
    sequences: impl Fn(usize) -> usize + 'a,
) -> impl FnMut(&Hierarchy, usize) -> Result<()> + 'a {
    move |hierarchy, level| {
        let (target, sequences) = (Target { level, coset: 0 }, sequences(level));
        differentiator.gradient(comm, hierarchy, target, first, sequences, Ends::Sum, Receivers::All).map(drop)
    }
}

/// The validation sequences that an evaluation reads, in order and unshuffled.
struct Validation {
    sampler: Sampler,
    sequences: usize,
}

impl Validation {
    fn new(config: &Config) -> Result<Validation> {
        let dataset = Dataset::open(&config.data.dir, Split::Val)?;
        let sampler = Sampler::in_order(&dataset, config.data.context)?;
        let available = sampler.windows() as usize;
        let sequences = match config.log.eval_sequences {
            0 => available,
            wanted => wanted.min(available),
        };
        Ok(Validation { sampler, sequences })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Solo;
    use crate::data::shard;
    use crate::ops::testing::on_gpu;

    /// Losses of a coarse level's steps, then of the fine one's, and the validation loss.
    fn losses(dtype: &str, device: &Device) -> Vec<f64> {
        let folder = tempfile::tempdir().unwrap();
        for split in [Split::Train, Split::Val] {
            let mut writer = shard::Writer::new(folder.path(), split, 1000);
            writer.write(&(0..600).map(|i| i % 5).collect::<Vec<u16>>()).unwrap();
            writer.finish().unwrap();
        }
        let text = format!(
            "[data]\ndir = '{}'\ncontext = 16\nbatch = 4\n[optimizer]\nlr = 1e-2\n\
             [model]\nvocab = 64\nwidth = 16\nheads = 2\ndepth = 4\ndtype = '{dtype}'\n\
             [levels]\ncount = 2\ncontext = [16, 8]\n[cycle]\nkind = 'cascade'\n[parallel]\ndevice = 'cuda'",
            folder.path().display()
        );
        let config = crate::config::parse(&text, &[]).unwrap();
        let (mut learner, mut comm) = (Learner::new(&config, device, 1, 0, 1).unwrap(), Solo::default());
        let step = |learner: &mut Learner, comm: &mut Solo, level, step: u64| {
            let target = Target { level, coset: 0 };
            learner.step(comm, target, 4 * step, 1e-2).unwrap().loss
        };
        learner.descend(&mut comm, Side::Main, 1, None).unwrap();
        let mut losses: Vec<f64> = (0..3).map(|n| step(&mut learner, &mut comm, 1, n)).collect();
        losses.push(learner.evaluate(&mut comm).unwrap());
        learner.ascend(Side::Main, 0).unwrap();
        losses.extend((3..5).map(|n| step(&mut learner, &mut comm, 0, n)));
        losses.push(learner.evaluate(&mut comm).unwrap());
        losses
    }

    /// On a GPU a net learns as on the CPU, and in bf16 as in f32, but it does not compute the same.
    #[test]
    fn a_gpu_learns_as_the_cpu_and_bf16_as_f32() {
        let on = |dtype| on_gpu(|device| losses(dtype, device));
        let (Some(exact), Some(rounded)) = (on("f32"), on("bf16")) else { return };
        for (step, (gpu, cpu)) in exact.iter().zip(losses("f32", &Device::Cpu)).enumerate() {
            assert!((gpu - cpu).abs() < 1e-3, "{step}: {gpu} on the GPU, {cpu} on the CPU");
        }
        assert!(exact[0] > exact[6] + 0.2, "{exact:?}");
        for (step, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
            let error = (exact - rounded).abs();
            assert!(error > 0.0 && error < 0.05, "{step}: {exact} in f32, {rounded} in bf16");
        }
    }
}
