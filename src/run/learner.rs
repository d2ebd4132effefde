//! The numerical work of a run: step, switch, evaluation. Knows the net and its levels, not the plan.

use super::device::device;
use super::gradient::{Differentiator, Target, gradient_norm};
use crate::checkpoint::Checkpoint;
use crate::comm::{Communicator, Reduction};
use crate::config::{Config, Parametrization};
use crate::data::{Dataset, Sampler, Split, share};
use crate::error::Result;
use crate::levels::Hierarchy;
use crate::model::{Spec, initialize};
use crate::optim::{self, Hyper, Optimizer};
use candle_core::DType;

/// One rank's net, its levels and its optimizer.
pub struct Learner {
    spec: Spec,
    pub differentiator: Differentiator,
    pub hierarchy: Hierarchy,
    optimizer: Box<dyn Optimizer>,
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
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean cross-entropy of the global batch before the update, in nats a token.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
}

impl StepReport {
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite()
    }
}

impl Learner {
    /// Builds and initialises everything for `config`, whose vocabulary is resolved.
    pub fn new(config: &Config, comm: &dyn Communicator) -> Result<Learner> {
        let device = device(config)?;
        let spec = Spec::new(config);
        let optimizer = optim::new(&config.optimizer);
        let moments: Vec<_> = optimizer.moments().iter().map(|m| (m.name, m.power)).collect();
        let (ends, trajectory) = initialize(&spec, config.run.seed, DType::F32, &device)?;
        Ok(Learner {
            differentiator: Differentiator::new(config, &spec, &device, comm)?,
            hierarchy: Hierarchy::new(config, &spec, &moments, trajectory, ends)?,
            optimizer,
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

    /// One optimizer step of `target` on the global batch that starts at sequence `first`. `wishes` of all ranks are
    /// summed along the way. A gradient that is not finite changes no parameter. Collective.
    pub fn step(
        &mut self,
        comm: &mut dyn Communicator,
        target: Target,
        first: u64,
        lr: f64,
        wishes: &mut [f64; 2],
    ) -> Result<StepReport> {
        let sequences = self.batches[target.level];
        let share = self.differentiator.gradient(comm, &self.hierarchy, target, first, sequences)?;
        self.hierarchy.correct_gradient(target.level)?;
        let grad_norm = gradient_norm(&self.hierarchy, target)?;
        let mut sums = [share, wishes[0], wishes[1]];
        comm.reduce(&mut sums, Reduction::Sum)?;
        *wishes = [sums[1], sums[2]];
        let report = StepReport { loss: sums[0], grad_norm };
        if report.is_finite() {
            self.update(target, lr, optim::gradient_scale(grad_norm, self.clip))?;
        }
        Ok(report)
    }

    /// θ ← θ + update, for the target's rows and the ends.
    fn update(&mut self, Target { level, coset }: Target, lr: f64, gradient_scale: f64) -> Result<()> {
        let Learner { hierarchy, optimizer, .. } = self;
        let eps_scale = if self.eps_follows_h { hierarchy.params(level, coset).h } else { 1.0 };
        let (group, ends) = (hierarchy.group(level), hierarchy.ends());
        let rows = hierarchy.row_indices(level, coset);
        let hyper = Hyper { lr, gradient_scale, eps_scale };
        let updates = hierarchy.updates(level, coset);
        optimizer.step(&group.layout, rows, &updates, &group.theta, &group.grad, &group.moments, &hyper)?;
        let hyper = Hyper { eps_scale: 1.0, ..hyper };
        optimizer.step(&ends.layout, &[0], &ends.updates, &ends.theta, &ends.grad, &ends.moments, &hyper)?;
        hierarchy.count_update(level, coset);
        Ok(())
    }

    /// Restricts to level `to`; a coherence term is measured on the sequences from `first` on. Collective.
    pub fn descend(&mut self, comm: &mut dyn Communicator, to: usize, first: u64) -> Result<()> {
        let Learner { hierarchy, differentiator, coherence_sequences, .. } = self;
        hierarchy.descend(to, &mut |hierarchy, level| {
            let target = Target { level, coset: 0 };
            differentiator.gradient(comm, hierarchy, target, first, *coherence_sequences).map(drop)
        })
    }

    /// Prolongs to level `to`.
    pub fn ascend(&mut self, to: usize) -> Result<()> {
        self.hierarchy.ascend(to)
    }

    /// Mean validation loss, in nats a token, of the fine net as it would be if all ascents were done now. Collective.
    pub fn evaluate(&mut self, comm: &mut dyn Communicator) -> Result<f64> {
        let Validation { sampler, sequences } = &self.validation;
        let share = share(*sequences, comm.rank(), comm.size());
        let mut sums = [self.differentiator.loss(self.hierarchy.fine()?, sampler, share)?];
        comm.reduce(&mut sums, Reduction::Sum)?;
        Ok(sums[0] / self.validation_tokens() as f64)
    }

    /// Takes the fine net over from a checkpoint, in place.
    pub fn load_model(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let (blocks, ends) = (self.hierarchy.group(0), self.hierarchy.ends());
        checkpoint.read_model(&[("blocks", &blocks.layout, &blocks.theta), ("ends", &ends.layout, &ends.theta)])
    }

    /// Tokens that an evaluation predicts.
    pub fn validation_tokens(&self) -> u64 {
        (self.validation.sequences * self.spec.context) as u64
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
