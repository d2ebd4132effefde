//! The laws of `parallel.placement` and of `parallel.zero`, with ranks as threads of this process.

mod common;

use candle_core::Device;
use common::{checkpoint, cut_at, results, saved_steps};
use serde_json::Value;
use std::path::{Path, PathBuf};
use vcycle::checkpoint::{Check, Checkpoint};
use vcycle::comm::{Solo, thread};
use vcycle::config::{self, Config, OptimizerKind};
use vcycle::data;
use vcycle::error::{Outcome, Result};
use vcycle::run::{self, Console, Ends, Learner, Options, Target};

/// A tiny net with two coarse levels and no warm-up.
const BASE: &str = "
[run]
steps = 16
[data]
context = 16
batch = 8
[model]
vocab = 320
width = 16
heads = 2
depth = 4
[optimizer]
lr = 1e-2
[schedule]
kind = 'constant'
warmup = 0
[log]
every_steps = 1
eval_every = 5
eval_sequences = 8
[checkpoint]
keep = 0
";

/// Every coset of two levels, then the fine level.
const COSETS: &[&str] = &[
    "levels.count=3",
    "levels.transfer=injection",
    "cycle.kind=phases",
    "cycle.phases=[{level=2,steps=5},{level=1,steps=5},{level=0,steps=6}]",
    "parallel.placement=cosets",
];

/// The fine level alone, beside a coarse level, alone.
const BESIDE: &[&str] = &[
    "levels.count=2",
    "cycle.kind=phases",
    "cycle.phases=[{level=0,steps=3},{level=1,steps=7},{level=0,steps=3},{level=0,steps=3}]",
    "parallel.placement=beside",
];

/// As `BESIDE`, with all that a coarse side can hold: two levels, coherence terms, moments that are reset.
const DEEP: &[&str] = &[
    "levels.count=3",
    "levels.coherence=true",
    "levels.state=reset",
    "levels.update=correct",
    "cycle.kind=w",
    "cycle.pre=1",
    "cycle.post=2",
    "cycle.coarse=2",
    "parallel.placement=beside",
];

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        std::fs::create_dir(&texts).unwrap();
        // Counting: something to learn, in documents enough for both splits.
        for i in 0..100 {
            let text: String = (0..40).map(|j| format!("{} ", i * 37 + j * (1 + i % 3))).collect();
            std::fs::write(texts.join(format!("{i:03}.txt")), text).unwrap();
        }
        let tokenizer = "bytes".parse().unwrap();
        let out = folder.path().join("data");
        let options = data::Options { inputs: vec![texts], out, tokenizer, val_fraction: 0.2, extensions: None };
        data::prepare(&options, &mut |_, _| ()).unwrap();
        Bench { folder }
    }

    /// `name` in the folder; a whole path as it is.
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self, settings: &[&[&str]]) -> Config {
        let data = format!("data.dir={}", self.path("data").display());
        let settings = settings.concat().into_iter().map(str::to_owned).chain([data]);
        config::parse(BASE, &settings.collect::<Vec<_>>()).unwrap()
    }

    /// Trains or resumes the run `name`.
    fn train(&self, name: impl AsRef<Path>, ranks: usize, settings: &[&[&str]]) -> PathBuf {
        let (config, run_dir) = (self.config(settings), self.path(name));
        let options = Options { run_dir: run_dir.clone(), resume: true, threads: 1 };
        let results = thread::run(ranks, |comm| run::train(config.clone(), &options, comm, &Console::default()));
        results.into_iter().for_each(|result| assert_eq!(result.unwrap(), Outcome::Done));
        run_dir
    }
}

/// Checksums of the tensors: the fine net, all else.
fn checksums(run: &Path, step: u64) -> Vec<String> {
    let opened = Checkpoint::open(&checkpoint(run, step), Check::Checksums).unwrap();
    let tensors = opened.manifest().files.iter().filter(|file| file.name.ends_with(".h5"));
    tensors.map(|file| file.sha256.clone()).collect()
}

