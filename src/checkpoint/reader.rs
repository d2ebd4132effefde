//! Reading: the newest intact checkpoint, and its way back into a state.

use super::folder::Folder;
use super::manifest::{Check, Manifest, NewerFormat, read_json};
use super::snapshot::{row_count, shape};
use super::{PROGRESS, Part, Progress, State, Visitor};
use crate::config::Config;
use crate::error::{Context, Error, Result, anyhow, bail, ensure};
use crate::model::Layout;
use candle_core::{DType, Tensor, WithDType};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A complete checkpoint. While it is open, no writer deletes it.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// A shared lock on the manifest.
    _lock: std::fs::File,
}

/// Name, shape and dtype of a dataset in a checkpoint.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Dataset {
    pub file: &'static str,
    /// Path in the file, as `/blocks/attn/qkv/weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: String,
}

/// The newest checkpoint of a run whose every file has the size and checksum of its manifest; `None` if the run has no
/// checkpoint. One that is damaged is named in a warning and skipped for the one before it.
///
/// It is an error if all are damaged, or if a newer vcycle wrote the newest: to start over silently would be worse.
pub fn latest(run_dir: &Path) -> Result<Option<Checkpoint>> {
    newest(&Folder::of_run(run_dir))
}

fn newest(folder: &Folder) -> Result<Option<Checkpoint>> {
    let (found, damaged) = search(folder)?;
    for damage in &damaged {
        tracing::warn!("skipped a damaged checkpoint: {damage:#}");
    }
    match (found, damaged.first()) {
        (None, Some(newest)) => bail!(
            "none of the {} checkpoints in {} is intact; in the newest, {newest:#}; to start over, move that folder away",
            damaged.len(),
            folder.path().display()
        ),
        (found, _) => Ok(found),
    }
}

