use super::*;
use crate::config;
use crate::model::Spec;
use proptest::prelude::*;

/// Valid configs of every kind of cycle and every placement, of less than `limit` steps.
pub(super) fn configs(limit: u64) -> impl Strategy<Value = Config> {
    let shape = (1..=4usize, 2..=3usize, 1..limit);
    let steps = (0..40u64, 0..40u64, 1..60u64, 0.0..1.0f64);
    let coset = (any::<bool>(), prop::sample::select(CosetPolicy::ALL));
    let shares = prop::collection::vec(prop_oneof![Just(0u32), 1..100u32], 4);
    let kind = prop::sample::select(CycleKind::ALL);
    let placement = (prop::sample::select(Placement::ALL), 1..5u64);
    (kind, shape, steps, coset, shares, any::<u64>(), placement).prop_filter_map("not a valid config", |drawn| {
        let (kind, (count, factor, steps), (pre, post, coarse, finish), (injection, coset), shares, cut, place) = drawn;
        let (placement, sync_every) = place;
        let count = match kind {
            CycleKind::Flat => 1,
            CycleKind::Paper => 2,
            _ => count,
        };
        let shared = match placement {
            Placement::Sequential => injection || kind == CycleKind::Paper,
            _ => placement == Placement::Cosets,
        };
        let (transfer, state, coset) =
            if shared { ("injection", "keep", coset) } else { ("copy", "scale", CosetPolicy::First) };
        let sum: u32 = shares[..count].iter().sum();
        let fractions: Vec<f64> = shares[..count].iter().map(|&s| s as f64 / sum.max(1) as f64).collect();
        let fractions = if sum == 0 { String::new() } else { format!("fractions = {fractions:?}") };
        let batch: Vec<u32> = (0..count).map(|level| if level == 0 { 4 } else { shares[level] % 5 + 1 }).collect();
        let (first, before) = (cut % (steps + 1), cut % (steps + 1) / 3);
        let text = format!(
            "[run]\nsteps = {steps}\n[data]\ndir = 'x'\nbatch = 4\n[model]\nvocab = 64\ndepth = {}\n\
             [levels]\ncount = {count}\nbatch = {batch:?}\nfactor = {factor}\ntransfer = '{transfer}'\nstate = '{state}'\ncoset = '{coset}'\n\
             [cycle]\nkind = '{kind}'\npre = {pre}\npost = {post}\ncoarse = {coarse}\nfinish = {finish}\n{fractions}\n\
             phases = [{{ level = 0, steps = {before} }}, {{ level = {}, steps = {} }}, {{ level = 0, steps = {} }}]\n\
             [parallel]\nplacement = '{placement}'\nsync_every = {sync_every}",
            factor.pow(3),
            count - 1,
            first - before,
            steps - first,
        );
        config::parse(&text, &[]).ok()
    })
}

pub(super) fn places(config: &Config, ranks: usize) -> Places {
    Places::new(config, &Spec::new(config), ranks).unwrap()
}

fn config(text: &str) -> Config {
    config::parse(&format!("[data]\ndir = 'x'\n[model]\nvocab = 64\ndepth = 8\n{text}"), &[]).unwrap()
}

