//! What is in a dataset, verified.

use super::dataset::check_vocab;
use super::tokenizer::{GPT2_VOCAB, Spec};
use super::{Meta, Split, SplitMeta, folder_of, shard};
use crate::error::{Result, bail, ensure};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Tokens shown as text.
const SHOWN: usize = 48;

/// Reads all of `path`, a dataset's folder or one shard, verifies checksums and that every token is below the vocabulary,
/// and describes it.
///
/// # Errors
/// Whatever is damaged, by name.
pub fn inspect(path: &Path) -> Result<String> {
    let dir = if path.is_dir() { path } else { folder_of(path) };
    let meta = Meta::read(dir)?;
    let (vocab, name) = meta.as_ref().map_or((GPT2_VOCAB, "gpt2"), |meta| (meta.vocab, &meta.tokenizer));
    let tokenizer = Spec::of_dataset(dir, name)?.load()?;
    let end_of_text = meta.as_ref().map_or(tokenizer.end_of_text(), |meta| meta.end_of_text);
    ensure!(tokenizer.vocab() == vocab, "{}: vocab {vocab}, but {name} has {}", dir.display(), tokenizer.vocab());

    let assumed = if meta.is_some() { "" } else { " (assumed: no meta.json)" };
    let mut report = format!("{}: {name}, vocab {vocab}, end of text {end_of_text}{assumed}\n", path.display());
    let shards = Listed::find(path, dir, meta.as_ref())?;
    for listed in &shards {
        let seen = listed.verify(vocab, end_of_text)?;
        let sum = if listed.sha256.is_some() { "sha256 ok" } else { "no checksum" };
        let (file, start) = (listed.path.file_name().unwrap_or_default().display(), tokenizer.decode(&seen.start)?);
        writeln!(report, "  {file}  {} tokens  {} ends of text  {sum}", seen.tokens, seen.ends)?;
        writeln!(report, "    {start:?}")?;
    }
    for split in [Split::Train, Split::Val] {
        if let Some(meta) = &meta {
            let SplitMeta { tokens, documents, bytes, shards } = meta.split(split);
            let (name, shards) = (split.name(), shards.len());
            writeln!(report, "{name}: {tokens} tokens, {documents} documents, {bytes} bytes, {shards} shards")?;
        }
    }
    Ok(report)
}

/// A shard, and what `meta.json` says of it.
struct Listed {
    path: PathBuf,
    tokens: Option<u64>,
    sha256: Option<String>,
}

/// What a shard holds.
struct Seen {
    tokens: u64,
    ends: u64,
    /// Its first tokens.
    start: Vec<u16>,
}

impl Listed {
    /// The shards under `path`: those of `meta`, else those found by name.
    fn find(path: &Path, dir: &Path, meta: Option<&Meta>) -> Result<Vec<Listed>> {
        let mut shards = Vec::new();
        for split in [Split::Train, Split::Val] {
            match meta {
                Some(meta) => shards.extend(meta.split(split).shards.iter().map(|shard| Listed {
                    path: dir.join(&shard.file),
                    tokens: Some(shard.tokens),
                    sha256: Some(shard.sha256.clone()),
                })),
                None => shards.extend(shard::find(dir, split)?.into_iter().map(Listed::unlisted)),
            }
        }
        if !path.is_dir() {
            shards.retain(|shard| shard.path.file_name() == path.file_name());
            if shards.is_empty() {
                shards.push(Listed::unlisted(path.to_owned()));
            }
        }
        if shards.is_empty() {
            bail!("{}: no shards: expected train_000000.bin and val_000000.bin", path.display());
        }
        Ok(shards)
    }

    fn unlisted(path: PathBuf) -> Listed {
        Listed { path, tokens: None, sha256: None }
    }

    fn verify(&self, vocab: usize, end_of_text: u16) -> Result<Seen> {
        let shown = self.path.display();
        let mut seen = Seen { tokens: 0, ends: 0, start: Vec::new() };
        shard::scan(&self.path, |position, tokens| {
            check_vocab(tokens, vocab, &self.path, position)?;
            if position == 0 {
                seen.start = tokens[..tokens.len().min(SHOWN)].to_vec();
            }
            seen.tokens += tokens.len() as u64;
            seen.ends += tokens.iter().filter(|&&token| token == end_of_text).count() as u64;
            Ok(())
        })?;
        if let Some(listed) = self.tokens.filter(|&listed| listed != seen.tokens) {
            bail!("{shown}: {} tokens, but meta.json lists {listed}", seen.tokens);
        }
        if let Some(listed) = &self.sha256 {
            let sum = shard::sha256(&self.path)?;
            ensure!(sum == *listed, "{shown}: damaged: its sha256 is {sum}, but meta.json lists {listed}");
        }
        Ok(seen)
    }
}
