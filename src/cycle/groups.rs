use crate::data::share;
use serde::Serialize;
use std::ops::Range;

/// All ranks, cut into consecutive groups that work at the same time. Group 0 begins with rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Groups {
    /// Ranks in each group, none 0.
    sizes: Vec<usize>,
}

impl Groups {
    pub fn new(sizes: Vec<usize>) -> Groups {
        debug_assert!(!sizes.is_empty() && !sizes.contains(&0));
        Groups { sizes }
    }

    /// All `ranks` as one group.
    pub fn one(ranks: usize) -> Groups {
        Groups::new(vec![ranks])
    }

    /// `count` ≤ `ranks` groups whose sizes differ by at most 1.
    pub fn equal(ranks: usize, count: usize) -> Groups {
        Groups::new((0..count).map(|group| share(ranks, group, count).len()).collect())
    }

    /// Two groups of `ranks` ≥ 2 that finish as nearly together as can be: the sizes n, ranks − n with the least
    /// max(work[0] / n, work[1] / (ranks − n)).
    pub fn balanced(ranks: usize, work: [f64; 2]) -> Groups {
        let time = |n: usize| (work[0] / n as f64).max(work[1] / (ranks - n) as f64);
        let best = (1..ranks).min_by(|&a, &b| time(a).total_cmp(&time(b))).expect("at least two ranks");
        Groups::new(vec![best, ranks - best])
    }

    /// Number of groups.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Number of ranks in all groups together.
    pub fn ranks(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// Ranks in each group.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The ranks of `group`; the first one is its root.
    pub fn members(&self, group: usize) -> Range<usize> {
        let first = self.sizes[..group].iter().sum();
        first..first + self.sizes[group]
    }

    pub fn root(&self, group: usize) -> usize {
        self.members(group).start
    }

    /// The group that `rank` is in.
    pub fn of(&self, rank: usize) -> usize {
        (0..self.len()).find(|&group| self.members(group).contains(&rank)).expect("every rank is in a group")
    }

    pub fn is_root(&self, rank: usize) -> bool {
        self.root(self.of(rank)) == rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_rank_is_in_exactly_one_group(ranks in 1usize..65, count in 1usize..65, work in 0.01..100.0f64) {
            let mut all = vec![Groups::equal(ranks, count.min(ranks)), Groups::one(ranks)];
            if ranks > 1 {
                all.push(Groups::balanced(ranks, [work, 1.0]));
            }
            for groups in all {
                let members: Vec<usize> = (0..groups.len()).flat_map(|group| groups.members(group)).collect();
                prop_assert_eq!(members, (0..ranks).collect::<Vec<_>>());
                prop_assert!((0..ranks).all(|rank| groups.members(groups.of(rank)).contains(&rank)));
                prop_assert_eq!(groups.ranks(), ranks);
            }
        }
    }

    #[test]
    fn balanced_groups_follow_the_work() {
        let sizes = |ranks, work| Groups::balanced(ranks, work).sizes().to_vec();
        assert_eq!(sizes(2, [9.0, 1.0]), [1, 1]);
        assert_eq!(sizes(8, [3.0, 1.0]), [6, 2]);
        assert_eq!(sizes(8, [1.0, 2.5]), [2, 6]);
    }
}
