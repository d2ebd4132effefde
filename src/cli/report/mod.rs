//! What `compare`, `study report` and `scaling report` share: runs as read, plots, and the parts of an HTML page.

pub mod html;
pub mod plots;
pub mod run;
pub mod statistics;

use crate::error::{Context, Result, ensure};
use plots::Plot;
use std::ffi::OsStr;
use std::path::Path;

/// Writes the page to `out` and, beside it, one SVG file a plot: `report.html` → `report-flops.svg`, ... Says so on stderr.
pub fn write(out: &Path, plots: &[Plot], page: impl FnOnce(&[Plot]) -> String) -> Result<()> {
    let stem = out.file_stem().map(OsStr::to_string_lossy);
    let stem = stem.filter(|_| out.extension() == Some(OsStr::new("html")));
    ensure!(stem.is_some(), "--out {}: expected a file name that ends in .html", out.display());
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write the report {}", path.display()))
    };
    if let Some(dir) = out.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    for plot in plots {
        let name = format!("{}-{}.svg", stem.as_deref().unwrap_or_default(), plot.name);
        write(&out.with_file_name(name), &plot.svg)?;
    }
    write(out, &page(plots))?;
    eprintln!("report: {}", out.display());
    Ok(())
}
