//! `vcycle compare`: what multilevel training saved at matched validation loss.

mod analysis;
mod html;
mod table;

use super::report::{self, plots, run::Run};
use crate::error::{Outcome, Result};
use analysis::Comparison;
use std::path::PathBuf;

/// Compare runs with a baseline: FLOPs and time saved at the baseline's final validation loss.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Run directory of the baseline.
    baseline: PathBuf,
    /// Run directories to compare with it.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write a report with plots to this HTML file, and its plots beside it as SVG files.
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<Outcome> {
    let dirs = std::iter::once(&args.baseline).chain(&args.runs);
    let comparison = Comparison::new(dirs.map(|dir| Run::load(dir)).collect::<Result<_>>()?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&comparison)?);
    } else {
        print!("{}", table::text(&comparison));
    }
    for warning in &comparison.warnings {
        eprintln!("warning: {warning}");
    }
    if let Some(out) = &args.out {
        let (series, target) = comparison.series();
        report::write(out, &plots::all(&series, &target)?, |plots| html::page(&comparison, plots))?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::report::run::tests::metrics;
    use crate::run::history::{FILE_NAME, Log};
    use std::path::Path;

    /// Two run directories, the second with a torn last line, and what `compare` says of them.
    fn compare(dir: &Path, out: &str) -> Result<Outcome> {
        for (name, cost) in [("base", 4), ("fast", 1)] {
            std::fs::create_dir_all(dir.join(name))?;
            let mut log = Log::open(&dir.join(name).join(FILE_NAME), 0)?;
            (1..=5).try_for_each(|i| log.append(&metrics(100 * i, 0, cost, Some(6.0 - i as f64))))?;
        }
        let torn = dir.join("fast").join(FILE_NAME);
        let text = std::fs::read_to_string(&torn)?;
        std::fs::write(&torn, &text[..text.len() - 40])?;
        let out = Some(dir.join(out));
        run(Args { baseline: dir.join("base"), runs: vec![dir.join("fast")], json: true, out })
    }

    #[test]
    fn a_report_is_one_page_with_its_plots_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        compare(dir.path(), "new/report.html").unwrap();
        let page = std::fs::read_to_string(dir.path().join("new/report.html")).unwrap();
        assert_eq!(page.matches("<figure>").count(), 5);
        // The fast run lost its last line, and with it the only evaluation at or under the target.
        assert!(page.contains("not reached"));
        assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("@import"), "needs other files");
        for plot in ["flops", "flops-blocks", "time", "steps", "train"] {
            assert!(dir.path().join(format!("new/report-{plot}.svg")).is_file());
        }
    }

    #[test]
    fn a_report_that_is_not_html_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let e = compare(dir.path(), "report.pdf").unwrap_err().to_string();
        assert!(e.contains("report.pdf: expected a file name that ends in .html"), "{e}");
    }
}
