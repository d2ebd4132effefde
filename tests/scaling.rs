//! `vcycle scaling` and `plan --machine` through the real binary; tests/slurm/run.sh has a study on a real Slurm.

use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const VCYCLE: &str = env!("CARGO_BIN_EXE_vcycle");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn vcycle(arguments: &[&str]) -> Output {
    Command::new(VCYCLE).args(arguments).current_dir(root()).output().unwrap()
}

#[track_caller]
fn succeeds(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(output: Output, expected: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(expected), "{said}");
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
}

/// Prepared data, and a study of 1 and 2 nodes of 2 ranks made by `init`.
fn study(folder: &Path, settings: &[&str]) -> Output {
    let data = folder.join("data");
    if !data.exists() {
        let prepared = ["data", "prepare", "src", "--tokenizer", "bytes", "--ext", "rs", "--out"];
        succeeds(vcycle(&[&prepared[..], &[data.to_str().unwrap()]].concat()));
    }
    let (data, out) = (format!("data.dir={}", data.display()), folder.join("study"));
    let arguments = ["scaling", "init", "configs/quickstart.toml", "--out", out.to_str().unwrap(), "--set", &data];
    vcycle(&[&arguments[..], &["--nodes", "1,2", "--ranks-per-node", "2"], settings].concat())
}

#[test]
fn a_study_is_a_folder_of_configs_and_job_arrays() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeeds(study(folder.path(), &["--repeats", "2", "--steps", "40"]));
    assert!(said.contains("8 runs in 2 job arrays"), "{said}");
    let dir = folder.path().join("study");
    let plan = |name: &str| -> Value {
        let config = dir.join("configs").join(name);
        serde_json::from_str(&succeeds(vcycle(&["plan", config.to_str().unwrap(), "--json"]))).unwrap()
    };
    for (config, tokens) in
        [("strong-1x2.toml", 2048), ("weak-1x2.toml", 2048), ("strong-2x2.toml", 2048), ("weak-2x2.toml", 4096)]
    {
        assert_eq!(
            (plan(config)["steps"].as_u64(), plan(config)["tokens_per_step"].as_u64()),
            (Some(40), Some(tokens))
        );
    }
    for script in ["1x2.sbatch", "2x2.sbatch", "train.sbatch"] {
        assert!(Command::new("bash").arg("-n").arg(dir.join(script)).status().unwrap().success(), "{script}");
    }
    fails(study(folder.path(), &[]), "already holds a study");
    let other = tempfile::tempdir().unwrap();
    fails(study(other.path(), &["--set", "data.batch=3"]), "strong scaling to 4 ranks needs a sequence for each");
    fails(vcycle(&["scaling", "report", "configs"]), "configs has no scaling.toml");
    fails(study(other.path(), &["--nodes", "0"]), "--nodes: expected counts from 1 on");
}

/// A program called sbatch in a folder of its own.
fn fake_sbatch(folder: &Path, script: &str) -> PathBuf {
    let bin = folder.join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    std::fs::write(bin.join("sbatch"), format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(bin.join("sbatch"), std::fs::Permissions::from_mode(0o755)).unwrap();
    bin
}

#[test]
fn job_arrays_are_submitted_once_each() {
    let folder = tempfile::tempdir().unwrap();
    succeeds(study(folder.path(), &["--repeats", "1"]));
    let submit = |path: &Path| {
        let mut command = Command::new(VCYCLE);
        let study = folder.path().join("study");
        command.args(["scaling", "submit"]).arg(study).args(["--", "--account=me"]).env("PATH", path).output().unwrap()
    };
    fails(submit(Path::new("/nowhere")), "there is no program sbatch: submit where Slurm is");
    fails(submit(&fake_sbatch(folder.path(), "echo 'invalid account' >&2; exit 1")), "1x2.sbatch: invalid account");
    let said = succeeds(submit(&fake_sbatch(folder.path(), "echo \"$@\" >>\"$0.log\"; echo '17;cluster'")));
    assert!(said.contains("1x2: job array 17, --array=0,1%1"), "{said}");
    let asked = std::fs::read_to_string(folder.path().join("bin/sbatch.log")).unwrap();
    let asked: Vec<&str> = asked.lines().collect();
    assert!(asked.len() == 2 && asked[1].starts_with("--parsable --array=0,1%1 --account=me /"), "{asked:?}");
    let jobs = std::fs::read_to_string(folder.path().join("study/jobs.txt")).unwrap();
    assert_eq!(jobs, "17 1x2 --array=0,1%1\n17 2x2 --array=0,1%1\n");
}

const GPT2: &[&str] = &["configs/gpt2-124m-cascade.toml", "--set", "data.dir=/nowhere"];

#[test]
fn every_machine_is_predicted_for() {
    let machines: Vec<PathBuf> =
        std::fs::read_dir(root().join("machines")).unwrap().map(|f| f.unwrap().path()).collect();
    assert!(machines.len() >= 2, "{machines:?}");
    for machine in &machines {
        let machine = machine.to_str().unwrap();
        let plan = [&["plan"], GPT2, &["--ranks", "64", "--machine", machine]].concat();
        assert!(succeeds(vcycle(&plan)).contains("predicted for 64 ranks on "));
        let json: Value = serde_json::from_str(&succeeds(vcycle(&[&plan[..], &["--json"]].concat()))).unwrap();
        let levels = json["forecast"]["levels"].as_array().unwrap();
        assert!(levels.iter().all(|level| (0.0..=1.0).contains(&level["efficiency"].as_f64().unwrap())), "{json}");
        let svg = tempfile::tempdir().unwrap();
        let plot = svg.path().join("plot.svg");
        let asked: [&[&str]; 3] =
            [&["scaling", "predict", "--json"], GPT2, &["--machine", machine, "--plot", plot.to_str().unwrap()]];
        let report: Value = serde_json::from_str(&succeeds(vcycle(&asked.concat()))).unwrap();
        let last = report["rows"].as_array().unwrap().last().unwrap();
        assert_eq!((last["mode"].as_str(), last["ranks"].as_u64()), (Some("weak"), Some(4096)));
        assert!(last["predicted"]["step_s"].as_f64().unwrap() > 0.0 && last["measured"].is_null());
        assert!(std::fs::read_to_string(plot).unwrap().contains("weak scaling: ranks"));
    }
}

#[test]
fn a_wrong_machine_file_is_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.toml");
    let any = std::fs::read_dir(root().join("machines")).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(any).unwrap();
    std::fs::write(&file, text.replace("overlap", "overlp")).unwrap();
    let plan = |file: &str| vcycle(&[&["plan"], GPT2, &["--ranks", "4", "--machine", file]].concat());
    fails(plan(file.to_str().unwrap()), "m.toml: unknown key overlp; did you mean `overlap`?");
    fails(plan("/nowhere.toml"), "cannot read the machine file /nowhere.toml");
}
