//! The main job through the real binary: ranks under mpirun, checkpoints, signals, resume.

mod common;

use common::{checkpoint, cut_at, metrics, results, saved_steps};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const VCYCLE: &str = env!("CARGO_BIN_EXE_vcycle");

/// A tiny net that still has three levels; `log.every_steps = 1` makes every loss visible.
const BASE: &str = "
[run]
steps = 12
[data]
context = 16
batch = 8
[model]
width = 16
heads = 2
depth = 4
[optimizer]
lr = 1e-2
[schedule]
rewarm = 2
[log]
every_steps = 1
eval_every = 5
eval_sequences = 8
[checkpoint]
every_steps = 1
keep = 0
";

/// Cycles that together use every operator, update form, state rule, coset policy and optimizer.
const CYCLES: &[(&str, &[&str])] = &[
    ("flat", &["model.integrator=heun", "optimizer.kind=sgd"]),
    (
        "cascade",
        &[
            "levels.count=3",
            "levels.batch=[8,5,4]",
            "levels.context=[16,8,4]",
            "levels.noise=0.1",
            "cycle.kind=cascade",
            "model.parametrization=completep",
        ],
    ),
    (
        "v",
        &[
            "levels.count=3",
            "levels.transfer=average",
            "levels.update=correct",
            "levels.coherence=true",
            "levels.coherence_from=0.4",
            "cycle.kind=v",
            "cycle.pre=1",
            "cycle.post=1",
            "cycle.coarse=2",
            "optimizer.kind=muon",
        ],
    ),
    (
        "w",
        &[
            "levels.count=2",
            "levels.transfer=linear",
            "levels.update=mix",
            "levels.alpha=0.5",
            "levels.state=keep",
            "cycle.kind=w",
            "cycle.pre=1",
            "cycle.post=1",
            "cycle.coarse=2",
        ],
    ),
    ("f", &["levels.count=3", "levels.state=reset", "cycle.kind=f", "cycle.pre=1", "cycle.post=1", "cycle.coarse=1"]),
    (
        "paper",
        &[
            "levels.count=2",
            "levels.transfer=injection",
            "levels.coset=alternate",
            "levels.pull=0.2",
            "cycle.kind=paper",
            "levels.state=keep",
            "optimizer.kind=sgd",
        ],
    ),
    (
        "random",
        &[
            "levels.count=3",
            "levels.transfer=injection",
            "levels.coset=random",
            "cycle.kind=phases",
            "cycle.phases=[{level=2,steps=4},{level=1,steps=4},{level=0,steps=4}]",
        ],
    ),
    (
        "adaptive",
        &[
            "levels.count=2",
            "levels.state=move",
            "cycle.kind=adaptive",
            "cycle.fractions=[0.8,0.2]",
            "cycle.window=1",
            "cycle.threshold=0.0",
        ],
    ),
    ("cosets", COSETS),
    (
        "averaged",
        &[
            "levels.count=2",
            "levels.transfer=injection",
            "cycle.kind=paper",
            "parallel.placement=cosets",
            "parallel.sync_every=4",
        ],
    ),
    ("beside", BESIDE),
];

/// Four cosets, then two, then the fine level.
const COSETS: &[&str] = &[
    "levels.count=3",
    "levels.transfer=injection",
    "cycle.kind=phases",
    "cycle.phases=[{level=2,steps=4},{level=1,steps=4},{level=0,steps=4}]",
    "parallel.placement=cosets",
];

/// One V-cycle: a step on the fine level, then 2 of them beside 6 on two coarse levels, then the finish.
const BESIDE: &[&str] = &[
    "levels.count=3",
    "levels.coherence=true",
    "cycle.kind=v",
    "cycle.pre=1",
    "cycle.post=2",
    "cycle.coarse=3",
    "cycle.finish=0.25",
    "parallel.placement=beside",
];

