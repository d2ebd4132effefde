//! `meta.json`: what is known about a prepared dataset.

use super::{Split, shard};
use crate::error::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;

const FILE: &str = "meta.json";
const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Version of this file's format.
    pub format: u32,
    /// `gpt2`, `bytes`, or `tokenizer.json` beside this file.
    pub tokenizer: String,
    /// Every token is below it.
    pub vocab: usize,
    /// Ends every document.
    pub end_of_text: u16,
    pub train: SplitMeta,
    pub val: SplitMeta,
}

/// One split: its shards in order, and what they hold together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitMeta {
    /// End-of-text tokens included.
    pub tokens: u64,
    pub documents: u64,
    /// Bytes of text (of uint16 tokens, where the input was a shard).
    pub bytes: u64,
    pub shards: Vec<ShardMeta>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardMeta {
    /// Name in the dataset's folder.
    pub file: String,
    pub tokens: u64,
    /// Of the whole file, in hex, as `sha256sum` prints it.
    pub sha256: String,
}

impl Meta {
    pub fn new(tokenizer: &str, vocab: usize, end_of_text: u16, train: SplitMeta, val: SplitMeta) -> Meta {
        Meta { format: FORMAT, tokenizer: tokenizer.into(), vocab, end_of_text, train, val }
    }

    pub fn split(&self, split: Split) -> &SplitMeta {
        match split {
            Split::Train => &self.train,
            Split::Val => &self.val,
        }
    }

    /// The `meta.json` of folder `dir`, or `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Meta>> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let meta: Meta = serde_json::from_slice(&text).with_context(|| format!("{}: damaged", path.display()))?;
        ensure!(meta.format == FORMAT, "{}: format {}, expected {FORMAT}", path.display(), meta.format);
        ensure!((1..=65_536).contains(&meta.vocab), "{}: vocab {} not in 1..=65536", path.display(), meta.vocab);
        Ok(Some(meta))
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        shard::write_synced(&dir.join(FILE), &text)
    }
}
