//! `manifest.json`: what belongs to a checkpoint, with size and checksum.

use super::FORMAT_VERSION;
use crate::error::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

const NAME: &str = "manifest.json";

/// The files of a checkpoint. Written last: a folder without one is incomplete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format_version: u32,
    pub step: u64,
    /// Version of the vcycle that wrote it.
    pub vcycle_version: String,
    /// RFC 3339, UTC.
    pub created: String,
    pub files: Vec<File>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct File {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

/// How thoroughly files are compared with their manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Each is there and has its size.
    Sizes,
    /// Its checksum too; reads every byte.
    Checksums,
}

/// A newer vcycle wrote the checkpoint in a format that this one does not know.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} has format version {version}, written by vcycle {by}; this is vcycle {}, which reads versions up to {FORMAT_VERSION}: use the newer one",
    checkpoint.display(),
    env!("CARGO_PKG_VERSION")
)]
pub struct NewerFormat {
    checkpoint: PathBuf,
    version: u64,
    by: String,
}

impl Manifest {
    /// The manifest of the files `names` as they lie in `folder`.
    pub(super) fn of(folder: &Path, step: u64, names: &[&str]) -> Result<Manifest> {
        let describe = |name: &&str| {
            let path = folder.join(name);
            let (bytes, sha256) = digest(&path).with_context(|| format!("cannot read back {}", path.display()))?;
            Ok(File { name: name.to_string(), bytes, sha256 })
        };
        Ok(Manifest {
            format_version: FORMAT_VERSION,
            step,
            vcycle_version: env!("CARGO_PKG_VERSION").to_owned(),
            created: chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now())
                .to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            files: names.iter().map(describe).collect::<Result<_>>()?,
        })
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        write_json(&folder.join(NAME), self)
    }

    /// Reads the manifest of a checkpoint; the error is a [`NewerFormat`] if this vcycle is too old for it.
    pub fn read(checkpoint: &Path) -> Result<Manifest> {
        let path = checkpoint.join(NAME);
        let json: serde_json::Value = read_json(&path)?;
        // First of all: a newer manifest may have other fields.
        let version = json["format_version"].as_u64().unwrap_or_default();
        if version > u64::from(FORMAT_VERSION) {
            let by = json["vcycle_version"].as_str().unwrap_or("unknown").to_owned();
            return Err(NewerFormat { checkpoint: checkpoint.to_owned(), version, by }.into());
        }
        let manifest = Manifest::deserialize(json).with_context(|| format!("{} is damaged", path.display()))?;
        let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = super::folder::step_of(&name) {
            let found = manifest.step;
            ensure!(found == step, "{}: step is {found}, the folder is named {name}", path.display());
        }
        Ok(manifest)
    }

    /// A shared lock on the manifest, held while the checkpoint is read; no lock where the file system has none.
    pub(super) fn lock(checkpoint: &Path) -> Result<fs::File> {
        let path = checkpoint.join(NAME);
        let file = fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let _ = file.lock_shared();
        Ok(file)
    }

    /// What is wrong with the files of the checkpoint, each with its name, what was expected and what was found; empty
    /// if all is well.
    pub fn problems(&self, checkpoint: &Path, check: Check) -> Vec<String> {
        self.files.iter().filter_map(|file| file.problem(checkpoint, check)).collect()
    }

    /// Size of all files together.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl File {
    fn problem(&self, checkpoint: &Path, check: Check) -> Option<String> {
        let path = checkpoint.join(&self.name);
        let at = path.display();
        let found = match fs::metadata(&path) {
            Err(e) => return Some(format!("{at}: expected {} bytes, found none ({e})", self.bytes)),
            Ok(metadata) => metadata.len(),
        };
        if found != self.bytes {
            return Some(format!("{at}: expected {} bytes, found {found}", self.bytes));
        }
        if check == Check::Sizes {
            return None;
        }
        match digest(&path) {
            Err(e) => Some(format!("{at}: cannot be read ({e})")),
            Ok((_, sha256)) if sha256 == self.sha256 => None,
            Ok((_, sha256)) => Some(format!("{at}: expected sha256 {}, found {sha256}", self.sha256)),
        }
    }
}

/// Size and SHA-256 of a file, read as a stream.
fn digest(path: &Path) -> std::io::Result<(u64, String)> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut bytes = 0;
    // Stays in the second-level cache between the kernel's copy and the hash.
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, format!("{:x}", hash.finalize()))),
            Ok(count) => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Writes a JSON file and waits until it is on disk.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let write = || -> Result<()> {
        let mut file = fs::File::create(path)?;
        std::io::Write::write_all(&mut file, &serde_json::to_vec_pretty(value)?)?;
        Ok(file.sync_all()?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
}