/// A folder with prepared data and a config.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("texts");
        std::fs::create_dir(&text).unwrap();
        for (i, source) in [include_str!("train.rs"), include_str!("../src/run/train.rs")].iter().enumerate() {
            for (j, part) in source.split("\n\n").enumerate() {
                std::fs::write(text.join(format!("{i}-{j:03}.txt")), part).unwrap();
            }
        }
        let bench = Bench { folder };
        std::fs::write(bench.path("config.toml"), BASE).unwrap();
        let prepared = Command::new(VCYCLE)
            .args(["data", "prepare", "--tokenizer", "bytes", "--val-fraction", "0.1", "--out"])
            .args([bench.path("data"), text])
            .output()
            .unwrap();
        assert!(prepared.status.success(), "{}", stderr(&prepared));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `vcycle train` into `run_dir` on `ranks` ranks.
    fn train(&self, run_dir: &Path, ranks: usize, settings: &[&str], flags: &[&str]) -> Command {
        let mut command = vcycle(ranks);
        command.arg("train").arg(self.path("config.toml"));
        command.arg("--set").arg(format!("data.dir={}", self.path("data").display()));
        command.args(["--set", "parallel.threads=1"]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command.arg("--run-dir").arg(run_dir).args(flags);
        command
    }

    /// A whole run that must succeed.
    fn finished(&self, name: &str, ranks: usize, settings: &[&str]) -> PathBuf {
        let run_dir = self.path(name);
        expect_exit(self.train(&run_dir, ranks, settings, &[]).output().unwrap(), 0);
        run_dir
    }

    fn resume(&self, run_dir: &Path, ranks: usize, settings: &[&str]) -> Output {
        self.train(run_dir, ranks, settings, &["--resume"]).output().unwrap()
    }
}

fn vcycle(ranks: usize) -> Command {
    if ranks == 1 {
        return Command::new(VCYCLE);
    }
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--oversubscribe", "--bind-to", "none", "-n"]).arg(ranks.to_string()).arg(VCYCLE);
    mpirun.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    mpirun
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn expect_exit(output: Output, code: i32) -> String {
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// Checksums of the tensors in a checkpoint.
fn checksums(run: &Path, step: u64) -> Vec<String> {
    let manifest = std::fs::read(checkpoint(run, step).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let files = manifest["files"].as_array().unwrap();
    let tensors = files.iter().filter(|file| file["name"].as_str().unwrap().ends_with(".h5"));
    tensors.map(|file| file["sha256"].as_str().unwrap().to_owned()).collect()
}

fn losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[track_caller]
fn assert_close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance * x.abs(), "loss {i}: {x} against {y}");
    }
}

#[test]
fn every_cycle_resumes_bit_for_bit_after_every_step() {
    let bench = Bench::new();
    for (name, settings) in CYCLES {
        let whole = bench.finished(name, 1, settings);
        let saved = saved_steps(&whole);
        assert!(saved.len() >= 4 && saved.ends_with(&[12]), "{name}: {saved:?}");
        for &step in &saved[..saved.len() - 1] {
            let cut = cut_at(&whole, step);
            expect_exit(bench.resume(&cut, 1, settings), 0);
            assert_eq!(results(&cut), results(&whole), "{name} resumed after step {step}");
            assert_eq!(checksums(&cut, 12), checksums(&whole, 12), "{name} resumed after step {step}");
        }
    }
}

#[test]
fn two_ranks_resume_bit_for_bit_and_other_world_sizes_go_on() {
    let bench = Bench::new();
    let settings = CYCLES[1].1;
    let whole = bench.finished("two", 2, settings);
    let cut = cut_at(&whole, 7);
    expect_exit(bench.resume(&cut, 2, settings), 0);
    assert_eq!(results(&cut), results(&whole));
    assert_eq!(checksums(&cut, 12), checksums(&whole, 12));
    for ranks in [1, 3] {
        let cut = cut_at(&whole, 7);
        expect_exit(bench.resume(&cut, ranks, settings), 0);
        assert_close(&losses(&cut), &losses(&whole), 1e-5);
    }
}

