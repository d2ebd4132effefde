use super::transfer::transfer;
use super::*;
use crate::config::{self, Config, StateRule, TransferKind, Update};
use crate::model::{Division, Net, Spec, initialize};
use crate::ops::testing::random;
use candle_core::{DType, Device, Tensor};
use std::cell::Cell;
use std::collections::HashSet;

const MOMENTS: &[(&str, i32)] = &[("m", 1), ("v", 2)];
const CPU: &Device = &Device::Cpu;

/// A tiny net of 8 blocks and 3 levels; `levels` holds further keys of that table.
fn config(transfer: TransferKind, levels: &str) -> Config {
    let state = if transfer == TransferKind::Injection { "keep" } else { "scale" };
    let state = if levels.contains("state") { String::new() } else { format!("state = '{state}'\n") };
    let text = format!(
        "[data]\ndir = 'x'\ncontext = 5\nbatch = 3\n[model]\nvocab = 11\nwidth = 8\nheads = 2\ndepth = 8\nhorizon = 1\ninit_std = 0.3\n\
         [levels]\ncount = 3\ntransfer = '{transfer}'\n{state}{levels}\n[cycle]\nkind = 'cascade'"
    );
    config::parse(&text, &[]).unwrap()
}

fn hierarchy(config: &Config, dtype: DType) -> Hierarchy {
    let spec = Spec::new(config);
    let (ends, trajectory) = initialize(&spec, 1, dtype, CPU).unwrap();
    Hierarchy::new(config, &spec, MOMENTS, Division::NONE, trajectory, ends).unwrap()
}

