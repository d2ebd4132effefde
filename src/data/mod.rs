//! Text → tokens → shards → batches.
//!
//! [`prepare`] turns files into shards of uint16 tokens ([`shard`] has the format, [`Meta`] what is known about them),
//! [`Dataset`] maps them into memory, and a [`Sampler`] reads batches from it. `docs/DATA.md` states rules and guarantees.

mod dataset;
mod inspect;
mod meta;
mod permutation;
mod prepare;
mod sampler;
pub mod shard;
mod source;
pub mod tokenizer;

pub use dataset::Dataset;
pub use inspect::inspect;
pub use meta::{Meta, ShardMeta, SplitMeta};
pub use prepare::{Options, prepare};
pub use sampler::{Batch, Sampler, share};

use std::path::Path;

/// Which part of the data: what is trained on, or what is held out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Val,
}

impl Split {
    /// `train` or `val`, as in file names.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Val => "val",
        }
    }
}

/// The folder that `path` is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The lower-case words of a file's name: `fineweb_val_000000.bin` → fineweb, val, 000000, bin.
fn words(path: &Path) -> Vec<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    name.split(|c: char| !c.is_alphanumeric()).map(str::to_owned).collect()
}