/// On a CPU: the losses of f32 nearly, the same for any number of threads, resumed bit for bit, also in the other type.
#[test]
fn products_in_bf16_train_as_f32_nearly_and_resume() {
    let bench = Bench::new();
    let bf16 = |threads| [CYCLES[1].1, &["model.dtype=bf16", threads]].concat();
    let exact = bench.finished("f32", 1, CYCLES[1].1);
    let whole = bench.finished("bf16", 1, &bf16("parallel.threads=1"));
    assert_close(&losses(&whole), &losses(&exact), 1e-2);
    assert_ne!(losses(&whole), losses(&exact));
    assert_eq!(losses(&bench.finished("bf16-threads", 1, &bf16("parallel.threads=2"))), losses(&whole));
    let cut = cut_at(&whole, 7);
    expect_exit(bench.resume(&cut, 1, &bf16("parallel.threads=1")), 0);
    assert_eq!(results(&cut), results(&whole));
    assert_eq!(checksums(&cut, 12), checksums(&whole, 12));
    let cut = cut_at(&exact, 7);
    expect_exit(bench.resume(&cut, 2, &bf16("parallel.threads=1")), 0);
    assert_close(&losses(&cut), &losses(&exact), 1e-2);
}

/// On MPI processes: on two of them the sums are the same, without clipping all is.
#[test]
fn sharded_optimizer_state_trains_as_the_whole_and_resumes() {
    let bench = Bench::new();
    for (name, settings) in [CYCLES[1], CYCLES[2], CYCLES[5]] {
        for ranks in [2, 3] {
            let settings = |zero| [settings, &["optimizer.clip=0", zero]].concat();
            let (unsharded, sharded) = (settings("parallel.zero=0"), settings("parallel.zero=1"));
            let whole = bench.finished(&format!("{name}-{ranks}-0"), ranks, &unsharded);
            let shards = bench.finished(&format!("{name}-{ranks}-1"), ranks, &sharded);
            assert_close(&losses(&shards), &losses(&whole), 1e-4);
            if ranks == 2 {
                assert_eq!(losses(&shards), losses(&whole));
                assert_eq!(checksums(&shards, 12)[1], checksums(&whole, 12)[1]);
            }
            let cut = cut_at(&shards, 7);
            expect_exit(bench.resume(&cut, ranks, &sharded), 0);
            assert_eq!(results(&cut), results(&shards));
            assert_eq!(checksums(&cut, 12), checksums(&shards, 12));
            let cut = cut_at(&shards, 7);
            expect_exit(bench.resume(&cut, 1, &unsharded), 0);
            assert_close(&losses(&cut), &losses(&whole), 1e-4);
        }
    }
}

/// Groups of MPI processes: the same training as on one rank, resumed bit for bit in the middle, also on more ranks.
#[test]
fn placements_train_as_one_rank_does_and_resume_in_the_middle() {
    let bench = Bench::new();
    for (name, settings) in [("cosets", COSETS), ("beside", BESIDE)] {
        let one = losses(&bench.finished(name, 1, settings));
        for ranks in [2, 4] {
            let whole = bench.finished(&format!("{name}-{ranks}"), ranks, settings);
            assert_close(&losses(&whole), &one, 1e-3);
            let saved = saved_steps(&whole);
            let middle = saved[saved.len() / 3];
            let cut = cut_at(&whole, middle);
            expect_exit(bench.resume(&cut, ranks, settings), 0);
            assert_eq!(results(&cut), results(&whole), "{name} on {ranks} ranks, resumed after step {middle}");
            assert_eq!(checksums(&cut, 12), checksums(&whole, 12), "{name} on {ranks} ranks, after step {middle}");
            let cut = cut_at(&whole, middle);
            expect_exit(bench.resume(&cut, 6 - ranks, settings), 0);
            assert_close(&losses(&cut), &one, 1e-3);
        }
        // Evaluations, which one group may do alone, on steps that are not logged otherwise.
        let settings = [settings, &["log.every_steps=100", "log.eval_every=1", "parallel.timeout=20"]].concat();
        bench.finished(&format!("{name}-evaluated"), 2, &settings);
    }
}

