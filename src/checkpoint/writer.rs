//! Writing: a snapshot that training waits for, and a thread that brings it to disk.

use super::folder::{Folder, remove_all};
use super::manifest::{Manifest, write_json};
use super::snapshot::{Data, Dataset, Snapshot};
use super::{FORMAT_VERSION, PROGRESS, Part, Progress, State, Visitor};
use crate::config::{Config, to_toml};
use crate::error::{Context, Result, anyhow};
use crate::model::Layout;
use candle_core::Tensor;
use hdf5::types::VarLenUnicode;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Writes the checkpoints of a run, one at a time.
pub struct Writer {
    /// `None` on ranks that do not write.
    target: Option<Arc<Target>>,
    /// The buffers, while no write is running.
    snapshot: Snapshot,
    running: Option<JoinHandle<(Snapshot, Result<()>)>>,
}

/// Where and how checkpoints are written.
struct Target {
    folder: Folder,
    config: String,
    keep: usize,
}

impl Writer {
    /// The writer of a run; `config.checkpoint.keep` checkpoints are kept. Removes what a killed run left and fails at
    /// once if the folder cannot be written. Where `writes` is false (all ranks but 0), saving keeps nothing.
    pub fn new(run_dir: &Path, config: &Config, writes: bool) -> Result<Writer> {
        let target = Target { folder: Folder::of_run(run_dir), config: to_toml(config), keep: config.checkpoint.keep };
        if writes {
            target.folder.prepare()?;
        }
        Ok(Writer { target: writes.then(|| Arc::new(target)), snapshot: Snapshot::default(), running: None })
    }

    /// Saves `state` as the checkpoint of `step`: waits for the write before it, copies the state and returns; a thread
    /// writes the copy.
    ///
    /// An error of the write before is returned here, and nothing is saved; the next call tries again.
    pub fn save(&mut self, step: u64, state: &mut dyn State) -> Result<()> {
        let Some(target) = self.target.clone() else { return state.visit(&mut Nowhere) };
        self.finish()?;
        self.snapshot.take(state).with_context(|| format!("cannot save step {step}"))?;
        let snapshot = std::mem::take(&mut self.snapshot);
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let write = move || {
            let result = target.write(step, &snapshot);
            (snapshot, result)
        };
        self.running = Some(thread.spawn(write).context("cannot start the thread that writes checkpoints")?);
        Ok(())
    }

    /// Waits until the last saved checkpoint is on disk.
    pub fn finish(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let (snapshot, result) = running.join().map_err(|_| anyhow!("the thread that writes checkpoints panicked"))?;
        self.snapshot = snapshot;
        result
    }
}

/// The visit of a rank that keeps nothing.
struct Nowhere;

impl Visitor for Nowhere {
    fn rows(&mut self, _part: Part, _group: &str, _layout: &Layout, _tensor: &Tensor) -> Result<()> {
        Ok(())
    }

    fn value(&mut self, _name: &str, _value: &mut Value) -> Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(e) = self.finish() {
            tracing::error!("{e:#}");
        }
    }
}

impl Target {
    /// Writes, publishes and prunes; after an error nothing of this step is left.
    fn write(&self, step: u64, snapshot: &Snapshot) -> Result<()> {
        let written = self.folder.temporary(&format!("step-{step:08}")).and_then(|temporary| {
            let published =
                self.write_files(&temporary, step, snapshot).and_then(|()| self.folder.publish(&temporary, step));
            if published.is_err() {
                // The error that led here says more than one of the removal.
                let _ = remove_all(&temporary);
            }
            published
        });
        let path = self.folder.step(step);
        written.with_context(|| format!("the checkpoint {} was not written", path.display()))?;
        tracing::debug!("wrote {}", path.display());
        self.folder.prune(self.keep, step)
    }

    fn write_files(&self, temporary: &Path, step: u64, snapshot: &Snapshot) -> Result<()> {
        const METADATA: u64 = 4 << 20;
        self.folder.require_space(snapshot.bytes() + METADATA)?;
        for part in Part::ALL {
            let path = temporary.join(part.file());
            self.write_part(&path, part, step, snapshot).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let progress = Progress { format_version: FORMAT_VERSION, step, values: snapshot.values.clone() };
        write_json(&temporary.join(PROGRESS), &progress)?;
        let names = [Part::Model.file(), Part::State.file(), PROGRESS];
        Manifest::of(temporary, step, &names)?.write(temporary)
    }

    /// Writes the HDF5 file of one part and waits until it is on disk.
    fn write_part(&self, path: &Path, part: Part, step: u64, snapshot: &Snapshot) -> Result<()> {
        // No HDF5 file locks: nobody else knows this file, and some cluster file systems refuse them.
        let file = hdf5::File::with_options().with_fapl(|fapl| fapl.file_locking(false)).create(path)?;
        file.new_attr::<u32>().create("format_version")?.write_scalar(&FORMAT_VERSION)?;
        file.new_attr::<u64>().create("step")?.write_scalar(&step)?;
        if part == Part::Model {
            let config: VarLenUnicode = self.config.parse()?;
            file.new_attr::<VarLenUnicode>().create("config")?.write_scalar(&config)?;
        }
        for dataset in snapshot.datasets.iter().filter(|dataset| dataset.part == part) {
            write_dataset(&file, dataset).with_context(|| format!("dataset /{}", dataset.name))?;
        }
        file.close()?;
        Ok(std::fs::File::open(path)?.sync_all()?)
    }
}

fn write_dataset(file: &hdf5::File, dataset: &Dataset) -> Result<()> {
    fn write<T: hdf5::H5Type>(file: &hdf5::File, dataset: &Dataset, data: &[T]) -> Result<()> {
        let created = file.new_dataset::<T>().shape(dataset.shape.as_slice()).create(dataset.name.as_str())?;
        Ok(created.write_raw(data)?)
    }
    match &dataset.data {
        Data::F32(data) => write(file, dataset, data),
        Data::F64(data) => write(file, dataset, data),
    }
}
