//! `vcycle scaling submit`

use super::file::{Point, Run, Study};
use super::measure::is_finished;
use crate::error::{Context, Result, ensure};
use std::io::ErrorKind;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Folder of the study.
    study: PathBuf,
    /// Options for sbatch, after `--`, as in `-- --partition=long --account=me`.
    #[arg(last = true)]
    options: Vec<String>,
}

pub fn run(args: &Args) -> Result<()> {
    let study = Study::load(&args.study)?;
    let steps = study.base_config()?.run.steps;
    for &point in &study.points {
        let runs = study.runs(point);
        match tasks(&runs, |run| is_finished(&run.dir, steps)) {
            Some(tasks) => submit(&study, point, &tasks, &args.options)?,
            None => println!("{}: its {} runs are finished", point.name(), runs.len()),
        }
    }
    Ok(())
}

/// The runs still to be done as `--array` takes them, one at a time; `None` if there are none.
fn tasks(runs: &[Run], is_finished: impl Fn(&Run) -> bool) -> Option<String> {
    let open = runs.iter().enumerate().filter(|(_, run)| !is_finished(run));
    let open: Vec<String> = open.map(|(task, _)| task.to_string()).collect();
    (!open.is_empty()).then(|| format!("--array={}%1", open.join(",")))
}

fn submit(study: &Study, point: Point, tasks: &str, options: &[String]) -> Result<()> {
    let script = study.script(point);
    let started = Command::new("sbatch").args(["--parsable", tasks]).args(options).arg(&script).output();
    let output = match started {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(error)
                .context("there is no program sbatch: submit where Slurm is, such as on a cluster's login node");
        }
        output => output.context("cannot start sbatch")?,
    };
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "sbatch refused {}: {}", script.display(), error.trim());
    // `--parsable`: the job's number, and the cluster's name after a semicolon.
    let job = String::from_utf8_lossy(&output.stdout);
    let job = job.trim().split(';').next().unwrap_or_default();
    println!("{}: job array {job}, {tasks}", point.name());
    let file = study.dir.join("jobs.txt");
    let log = std::fs::File::options().create(true).append(true).open(&file);
    log.and_then(|mut log| writeln!(log, "{job} {} {tasks}", point.name()))
        .with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::study;
    use super::*;
    use std::path::Path;

    #[test]
    fn finished_runs_are_left_out() {
        let study = study(Path::new("/s"));
        let runs = study.runs(study.points[0]);
        assert_eq!(tasks(&runs, |run| run.name.ends_with('1')).as_deref(), Some("--array=2,3%1"));
        assert_eq!(tasks(&runs, |_| true), None);
    }
}
