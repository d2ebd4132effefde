//! A fine and a coarse level that are trained at the same time, from the same θ⁰.
//!
//! ```text
//! fine side:    θ_F, e_F from θ⁰, e⁰                    level 0 and its ends
//! coarse side:  θ_C, e_C from R θ⁰, e⁰                  level 1 (and coarser ones in between) and the coarse ends
//! then:         θ_F + α P (θ_C − R θ⁰),  e_F + α (e_C − e⁰)
//! ```
//!
//! The sides share no tensor that either changes, so they can be on different ranks: [`Hierarchy::half`] names what has to
//! be sent from one to the other.

use super::hierarchy::Level;
use super::snapshot::Snapshot;
use super::switch::Gradient;
use super::{Group, Hierarchy};
use crate::error::{Result, bail, ensure};
use crate::model::Params;
use crate::ops::residual::combine;
use candle_core::Tensor;

/// Half of a hierarchy: level 0 and its ends, or the coarse levels and theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Fine,
    Coarse,
}

impl Hierarchy {
    /// The coarse side goes to the next coarser level; from level 0 it starts: R θ⁰ and e⁰ are kept.
    pub fn descend_beside(&mut self, to: usize, coherence: Option<&mut Gradient>) -> Result<()> {
        ensure!(
            self.ends.len() == 2 && self.current == 0,
            "no coarse level can be trained beside level {}",
            self.current
        );
        self.check_descent(self.beside.unwrap_or(0), to)?;
        self.beside = Some(to);
        if to == 1 {
            self.ends_entry = Some(self.ends[0].theta.copy()?);
        }
        self.restrict(to, to == 1, coherence)
    }

    /// The coarse side goes to the next finer level, level 1 at the finest.
    pub fn ascend_beside(&mut self, to: usize) -> Result<()> {
        ensure!(to > 0, "the coarse side ends on level 1");
        self.check_ascent(self.beside.unwrap_or(0), to)?;
        self.prolong(to)?;
        self.beside = Some(to);
        Ok(())
    }

    /// e_C − e⁰ [1, E], a new tensor.
    pub fn change_of_ends(&self) -> Result<Tensor> {
        match &self.ends_entry {
            Some(entry) => Ok((&self.ends[1].theta - entry)?),
            None => bail!("no coarse level was trained beside level 0"),
        }
    }

    /// The corrected fine net, in scratch tensors that are valid until the next call; `change` = e_C − e⁰. The coarse ends
    /// are overwritten: they are the scratch of the ends.
    pub fn corrected(&self, change: &Tensor, alpha: f64) -> Result<&Params> {
        let (Some((theta, params)), Some(entry)) = (&self.scratch, &self.levels[1].entry) else {
            bail!("no coarse level was trained beside level 0");
        };
        theta.slice_set(&self.groups[0].theta, 0, 0)?;
        self.prolongation(1).multiply(alpha, &(&self.groups[1].theta - entry)?, 1.0, theta)?;
        combine(1.0, &self.ends[0].theta, alpha, change, &self.ends[1].theta)?;
        Ok(params)
    }

    /// Ends the stage; with `take`, the fine net becomes what [`Hierarchy::corrected`] gave last. Its moments stay.
    pub fn end_beside(&mut self, take: bool) -> Result<()> {
        if let (true, Some((theta, _))) = (take, &self.scratch) {
            self.groups[0].theta.slice_set(theta, 0, 0)?;
            self.ends[0].theta.slice_set(&self.ends[1].theta, 0, 0)?;
        }
        (self.beside, self.ends_entry) = (None, None);
        self.levels.iter_mut().for_each(Level::leave);
        Ok(())
    }

    /// Every tensor that training changes in one half, in a fixed order. The halves of two ranks correspond once
    /// [`Hierarchy::adopt`] has taken over the other's counts.
    pub fn half(&self, half: Half) -> Vec<&Tensor> {
        match half {
            Half::Fine => tensors([&self.groups[0], &self.ends[0]].into_iter()).collect(),
            Half::Coarse => {
                let terms = self.levels.iter().flat_map(Level::terms).chain(&self.ends_entry);
                tensors(self.groups.iter().skip(1).chain(self.ends.get(1))).chain(terms).collect()
            }
        }
    }

    /// Takes over the counts of one half from the snapshot of another rank, and makes room for its tensors.
    pub fn adopt(&mut self, half: Half, other: &Snapshot) -> Result<()> {
        let merged = self.snapshot().with(half, other);
        self.restore(&merged)
    }
}

fn tensors<'a>(groups: impl Iterator<Item = &'a Group>) -> impl Iterator<Item = &'a Tensor> {
    groups.flat_map(|group| std::iter::once(&group.theta).chain(&group.moments))
}
