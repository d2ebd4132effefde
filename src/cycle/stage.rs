//! `parallel.placement = "beside"`: coarse visits beside the fine visit after them.

use super::{Op, Visit, merged, smooth, switch};
use crate::config::Config;

/// The ops of `visits` in which an excursion to coarse levels is done beside the fine visit that follows it.
///
/// An excursion is a run of coarse visits. Its fine visit keeps the steps that it has in the list of visits; what comes
/// after it there is smoothed by all ranks. An excursion with no fine visit before it (nested iteration: the fine net
/// is untrained) or none after it is done by all ranks.
pub(super) fn plan(config: &Config, visits: Vec<Visit>) -> Vec<Op> {
    let mut visits = visits.into_iter().filter(|visit| visit.steps > 0).peekable();
    let (mut ops, mut alone, mut trained) = (Vec::new(), Vec::new(), false);
    while let Some(visit) = visits.next() {
        if visit.level == 0 {
            trained = true;
            alone.push(visit);
            continue;
        }
        let mut excursion = vec![visit];
        while let Some(coarse) = visits.next_if(|visit| visit.level > 0) {
            excursion.push(coarse);
        }
        match visits.next_if(|_| trained) {
            Some(fine) => {
                sequence(config, &mut ops, std::mem::take(&mut alone), 0);
                ops.push(beside(config, fine.steps, excursion));
            }
            None => alone.extend(excursion),
        }
    }
    sequence(config, &mut ops, alone, 0);
    ops
}

fn beside(config: &Config, fine: u64, excursion: Vec<Visit>) -> Op {
    let mut coarse = Vec::new();
    sequence(config, &mut coarse, excursion, 1);
    let steps: u64 = coarse.iter().map(Op::steps).sum();
    Op::Beside { fine, rounds: fine.min(steps).div_ceil(config.parallel.sync_every), coarse }
}

/// Adds the ops of `visits`, which start on level 0 and end on level `end`.
pub(super) fn sequence(config: &Config, ops: &mut Vec<Op>, visits: Vec<Visit>, end: usize) {
    let cosets = super::cycle(config.cycle.kind).cosets(config);
    let mut level = 0;
    for visit in merged(visits) {
        switch(ops, level, visit.level);
        smooth(ops, visit, cosets, config);
        level = visit.level;
    }
    switch(ops, level, end);
}