/// Fine and coarse levels in every way that moves optimizer state, for the update rules of [`OptimizerKind`].
const SWITCHES: [(&str, &[&str]); 3] = [
    (
        "v",
        &[
            "levels.count=3",
            "levels.transfer=average",
            "levels.update=correct",
            "levels.coherence=true",
            "cycle.kind=v",
            "cycle.pre=1",
            "cycle.post=1",
            "cycle.coarse=3",
        ],
    ),
    (
        "cosets",
        &[
            "levels.count=2",
            "levels.transfer=injection",
            "levels.coset=all",
            "levels.state=scale",
            "levels.pull=0.2",
            "cycle.kind=phases",
            "cycle.phases=[{level=1,steps=8},{level=0,steps=8}]",
        ],
    ),
    ("linear", &["levels.count=2", "levels.transfer=linear", "levels.coherence=true", "cycle.kind=cascade"]),
];

/// The runs read the same and computed the same up to rounding.
#[track_caller]
fn assert_close(a: &Path, b: &Path) {
    let (a, b) = (results(a), results(b));
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().zip(&b) {
        for key in ["step", "op", "level", "coset", "tokens", "flops_total", "lr"] {
            assert_eq!(x[key], y[key], "{key}: {x} against {y}");
        }
        for key in ["loss", "val_loss", "grad_norm"] {
            let (p, q) = (x[key].as_f64().unwrap_or(0.0), y[key].as_f64().unwrap_or(0.0));
            assert!((p - q).abs() <= 1e-3 * p.abs(), "{key}: {x} against {y}");
        }
    }
}

/// Every parameter of the fine net after the last step.
fn fine_net(bench: &Bench, run: &Path) -> Vec<f32> {
    let mut learner = Learner::new(&bench.config(&[]), &Device::Cpu, 1, 0, 1).unwrap();
    learner.load_model(&Checkpoint::open(run, Check::Sizes).unwrap()).unwrap();
    let hierarchy = &learner.hierarchy;
    [values(&hierarchy.group(0).theta), values(&hierarchy.ends(0).theta)].concat()
}

fn values(x: &candle_core::Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// θ_k ← θ_k − η g_k for the rows of every coset k, e ← e − η (g_{e,0} + g_{e,1}) / 2: each coset's gradient is on a batch of
/// its own, all before the update. The logged norm is √(Σ ‖g_k‖² / 2 + ‖ḡ_e‖²).
#[test]
fn a_step_of_all_cosets_is_one_of_their_gradients_side_by_side() -> Result<()> {
    let bench = Bench::new();
    let settings: &[&str] = &[
        "run.steps=1",
        "levels.count=2",
        "levels.transfer=injection",
        "cycle.kind=phases",
        "cycle.phases=[{level=1,steps=1},{level=0,steps=0}]",
        "parallel.placement=cosets",
        "optimizer.kind=sgd",
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "optimizer.clip=0",
        "optimizer.lr=0.5",
    ];
    let (lr, config) = (0.5, bench.config(&[settings]));
    let mut by_hand = Learner::new(&config, &Device::Cpu, 1, 0, 1)?;
    let (mut rows, mut ends, mut square) = (Vec::new(), vec![0f32; by_hand.hierarchy.ends(0).theta.elem_count()], 0.0);
    for coset in 0..2 {
        let target = Target { level: 1, coset };
        by_hand.gradient(&mut Solo::default(), target, 8 * coset as u64, Ends::Sum)?;
        let hierarchy = &by_hand.hierarchy;
        ends.iter_mut().zip(values(&hierarchy.ends(1).grad)).for_each(|(sum, g)| *sum += g / 2.0);
        for &row in hierarchy.row_indices(1, coset) {
            let gradient = values(&hierarchy.group(1).grad.get(row)?);
            square += gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>() / 2.0;
            rows.push((row, gradient));
        }
    }
    square += ends.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    let moved = |theta: &candle_core::Tensor, gradient: &[f32]| -> Vec<f32> {
        values(theta).iter().zip(gradient).map(|(theta, g)| theta - lr * g).collect()
    };
    for ranks in 1..=4 {
        let run = bench.train(format!("{ranks}"), ranks, &[settings]);
        let mut trained = Learner::new(&config, &Device::Cpu, 1, 0, 1)?;
        trained.load_model(&Checkpoint::open(&run, Check::Checksums)?)?;
        let (before, after) = (&by_hand.hierarchy, &trained.hierarchy);
        let mut pairs = vec![(moved(&before.ends(0).theta, &ends), values(&after.ends(0).theta))];
        for (row, gradient) in &rows {
            pairs.push((moved(&before.group(0).theta.get(*row)?, gradient), values(&after.group(0).theta.get(*row)?)));
        }
        for (expected, found) in pairs {
            let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-6, "{ranks} ranks: {worst}");
        }
        let norm = results(&run)[0]["grad_norm"].as_f64().unwrap();
        assert!((norm - square.sqrt()).abs() < 1e-5 * norm, "{norm} against {}", square.sqrt());
    }
    Ok(())
}