/// A plan in short: `v1` descends to level 1, `^0` ascends to level 0, `1:20` is 20 steps on level 1, `1.k:5` on its coset k.
fn short(ops: &[Op]) -> String {
    let word = |op: &Op| match *op {
        Op::Smooth { level, coset: Coset::All, steps } => format!("{level}.*:{steps}"),
        Op::Beside { fine, ref coarse, rounds } => format!("[0:{fine} | {}]/{rounds}", short(coarse)),
        Op::Descend { to } => format!("v{to}"),
        Op::Ascend { to } => format!("^{to}"),
        Op::Smooth { level, coset: Coset::Index(0), steps } => format!("{level}:{steps}"),
        Op::Smooth { level, coset: Coset::Index(k), steps } => format!("{level}.{k}:{steps}"),
        Op::Smooth { level, coset: Coset::Random, steps } => format!("{level}.?:{steps}"),
    };
    ops.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn plan_of(text: &str) -> String {
    short(&plan(&config(text)))
}

proptest! {
    #[test]
    fn every_plan_is_valid_and_deterministic(config in configs(3000)) {
        let ops = plan(&config);
        prop_assert!(check(&ops, &config).is_ok(), "{} {:?}", short(&ops), check(&ops, &config));
        prop_assert_eq!(&ops, &plan(&config));
    }

    #[test]
    fn positions_visit_every_step_once(config in configs(3000)) {
        let ops = plan(&config);
        let places = places(&config, 1);
        let (mut position, mut steps, mut level) = (Position::default(), 0, 0);
        while let Some(op) = position.op(&ops) {
            prop_assert_eq!(position.steps_done(&ops), steps);
            prop_assert_eq!(position.level(&ops), level);
            let round = places.round(op, position.step_in_op);
            prop_assert_eq!(round.ends, position.step_in_op + round.advance == op.length());
            steps += round.steps();
            if let Op::Descend { to } | Op::Ascend { to } = *op {
                level = to;
            }
            position.advance(&ops, round.advance);
        }
        prop_assert_eq!((steps, level), (config.run.steps, 0));
    }

    #[test]
    fn shortening_keeps_plans_valid(config in configs(3000), stop in 0..3000u64) {
        let mut ops = plan(&config);
        let mut position = Position::default();
        while position.steps_done(&ops) < stop && position.op(&ops).is_some() {
            position.advance(&ops, 1);
        }
        let (before, level) = (position, position.level(&ops));
        let finer = |op: &Op| matches!(op, Op::Smooth { level: l, .. } if *l < level);
        let can = position.step_in_op > 0 && matches!(position.op(&ops), Some(Op::Smooth { .. })) && ops[position.op..].iter().any(finer);
        shorten(&mut ops, &mut position, 2);
        prop_assert!(check(&ops, &config).is_ok());
        prop_assert_eq!(position.steps_done(&ops), before.steps_done(&ops));
        let expected = if can { Position { op: before.op + 1, step_in_op: 0 } } else { before };
        prop_assert_eq!(position, expected);
    }
}

#[test]
fn names_are_the_config_words() {
    for &kind in CycleKind::ALL {
        assert_eq!(cycle(kind).name(), kind.name());
    }
}

#[test]
fn the_plans_of_every_cycle() {
    let steps = "[run]\nsteps = 100\n[levels]\ncount = 3\n[cycle]\nfinish = 0.1\npre = 5\npost = 5\ncoarse = 10\n";
    for (text, expected) in [
        ("[run]\nsteps = 7", "0:7"),
        (
            "[run]\nsteps = 41\n[levels]\ncount = 2\ntransfer = 'injection'\n[cycle]\nkind = 'paper'",
            "v1 1:11 1.1:10 ^0 0:20",
        ),
        (
            "[run]\nsteps = 10\n[levels]\ncount = 3\n[cycle]\nkind = 'cascade'\nfractions = [0.5, 0.3, 0.2]",
            "v1 v2 2:5 ^1 1:3 ^0 0:2",
        ),
        (
            "[run]\nsteps = 10\n[levels]\ncount = 3\n[cycle]\nkind = 'cascade'\nfractions = [0.5, 0.0, 0.5]",
            "v1 v2 2:5 ^1 ^0 0:5",
        ),
        (
            &format!("{steps}kind = 'v'"),
            "0:5 v1 1:5 v2 2:10 ^1 1:5 ^0 0:10 v1 1:5 v2 2:10 ^1 1:5 ^0 0:10 v1 1:5 v2 2:10 ^1 1:5 ^0 0:15",
        ),
        (&format!("{steps}kind = 'w'"), "0:9 v1 1:9 v2 2:18 ^1 1:18 v2 2:18 ^1 1:9 ^0 0:19"),
        (&format!("{steps}kind = 'f'"), "v1 v2 2:15 ^1 1:8 v2 2:15 ^1 1:7 ^0 0:8 v1 1:7 v2 2:15 ^1 1:8 ^0 0:17"),
        (
            "[run]\nsteps = 10\n[levels]\ncount = 3\n[cycle]\nkind = 'phases'\nphases = [{level=2,steps=3},{level=1,steps=0},{level=0,steps=7}]",
            "v1 v2 2:3 ^1 ^0 0:7",
        ),
        (
            "[run]\nsteps = 10\n[levels]\ncount = 2\ntransfer = 'injection'\ncoset = 'random'\n[cycle]\nkind = 'cascade'",
            "v1 1.?:8 ^0 0:2",
        ),
        ("[run]\nsteps = 10\n[levels]\ncount = 4\n[cycle]\nkind = 'cascade'", "v1 v2 v3 3:3 ^2 2:3 ^1 1:2 ^0 0:2"),
        (
            "[run]\nsteps = 40\n[levels]\ncount = 2\ntransfer = 'injection'\n[cycle]\nkind = 'paper'\n\
             [parallel]\nplacement = 'cosets'",
            "v1 1.*:20 ^0 0:20",
        ),
        (
            &format!("{steps}kind = 'v'\n[parallel]\nplacement = 'beside'"),
            "0:5 [0:5 | v1 1:5 v2 2:10 ^1 1:5]/5 0:5 [0:5 | v1 1:5 v2 2:10 ^1 1:5]/5 0:5 [0:5 | v1 1:5 v2 2:10 ^1 1:5]/5 0:10",
        ),
        (
            &format!("{steps}kind = 'f'\n[parallel]\nplacement = 'beside'\nsync_every = 4"),
            "v1 v2 2:15 ^1 1:8 v2 2:15 ^1 1:7 ^0 0:8 [0:7 | v1 1:7 v2 2:15 ^1 1:8]/2 0:10",
        ),
        (
            "[run]\nsteps = 12\n[levels]\ncount = 2\n[cycle]\nkind = 'phases'\n\
             phases = [{level=1,steps=2},{level=0,steps=3},{level=1,steps=2},{level=0,steps=1},{level=0,steps=4}]\n\
             [parallel]\nplacement = 'beside'",
            "v1 1:2 ^0 0:3 [0:1 | v1 1:2]/1 0:4",
        ),
    ] {
        assert_eq!(plan_of(text), expected, "{text}");
    }
}

#[test]
fn a_cycle_that_does_not_fit_is_refused() {
    for kind in ["v", "w", "f"] {
        let text = format!(
            "[data]\ndir = 'x'\n[model]\ndepth = 8\n[levels]\ncount = 4\n[run]\nsteps = 50\n[cycle]\nkind = '{kind}'"
        );
        let error = format!("{:#}", config::parse(&text, &[]).unwrap_err());
        assert!(error.contains("cycle takes"), "{error}");
    }
}

#[test]
fn coherence_is_refused_where_several_cosets_are_trained() {
    let head = "[data]\ndir = 'x'\n[levels]\ncoherence = true\ncount = 2\n";
    for tail in [
        "transfer = 'injection'\ncoset = 'alternate'\n[cycle]\nkind = 'cascade'",
        "transfer = 'injection'\n[cycle]\nkind = 'paper'",
    ] {
        let error = format!("{:#}", config::parse(&format!("{head}{tail}"), &[]).unwrap_err());
        assert!(error.contains("levels.coherence"), "{error}");
    }
    config::parse(&format!("{head}transfer = 'injection'\n[cycle]\nkind = 'cascade'"), &[]).unwrap();
}

#[test]
fn a_shortened_smooth_gives_finer_levels_more_work_in_proportion() {
    let text = "[run]\nsteps = 100\n[levels]\ncount = 3\n[cycle]\nkind = 'adaptive'\nfractions = [0.4, 0.3, 0.3]";
    let mut ops = plan(&config(text));
    assert_eq!(short(&ops), "v1 v2 2:40 ^1 1:30 ^0 0:30");
    let mut position = Position { op: 2, step_in_op: 10 };
    shorten(&mut ops, &mut position, 2);
    assert_eq!(short(&ops), "v1 v2 2:10 ^1 1:50 ^0 0:40");
    assert_eq!(position, Position { op: 3, step_in_op: 0 });
}

#[test]
fn adaptive_leaves_a_level_whose_finer_one_gives_more_for_its_work() {
    let leave = |factor: usize, ratios: &[f64]| {
        let text = format!("[levels]\ncount = 2\nfactor = {factor}\n[cycle]\nkind = 'adaptive'");
        cycle(CycleKind::Adaptive).leave(&config(&text), ratios)
    };
    assert!(!leave(2, &[]) && !leave(2, &[9.0; 4]), "too few measurements");
    assert!(leave(2, &[1.0, 0.9, 1.1, 0.9, 1.1]) && !leave(2, &[1.0, 0.9, 1.1, 0.9, 1.0]), "the mean of five");
    assert!(leave(2, &[0.1, 1.0, 1.0, 1.0, 1.0, 1.0]) && !leave(2, &[9.0, 0.1, 0.1, 0.1, 0.1, 0.1]), "the last five");
    assert!(!leave(4, &[2.9; 5]) && leave(4, &[3.0; 5]), "four times the rows cost four times the work");
    assert!(!leave(2, &[f64::NAN; 5]));
    assert!(!cycle(CycleKind::Cascade).leave(&config("[levels]\ncount = 2\n[cycle]\nkind = 'cascade'"), &[9.0; 5]));
}

#[test]
fn adaptive_is_refused_where_levels_share_rows() {
    let text = "[data]\ndir = 'x'\n[levels]\ncount = 2\ntransfer = 'injection'\n[cycle]\nkind = 'adaptive'";
    let error = format!("{:#}", config::parse(text, &[]).unwrap_err());
    assert!(error.contains("cycle.kind") && error.contains("injection"), "{error}");
}

#[test]
fn lists_that_cannot_be_carried_out_are_refused() {
    let config = config("[run]\nsteps = 4\n[levels]\ncount = 2\n[cycle]\nkind = 'cascade'");
    let smooth = |level, steps| Op::Smooth { level, coset: Coset::Index(0), steps };
    for (ops, why) in [
        (vec![smooth(0, 3)], "run.steps"),
        (vec![smooth(1, 4)], "op 0"),
        (vec![Op::Descend { to: 2 }], "op 0"),
        (vec![Op::Descend { to: 1 }, Op::Ascend { to: 1 }], "op 1"),
        (vec![Op::Descend { to: 1 }, smooth(1, 4)], "ends on level 1"),
        (vec![smooth(0, 0), smooth(0, 4)], "op 0"),
        (vec![Op::Smooth { level: 0, coset: Coset::Index(1), steps: 4 }], "op 0"),
        (vec![Op::Beside { fine: 2, coarse: vec![smooth(0, 2)], rounds: 1 }], "op 0"),
        (vec![Op::Beside { fine: 2, coarse: vec![Op::Descend { to: 1 }, smooth(1, 2)], rounds: 3 }], "op 0"),
    ] {
        let error = check(&ops, &config).unwrap_err().to_string();
        assert!(error.contains(why), "{ops:?}: {error}");
    }
}
