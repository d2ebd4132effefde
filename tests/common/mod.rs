//! What the tests of runs read in run directories.

use serde_json::Value;
use std::path::{Path, PathBuf};

pub fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}

/// Steps of all checkpoints.
pub fn saved_steps(run: &Path) -> Vec<u64> {
    let folders = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let step = |name: &str| name.strip_prefix("step-").map(|step| step.parse().unwrap());
    let mut steps: Vec<u64> =
        folders.filter_map(|folder| step(folder.unwrap().file_name().to_str().unwrap())).collect();
    steps.sort_unstable();
    steps
}

/// A copy of `run`, in the folder beside it named after it with `-cut`, as it was when step `step` had just been saved.
pub fn cut_at(run: &Path, step: u64) -> PathBuf {
    let cut = run.with_file_name(format!("{}-cut", run.file_name().unwrap().to_str().unwrap()));
    let _ = std::fs::remove_dir_all(&cut);
    std::fs::create_dir_all(cut.join("checkpoints")).unwrap();
    for file in ["config.toml", "metrics.jsonl", "provenance.json", "log.txt"] {
        std::fs::copy(run.join(file), cut.join(file)).unwrap();
    }
    for saved in saved_steps(run).into_iter().filter(|&saved| saved <= step).rev().take(2) {
        copy_folder(&checkpoint(run, saved), &checkpoint(&cut, saved));
    }
    cut
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a run computed, without what follows from the machine.
pub fn results(run: &Path) -> Vec<Value> {
    let of_the_machine = ["elapsed_s", "tokens_per_s", "mfu", "memory_bytes", "ranks"];
    let mut lines = metrics(run);
    for line in &mut lines {
        line.as_object_mut().unwrap().retain(|key, _| !of_the_machine.contains(&key.as_str()));
    }
    lines
}