/// Every transfer operator with every update form that goes with it.
fn each(mut law: impl FnMut(&Config)) {
    for &kind in TransferKind::ALL {
        let shared = transfer(kind).shares_rows();
        for &update in Update::ALL.iter().filter(|&&update| !shared || update == Update::Replace) {
            law(&config(kind, &format!("update = '{update}'\nalpha = 0.3")));
        }
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// max |a - b|
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// x += noise, in place: as if an optimizer had worked on it. Each call in a test has other noise, each run of the test the same.
fn disturb(x: &Tensor) {
    thread_local!(static CALLS: Cell<u64> = const { Cell::new(0) });
    let seed = CALLS.replace(CALLS.get() + 1);
    let noise = (random(x.dims(), x.dtype(), seed) * 0.3).unwrap();
    x.slice_set(&(x + noise).unwrap(), 0, 0).unwrap();
}

fn set(x: &Tensor, value: f64) {
    x.slice_set(&(x.zeros_like().unwrap() + value).unwrap(), 0, 0).unwrap();
}

/// A real gradient on one fixed batch.
fn gradient_of(config: &Config, dtype: DType) -> impl FnMut(&Hierarchy, usize) -> crate::error::Result<()> {
    let spec = Spec::new(config);
    let mut net = Net::new(&spec, spec.depth, 3, dtype, CPU).unwrap();
    let tokens: Vec<u32> = (0..15).map(|i| i * i % 11).collect();
    let targets: Vec<u32> = (0..15).map(|i| (i * i + 2 * i + 1) % 11).collect();
    move |hierarchy, level| {
        hierarchy.group(level).grad.zero_set()?;
        hierarchy.ends(level).grad.zero_set()?;
        let (params, grads) = (hierarchy.params(level, 0), hierarchy.grads(level, 0));
        net.loss_and_gradient(params, grads, &tokens, &targets, 1.0 / 15.0, None)?;
        Ok(())
    }
}

#[test]
fn the_unresolved_ratio_is_that_of_an_ascent_and_measuring_it_changes_nothing() {
    each(|config| {
        if config.levels.transfer == TransferKind::Injection {
            return;
        }
        let [mut measured, mut other] = [(); 2].map(|_| hierarchy(config, DType::F64));
        for h in [&mut measured, &mut other] {
            h.descend(1, None).unwrap();
            h.descend(2, None).unwrap();
        }
        disturb(&measured.group(2).theta);
        other.group(2).theta.slice_set(&measured.group(2).theta, 0, 0).unwrap();
        let mut gradient = gradient_of(config, DType::F64);
        let ratio = measured.unresolved(&mut gradient).unwrap();
        [&mut measured, &mut other].into_iter().for_each(|h| h.ascend(1).unwrap());
        assert_eq!(distance(&measured.group(1).theta, &other.group(1).theta), 0.0);
        gradient(&other, 1).unwrap();
        // Twins a and b: half of their sum twice over, and half of their difference.
        let [a, b] = [0, 1].map(|first| {
            let rows: Vec<u32> = (first..4).step_by(2).collect();
            other.group(1).grad.index_select(&Tensor::new(&rows[..], CPU).unwrap(), 0).unwrap()
        });
        let square = |x: Tensor| values(&x.sqr().unwrap()).iter().sum::<f64>();
        let expected = square((&a - &b).unwrap()) / square((&a + &b).unwrap());
        assert!(ratio > 0.01 && (ratio - expected).abs() < 1e-12 * (1.0 + expected), "{ratio} {expected}");
    });
}

#[test]
fn noise_parts_the_matrices_of_twins_and_keeps_their_mean() {
    for transfer in [TransferKind::Copy, TransferKind::Average] {
        let [mut parted, mut copied] =
            ["noise = 0.25", ""].map(|levels| hierarchy(&config(transfer, levels), DType::F64));
        for h in [&mut parted, &mut copied] {
            h.descend(1, None).unwrap();
            h.ascend(0).unwrap();
        }
        let halves = |h: &Hierarchy| {
            let twins = h.group(0).theta.reshape((4, 2, ())).unwrap();
            [0, 1].map(|j| twins.narrow(1, j, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap())
        };
        let ([a, b], [copy, _]) = (halves(&parted), halves(&copied));
        assert!(distance(&((&a + &b).unwrap() / 2.0).unwrap(), &copy) < 1e-7);
        let rms = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        for segment in &parted.group(0).layout.segments {
            let part = |x: &Tensor| x.narrow(1, segment.offset, segment.len()).unwrap().contiguous().unwrap();
            let apart = rms((part(&a) - part(&copy)).unwrap());
            match segment.matrices {
                0 => assert_eq!(apart, 0.0, "{}", segment.name),
                // (ξ_0 - ξ_1) / 2 has the deviation 1/√2.
                _ => assert!((apart / rms(part(&copy)) / 0.25 - 0.5f64.sqrt()).abs() < 0.1, "{}", segment.name),
            }
        }
    }
}

#[test]
fn a_pull_keeps_the_means_of_twins_and_makes_them_alike() {
    let means = |h: &Hierarchy, k: usize| {
        let theta = &h.group(0).theta;
        theta.reshape((8 / k, k, ())).unwrap().mean(1).unwrap()
    };
    let spread = |h: &Hierarchy, k: usize| {
        let theta = &h.group(0).theta;
        let copies: Vec<Tensor> = (0..8).map(|n| means(h, k).narrow(0, n / k, 1).unwrap()).collect();
        distance(theta, &Tensor::cat(&copies, 0).unwrap())
    };
    for (level, twins) in [(1, 2), (2, 4)] {
        let h = hierarchy(&config(TransferKind::Injection, "pull = 0.25"), DType::F64);
        let (before, apart) = (means(&h, twins), spread(&h, twins));
        assert!(apart > 0.1, "{apart}");
        h.pull(level).unwrap();
        assert!(distance(&before, &means(&h, twins)) < 1e-15);
        assert!((spread(&h, twins) - 0.75 * apart).abs() < 1e-15);
    }
    let h = hierarchy(&config(TransferKind::Injection, "pull = 1"), DType::F64);
    h.pull(0).unwrap();
    assert!(spread(&h, 2) > 0.1, "the fine level has no twins");
    h.pull(2).unwrap();
    assert!(spread(&h, 4) < 1e-15, "copies");
}

#[test]
fn cosets_are_strided_views() {
    let mut h = hierarchy(&config(TransferKind::Injection, ""), DType::F32);
    assert_eq!([h.cosets(0), h.cosets(1), h.cosets(2)], [1, 2, 4]);
    assert_eq!(h.row_indices(1, 1), [1, 3, 5, 7]);
    assert_eq!(h.row_indices(2, 3), [3, 7]);
    assert_eq!((h.params(2, 3).rows(), h.params(2, 3).h), (2, 0.5));
    h.count_update(2, [3]);
    h.count_update(1, [1]);
    assert_eq!(h.group(0).updates, [0, 1, 0, 2, 0, 1, 0, 2]);
    assert_eq!((h.updates(2, 3), h.ends(0).updates[0]), (vec![2, 2], 2));
}

#[test]
fn only_adjacent_switches_are_possible() {
    let mut h = hierarchy(&config(TransferKind::Copy, ""), DType::F32);
    assert!(h.ascend(0).is_err());
    assert!(h.descend(2, None).is_err());
    h.descend(1, None).unwrap();
    h.descend(2, None).unwrap();
    assert!(h.descend(3, None).is_err() && h.ascend(0).is_err());
    h.ascend(1).unwrap();
    assert_eq!(h.level(), 1);
}

#[test]
fn update_forms_are_their_formulas() {
    each(|config| {
        let mut h = hierarchy(config, DType::F64);
        h.descend(1, None).unwrap();
        let theta_h = h.group(0).theta.copy().unwrap();
        let operator = transfer(config.levels.transfer);
        if operator.shares_rows() {
            disturb(&h.group(1).theta);
            let trained = h.group(0).theta.copy().unwrap();
            h.ascend(0).unwrap();
            assert_eq!(distance(&h.group(0).theta, &trained), 0.0);
            return;
        }
        let theta_0 = h.group(1).theta.copy().unwrap();
        assert_eq!(distance(&theta_0, &operator.restriction(4, 2).apply(&theta_h).unwrap()), 0.0);
        disturb(&h.group(1).theta);
        let theta_1 = h.group(1).theta.copy().unwrap();
        h.ascend(0).unwrap();
        let p = |x: &Tensor| operator.prolongation(4, 2).apply(x).unwrap();
        let expected = match config.levels.update {
            Update::Replace => p(&theta_1),
            Update::Mix => ((&theta_h * 0.7).unwrap() + (p(&theta_1) * 0.3).unwrap()).unwrap(),
            Update::Correct => (&theta_h + (p(&(theta_1 - theta_0).unwrap()) * 0.3).unwrap()).unwrap(),
        };
        let error = distance(&h.group(0).theta, &expected);
        assert!(error < 1e-15, "{} {}: {error}", operator.name(), config.levels.update);
    });
}

#[test]
fn an_untrained_correction_changes_nothing() {
    for &kind in TransferKind::ALL.iter().filter(|&&kind| !transfer(kind).shares_rows()) {
        let mut h = hierarchy(&config(kind, "update = 'correct'"), DType::F32);
        let before = h.group(0).theta.copy().unwrap();
        for to in [1, 2] {
            h.descend(to, None).unwrap();
        }
        for to in [1, 0] {
            h.ascend(to).unwrap();
        }
        assert_eq!(distance(&h.group(0).theta, &before), 0.0);
        assert!(h.levels.iter().all(|level| level.entry.is_none()), "kept for no one");
    }
}

#[test]
fn the_fine_net_of_a_coarse_phase_is_the_one_after_the_ascents() {
    each(|config| {
        let mut h = hierarchy(config, DType::F32);
        for to in [1, 2] {
            disturb(&h.group(to - 1).theta);
            h.descend(to, None).unwrap();
        }
        disturb(&h.group(2).theta);
        let left = h.group(0).theta.copy().unwrap();
        assert_eq!(h.fine().unwrap().rows(), 8);
        let fine = match &h.scratch {
            Some((theta, _)) => theta.copy().unwrap(),
            None => left.clone(),
        };
        assert_eq!(distance(&h.group(0).theta, &left), 0.0, "looking at it must not change it");
        for to in [1, 0] {
            h.ascend(to).unwrap();
        }
        assert_eq!(distance(&h.group(0).theta, &fine), 0.0, "{:?}", config.levels);
    });
}

#[test]
fn moments_move_by_rule() {
    for &kind in TransferKind::ALL.iter().filter(|&&kind| !transfer(kind).shares_rows()) {
        for (rule, coarse, fine, updates) in [
            (StateRule::Scale, [6.0, 20.0], [3.0, 5.0], (7, 8)),
            (StateRule::Move, [3.0, 5.0], [3.0, 5.0], (7, 8)),
            (StateRule::Reset, [0.0, 0.0], [0.0, 0.0], (0, 0)),
            (StateRule::Keep, [0.0, 0.0], [3.0, 5.0], (0, 7)),
        ] {
            let mut h = hierarchy(&config(kind, &format!("state = '{rule}'")), DType::F64);
            let assert_moments = |h: &Hierarchy, level: usize, expected: [f64; 2]| {
                for (moment, expected) in h.group(level).moments.iter().zip(expected) {
                    assert!(values(moment).iter().all(|m| (m - expected).abs() < 1e-12), "{kind} {rule} level {level}");
                }
            };
            for (moment, value) in h.groups[0].moments.iter().chain(&h.ends[0].moments).zip([3.0, 5.0, 1.0, 1.0]) {
                set(moment, value);
            }
            (0..7).for_each(|_| h.count_update(0, [0]));
            h.descend(1, None).unwrap();
            assert_moments(&h, 1, coarse);
            assert_eq!(h.updates(1, 0), [updates.0; 4]);
            let ends = if rule == StateRule::Reset { 0.0 } else { 1.0 };
            assert!(h.ends(0).moments.iter().flat_map(values).all(|m| m == ends));
            h.count_update(1, [0]);
            h.ascend(0).unwrap();
            assert_moments(&h, 0, fine);
            assert_eq!(h.updates(0, 0), [updates.1; 8]);
        }
    }
}

#[test]
fn shared_moments_are_in_the_unit_of_the_current_level() {
    let mut h = hierarchy(&config(TransferKind::Injection, "state = 'scale'"), DType::F32);
    h.groups[0].moments.iter().for_each(disturb);
    let before: Vec<Tensor> = h.groups[0].moments.iter().map(|m| m.copy().unwrap()).collect();
    for to in [1, 2] {
        h.descend(to, None).unwrap();
    }
    for (i, factor) in [4.0, 16.0].into_iter().enumerate() {
        assert_eq!(distance(&h.group(2).moments[i], &(&before[i] * factor).unwrap()), 0.0);
    }
    for to in [1, 0] {
        h.ascend(to).unwrap();
    }
    for (moment, before) in h.group(0).moments.iter().zip(&before) {
        assert_eq!(distance(moment, before), 0.0);
    }
}

/// The premise of `scale`: after an ascent by `copy`, each fine gradient is half of its coarse row's, up to O(h).
#[test]
fn gradients_scale_with_the_step_size() {
    let config = config(TransferKind::Copy, "");
    let mut h = hierarchy(&config, DType::F64);
    let mut gradient = gradient_of(&config, DType::F64);
    h.descend(1, None).unwrap();
    gradient(&h, 1).unwrap();
    let coarse = h.group(1).grad.copy().unwrap();
    h.ascend(0).unwrap();
    gradient(&h, 0).unwrap();
    let expected = (transfer(TransferKind::Copy).prolongation(4, 2).apply(&coarse).unwrap() * 0.5).unwrap();
    let largest = values(&expected).iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    let error = distance(&h.group(0).grad, &expected) / largest;
    assert!(error < 0.2, "{error}");
}

#[test]
fn the_corrected_coarse_gradient_is_the_restricted_fine_one() {
    for &kind in TransferKind::ALL {
        let config = config(kind, "coherence = true");
        let mut h = hierarchy(&config, DType::F64);
        let mut gradient = gradient_of(&config, DType::F64);
        let mut corrected = |h: &Hierarchy, level: usize| {
            gradient(h, level).unwrap();
            h.correct_gradient(level).unwrap();
            (h.gradient_of(level).unwrap().copy().unwrap(), h.ends(level).grad.copy().unwrap())
        };
        // On level 2 the finer objective carries a term itself.
        for to in [1, 2] {
            let (fine, ends) = corrected(&h, to - 1);
            h.descend(to, Some(&mut gradient_of(&config, DType::F64))).unwrap();
            let p = transfer(kind).prolongation(config.rows(to), 2);
            let (coarse, coarse_ends) = corrected(&h, to);
            let error = distance(&coarse, &p.transpose().apply(&fine).unwrap()).max(distance(&coarse_ends, &ends));
            assert!(error < 1e-15, "{kind} level {to}: {error}");
            let v = h.levels[to].coherence.as_ref().unwrap();
            assert!(values(&v.blocks).iter().any(|v| v.abs() > 1e-6), "{kind}: the law must not hold trivially");
        }
        h.ascend(1).unwrap();
        assert!(h.levels[2].coherence.is_none() && h.levels[1].coherence.is_some());
    }
}

#[test]
fn a_restored_hierarchy_goes_on_bit_for_bit() {
    each(|config| {
        let mut config = config.clone();
        config.levels.coherence = true;
        let spec = Spec::new(&config);
        let mut gradient = gradient_of(&config, DType::F32);
        let mut h = hierarchy(&config, DType::F32);
        for to in [1, 2] {
            h.groups.iter().flat_map(|g| g.moments.iter().chain([&g.theta])).for_each(disturb);
            h.count_update(to - 1, [0]);
            h.descend(to, Some(&mut gradient)).unwrap();
        }
        let snapshot = serde_json::to_string(&h.snapshot()).unwrap();
        let (ends, trajectory) = initialize(&spec, 2, DType::F32, CPU).unwrap();
        let mut restored = Hierarchy::new(&config, &spec, MOMENTS, Division::NONE, trajectory, ends).unwrap();
        restored.restore(&serde_json::from_str(&snapshot).unwrap()).unwrap();
        let (from, to) = (h.tensors().unwrap(), restored.tensors().unwrap());
        assert_eq!(from.len(), to.len());
        let mut names = HashSet::new();
        for (from, to) in from.iter().zip(&to) {
            assert!(names.insert(&from.name), "{} twice", from.name);
            assert_eq!((&from.name, from.layout, from.fine_net), (&to.name, to.layout, to.fine_net));
            assert_eq!(from.tensor.dim(1).unwrap(), from.layout.len());
            to.tensor.slice_set(from.tensor, 0, 0).unwrap();
        }
        let bytes: usize = from.iter().map(|named| 4 * named.tensor.elem_count()).sum();
        let memory = memory(&config, &spec, MOMENTS.len(), Division::NONE);
        assert_eq!(bytes as u64, memory.total() - memory.gradients, "{:?}", config.levels);
        // What matters is that both go on alike.
        for net in [&mut h, &mut restored] {
            gradient(net, 2).unwrap();
            net.correct_gradient(2).unwrap();
        }
        assert_eq!(distance(&h.group(2).grad, &restored.group(2).grad), 0.0);
        for net in [&mut h, &mut restored] {
            net.ascend(1).unwrap();
            net.ascend(0).unwrap();
            net.restore(&net.snapshot()).unwrap();
        }
        assert_eq!(h.snapshot(), restored.snapshot());
        for (a, b) in h.tensors().unwrap().iter().zip(restored.tensors().unwrap()) {
            assert_eq!(a.name, b.name);
            assert_eq!(distance(a.tensor, b.tensor), 0.0, "{}", a.name);
        }
    });
}

#[test]
fn moments_are_divided_among_ranks() {
    each(|config| {
        let (spec, elements) = (Spec::new(config), |h: &Hierarchy| {
            let groups = h.groups.iter().chain(&h.ends);
            groups.flat_map(|group| &group.moments).map(Tensor::elem_count).sum::<usize>()
        });
        let whole = elements(&hierarchy(config, DType::F32));
        for (ranks, whole_matrices) in [(2, false), (3, false), (4, true), (9, true)] {
            let division = |rank| Division { rank, ranks, whole_matrices };
            let of_rank = |rank| {
                let (ends, trajectory) = initialize(&spec, 1, DType::F32, CPU).unwrap();
                elements(&Hierarchy::new(config, &spec, MOMENTS, division(rank), trajectory, ends).unwrap())
            };
            let parts: Vec<usize> = (0..ranks).map(of_rank).collect();
            assert_eq!(parts.iter().sum::<usize>(), whole);
            let largest = *parts.iter().max().unwrap();
            assert_eq!(memory(config, &spec, MOMENTS.len(), division(0)).moments, 4 * largest as u64);
            assert!(whole_matrices || largest * ranks * 10 < whole * 12, "{parts:?} of {whole}");
        }
    });
}

#[test]
fn a_checkpoint_of_another_shape_is_refused() {
    let mut h = hierarchy(&config(TransferKind::Copy, ""), DType::F32);
    let other = hierarchy(&config(TransferKind::Injection, ""), DType::F32).snapshot();
    assert!(h.restore(&other).unwrap_err().to_string().contains("resume with"));
}