/// A coset a rank, fewer ranks than cosets, several ranks a coset: the same training, sums rounded differently.
#[test]
fn where_cosets_and_sides_are_trained_does_not_matter() {
    let bench = Bench::new();
    let averaged = [COSETS, &["parallel.sync_every=3"]].concat();
    // Leaves the coarse level before its 36 steps are done.
    let leaving: &[&str] = &[
        "run.steps=40",
        "levels.count=2",
        "cycle.kind=adaptive",
        "cycle.fractions=[0.9,0.1]",
        "cycle.window=1",
        "cycle.threshold=0.0",
    ];
    let every: [(&str, &[&str]); _] =
        [("cosets", COSETS), ("averaged", &averaged), ("leaving", leaving), ("beside", BESIDE), ("deep", DEEP)];
    for (name, settings) in every {
        let alone = bench.train(name, 1, &[settings]);
        for ranks in [2, 3, 4, 6] {
            let several = bench.train(format!("{name}-{ranks}"), ranks, &[settings]);
            assert_close(&several, &alone);
        }
    }
    assert!(results(&bench.path("leaving")).iter().filter(|line| line["level"] == 1).count() < 36);
    let in_turn = [COSETS, &["parallel.placement=sequential", "levels.coset=all"]].concat();
    assert_close(&bench.train("in-turn", 2, &[&in_turn]), &bench.path("cosets"));
    let given = ["parallel.groups=[1,3]"];
    assert_close(&bench.train("given", 4, &[BESIDE, &given]), &bench.path("beside"));
    assert_close(&bench.train("given-cosets", 4, &[COSETS, &given]), &bench.path("cosets"));
}

/// Averaging the ends is not summing their gradients, or the law above would say little.
#[test]
fn averaged_ends_are_another_computation() {
    let bench = Bench::new();
    let [summed, averaged] = ["1", "3"].map(|every| {
        let run = bench.train(every, 2, &[COSETS, &[&format!("parallel.sync_every={every}")]]);
        results(&run).last().unwrap()["val_loss"].as_f64().unwrap()
    });
    assert!(summed != averaged && (summed - averaged).abs() < 0.5, "{summed} {averaged}");
}

#[test]
fn placements_resume_bit_for_bit_after_every_meeting() {
    let bench = Bench::new();
    let averaged = [COSETS, &["parallel.sync_every=2"]].concat();
    for (name, settings, ranks) in
        [("cosets", COSETS, 3), ("averaged", &averaged[..], 2), ("beside", BESIDE, 3), ("deep", DEEP, 2)]
    {
        let settings = [settings, &["checkpoint.every_steps=1"]].concat();
        let whole = bench.train(name, ranks, &[&settings]);
        let saved = saved_steps(&whole);
        assert!(saved.len() > 4, "{name}: {saved:?}");
        for &step in &saved[..saved.len() - 1] {
            let cut = bench.train(cut_at(&whole, step), ranks, &[&settings]);
            assert_eq!(results(&cut), results(&whole), "{name} resumed after step {step}");
            assert_eq!(checksums(&cut, 16), checksums(&whole, 16), "{name} resumed after step {step}");
        }
        for &step in &saved[1..3] {
            let other = bench.train(cut_at(&whole, step), 5 - ranks, &[&settings]);
            assert_close(&other, &whole);
        }
    }
}

