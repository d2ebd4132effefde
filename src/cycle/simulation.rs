//! Carries out the lists of all ranks without tensors: who meets whom, and who knows what.

use super::tests::{configs, places};
use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Takes ops off the lists as ranks would: an op of a scope is done when all of its ranks have come to it. The number of ops
/// left when nobody can go on, 0 if every op met its partners.
fn left_over(lists: Vec<Vec<(Groups, LocalOp)>>) -> usize {
    let mut queues: Vec<VecDeque<_>> = lists.into_iter().map(VecDeque::from).collect();
    let ranks = queues.len();
    let mut moved = true;
    while moved {
        moved = false;
        for rank in 0..ranks {
            while let Some(head) = queues[rank].front() {
                let members = match head.1.scope() {
                    Scope::Rank => rank..rank + 1,
                    Scope::Group => head.0.members(head.0.of(rank)),
                    Scope::All => 0..ranks,
                };
                if members.clone().any(|member| queues[member].front() != Some(head)) {
                    break;
                }
                members.for_each(|member| drop(queues[member].pop_front()));
                moved = true;
            }
        }
    }
    queues.iter().map(VecDeque::len).sum()
}

/// What a rank knows: steps in the rows of each net, and the levels that it is on.
#[derive(Clone, Debug, Default, PartialEq)]
struct Knowledge {
    steps: BTreeMap<(usize, usize), u64>,
    level: usize,
    coarse_level: usize,
}

impl Knowledge {
    fn train(&mut self, level: usize, coset: Coset, steps: u64) {
        let coset = if let Coset::Index(k) = coset { k } else { 0 };
        *self.steps.entry((level, coset)).or_default() += steps;
    }

    fn take(&mut self, from: &Knowledge, nets: impl Fn(usize, usize) -> bool) {
        let taken = from.steps.iter().filter(|((level, coset), _)| nets(*level, *coset));
        self.steps.extend(taken.map(|(net, steps)| (*net, *steps)));
    }
}

/// One round of all ranks. Returns the sequences read, by side.
fn carry_out(round: &Round, places: &Places, ranks: &mut [Knowledge]) -> Vec<(Side, u64)> {
    let mut sequences = Vec::new();
    let groups = &round.groups;
    for (rank, own) in ranks.iter_mut().enumerate() {
        let mut read = |side, level, first| {
            if groups.is_root(rank) {
                sequences.extend((first..first + places.batch(level)).map(|sequence| (side, sequence)));
            }
        };
        for op in places.local(round, rank) {
            match op {
                LocalOp::Gradient { level, first, .. } => read(Side::Main, level, first),
                LocalOp::Update { level, cosets, .. } => cosets.iter().for_each(|&k| own.train(level, k, 1)),
                LocalOp::Smooth(smooth) => {
                    (0..smooth.steps).for_each(|i| read(smooth.side, smooth.level, smooth.first + i * smooth.stride));
                    assert!(smooth.passed(smooth.steps - 1) < round.steps());
                    assert_eq!(smooth.level, if smooth.side == Side::Main { own.level } else { own.coarse_level });
                    own.train(smooth.level, smooth.coset, smooth.steps);
                }
                LocalOp::Switch { side, op: Op::Descend { to } | Op::Ascend { to } } => match side {
                    Side::Main => own.level = to,
                    Side::Coarse => own.coarse_level = to,
                },
                LocalOp::Switch { op, .. } => panic!("{op:?} is no switch"),
                _ => {}
            }
        }
    }
    for op in places.local(round, 0) {
        let before = ranks.to_vec();
        for own in ranks.iter_mut() {
            match op {
                LocalOp::Assemble { level } => (0..groups.len()).for_each(|group| {
                    let trained = own_cosets(groups, places.nets(level, Coset::All), groups.root(group));
                    own.take(&before[groups.root(group)], |l, k| l == level && trained.contains(&k));
                }),
                LocalOp::Accept => {
                    own.take(&before[groups.root(0)], |level, _| level == 0);
                    own.take(&before[groups.root(groups.len() - 1)], |level, _| level > 0);
                    own.coarse_level = 0;
                }
                _ => {}
            }
        }
    }
    sequences
}

