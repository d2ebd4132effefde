//! What a checkpoint keeps of a hierarchy: small values ([`Snapshot`]) and named tensors ([`Hierarchy::tensors`]).

use super::coherence::Coherence;
use super::{Group, Half, Hierarchy};
use crate::error::{Result, ensure};
use crate::model::{Layout, Shard};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The state of a hierarchy besides tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The level that the run is on.
    level: usize,
    /// Updates of each row of each group, finest first.
    updates: Vec<Vec<u64>>,
    ends_updates: u64,
    /// Levels that hold θ_H⁰.
    entries: Vec<usize>,
    /// Levels that hold a coherence term.
    coherence: Vec<usize>,
    /// The level of the coarse side, while one is trained beside level 0.
    #[serde(default)]
    beside: Option<usize>,
    /// Updates of the coarse levels' ends, if those are not the fine level's.
    #[serde(default)]
    coarse_ends_updates: Option<u64>,
}

impl Snapshot {
    /// This snapshot with one half of it from another.
    pub(super) fn with(mut self, half: Half, other: &Snapshot) -> Snapshot {
        match half {
            Half::Fine => {
                self.ends_updates = other.ends_updates;
                self.updates[0].clone_from(&other.updates[0]);
            }
            Half::Coarse => {
                let (fine, ends_updates) = (self.updates.swap_remove(0), self.ends_updates);
                self = Snapshot { ends_updates, ..other.clone() };
                self.updates[0] = fine;
            }
        }
        self
    }
}

/// A tensor of a checkpoint.
pub struct Named<'a> {
    /// `blocks`, `optimizer/m/ends`, `levels/1/coherence/blocks`, ...
    pub name: String,
    /// Part of the fine net, all that an evaluation needs.
    pub fine_net: bool,
    pub layout: &'a Layout,
    /// [R, P], or [R, S] with the columns of `shard`; a reader writes into it in place.
    pub tensor: &'a Tensor,
    /// The columns that this rank has of it; `None`: all.
    pub shard: Option<&'a Shard>,
}

impl Hierarchy {
    pub fn snapshot(&self) -> Snapshot {
        let holding = |holds: fn(&super::hierarchy::Level) -> bool| {
            (0..self.levels.len()).filter(|&level| holds(&self.levels[level])).collect()
        };
        Snapshot {
            level: self.current,
            updates: self.groups.iter().map(|group| group.updates.clone()).collect(),
            ends_updates: self.ends[0].updates[0],
            beside: self.beside,
            coarse_ends_updates: self.ends.get(1).map(|ends| ends.updates[0]),
            entries: holding(|level| level.entry.is_some()),
            coherence: holding(|level| level.coherence.is_some()),
        }
    }

