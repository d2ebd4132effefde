//! `vcycle bench` as its users run it.

use serde_json::Value;
use std::process::Command;

/// A net that takes no time.
const SMALL: [&str; 7] = [
    "model.vocab=64",
    "model.width=16",
    "model.heads=2",
    "model.depth=2",
    "data.context=8",
    "data.batch=3",
    "data.micro_batch=2",
];

fn bench(arguments: &[&str], settings: &[&str]) -> Value {
    let settings = SMALL.iter().chain(settings).flat_map(|setting| ["--set", setting]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vcycle"));
    let out = command.arg("bench").args(arguments).arg("--json").args(settings).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn ops_times_each_op_of_a_step() {
    for settings in [
        ["model.integrator=euler", "optimizer.kind=adamw"],
        ["model.integrator=heun", "optimizer.kind=muon"],
        ["model.integrator=split", "optimizer.kind=sgd"],
    ] {
        let report = bench(&["ops", "--times=1"], &settings);
        assert_eq!(report["missing"], Value::Array(vec![]), "{settings:?}");
        for op in report["ops"].as_array().unwrap() {
            let positive = |key: &str| op[key].as_f64().unwrap() > 0.0;
            assert!(positive("seconds") && positive("bytes") && positive("calls"), "{op}");
            assert_eq!(positive("flops"), op["weight"][0] != 0 || is_product(op["op"].as_str().unwrap()), "{op}");
        }
    }
}

fn is_product(op: &str) -> bool {
    op.starts_with("attention") || op == "classifier::loss_and_gradient"
}

#[test]
fn ops_are_chosen_by_name() {
    let report = bench(&["ops", "--times=1", "--only=attention"], &[]);
    let names: Vec<&str> = report["ops"].as_array().unwrap().iter().map(|op| op["op"].as_str().unwrap()).collect();
    assert_eq!(names, ["attention::forward", "attention::backward"]);
}
