//! What holds the repository together: the one-way order of modules, configs that load, a reference that is true.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use vcycle::config::{self, Config};

/// A module uses only what stands before it.
const ORDER: [&str; 12] =
    ["error", "config", "data", "ops", "model", "levels", "optim", "cycle", "comm", "checkpoint", "run", "cli"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files under `dir` that are kept in the repository.
fn files(dir: &Path) -> Vec<PathBuf> {
    let ignored = ["target", "runs", "data", "quickstart", ".venv", ".git"];
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let at_top = path.parent() == Some(root());
        if at_top && ignored.iter().any(|name| path.ends_with(name)) || path.extension().is_some_and(|e| e == "log") {
            continue;
        }
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Relative to the repository's root, for messages.
fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The modules that `source` names after `crate::`, also in groups: `use crate::{data, run::history}`.
fn modules_used(source: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let name = |text: &'_ str| text.find(|c| !is_name(c)).unwrap_or(text.len());
    let mut used = Vec::new();
    for (start, _) in source.match_indices("crate::") {
        let rest = &source[start + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            used.push(&rest[..name(rest)]);
            continue;
        };
        let (mut depth, mut item) = (0, true);
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => item = true,
                c if item && is_name(c) => {
                    used.push(&group[at..at + name(&group[at..])]);
                    item = false;
                }
                _ => {}
            }
        }
    }
    used
}

/// "FILE uses crate::MODULE" for each use in `source` of a module that does not stand before `module`.
fn against_the_order(module: &str, source: &str) -> Vec<String> {
    let rank = |name: &str| ORDER.iter().position(|known| *known == name);
    let own = rank(module).unwrap_or_else(|| panic!("src/{module} has no place in the order {}", ORDER.join(" → ")));
    let code: String =
        source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n");
    let wrong = modules_used(&code).into_iter().filter(|used| rank(used).is_some_and(|used| used > own));
    wrong.map(|used| format!("{module} uses crate::{used}")).collect()
}

#[test]
fn modules_use_only_what_stands_before_them() {
    let src = root().join("src");
    let mut wrong = Vec::new();
    for file in files(&src) {
        let inside = file.strip_prefix(&src).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if module == "lib" || module == "main" || file.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        let uses = against_the_order(module, &fs::read_to_string(&file).unwrap());
        wrong.extend(uses.into_iter().map(|what| format!("{}: {what}", shown(&file))));
    }
    assert!(wrong.is_empty(), "the order is {}\n{}", ORDER.join(" → "), wrong.join("\n"));
}

#[test]
fn a_use_against_the_order_is_found_however_it_is_written() {
    for source in [
        "use crate::run::history;",
        "use crate::{error::{Result, bail}, run};",
        "use crate::{\n    data,\n    cli::{a, b},\n};",
        "fn f() -> crate::run::Run {}",
    ] {
        assert_eq!(against_the_order("optim", source).len(), 1, "{source}");
    }
    for source in ["use crate::{model, data::run};", "// crate::run", "use crate::optim::adamw;"] {
        assert_eq!(against_the_order("optim", source), [""; 0], "{source}");
    }
}

fn load(name: &str) -> Config {
    config::load(&root().join("configs").join(name), &[]).unwrap_or_else(|e| panic!("{e:#}"))
}

#[test]
fn every_config_loads() {
    let configs = files(&root().join("configs"));
    assert!(configs.len() >= 5, "configs/ has only {configs:?}");
    for path in configs {
        load(path.file_name().unwrap().to_str().unwrap());
    }
}

#[test]
fn every_study_loads() {
    // A copy, so that runs of these studies do not matter.
    let copy = tempfile::tempdir().unwrap();
    for folder in ["configs", "studies"] {
        fs::create_dir(copy.path().join(folder)).unwrap();
        for path in files(&root().join(folder)) {
            fs::copy(&path, copy.path().join(folder).join(path.file_name().unwrap())).unwrap();
        }
    }
    let studies = files(&copy.path().join("studies"));
    assert!(!studies.is_empty());
    for study in studies {
        let mut report = Command::new(env!("CARGO_BIN_EXE_vcycle"));
        let output = report.args(["study", "report"]).arg(&study).current_dir(copy.path()).output().unwrap();
        assert!(output.status.success(), "{}: {}", study.display(), String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_baseline_differs_from_its_multilevel_run_only_in_levels_and_steps() {
    for (baseline, multilevel) in
        [("quickstart-baseline.toml", "quickstart.toml"), ("gpt2-124m.toml", "gpt2-124m-cascade.toml")]
    {
        let (baseline, mut run) = (load(baseline), load(multilevel));
        assert!(baseline.levels.count == 1 && run.levels.count > 1, "{multilevel}");
        run.run.steps = baseline.run.steps;
        run.levels = baseline.levels.clone();
        run.cycle = baseline.cycle.clone();
        run.schedule.level_multipliers = baseline.schedule.level_multipliers.clone();
        assert_eq!(run, baseline, "{multilevel}");
    }
}

#[test]
fn the_config_reference_is_up_to_date() {
    let written = fs::read_to_string(root().join("docs/CONFIG.md")).unwrap_or_default();
    assert!(written == config::reference(), "docs/CONFIG.md is out of date: run `make docs`");
}

#[test]
fn scripts_are_valid_bash() {
    let scripts: Vec<PathBuf> = files(root())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "sh" || e == "sbatch") || path.ends_with(".ci/run"))
        .collect();
    assert!(scripts.iter().any(|path| path.ends_with("slurm/train.sbatch")));
    for script in scripts {
        let output = Command::new("bash").arg("-n").arg(&script).output().unwrap();
        assert!(output.status.success(), "{}: {}", shown(&script), String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn no_file_names_a_folder_of_one_machine() {
    let mut found = Vec::new();
    for path in files(root()) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (number, line) in text.lines().enumerate() {
            // In two parts, so that this file passes.
            for folder in [concat!("/", "home/"), concat!("/", "root/"), concat!("/", "work/"), concat!("/", "Users/")]
            {
                let absolute =
                    |(at, _): (usize, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-.}*~".contains(c));
                if line.match_indices(folder).any(absolute) {
                    found.push(format!("{}:{}: {}", shown(&path), number + 1, line.trim()));
                }
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
