//! One split of a dataset, mapped into memory.

use super::shard::{self, Shard};
use super::tokenizer::GPT2_VOCAB;
use super::{Meta, Split};
use crate::error::{Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tokens of one split, its shards one after the other. Clones share the mapping.
#[derive(Clone)]
pub struct Dataset {
    shards: Arc<[Shard]>,
    /// Tokens before each shard.
    starts: Arc<[u64]>,
    tokens: u64,
    vocab: usize,
}

impl Dataset {
    /// Maps the shards of `split` in folder `dir`: those that `meta.json` lists, or, where there is none, llm.c's and
    /// nanoGPT's by name ([`shard::find`]) with GPT-2's vocabulary. Checks headers and sizes, not tokens: those are checked
    /// as they are read, so that opening costs nothing.
    ///
    /// # Errors
    /// No shard or no token, a wrong magic or version, a size that is not the header's or not `meta.json`'s.
    pub fn open(dir: &Path, split: Split) -> Result<Dataset> {
        let meta = Meta::read(dir)?;
        let paths: Vec<PathBuf> = match &meta {
            Some(meta) => meta.split(split).shards.iter().map(|shard| dir.join(&shard.file)).collect(),
            None => shard::find(dir, split)?,
        };
        let shards = paths.iter().map(|path| Shard::map(path)).collect::<Result<Vec<_>>>()?;
        if let Some(meta) = &meta {
            for (shard, listed) in shards.iter().zip(&meta.split(split).shards) {
                let (path, tokens) = (shard.path().display(), shard.tokens());
                ensure!(tokens == listed.tokens, "{path}: {tokens} tokens, but meta.json lists {}", listed.tokens);
            }
        }

        let (mut starts, mut tokens) = (Vec::with_capacity(shards.len()), 0);
        for shard in &shards {
            starts.push(tokens);
            tokens += shard.tokens();
        }
        if tokens == 0 {
            let (dir, name) = (dir.display(), split.name());
            bail!("{dir}: no {name} data: expected shards like {name}_000000.bin (see `vcycle data prepare`)");
        }
        let vocab = meta.map_or(GPT2_VOCAB, |meta| meta.vocab);
        Ok(Dataset { shards: shards.into(), starts: starts.into(), tokens, vocab })
    }

    /// Number of tokens.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.tokens
    }

    /// Every token is below it.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Copies the tokens from `position` on into `out`; `position + out.len() ≤ len()`.
    ///
    /// # Errors
    /// A token ≥ vocab.
    pub fn read(&self, mut position: u64, mut out: &mut [u32]) -> Result<()> {
        while !out.is_empty() {
            let index = self.starts.partition_point(|&start| start <= position) - 1;
            let (shard, within) = (&self.shards[index], position - self.starts[index]);
            let count = usize::try_from(shard.tokens() - within).unwrap_or(usize::MAX).min(out.len());
            let (now, later) = out.split_at_mut(count);
            shard.read(within, now);
            check_vocab(now, self.vocab, shard.path(), within)?;
            position += count as u64;
            out = later;
        }
        Ok(())
    }
}

/// Fails on the first of `tokens` that is not below `vocab`; they start at `position` of the shard `path`.
pub fn check_vocab<T: Copy + Into<u32>>(tokens: &[T], vocab: usize, path: &Path, position: u64) -> Result<()> {
    let Some(i) = tokens.iter().position(|&token| token.into() as usize >= vocab) else { return Ok(()) };
    let (token, position) = (tokens[i].into(), position + i as u64);
    bail!("{}: token {token} at position {position} is not below the vocabulary of {vocab}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SplitMeta;

    /// Two shards of tokens 0..10 and a `meta.json` of vocabulary `vocab`.
    fn prepared(vocab: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = shard::Writer::new(dir.path(), Split::Train, 4);
        writer.write(&(0..10).collect::<Vec<u16>>()).unwrap();
        let train = SplitMeta { tokens: 10, documents: 1, bytes: 9, shards: writer.finish().unwrap() };
        Meta::new("bytes", vocab, 0, train, SplitMeta::default()).write(dir.path()).unwrap();
        dir
    }

    fn error(result: Result<Dataset>) -> String {
        format!("{:#}", result.err().expect("an error"))
    }

    #[test]
    fn reads_across_shards() {
        let dir = prepared(10);
        let data = Dataset::open(dir.path(), Split::Train).unwrap();
        assert_eq!((data.len(), data.vocab()), (10, 10));
        for position in 0..10 {
            let mut out = vec![0; 10 - position];
            data.read(position as u64, &mut out).unwrap();
            assert_eq!(out, (position as u32..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_named() {
        let dir = prepared(7);
        let data = Dataset::open(dir.path(), Split::Train).unwrap();
        data.read(0, &mut [0; 7]).unwrap();
        let message = data.read(1, &mut [0; 9]).unwrap_err().to_string();
        assert!(message.contains("train_000001.bin: token 7 at position 3"), "{message}");
    }

    #[test]
    fn an_empty_or_damaged_split_is_named() {
        let dir = prepared(10);
        assert!(error(Dataset::open(dir.path(), Split::Val)).contains("no val data"));
        assert!(error(Dataset::open(&dir.path().join("none"), Split::Val)).contains("none"));
        std::fs::copy(dir.path().join("train_000002.bin"), dir.path().join("train_000001.bin")).unwrap();
        assert!(error(Dataset::open(dir.path(), Split::Train)).contains("2 tokens, but meta.json lists 4"));
        std::fs::remove_file(dir.path().join("train_000001.bin")).unwrap();
        assert!(error(Dataset::open(dir.path(), Split::Train)).contains("train_000001.bin"));
        std::fs::write(dir.path().join("meta.json"), "{").unwrap();
        assert!(error(Dataset::open(dir.path(), Split::Train)).contains("meta.json: damaged"));
    }

    #[test]
    fn nanogpt_and_bare_llmc_shards_are_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("train.bin"), [1, 0, 2, 1]).unwrap();
        std::fs::write(dir.path().join("meta.pkl"), "ignored").unwrap();
        let mut writer = shard::Writer::new(dir.path(), Split::Val, 4);
        writer.write(&[5, 6]).unwrap();
        writer.finish().unwrap();
        std::fs::rename(dir.path().join("val_000000.bin"), dir.path().join("fineweb_val_000000.bin")).unwrap();
        for (split, expected) in [(Split::Train, [1, 258]), (Split::Val, [5, 6])] {
            let data = Dataset::open(dir.path(), split).unwrap();
            let mut out = [0; 2];
            data.read(0, &mut out).unwrap();
            assert_eq!((data.vocab(), out), (50_257, expected));
        }
    }
}
