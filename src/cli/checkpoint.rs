//! `vcycle checkpoint list|verify|show`.

use super::text;
use crate::checkpoint::{Check, Checkpoint, Dataset, Folder, Manifest};
use crate::error::{Outcome, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List checkpoints; whether one is intact is judged by the sizes of its files
    List(Target),
    /// Compare every file with its checksum; exit with 1 if anything is damaged
    Verify(Target),
    /// Show a checkpoint: files, position, config and datasets (of a run: the newest intact one)
    Show(Target),
}

#[derive(clap::Args, Debug)]
struct Target {
    /// A run, its folder `checkpoints`, or one checkpoint
    path: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<Outcome> {
    match args.command {
        Command::List(target) => list(&target)?,
        Command::Verify(target) => verify(&target)?,
        Command::Show(target) => show(&target)?,
    }
    Ok(Outcome::Done)
}

/// One checkpoint and what is wrong with it.
#[derive(serde::Serialize)]
struct Report {
    path: PathBuf,
    manifest: Option<Manifest>,
    /// Each names a file, what was expected and what was found; none if the checkpoint is intact.
    problems: Vec<String>,
}

impl Report {
    fn of(path: PathBuf, check: Check) -> Report {
        match Manifest::read(&path) {
            Ok(manifest) => Report { problems: manifest.problems(&path, check), manifest: Some(manifest), path },
            Err(e) => Report { path, manifest: None, problems: vec![format!("{e:#}")] },
        }
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }
}

/// Every checkpoint at `path`, oldest first.
fn reports(path: &Path, check: Check) -> Result<Vec<Report>> {
    ensure!(path.exists(), "{} does not exist", path.display());
    let Some(folder) = Folder::find(path) else { return Ok(vec![Report::of(path.to_owned(), check)]) };
    let steps = folder.steps()?;
    ensure!(!steps.is_empty(), "{} holds no checkpoint", folder.path().display());
    Ok(steps.into_iter().map(|step| Report::of(folder.step(step), check)).collect())
}

fn list(target: &Target) -> Result<()> {
    print_reports(&reports(&target.path, Check::Sizes)?, target.json)
}

fn verify(target: &Target) -> Result<()> {
    let reports = reports(&target.path, Check::Checksums)?;
    print_reports(&reports, target.json)?;
    let damaged: Vec<String> = reports.iter().filter(|r| !r.problems.is_empty()).map(Report::name).collect();
    if !damaged.is_empty() {
        bail!("damaged: {}", damaged.join(", "));
    }
    Ok(())
}

fn print_reports(reports: &[Report], json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(reports)?);
        return Ok(());
    }
    println!("{:<16} {:<20} {:>10}  intact", "checkpoint", "date (UTC)", "size");
    for report in reports {
        let (date, size) = match &report.manifest {
            Some(manifest) => (manifest.created.as_str(), text::bytes(manifest.bytes())),
            None => ("?", "?".to_owned()),
        };
        let intact =
            if report.problems.is_empty() { "yes".to_owned() } else { format!("NO: {}", report.problems.join("; ")) };
        println!("{:<16} {date:<20} {size:>10}  {intact}", report.name());
    }
    Ok(())
}

fn show(target: &Target) -> Result<()> {
    let checkpoint = Checkpoint::open(&target.path, Check::Sizes)?;
    let (manifest, values, datasets) = (checkpoint.manifest(), checkpoint.values()?, checkpoint.datasets()?);
    let config: toml::Table = toml::from_str(&checkpoint.config_toml()?)?;
    if target.json {
        let all = json!({
            "path": checkpoint.path(), "manifest": manifest, "values": values, "config": config, "datasets": datasets,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{}", checkpoint.path().display());
    println!(
        "step {}, {}, written by vcycle {} in format {}",
        manifest.step, manifest.created, manifest.vcycle_version, manifest.format_version
    );
    println!("\nfiles");
    for file in &manifest.files {
        println!("  {:<14} {:>10}  sha256 {}", file.name, text::bytes(file.bytes), file.sha256);
    }
    println!("\nvalues");
    for (name, value) in &values {
        println!("  {name} = {}", short(value));
    }
    println!("\nconfig");
    for (table, keys) in &config {
        let keys: Vec<String> = keys.as_table().into_iter().flatten().map(|(k, v)| format!("{k} = {v}")).collect();
        println!("  [{table}] {}", keys.join(", "));
    }
    println!("\ndatasets");
    for Dataset { file, name, shape, dtype } in &datasets {
        println!("  {file} {name:<36} {dtype} {shape:?}");
    }
    Ok(())
}

/// A value on one line; long lists and objects are cut.
fn short(value: &Value) -> String {
    const LIMIT: usize = 100;
    let text = value.to_string();
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}… ({} characters; --json shows all)", &text[..end], text.chars().count()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{State, Visitor, Writer, value};

    struct Counter(u64);

    impl State for Counter {
        fn visit(&mut self, visitor: &mut dyn Visitor) -> Result<()> {
            value(visitor, "count", &mut self.0)
        }
    }

    #[test]
    fn damage_fails_verification_and_is_named() {
        let run_dir = tempfile::tempdir().unwrap();
        let config = crate::config::parse("[data]\ndir = 'x'", &[]).unwrap();
        let mut writer = Writer::new(run_dir.path(), &config, true).unwrap();
        for step in [1, 2] {
            writer.save(step, &mut Counter(step)).unwrap();
        }
        writer.finish().unwrap();
        let target = |path: &Path| Target { path: path.to_owned(), json: true };
        let checkpoints = run_dir.path().join("checkpoints");
        for path in [run_dir.path(), &checkpoints, &checkpoints.join("step-00000002")] {
            verify(&target(path)).unwrap();
            show(&target(path)).unwrap();
        }
        std::fs::write(checkpoints.join("step-00000002/progress.json"), "{}").unwrap();
        assert_eq!(verify(&target(run_dir.path())).unwrap_err().to_string(), "damaged: step-00000002");
        let listed = reports(run_dir.path(), Check::Sizes).unwrap();
        assert!(listed[0].problems.is_empty());
        assert!(listed[1].problems[0].contains("step-00000002/progress.json: expected"), "{:?}", listed[1].problems);
    }
}