/// The newest intact checkpoint, and what is wrong with those after it.
pub(super) fn search(folder: &Folder) -> Result<(Option<Checkpoint>, Vec<Error>)> {
    let mut damaged = Vec::new();
    for step in folder.steps()?.into_iter().rev() {
        match Checkpoint::open_one(&folder.step(step), Check::Checksums) {
            Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
            Err(e) if e.is::<NewerFormat>() => return Err(e),
            Err(e) => damaged.push(e),
        }
    }
    Ok((None, damaged))
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a checkpoint's own folder, checked as `check` says, or a run or folder of
    /// checkpoints, of which it is the newest intact one.
    pub fn open(path: &Path, check: Check) -> Result<Checkpoint> {
        match Folder::find(path) {
            Some(folder) => newest(&folder)?.ok_or_else(|| anyhow!("{} is empty", folder.path().display())),
            None => Checkpoint::open_one(path, check)
                .with_context(|| format!("{} is neither a run nor an intact checkpoint", path.display())),
        }
    }

    fn open_one(path: &Path, check: Check) -> Result<Checkpoint> {
        let lock = Manifest::lock(path)?;
        let manifest = Manifest::read(path)?;
        let problems = manifest.problems(path, check);
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(Checkpoint { path: path.to_owned(), manifest, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The config of the run that wrote it, as TOML.
    pub fn config_toml(&self) -> Result<String> {
        let read = || -> Result<String> {
            let text: hdf5::types::VarLenUnicode = self.file(Part::Model)?.attr("config")?.read_scalar()?;
            Ok(text.as_str().to_owned())
        };
        read().with_context(|| format!("cannot read the attribute config of {}", self.name(Part::Model)))
    }

    /// The config of the run that wrote it.
    pub fn config(&self) -> Result<Config> {
        crate::config::parse(&self.config_toml()?, &[])
            .with_context(|| format!("in the attribute config of {}", self.name(Part::Model)))
    }

    /// Every small value by name.
    pub fn values(&self) -> Result<Map<String, Value>> {
        let progress: Progress = read_json(&self.path.join(PROGRESS))?;
        Ok(progress.values)
    }

    /// Every dataset, in the order of names.
    pub fn datasets(&self) -> Result<Vec<Dataset>> {
        let mut all = Vec::new();
        for part in Part::ALL {
            let file = self.file(part)?;
            for name in dataset_names(&file)? {
                let dataset = file.dataset(&name)?;
                all.push(Dataset { file: part.file(), name, shape: dataset.shape(), dtype: dtype_name(&dataset)? });
            }
        }
        Ok(all)
    }

    /// Reads everything back into `state`, tensors in place. Names, shapes and dtypes must be those of the checkpoint,
    /// nothing may be missing and nothing left over. After an error the state is partly read: use it no more.
    pub fn restore(&self, state: &mut dyn State) -> Result<()> {
        let mut visitor = Restore { pieces: Pieces::open(self, &Part::ALL)?, values: self.values()? };
        state.visit(&mut visitor)?;
        let Restore { pieces, values } = visitor;
        pieces.require_all_read()?;
        if let Some(name) = values.keys().next() {
            bail!("{} holds the value `{name}`, which this run does not know", self.path.join(PROGRESS).display());
        }
        Ok(())
    }

    /// Reads the fine net alone, in place: each group (`blocks`, `ends`) with the layout of its rows and a tensor [R, P].
    pub fn read_model(&self, groups: &[(&str, &Layout, &Tensor)]) -> Result<()> {
        let mut pieces = Pieces::open(self, &[Part::Model])?;
        for (group, layout, tensor) in groups {
            pieces.read(Part::Model, group, layout, tensor)?;
        }
        pieces.require_all_read()
    }

    fn file(&self, part: Part) -> Result<hdf5::File> {
        // No HDF5 file locks: some cluster file systems refuse them, and the lock on the manifest keeps deleters away.
        hdf5::File::with_options()
            .with_fapl(|fapl| fapl.file_locking(false))
            .open(self.path.join(part.file()))
            .with_context(|| format!("cannot open {}", self.name(part)))
    }

    fn name(&self, part: Part) -> String {
        self.path.join(part.file()).display().to_string()
    }
}

/// The visit that reads.
struct Restore {
    pieces: Pieces,
    /// Values not yet read.
    values: Map<String, Value>,
}

impl Visitor for Restore {
    fn rows(&mut self, part: Part, group: &str, layout: &Layout, tensor: &Tensor) -> Result<()> {
        self.pieces.read(part, group, layout, tensor)
    }

    fn value(&mut self, name: &str, value: &mut Value) -> Result<()> {
        let found = self.values.shift_remove(name);
        *value = found.with_context(|| format!("{PROGRESS} of the checkpoint lacks the value `{name}`"))?;
        Ok(())
    }
}

/// The datasets of a checkpoint's files.
struct Pieces {
    files: Vec<(Part, hdf5::File)>,
    /// Datasets not yet read.
    unread: BTreeSet<(Part, String)>,
}

impl Pieces {
    fn open(checkpoint: &Checkpoint, parts: &[Part]) -> Result<Pieces> {
        let mut pieces = Pieces { files: Vec::new(), unread: BTreeSet::new() };
        for &part in parts {
            let file = checkpoint.file(part)?;
            pieces.unread.extend(dataset_names(&file)?.into_iter().map(|name| (part, name)));
            pieces.files.push((part, file));
        }
        Ok(pieces)
    }

    /// tensor [R, P] = the datasets of `group`, one a segment.
    fn read(&mut self, part: Part, group: &str, layout: &Layout, tensor: &Tensor) -> Result<()> {
        let rows = row_count(group, layout, tensor)?;
        let Some((_, file)) = self.files.iter().find(|(open, _)| *open == part) else {
            bail!("/{group} is in {}, which is not read", part.file());
        };
        for segment in &layout.segments {
            let name = format!("/{group}/{}", segment.name);
            let at = || format!("{}: dataset {name}", file.filename());
            let dataset = file.dataset(&name).map_err(|_| anyhow!("{} is missing", at()))?;
            let (expected, found) = (shape(rows, segment), dataset.shape());
            ensure!(found == expected, "{} has shape {found:?}, this run expects {expected:?}", at());
            let columns = match tensor.dtype() {
                DType::F32 => read_typed::<f32>(&dataset, rows, tensor),
                DType::F64 => read_typed::<f64>(&dataset, rows, tensor),
                other => bail!("{} would be read as {}; a checkpoint holds f32 and f64", at(), other.as_str()),
            };
            tensor.slice_set(&columns.with_context(at)?, 1, segment.offset)?;
            self.unread.remove(&(part, name));
        }
        Ok(())
    }

    fn require_all_read(&self) -> Result<()> {
        let Some((part, name)) = self.unread.first() else { return Ok(()) };
        let (_, file) = self.files.iter().find(|(open, _)| open == part).expect("unread datasets are of open files");
        bail!("{}: dataset {name} has no place in this run: was its config changed?", file.filename())
    }
}

/// The dataset as a tensor [R, columns] on the device of `like`.
fn read_typed<T: WithDType + hdf5::H5Type>(dataset: &hdf5::Dataset, rows: usize, like: &Tensor) -> Result<Tensor> {
    let found = dtype_name(dataset)?;
    ensure!(dataset.dtype()?.is::<T>(), "has dtype {found}, this run expects {}", T::DTYPE.as_str());
    let data: Vec<T> = dataset.read_raw()?;
    let columns = data.len() / rows.max(1);
    Ok(Tensor::from_vec(data, (rows, columns), like.device())?)
}

fn dtype_name(dataset: &hdf5::Dataset) -> Result<String> {
    Ok(dataset.dtype()?.to_descriptor()?.to_string())
}

/// Full names of all datasets below a group, in the order of names.
fn dataset_names(group: &hdf5::Group) -> Result<Vec<String>> {
    let mut names: Vec<String> = group.datasets()?.iter().map(|dataset| dataset.name()).collect();
    for child in group.groups()? {
        names.extend(dataset_names(&child)?);
    }
    names.sort_unstable();
    Ok(names)
}