/// With α = 0 the fine level is trained as if nothing were beside it, bit for bit, whatever the coarse level does.
#[test]
fn without_a_correction_the_fine_level_trains_as_alone() {
    let bench = Bench::new();
    let nothing = ["levels.alpha=0"];
    let beside = bench.train("beside", 1, &[BESIDE, &nothing]);
    let alone = bench.train("alone", 1, &[&["run.steps=9"]]);
    assert!(fine_net(&bench, &beside) == fine_net(&bench, &alone));
    let fine = |run: &Path| -> Vec<Value> {
        let lines = results(run).into_iter().filter(|line| line["level"] == 0);
        lines.map(|line| line["loss"].clone()).collect()
    };
    // In the stage, too, a line is a step: each round has one of the fine level.
    assert_eq!(fine(&beside), fine(&alone));
    for ranks in [2, 3] {
        let slow = bench.train(format!("slow-{ranks}"), ranks, &[BESIDE, &nothing]);
        let faster = ["schedule.level_multipliers=[1.0, 3.0]"];
        let fast = bench.train(format!("fast-{ranks}"), ranks, &[BESIDE, &nothing, &faster]);
        assert!(fine_net(&bench, &slow) == fine_net(&bench, &fast));
        assert_ne!(checksums(&slow, 16)[1], checksums(&fast, 16)[1], "the coarse level was trained differently");
    }
}

/// What counts is the loss on the batch that the fine level reads next, that of the first step after the stage.
#[test]
fn a_correction_is_taken_only_if_it_lowers_the_held_out_loss() {
    let bench = Bench::new();
    let alone = bench.train("alone", 2, &[BESIDE, &["levels.alpha=0"]]);
    let helpful = bench.train("helpful", 2, &[BESIDE]);
    let next = |run: &Path| {
        let line = results(run).into_iter().find(|line| line["step"] == 14).unwrap();
        line["loss"].as_f64().unwrap()
    };
    assert!(next(&helpful) < next(&alone), "{} {}", next(&helpful), next(&alone));
    for (name, coarse_lr) in [("harmful", "1000.0"), ("idle", "1e-30")] {
        let multipliers = format!("schedule.level_multipliers=[1.0, {coarse_lr}]");
        let dropped = bench.train(name, 2, &[BESIDE, &[&multipliers]]);
        assert!(fine_net(&bench, &dropped) == fine_net(&bench, &alone), "{name}");
    }
}

/// ZeRO-1 is the same computation: bit for bit, checkpoints too, where the gradient is not clipped, for the norm is summed in
/// another order.
#[test]
fn sharded_optimizer_state_trains_as_the_whole() {
    let bench = Bench::new();
    for ((name, settings), kind) in SWITCHES.iter().flat_map(|case| OptimizerKind::ALL.iter().map(move |k| (case, k))) {
        let kind = format!("optimizer.kind={kind}");
        for (ranks, clip) in [(1, "0.1"), (2, "0"), (3, "0"), (3, "0.1"), (4, "0")] {
            let run = |zero: &str| {
                let (run, clip) = (format!("{name}-{kind}-{ranks}-{clip}-{zero}"), format!("optimizer.clip={clip}"));
                bench.train(run, ranks, &[settings, &[&kind, &clip, zero]])
            };
            let (whole, sharded) = (run("parallel.zero=0"), run("parallel.zero=1"));
            assert_close(&sharded, &whole);
            if clip == "0" || ranks == 1 {
                // The text of the config is in the file of the model.
                assert_eq!(checksums(&sharded, 16)[1], checksums(&whole, 16)[1], "{name} {kind} {ranks} ranks");
                assert!(fine_net(&bench, &sharded) == fine_net(&bench, &whole), "{name} {kind} {ranks} ranks");
            }
        }
    }
}

/// Bit for bit on as many ranks; on any other number, with and without shards, the run goes on.
#[test]
fn sharded_runs_resume_from_checkpoints_that_any_run_reads() {
    let bench = Bench::new();
    let (zero, one) = ("parallel.zero=0", "parallel.zero=1");
    for (name, settings) in SWITCHES {
        let settings = [settings, &["checkpoint.every_steps=1", "optimizer.kind=muon"]].concat();
        let whole = bench.train(name, 3, &[&settings, &[one]]);
        for step in [2, 5, 9] {
            let cut = bench.train(cut_at(&whole, step), 3, &[&settings, &[one]]);
            assert_eq!(results(&cut), results(&whole), "{name} resumed after step {step}");
            assert_eq!(checksums(&cut, 16), checksums(&whole, 16), "{name} resumed after step {step}");
        }
        for (ranks, other) in [(2, one), (8, one), (1, zero)] {
            assert_close(&bench.train(cut_at(&whole, 9), ranks, &[&settings, &[other]]), &whole);
        }
        let unsharded = bench.train(format!("{name}-0"), 2, &[&settings, &[zero]]);
        assert_close(&bench.train(cut_at(&unsharded, 9), 3, &[&settings, &[one]]), &unsharded);
    }
}
