//! `vcycle checkpoint list|verify|show`.

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
    println!("{:<16} {:<20} {:>10}  intact", "checkpoint", "date (UTC)", "MiB");
    for report in reports {
        let (date, size) = match &report.manifest {
            Some(manifest) => (manifest.created.as_str(), format!("{:.1}", mebibytes(manifest.bytes()))),
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
        println!("  {:<14} {:>10.1} MiB  sha256 {}", file.name, mebibytes(file.bytes), file.sha256);
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

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}
