//! `vcycle study` through the real binary: sweeps, resumption, failures, the report.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const VCYCLE: &str = env!("CARGO_BIN_EXE_vcycle");

/// A tiny net with two levels.
const CONFIG: &str = "
[run]
steps = 6
[data]
dir = 'data'
context = 16
batch = 8
[model]
width = 16
heads = 2
depth = 4
[optimizer]
kind = 'sgd'
clip = 0
[log]
every_steps = 1
eval_every = 2
eval_sequences = 8
";

/// Of the two learning rates one diverges.
const STUDY: &str = "
title = 'A <tiny> study'
config = 'config.toml'
dir = 'runs'
seeds = [1, 2]
parallel = 2
baseline = 'flat'
[arms.cascade]
set = { levels.count = 2, cycle.kind = 'cascade' }
[arms.flat]
sweep = { optimizer.lr = [1e-2, 1e30] }
";

/// A folder with prepared data, the config and a study.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(study: &str) -> Bench {
        let bench = Bench { folder: tempfile::tempdir().unwrap() };
        std::fs::write(bench.path("config.toml"), CONFIG).unwrap();
        bench.write_study(study);
        std::fs::create_dir(bench.path("texts")).unwrap();
        for (i, part) in include_str!("train.rs").split("\n\n").enumerate() {
            std::fs::write(bench.path("texts").join(format!("{i:03}.txt")), part).unwrap();
        }
        let mut prepare = bench.vcycle("data prepare --tokenizer bytes --val-fraction 0.2 texts --out data");
        expect_exit(prepare.output().unwrap(), 0);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_study(&self, study: &str) {
        std::fs::write(self.path("study.toml"), study).unwrap();
    }

    fn vcycle(&self, args: &str) -> Command {
        let mut command = Command::new(VCYCLE);
        command.args(args.split(' ')).current_dir(self.folder.path());
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command
    }

    /// Both streams of `vcycle study ARGS`, which must exit with `code`.
    #[track_caller]
    fn study(&self, args: &str, code: i32) -> (String, String) {
        let output = self.vcycle(&format!("study {args}")).output().unwrap();
        (String::from_utf8_lossy(&output.stdout).into_owned(), expect_exit(output, code))
    }

    /// How often each run was started, by its folder.
    fn starts(&self) -> Vec<(String, usize)> {
        let mut starts = Vec::new();
        runs(&self.path("runs"), &mut |run| {
            let provenance: Value =
                serde_json::from_slice(&std::fs::read(run.join("provenance.json")).unwrap()).unwrap();
            let name = run.strip_prefix(self.path("runs")).unwrap().display().to_string();
            starts.push((name, provenance.as_array().unwrap().len()));
        });
        starts.sort();
        starts
    }
}

/// Calls `f` with each run directory under `dir` that has been started.
fn runs(dir: &Path, f: &mut impl FnMut(&Path)) {
    if dir.join("provenance.json").exists() {
        return f(dir);
    }
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            runs(&path, f);
        }
    }
}