#[test]
fn ranks_give_the_losses_of_one_rank() {
    let bench = Bench::new();
    let settings = ["run.steps=20", "levels.count=2", "cycle.kind=cascade", "data.micro_batch=2"];
    let one = losses(&bench.finished("one", 1, &settings));
    assert_eq!(one.len(), 20);
    assert!(one[19] < one[0] - 0.5, "it learns: {one:?}");
    for ranks in [2, 3, 4, 8] {
        let several = bench.finished(&format!("ranks-{ranks}"), ranks, &settings);
        assert_close(&losses(&several), &one, 1e-5);
    }
}

#[test]
fn the_plan_is_what_training_logs() {
    let bench = Bench::new();
    for (name, settings) in CYCLES.iter().filter(|(name, _)| *name != "adaptive") {
        let run = bench.finished(name, 1, settings);
        let last = metrics(&run).pop().unwrap();
        let mut plan = Command::new(VCYCLE);
        plan.args(["plan", "--json"]).arg(run.join("config.toml"));
        let plan: Value = serde_json::from_slice(&plan.output().unwrap().stdout).unwrap();
        for key in ["flops_total", "flops_blocks"] {
            assert!(plan[key].is_u64());
            assert_eq!(plan[key], last[key], "{name}: {key}");
        }
    }
}

/// Five measurements, one after each coarse step, and all say that the fine level gives more for its work.
#[test]
fn adaptive_leaves_a_coarse_level_early_and_counts_its_measurements() {
    let bench = Bench::new();
    let (_, settings) = CYCLES.iter().find(|(name, _)| *name == "adaptive").unwrap();
    let run = bench.finished("adaptive", 1, settings);
    let lines = metrics(&run);
    let coarse = lines.iter().filter(|line| line["level"] == 1).count();
    assert_eq!((coarse, lines.len()), (5, 12));
    let flops = |line: &Value| line["flops_total"].as_u64().unwrap();
    let (coarse_step, fine_step) = (flops(&lines[0]), flops(&lines[11]) - flops(&lines[10]));
    assert_eq!(flops(&lines[11]), 5 * coarse_step + (7 + 5) * fine_step);
    let log = std::fs::read_to_string(run.join("log.txt")).unwrap();
    assert!(log.contains("step 5: level 1 is left after 5 steps"), "{log}");
}

#[test]
fn eval_repeats_the_last_validation_loss() {
    let bench = Bench::new();
    for (name, settings) in CYCLES {
        let run = bench.finished(name, 1, settings);
        let lines = metrics(&run);
        // The last step is of the fine level, step 5 of a coarse one in most cycles: both are loss of the fine net.
        let evaluated = |line: &&Value| !line["val_loss"].is_null();
        let step_of = |line: &Value| line["step"].as_u64().unwrap();
        let first = step_of(lines.iter().find(evaluated).unwrap());
        for (step, path) in [(12, run.clone()), (first, checkpoint(&run, first))] {
            let output = Command::new(VCYCLE).args(["eval", "--json"]).arg(path).output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            let eval: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(eval["step"], step);
            let line = lines.iter().rfind(|line| step_of(line) == step).unwrap();
            let (now, then) = (eval["val_loss"].as_f64().unwrap(), line["val_loss"].as_f64().unwrap());
            assert!((now - then).abs() < 1e-6, "{name}, step {step}: {now} against {then}");
        }
    }
}