/// The steps of all nets together that the plan asks for, by level.
fn asked(places: &Places, ops: &[Op], sum: &mut BTreeMap<usize, u64>) {
    for op in ops {
        match op {
            Op::Smooth { level, coset, steps } => {
                *sum.entry(*level).or_default() += steps * places.nets(*level, *coset) as u64
            }
            Op::Beside { fine, coarse, .. } => {
                *sum.entry(0).or_default() += fine;
                asked(places, coarse, sum);
            }
            Op::Descend { .. } | Op::Ascend { .. } => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Every op of every rank meets its partners, for every cycle, placement and number of ranks.
    #[test]
    fn all_lists_run_to_their_end(config in configs(200), ranks in 1..=64usize) {
        let (plan, places) = (plan(&config), places(&config, ranks));
        let lists: Vec<_> = (0..ranks).map(|rank| localize(&plan, &places, rank)).collect();
        prop_assert_eq!(left_over(lists), 0);
    }

    /// In the end every rank knows the same, each net had the steps that the plan asks for, and no sequence was read twice.
    #[test]
    fn all_ranks_end_alike_and_every_step_is_done_once(config in configs(200), ranks in 1..=64usize) {
        let (plan, places) = (plan(&config), places(&config, ranks));
        let mut knowledge = vec![Knowledge::default(); ranks];
        let divisions = places.divisions(&plan);
        for op in &plan {
            let mut done = 0;
            while done < op.length() {
                let round = places.round(op, done);
                prop_assert_eq!(round.groups.ranks(), ranks);
                prop_assert!(round.groups.len() == 1 || divisions.contains(&round.groups));
                let read = carry_out(&round, &places, &mut knowledge);
                for (side, count) in [Side::Main, Side::Coarse].into_iter().zip(places.sequences(&round)) {
                    let read = read.iter().filter(|(s, _)| *s == side).map(|(_, sequence)| *sequence);
                    let read: Vec<u64> = read.collect();
                    prop_assert_eq!(read.len() as u64, count);
                    prop_assert_eq!(BTreeSet::from_iter(read), (0..count).collect());
                }
                done += round.advance;
            }
            prop_assert_eq!(done, op.length());
            prop_assert!(knowledge.iter().all(|own| own == &knowledge[0]), "after {:?}", op);
        }
        let mut expected = BTreeMap::new();
        asked(&places, &plan, &mut expected);
        let mut trained = BTreeMap::new();
        knowledge[0].steps.iter().for_each(|((level, _), steps)| *trained.entry(*level).or_default() += steps);
        prop_assert_eq!(trained, expected);
        prop_assert_eq!(knowledge[0].level, 0);
    }

    /// Groups by FLOPs: nobody could finish earlier by moving one rank, and predicted idle shares are of the slowest's time.
    #[test]
    fn idle_times_are_shares(config in configs(200), ranks in 1..=64usize) {
        let places = places(&config, ranks);
        for op in plan(&config) {
            let (idle, work, groups) = (places.idle(&op), places.work(&op), places.groups(&op));
            prop_assert_eq!((idle.len(), work.len()), (groups.len(), groups.len()));
            prop_assert!(idle.iter().all(|share| (0.0..1.0).contains(share)), "{:?}", idle);
            prop_assert!(idle.contains(&0.0));
        }
    }
}

#[test]
fn a_list_that_does_not_meet_is_found() {
    let groups = Groups::one(2);
    let list = |ops: &[LocalOp]| ops.iter().map(|op| (groups.clone(), op.clone())).collect::<Vec<_>>();
    assert_eq!(left_over(vec![list(&[LocalOp::Meet]), list(&[LocalOp::Meet])]), 0);
    assert_eq!(left_over(vec![list(&[LocalOp::Meet, LocalOp::Accept]), list(&[LocalOp::Accept, LocalOp::Meet])]), 4);
    assert_eq!(left_over(vec![list(&[LocalOp::Meet, LocalOp::Meet]), list(&[LocalOp::Meet])]), 1);
}

#[test]
fn given_groups_are_taken_and_must_be_all_ranks() {
    let text = "[data]\ndir = 'x'\n[model]\nvocab = 64\ndepth = 8\n[levels]\ncount = 2\n[cycle]\nkind = 'v'\n\
                [parallel]\nplacement = 'beside'\ngroups = [3, 1]";
    let config = crate::config::parse(text, &[]).unwrap();
    let beside = plan(&config).into_iter().find(|op| matches!(op, Op::Beside { .. })).unwrap();
    assert_eq!(places(&config, 4).groups(&beside).sizes(), [3, 1]);
    let error = Places::new(&config, &crate::model::Spec::new(&config), 2).err().unwrap().to_string();
    assert!(error.contains("parallel.groups = [3, 1] is for 4 ranks, but there are 2"), "{error}");
}
