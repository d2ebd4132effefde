//! Shards of another tool (or of an earlier `prepare`), cut into documents again.

use super::text::PART_BYTES;
use super::{Content, Piece};
use crate::data::shard::{self, Tokens};
use crate::data::{Meta, folder_of};
use crate::error::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// Tokens of a long document in one piece.
const PART_TOKENS: usize = PART_BYTES / 2;

/// The documents of a shard: an end-of-text token ends one, whether its tool wrote it before or after each document.
pub struct Documents {
    path: PathBuf,
    tokens: Tokens,
    end_of_text: u16,
    /// The last tokens read, and how many of them are given out.
    buffer: Vec<u16>,
    used: usize,
    /// Tokens of the shard given out, ends of text included.
    position: u64,
    /// The next token starts a document.
    first: bool,
}

impl Documents {
    pub fn open(path: &Path, end_of_text: u16) -> Result<Documents> {
        if let Some(Meta { tokenizer, end_of_text: own, .. }) = Meta::read(folder_of(path))? {
            ensure!(own == end_of_text, "its tokens are of {tokenizer} (see meta.json): give that as --tokenizer");
        }
        let (file, layout) = shard::open(path)?;
        let tokens = Tokens::new(file, layout);
        Ok(Documents {
            path: path.to_owned(),
            tokens,
            end_of_text,
            buffer: Vec::new(),
            used: 0,
            position: 0,
            first: true,
        })
    }

    /// Tokens up to the end of a document, of the buffer, or of the shard. The document ends at the end of the shard too.
    fn piece(&mut self) -> Result<Option<Piece>> {
        if self.used == self.buffer.len() {
            self.used = 0;
            if !self.tokens.next_into(&mut self.buffer, PART_TOKENS)? {
                let (first, position) = (std::mem::replace(&mut self.first, true), self.position);
                let end = Piece { content: Content::Tokens(Vec::new()), position, first, last: true, read: 0 };
                return Ok((!first).then_some(end));
            }
        }
        let rest = &self.buffer[self.used..];
        let end = rest.iter().position(|&token| token == self.end_of_text);
        let content = rest[..end.unwrap_or(rest.len())].to_vec();
        let taken = content.len() + usize::from(end.is_some());

        let (first, position) = (std::mem::replace(&mut self.first, end.is_some()), self.position);
        self.used += taken;
        self.position += taken as u64;
        let content = Content::Tokens(content);
        Ok(Some(Piece { content, position, first, last: end.is_some(), read: 2 * taken as u64 }))
    }
}

impl Iterator for Documents {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        self.piece().with_context(|| format!("reading {}", self.path.display())).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (tokens, position, first, last) of every piece.
    fn pieces(tokens: &[u16]) -> Vec<(usize, u64, bool, bool)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.bin");
        std::fs::write(&path, tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        let seen = |piece: Piece| match piece.content {
            Content::Tokens(tokens) => (tokens.len(), piece.position, piece.first, piece.last),
            other => panic!("{other:?}"),
        };
        Documents::open(&path, 9).unwrap().map(|piece| seen(piece.unwrap())).collect()
    }

    #[test]
    fn ends_of_text_end_documents() {
        let expected = [(2, 0, true, true), (0, 3, true, true), (1, 4, true, false), (0, 5, false, true)];
        assert_eq!(pieces(&[1, 2, 9, 9, 3]), expected);
        assert_eq!(pieces(&[1, 9]), [(1, 0, true, true)]);
    }

    #[test]
    fn a_long_document_comes_in_parts() {
        let n = PART_TOKENS;
        let expected = [(n, 0, true, false), (n, n as u64, false, false), (0, 2 * n as u64, false, true)];
        assert_eq!(pieces(&vec![1; 2 * n]), expected);
    }
}