/// Waits until `run` has a line of metrics for `step`.
fn wait_for_step(run: &Path, child: &mut Child, step: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let reached = || {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
        text.lines().count() as u64 >= step
    };
    while !reached() {
        assert!(child.try_wait().unwrap().is_none(), "ended before step {step}");
        assert!(Instant::now() < deadline, "step {step} was not reached in a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose command line is exactly vcycle's on this run.
fn processes_of(run: &Path) -> Vec<i32> {
    let run = run.to_str().unwrap();
    let of_run = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
        let mut words = line.split('\0');
        (words.next() == Some(VCYCLE) && words.any(|word| word == run)).then_some(pid)
    };
    std::fs::read_dir("/proc").unwrap().filter_map(of_run).collect()
}

const LONG: &[&str] = &["run.steps=4000", "levels.count=2", "cycle.kind=cascade", "checkpoint.keep=2"];

#[test]
fn a_signal_to_any_rank_checkpoints_all_and_exits_75() {
    let bench = Bench::new();
    for (i, signal) in [libc::SIGTERM, libc::SIGUSR1, libc::SIGINT].into_iter().enumerate() {
        let settings = [LONG, &["checkpoint.every_steps=0"]].concat();
        let run = bench.path(&format!("signal-{signal}"));
        let mut command = bench.train(&run, 2, &settings, &[]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_step(&run, &mut child, 20);
        let ranks = processes_of(&run);
        assert_eq!(ranks.len(), 2);
        // SAFETY: sends a signal to a process that this test started.
        assert_eq!(unsafe { libc::kill(ranks[i % 2], signal) }, 0);
        expect_exit(child.wait_with_output().unwrap(), 75);
        let step = metrics(&run).len() as u64;
        assert!(checkpoint(&run, step).join("manifest.json").exists());
        assert!(step < 4000);
    }
}

/// On either rank, in the middle of what the two do apart; then again until it is resumed on one rank.
#[test]
fn a_signal_stops_groups_at_their_next_meeting() {
    let bench = Bench::new();
    let phases = "cycle.phases=[{level=0,steps=2},{level=1,steps=2000},{level=0,steps=1990},{level=0,steps=8}]";
    let beside = ["levels.count=2", "cycle.kind=phases", phases, "parallel.placement=beside", "parallel.sync_every=3"];
    let cosets = ["levels.count=2", "levels.transfer=injection", "cycle.kind=paper", "parallel.placement=cosets"];
    for (i, settings) in [&beside[..], &cosets].into_iter().enumerate() {
        let settings = [settings, &["run.steps=4000", "checkpoint.every_steps=0"]].concat();
        let run = bench.path(&format!("signal-{i}"));
        let mut command = bench.train(&run, 2, &settings, &[]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_step(&run, &mut child, 20);
        // SAFETY: sends a signal to a process that this test started.
        assert_eq!(unsafe { libc::kill(processes_of(&run)[1 - i], libc::SIGTERM) }, 0);
        expect_exit(child.wait_with_output().unwrap(), 75);
        let step = metrics(&run).last().unwrap()["step"].as_u64().unwrap();
        assert!(checkpoint(&run, step).join("manifest.json").exists());
        for ranks in [2, 1] {
            let limited = [&settings[..], &["run.max_minutes=0.001"]].concat();
            let text = expect_exit(bench.resume(&run, ranks, &limited), 75);
            assert!(text.contains("resumed at step"), "{text}");
        }
        assert!(metrics(&run).last().unwrap()["step"].as_u64().unwrap() > step);
    }
}

/// The process of `rank` of the run in `run`.
fn process_of(run: &Path, rank: usize) -> i32 {
    let has_rank = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == format!("OMPI_COMM_WORLD_RANK={rank}").as_bytes())
    };
    processes_of(run).into_iter().find(has_rank).unwrap_or_else(|| panic!("there is no rank {rank}"))
}

/// Waits until none of `processes` is left (a zombie is gone too), which must be by `deadline`.
fn await_end(processes: &[i32], deadline: Instant) {
    let runs = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    };
    while processes.iter().any(runs) {
        assert!(Instant::now() < deadline, "of {processes:?} some are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The others have ended when their time limit is over, and have said which rank they waited for and where; no
/// process stays, and every checkpoint is whole.
#[test]
fn a_rank_that_is_killed_or_stopped_ends_the_others_and_is_named() {
    let bench = Bench::new();
    let limit = Duration::from_secs(6);
    let settings = [LONG, &["parallel.timeout=6", "checkpoint.every_steps=5"]].concat();
    for (signal, code) in [(libc::SIGSTOP, 1), (libc::SIGKILL, 137)] {
        let run = bench.path(&format!("fault-{signal}"));
        let mut command = bench.train(&run, 3, &settings, &[]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_step(&run, &mut child, 20);
        let (ranks, lost, started) = (processes_of(&run), process_of(&run, 1), Instant::now());
        // SAFETY: sends a signal to a process that this test started.
        assert_eq!(unsafe { libc::kill(lost, signal) }, 0);
        let others: Vec<i32> = ranks.iter().copied().filter(|&pid| pid != lost).collect();
        await_end(&others, started + limit);
        println!("signal {signal}: the others ended after {:?}", started.elapsed());
        let text = expect_exit(child.wait_with_output().unwrap(), code);
        assert!(text.contains("in the collective `") && text.contains("rank 1 does not answer"), "{text}");
        await_end(&ranks, Instant::now() + Duration::from_secs(5));
        let checked =
            Command::new(VCYCLE).args(["checkpoint", "verify"]).arg(run.join("checkpoints")).output().unwrap();
        expect_exit(checked, 0);
        let settings = ["checkpoint.every_steps=0", "run.max_minutes=0.01"];
        let text = expect_exit(bench.resume(&run, 3, &[LONG, &settings].concat()), 75);
        assert!(text.contains("resumed at step"), "{text}");
    }
}

#[test]
fn ranks_that_wait_are_logged_with_the_one_they_wait_for() {
    let bench = Bench::new();
    let run = bench.finished("balance", 3, &[]);
    for line in metrics(&run) {
        let ranks = &line["ranks"];
        assert!(ranks["slowest"].as_u64().unwrap() < 3 && (0.0..1.0).contains(&ranks["waiting"].as_f64().unwrap()));
    }
    let log = std::fs::read_to_string(run.join("log.txt")).unwrap();
    assert!(log.contains("ranks wait ") && log.contains(" computes longest (+"), "{log}");
    assert!(metrics(&bench.finished("alone", 1, &[]))[0]["ranks"].is_null());
    let provenance: Value = serde_json::from_slice(&std::fs::read(run.join("provenance.json")).unwrap()).unwrap();
    let hosts = provenance[0]["hosts"].as_object().unwrap();
    assert_eq!(hosts.values().map(|ranks| ranks.as_u64().unwrap()).sum::<u64>(), 3);
    assert!(provenance[0]["mpi"].is_string() && provenance[0]["interconnect"].is_array());
}

#[test]
fn a_killed_run_goes_on_from_its_newest_complete_checkpoint() {
    let bench = Bench::new();
    let settings = ["run.steps=400", "levels.count=2", "cycle.kind=cascade", "checkpoint.keep=2"];
    let whole = bench.finished("whole", 1, &settings);
    let run = bench.path("killed");
    let mut command = bench.train(&run, 1, &settings, &[]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    for lines in [30, 90, 150] {
        wait_for_step(&run, &mut child, lines);
        child.kill().unwrap();
        child.wait().unwrap();
        child = bench.train(&run, 1, &settings, &["--resume"]).stderr(Stdio::null()).spawn().unwrap();
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(results(&run), results(&whole));
    assert_eq!(checksums(&run, 400), checksums(&whole, 400));
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() {
    let bench = Bench::new();
    let whole = bench.finished("whole", 1, &[]);
    let cut = cut_at(&whole, 8);
    let file = checkpoint(&cut, 8).join("state.h5");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let text = expect_exit(bench.resume(&cut, 1, &[]), 0);
    assert!(text.contains("step-00000008") && text.contains("state.h5"), "{text}");
    assert!(text.contains("resumed at step 7"), "{text}");
    assert_eq!(results(&cut), results(&whole));
}

#[test]
fn a_run_past_its_wall_clock_stops_with_75_and_resumes_until_it_is_done() {
    let bench = Bench::new();
    let settings = ["run.steps=2000", "run.max_minutes=0.01", "checkpoint.every_steps=0"];
    let run = bench.path("limited");
    let mut stops = 0;
    while bench.resume(&run, 1, &settings).status.code() == Some(75) {
        stops += 1;
        assert!(stops < 200);
    }
    assert!(stops > 0);
    let steps: Vec<u64> = metrics(&run).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=2000).collect::<Vec<_>>(), "each step once");
}

#[test]
fn divergence_is_an_error_that_changes_nothing() {
    let bench = Bench::new();
    let diverging = ["optimizer.kind=sgd", "optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup=0"];
    for (name, placement) in [("together", &[][..]), ("cosets", COSETS), ("beside", BESIDE)] {
        let text = [placement, &diverging].concat();
        let text = expect_exit(bench.train(&bench.path(name), 2, &text, &[]).output().unwrap(), 1);
        assert_eq!(text.matches("training diverged at step").count(), 1, "{text}");
        assert!(text.contains("optimizer.lr"), "{text}");
    }
}

#[test]
fn bad_input_is_one_clear_error_on_any_number_of_ranks() {
    let bench = Bench::new();
    let cases: &[(&[&str], &str)] = &[
        (&["optimizer.lrr=1"], "unknown key optimizer.lrr; did you mean `lr`?"),
        (&["data.dir=/nowhere"], "/nowhere"),
        (&["data.batch=1"], "data.batch = 1 is less than the 2 ranks"),
        (&["data.context=100000"], "context"),
        (&["model.vocab=100"], "model.vocab = 100 is too small"),
        (&["parallel.device=cuda"], "parallel.device"),
        (&["parallel.placement=cosets"], "needs levels.transfer = \"injection\" (now \"copy\")"),
        (&["parallel.placement=beside", "levels.count=2", "cycle.kind=cascade"], "nothing to put beside it"),
        (&["parallel.groups=[1, 1]"], "parallel.groups"),
        (&["parallel.zero=2"], "parallel.zero = 2: expected 0 or 1"),
        (&["parallel.zero=1", "parallel.sync_every=4"], "parallel.sync_every = 1 (now 4)"),
        (
            &[
                "parallel.placement=beside",
                "levels.count=2",
                "cycle.kind=v",
                "cycle.coarse=4",
                "cycle.pre=1",
                "cycle.post=1",
                "parallel.groups=[2, 2]",
            ],
            "parallel.groups = [2, 2] is for 4 ranks",
        ),
    ];
    for (settings, expected) in cases {
        for ranks in [1, 2] {
            if settings[0].contains("batch=1") && ranks == 1 {
                continue;
            }
            let started = Instant::now();
            let run = bench.path("bad");
            let text = expect_exit(bench.train(&run, ranks, settings, &[]).output().unwrap(), 1);
            assert_eq!(text.matches("error: ").count(), 1, "{text}");
            assert!(text.contains(expected), "{settings:?}: {text}");
            assert!(started.elapsed() < Duration::from_secs(20));
            let _ = std::fs::remove_dir_all(run);
        }
    }
    let usage = Command::new(VCYCLE).args(["train", "x.toml", "--set", "nonsense"]).output().unwrap();
    expect_exit(usage, 2);
}