    /// Takes over a snapshot; then [`Hierarchy::tensors`] names the tensors that belong to it, ready to be read into.
    /// What exists already is kept, so that restoring one's own snapshot changes nothing.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let shape = |updates: &[Vec<u64>]| updates.iter().map(Vec::len).collect::<Vec<_>>();
        let (own, saved) = (shape(&self.snapshot().updates), shape(&snapshot.updates));
        ensure!(
            own == saved && snapshot.level < self.levels.len(),
            "the checkpoint has rows {saved:?} and is on level {}; the config gives {} levels with rows {own:?}: \
             resume with the model and levels that the checkpoint was written with",
            snapshot.level,
            self.levels.len()
        );
        self.current = snapshot.level;
        self.beside = snapshot.beside;
        self.ends[0].updates[0] = snapshot.ends_updates;
        if let (Some(ends), Some(updates)) = (self.ends.get_mut(1), snapshot.coarse_ends_updates) {
            ends.updates[0] = updates;
        }
        let Hierarchy { ends_entry, ends, .. } = self;
        keep_or_make(ends_entry, snapshot.beside.is_some(), || Ok(ends[0].theta.zeros_like()?))?;
        for (group, updates) in self.groups.iter_mut().zip(&snapshot.updates) {
            group.updates.clone_from(updates);
        }
        for level in 0..self.levels.len() {
            let rows = self.group(level).theta.narrow(0, 0, self.rows(level))?;
            let (entry, coherence) = (snapshot.entries.contains(&level), snapshot.coherence.contains(&level));
            let Hierarchy { levels, ends, .. } = self;
            keep_or_make(&mut levels[level].entry, entry, || Ok(rows.zeros_like()?))?;
            keep_or_make(&mut levels[level].coherence, coherence, || {
                Ok(Coherence { blocks: rows.zeros_like()?, ends: ends[0].theta.zeros_like()? })
            })?;
        }
        Ok(())
    }

    /// Every tensor that a resumed run needs, each once, in a fixed order.
    ///
    /// The fine net under `blocks` is the one that is validated: on a coarse level with rows of its own that is
    /// [`Hierarchy::fine`], and level 0 as it was left is `levels/0/blocks`.
    pub fn tensors(&self) -> Result<Vec<Named<'_>>> {
        self.fine()?;
        let mut list = List(Vec::new());
        let fine = &self.groups[0];
        match &self.scratch {
            Some((theta, _)) if self.current > 0 => {
                list.push("blocks".into(), true, &fine.layout, theta);
                list.push("levels/0/blocks".into(), false, &fine.layout, &fine.theta);
            }
            _ => list.push("blocks".into(), true, &fine.layout, &fine.theta),
        }
        // Copies of the ends: the validated net's under `ends`.
        let own = self.ends_owner(self.current);
        for (copy, ends) in self.ends.iter().enumerate() {
            let name = if copy == own { "ends".into() } else { format!("levels/{copy}/ends") };
            list.push(name, copy == own, &ends.layout, &ends.theta);
        }
        list.moments(&self.moments, "", "blocks", fine);
        for (copy, ends) in self.ends.iter().enumerate() {
            let prefix = if copy == 0 { String::new() } else { format!("levels/{copy}/") };
            list.moments(&self.moments, &prefix, "ends", ends);
        }
        let ends_layout = &self.ends[0].layout;
        if let Some(entry) = &self.ends_entry {
            list.push("levels/1/entry/ends".into(), false, ends_layout, entry);
        }
        for (level, group) in self.groups.iter().enumerate().skip(1) {
            list.push(format!("levels/{level}/blocks"), false, &group.layout, &group.theta);
            list.moments(&self.moments, &format!("levels/{level}/"), "blocks", group);
        }
        for (level, terms) in self.levels.iter().enumerate() {
            if let Some(entry) = &terms.entry {
                list.push(format!("levels/{level}/entry/blocks"), false, &fine.layout, entry);
            }
            if let Some(v) = &terms.coherence {
                list.push(format!("levels/{level}/coherence/blocks"), false, &fine.layout, &v.blocks);
                list.push(format!("levels/{level}/coherence/ends"), false, ends_layout, &v.ends);
            }
        }
        Ok(list.0)
    }
}

struct List<'a>(Vec<Named<'a>>);

impl<'a> List<'a> {
    fn push(&mut self, name: String, fine_net: bool, layout: &'a Layout, tensor: &'a Tensor) {
        self.0.push(Named { name, fine_net, layout, tensor, shard: None });
    }

    fn moments(&mut self, moments: &[(&str, i32)], prefix: &str, kind: &str, group: &'a Group) {
        for ((name, _), tensor) in moments.iter().zip(&group.moments) {
            let shard = Some(&group.shard).filter(|shard| !shard.is_whole());
            let name = format!("{prefix}optimizer/{name}/{kind}");
            self.0.push(Named { name, fine_net: false, layout: &group.layout, tensor, shard });
        }
    }
}

/// Makes `piece` exist or not, keeping what is there.
fn keep_or_make<T>(piece: &mut Option<T>, exists: bool, make: impl FnOnce() -> Result<T>) -> Result<()> {
    if !exists {
        *piece = None;
    } else if piece.is_none() {
        *piece = Some(make()?);
    }
    Ok(())
}
