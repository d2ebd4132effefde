//! The folder `RUN/checkpoints`: names, and the renames that make checkpoints appear and disappear whole.

use super::manifest::{Check, Manifest};
use crate::error::{Context, Result, anyhow, bail};
use rustix::fs::{CWD, RenameFlags, renameat_with, statvfs};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What is being written or deleted; nobody reads it, and the next writer removes what a killed one left.
const TEMPORARY: &str = ".tmp-";

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The folder of checkpoints of a run, which need not exist.
    pub fn of_run(run_dir: &Path) -> Folder {
        Folder { root: run_dir.join("checkpoints") }
    }

    /// `path`, a run or its folder of checkpoints, or `None` if it is neither.
    pub fn find(path: &Path) -> Option<Folder> {
        let of_run = Folder::of_run(path);
        let is_root = path.file_name().is_some_and(|name| name == "checkpoints");
        let itself = Folder { root: path.to_owned() };
        let has_steps = || itself.steps().is_ok_and(|steps| !steps.is_empty());
        if of_run.root.is_dir() {
            Some(of_run)
        } else if path.is_dir() && (is_root || has_steps()) {
            Some(itself)
        } else {
            None
        }
    }

    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Where the checkpoint of `step` lies once it is complete.
    pub fn step(&self, step: u64) -> PathBuf {
        self.root.join(format!("step-{step:08}"))
    }

    /// Steps of all checkpoints by name, oldest first, intact or not; none if the folder does not exist.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Creates the folder, removes what killed writers left, and makes sure that files can be written.
    pub(super) fn prepare(&self) -> Result<()> {
        let root = self.root.display();
        fs::create_dir_all(&self.root).with_context(|| format!("cannot create the folder {root} for checkpoints"))?;
        for name in self.names()?.iter().filter(|name| name.starts_with(TEMPORARY)) {
            remove_all(&self.root.join(name))?;
            tracing::info!("removed {root}/{name}, left by a killed run");
        }
        let probe = self.temporary("probe")?;
        fs::write(probe.join("file"), b"x").with_context(|| format!("cannot write to the folder {root}"))?;
        remove_all(&probe)?;
        if let Some(parent) = self.root.parent() {
            sync_folder(parent)?;
        }
        Ok(())
    }

    /// A new, empty folder beside the checkpoints, with a name that readers ignore.
    pub(super) fn temporary(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(format!("{TEMPORARY}{name}"));
        remove_all(&path)?;
        fs::create_dir(&path).with_context(|| format!("cannot create the folder {}", path.display()))?;
        Ok(path)
    }

    /// Makes `temporary`, whose files are on disk, the checkpoint of `step`; an older one of the same step is replaced.
    pub(super) fn publish(&self, temporary: &Path, step: u64) -> Result<()> {
        let target = self.step(step);
        let publish = || -> Result<()> {
            sync_folder(temporary)?;
            if target.exists() {
                exchange(temporary, &target)?;
            } else {
                fs::rename(temporary, &target)?;
            }
            sync_folder(&self.root)
        };
        publish().with_context(|| format!("cannot rename {} to {}", temporary.display(), target.display()))?;
        remove_all(temporary)
    }

    /// Deletes the oldest complete checkpoints until `keep` are left, among them always `newest`, just written, and any
    /// that somebody reads. `keep` = 0 keeps all. A damaged checkpoint neither counts nor is deleted.
    pub(super) fn prune(&self, keep: usize, newest: u64) -> Result<()> {
        if keep == 0 {
            return Ok(());
        }
        let complete = |&step: &u64| {
            let path = self.step(step);
            step != newest && Manifest::read(&path).is_ok_and(|m| m.problems(&path, Check::Sizes).is_empty())
        };
        let others: Vec<u64> = self.steps()?.into_iter().filter(complete).collect();
        let surplus = (others.len() + 1).saturating_sub(keep);
        for &step in &others[..surplus] {
            self.delete(step)?;
        }
        Ok(())
    }

    /// Deletes a checkpoint unless somebody reads it. The rename comes first: a checkpoint is never half there.
    fn delete(&self, step: u64) -> Result<()> {
        let path = self.step(step);
        let Some(locks) = lock_unread(&path)? else {
            tracing::info!("kept {}: it is being read", path.display());
            return Ok(());
        };
        let doomed = self.root.join(format!("{TEMPORARY}deleted-step-{step:08}"));
        remove_all(&doomed)?;
        fs::rename(&path, &doomed).with_context(|| format!("cannot delete the old checkpoint {}", path.display()))?;
        drop(locks);
        remove_all(&doomed)
    }

    /// An error unless the file system has room for `bytes`.
    pub(super) fn require_space(&self, bytes: u64) -> Result<()> {
        let root = self.root.display();
        let stat = statvfs(&self.root).with_context(|| format!("cannot ask for the free space at {root}"))?;
        let free = stat.f_bavail * stat.f_frsize;
        if free < bytes {
            bail!(
                "the disk of {root} is full: a checkpoint needs {} MiB, {} MiB are free; make room or lower checkpoint.keep",
                bytes.div_ceil(1 << 20),
                free >> 20
            );
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let context = || format!("cannot list the folder of checkpoints {}", self.root.display());
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(context)?,
        };
        let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        entries.map(name).collect::<std::io::Result<_>>().with_context(context)
    }
}

/// The step in the name of a checkpoint's folder, `step-00000042`.
pub(super) fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    (digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Exclusive locks on all files of a checkpoint, or `None` if another process reads one of them: vcycle locks the
/// manifest it reads, HDF5 (also in h5py) its files. A file system without locks locks nothing.
fn lock_unread(checkpoint: &Path) -> Result<Option<Vec<fs::File>>> {
    let mut locks = Vec::new();
    for entry in fs::read_dir(checkpoint)? {
        let file = fs::File::open(entry?.path())?;
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Ok(None);
        }
        locks.push(file);
    }
    Ok(Some(locks))
}

/// Swaps two folders in one atomic step; on a file system that cannot (NFS), in three that are not.
fn exchange(a: &Path, b: &Path) -> Result<()> {
    match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            let aside = a.with_extension("replaced");
            fs::rename(b, &aside)?;
            fs::rename(a, b)?;
            fs::rename(&aside, a)?;
            Ok(())
        }
        done => Ok(done?),
    }
}

/// Waits until the names in a folder are on disk.
fn sync_folder(path: &Path) -> Result<()> {
    let sync = || fs::File::open(path)?.sync_all();
    sync().map_err(|e| anyhow!("cannot sync the folder {}: {e}", path.display()))
}

/// Removes a folder if it exists.
pub(super) fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