#[track_caller]
fn expect_exit(output: Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

#[test]
fn a_grid_is_run_once_and_reported() {
    let bench = Bench::new(STUDY);
    let (listed, _) = bench.study("run study.toml --dry-run", 0);
    assert!(listed.contains("0 of 5 runs") && listed.contains("waits for the sweep"), "{listed}");
    assert!(!bench.path("runs").exists());

    let (_, log) = bench.study("run study.toml --only flat", 0);
    assert!(log.contains("flat optimizer.lr=1e30 seed 1: diverged") && log.contains("[3/3] flat"), "{log}");
    let (_, log) = bench.study("run study.toml", 0);
    assert!(log.contains("[5/5] cascade optimizer.lr=0.01 seed "), "{log}");
    let once = [
        "cascade/optimizer.lr=0.01/seed-1",
        "cascade/optimizer.lr=0.01/seed-2",
        "flat/optimizer.lr=0.01/seed-1",
        "flat/optimizer.lr=0.01/seed-2",
        "flat/optimizer.lr=1e30/seed-1",
    ]
    .map(|run| (run.to_owned(), 1));
    assert_eq!(bench.starts(), once);
    let (_, log) = bench.study("run study.toml", 0);
    assert!(!log.contains("started"), "{log}");
    assert_eq!(bench.starts(), once);

    let (json, _) = bench.study("report study.toml --json --out report/study.html", 0);
    let report: Value = serde_json::from_str(&json).unwrap();
    let arms = report["arms"].as_array().unwrap();
    assert_eq!((&arms[0]["arm"], &arms[1]["arm"]), (&"flat".into(), &"cascade".into()), "the baseline comes first");
    for arm in arms {
        assert_eq!((arm["runs"].as_array().unwrap().len(), &arm["tuned"]["optimizer.lr"]), (2, &0.01.into()));
        let losses = [0, 1].map(|i| arm["runs"][i]["val_loss"].as_f64().unwrap());
        assert!((arm["val_loss"]["mean"].as_f64().unwrap() - (losses[0] + losses[1]) / 2.0).abs() < 1e-12);
        assert!(losses[0] != losses[1] && arm["val_loss"]["sd"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(arms[1]["compared"], 2);
    assert_eq!(report["sweeps"][0]["trials"][1]["diverged"], true);
    let warnings = report["warnings"].as_array().unwrap();
    assert!(warnings.len() == 1 && warnings[0].as_str().unwrap().contains("at the edge"), "{warnings:?}");
    let (text, _) = bench.study("report study.toml", 0);
    assert!(text.contains("A <tiny> study") && text.contains("diverged"), "{text}");
    let page = std::fs::read_to_string(bench.path("report/study.html")).unwrap();
    assert!(page.contains("A &lt;tiny&gt; study") && bench.path("report/study-flops.svg").is_file());

    bench.write_study(&STUDY.replace("'cascade' }", "'cascade', log.eval_every = 3 }"));
    let (_, error) = bench.study("run study.toml", 1);
    assert!(
        error.contains("cascade/optimizer.lr=0.01/seed-1") && error.contains("log.eval_every was 2, is now 3"),
        "{error}"
    );
    let (_, log) = bench.study("run study.toml --force", 0);
    assert_eq!(log.matches("started").count(), 2, "{log}");
}

#[test]
fn a_failing_run_is_named_and_the_others_are_done() {
    let failing = STUDY.replace("[arms.cascade]", "[arms.long]\nset.data.context = 100000\n[arms.cascade]");
    let bench = Bench::new(&failing);
    let (_, log) = bench.study("run study.toml", 1);
    assert!(
        log.contains("error: 2 runs failed: long optimizer.lr=0.01 seed 1; long optimizer.lr=0.01 seed 2"),
        "{log}"
    );
    assert!(log.contains("a sequence of context 100000") && log.contains("[5/7]"), "{log}");
}

/// A study of one run of `steps` steps on `ranks` ranks.
fn long(ranks: usize, steps: u64) -> String {
    let launcher = "mpirun --oversubscribe --bind-to none -n {ranks}";
    let run = format!("set = {{ run.steps = {steps}, log.eval_every = 1000, log.every_steps = 20 }}\n[arms.flat]\n");
    let head = "config = 'config.toml'\ndir = 'runs'\nseeds = [1]\nbaseline = 'flat'\n";
    format!("{head}launcher = '{launcher}'\nranks = {ranks}\n{run}")
}

fn steps(bench: &Bench) -> Vec<u64> {
    let metrics = std::fs::read_to_string(bench.path("runs/flat/seed-1/metrics.jsonl")).unwrap_or_default();
    let complete = metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    complete.map(|line| line["step"].as_u64().unwrap()).collect()
}

/// Starts the study and sends it `signal` when its run has got on; its exit status.
fn interrupted(bench: &Bench, signal: &str) -> Option<i32> {
    let before = steps(bench).last().copied().unwrap_or(0);
    let mut study: Child = bench.vcycle("study run study.toml").stderr(Stdio::null()).spawn().unwrap();
    let since = Instant::now();
    while steps(bench).last().is_none_or(|&step| step <= before) {
        assert!(since.elapsed() < Duration::from_secs(20), "the run does not get on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args([signal, &study.id().to_string()]).status().unwrap();
    assert!(sent.success());
    study.wait().unwrap().code()
}

#[test]
fn a_study_that_is_stopped_or_killed_goes_on_where_it_was() {
    // Long enough to be caught in the middle.
    for (ranks, end) in [(1, 2000), (2, 600)] {
        let bench = Bench::new(&long(ranks, end));
        assert_eq!(interrupted(&bench, "-TERM"), Some(75));
        let stopped = *steps(&bench).last().unwrap();
        assert!(stopped < end, "nothing was left to go on with");
        // Its child writes a checkpoint and ends by itself; the next study waits for it.
        assert_eq!(interrupted(&bench, "-KILL"), None);
        let (_, log) = bench.study("run study.toml", 0);
        assert!(log.contains("started again") && log.contains("[1/1] flat seed 1: val loss"), "{log}");
        let steps = steps(&bench);
        assert!(steps.windows(2).all(|pair| pair[0] < pair[1]) && steps.last() == Some(&end), "{steps:?}");
        assert_eq!(bench.starts(), [("flat/seed-1".to_owned(), 3)]);
    }
}
