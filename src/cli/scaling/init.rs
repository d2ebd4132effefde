//! `vcycle scaling init`

use super::file::{Mode, Point, Study};
use super::{counts, distinct, write};
use crate::cli::ConfigArgs;
use crate::config::{self, Config};
use crate::error::{Context, Result, ensure};
use crate::run::resolve_vocab;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Folder of the study, on a file system that all nodes see.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Numbers of nodes.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    nodes: Vec<usize>,
    /// Ranks on each node; several numbers are combined with those of nodes.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    ranks_per_node: Vec<usize>,
    /// Cores, and threads, of each rank.
    #[arg(long, default_value_t = 1)]
    cpus_per_rank: usize,
    /// Ask for a GPU a rank.
    #[arg(long)]
    gpus: bool,
    /// `strong`: the config's batch for all. `weak`: the config's batch for the fewest ranks, more for more.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["strong", "weak"])]
    modes: Vec<Mode>,
    /// Runs of each kind; they give the standard deviation.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Optimizer steps of each run: enough for its time, not for its loss.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Time limit of a job, in minutes.
    #[arg(long, default_value_t = 30)]
    minutes: u32,
}

pub fn run(args: &Args) -> Result<()> {
    let study = study(args)?;
    let base = base_config(args, &study)?;
    let mut configs = Vec::new();
    for &point in &study.points {
        for &mode in &study.modes {
            configs.push((study.config_file(mode, point), mode.config(&base, study.fewest(), point.ranks())?));
        }
    }
    let dir = &study.dir;
    write(&dir.join("scaling.toml"), &toml::to_string(&study)?)?;
    write(&dir.join("config.toml"), &config::to_toml(&base))?;
    write(&dir.join("train.sbatch"), include_str!("../../../slurm/train.sbatch"))?;
    for folder in ["configs", "runs", "output"] {
        std::fs::create_dir_all(dir.join(folder)).with_context(|| format!("cannot make {}/{folder}", dir.display()))?;
    }
    for (file, config) in &configs {
        write(file, &config::to_toml(config))?;
    }
    for &point in &study.points {
        write(&study.script(point), &script(&study, point)?)?;
    }
    let runs: usize = study.points.iter().map(|&point| study.runs(point).len()).sum();
    println!("{}: {runs} runs in {} job arrays", dir.display(), study.points.len());
    println!("look at {}, then: vcycle scaling submit {}", study.script(study.points[0]).display(), args.out.display());
    Ok(())
}

/// What was asked for, and its folder, which is made.
fn study(args: &Args) -> Result<Study> {
    let nodes = counts("--nodes", &args.nodes)?;
    let ranks = counts("--ranks-per-node", &args.ranks_per_node)?;
    for (option, value) in [("--repeats", args.repeats), ("--cpus-per-rank", args.cpus_per_rank)] {
        ensure!(value >= 1, "{option} {value}: expected at least 1");
    }
    ensure!(args.steps >= 10, "--steps {}: expected at least 10, or there is nothing to time", args.steps);
    let points =
        nodes.iter().flat_map(|&nodes| ranks.iter().map(move |&ranks_per_node| Point { nodes, ranks_per_node }));
    let mut points: Vec<Point> = points.collect();
    points.sort_by_key(|point| (point.ranks(), point.nodes));
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    let dir = args.out.canonicalize().with_context(|| format!("cannot find {}", args.out.display()))?;
    let plain = |c: char| c.is_alphanumeric() || "/-_.+=,".contains(c);
    ensure!(
        dir.to_str().is_some_and(|path| path.chars().all(plain)),
        "{}: Slurm takes no such path; use letters, digits, '-', '_', '.', '+', '=' and ','",
        dir.display()
    );
    ensure!(
        !dir.join("scaling.toml").exists(),
        "{} already holds a study: choose another --out, or delete it",
        args.out.display()
    );
    let title = args.config.config.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let Args { repeats, cpus_per_rank, gpus, minutes, .. } = *args;
    Ok(Study { title, modes: distinct(&args.modes), repeats, cpus_per_rank, gpus, minutes, points, dir })
}

/// The config of the fewest ranks: short, a line of metrics a step, nothing between steps that would be timed with them.
fn base_config(args: &Args, study: &Study) -> Result<Config> {
    let mut config = args.config.load()?;
    resolve_vocab(&mut config)?;
    config.data.dir = absolute(&config.data.dir)?;
    config.run.steps = args.steps;
    config.log.every_steps = (args.steps / 100).max(1);
    config.log.eval_every = 0;
    config.checkpoint = config::CheckpointTable { keep: 1, ..Default::default() };
    if config.parallel.threads == 0 {
        config.parallel.threads = study.cpus_per_rank;
    }
    Ok(config)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("data.dir = {}: cannot find it", path.display()))
}

/// The job array of `point`.
fn script(study: &Study, point: Point) -> Result<String> {
    let runs: Vec<String> = study.runs(point).into_iter().map(|run| run.name).collect();
    let vcycle = std::env::current_exe().context("cannot find the file of this program")?;
    let values = [
        ("@nodes@", point.nodes.to_string()),
        ("@ranks@", point.ranks_per_node.to_string()),
        ("@point@", point.name()),
        ("@cpus@", study.cpus_per_rank.to_string()),
        ("@minutes@", study.minutes.to_string()),
        ("@last@", (runs.len() - 1).to_string()),
        ("@runs@", runs.join(" ")),
        ("@study@", study.dir.display().to_string()),
        ("@vcycle@", vcycle.display().to_string()),
    ];
    let template = include_str!("../../../slurm/scaling.sbatch").to_owned();
    let mut script = values.iter().fold(template, |text, (name, value)| text.replace(name, value));
    if study.gpus {
        let gpus = format!("#SBATCH --gpus-per-node={}\n#SBATCH --exclusive", point.ranks_per_node);
        script = script.replacen("#SBATCH --exclusive", &gpus, 1);
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::study;
    use super::*;

    #[test]
    fn a_script_is_filled_in() {
        let mut study = study(Path::new("/s"));
        study.gpus = true;
        let script = script(&study, study.points[1]).unwrap();
        for line in [
            "#SBATCH --nodes=2",
            "#SBATCH --ntasks-per-node=2",
            "#SBATCH --gpus-per-node=2",
            "#SBATCH --array=0-3%1",
            "#SBATCH --signal=B:USR1@120",
            "study='/s'",
            "runs=(strong-2x2-1 weak-2x2-1 strong-2x2-2 weak-2x2-2)",
        ] {
            assert!(script.lines().any(|written| written == line), "{line}: {script}");
        }
        let left: Vec<&str> =
            script.lines().filter(|line| line.matches('@').count() > 1 && !line.contains("[@]")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
