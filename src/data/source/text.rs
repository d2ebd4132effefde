//! A text file is one document, read in parts so that its length does not matter.

use super::{Content, Piece};
use crate::error::{Context, Result};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A text longer than this is tokenized in parts.
pub const PART_BYTES: usize = 1 << 18;

/// Length of the first part of `text`: all of it up to [`PART_BYTES`], else up to a white-space character, best a line feed,
/// that something other than white space follows.
///
/// Before such a character GPT-2's pattern always ends a word, so the parts' tokens are exactly those of the whole text; only
/// in a text without white space for [`PART_BYTES`], which is cut anywhere, may a few tokens differ.
pub fn first_part(text: &str) -> usize {
    cut(text, PART_BYTES)
}

/// [`first_part`] of at most `max` bytes.
fn cut(text: &str, max: usize) -> usize {
    if text.len() <= max {
        return text.len();
    }
    let max = (0..=max).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    let mut before_word = false;
    let mut space = None;
    for (i, c) in text[..max].char_indices().rev() {
        if i > 0 && c.is_whitespace() && before_word {
            if c == '\n' {
                return i;
            }
            space = space.or(Some(i));
        }
        before_word = !c.is_whitespace();
    }
    space.unwrap_or(max)
}

/// The parts of `text`.
pub fn parts(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (part, rest) = text.split_at(first_part(text));
        text = rest;
        (!part.is_empty()).then_some(part)
    })
}

/// The parts of a file, one at a time. What is not UTF-8 becomes U+FFFD, with a warning.
pub struct Parts {
    path: PathBuf,
    file: File,
    /// Read, not decoded yet.
    bytes: Vec<u8>,
    /// Decoded, not given out yet.
    text: String,
    at_end: bool,
    warned: bool,
    first: bool,
}

impl Parts {
    pub fn open(path: &Path) -> Result<Parts> {
        let file = File::open(path)?;
        let (bytes, text) = (Vec::new(), String::new());
        Ok(Parts { path: path.to_owned(), file, bytes, text, at_end: false, warned: false, first: true })
    }

    /// Reads until there is more than a part, or the file ends.
    fn fill(&mut self) -> std::io::Result<()> {
        while self.text.len() <= PART_BYTES && !self.at_end {
            let read = self.file.by_ref().take(PART_BYTES as u64).read_to_end(&mut self.bytes)?;
            self.at_end = read == 0;
            self.decode();
        }
        Ok(())
    }

    /// Moves `bytes` to `text`, all but a character that the next read may complete.
    fn decode(&mut self) {
        let incomplete = match std::str::from_utf8(&self.bytes) {
            Ok(_) => 0,
            Err(_) if self.at_end => 0,
            Err(_) => incomplete_tail(&self.bytes),
        };
        let complete = self.bytes.len() - incomplete;
        let decoded = String::from_utf8_lossy(&self.bytes[..complete]);
        if matches!(decoded, std::borrow::Cow::Owned(_)) && !self.warned {
            self.warned = true;
            tracing::warn!("{}: not all of it is UTF-8; the rest became U+FFFD", self.path.display());
        }
        self.text.push_str(&decoded);
        self.bytes.drain(..complete);
    }
}

/// Length of an unfinished character at the end of `bytes`: 0 to 3.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let starts = (1..=bytes.len().min(3)).find(|&n| bytes[bytes.len() - n] >= 0xc0);
    let unfinished = |n: &usize| std::str::from_utf8(&bytes[bytes.len() - n..]).is_err_and(|e| e.error_len().is_none());
    starts.filter(unfinished).unwrap_or(0)
}

impl Iterator for Parts {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        if let Err(error) = self.fill() {
            self.at_end = true;
            self.text.clear();
            return Some(Err(error).with_context(|| format!("reading {}", self.path.display())));
        }
        if self.text.is_empty() {
            return None;
        }
        let rest = self.text.split_off(first_part(&self.text));
        let part = std::mem::replace(&mut self.text, rest);
        let (first, last) = (std::mem::take(&mut self.first), self.at_end && self.text.is_empty());
        Some(Ok(Piece { read: part.len() as u64, content: Content::Text(part), position: 0, first, last }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::{Spec, Tokenizer};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn of_file(bytes: &[u8]) -> Vec<(String, bool, bool)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, bytes).unwrap();
        let text = |piece: Piece| match piece.content {
            Content::Text(text) => (text, piece.first, piece.last),
            other => panic!("{other:?}"),
        };
        Parts::open(&path).unwrap().map(|piece| text(piece.unwrap())).collect()
    }

    #[test]
    fn a_long_file_gives_the_parts_of_its_text() {
        let text = "Größe 中文\n\n  and so on,\r\n".repeat(40_000);
        let read = of_file(text.as_bytes());
        assert!(read.len() > 3);
        assert!(read.iter().map(|(part, ..)| part.as_str()).eq(parts(&text)));
        for (i, (part, first, last)) in read.iter().enumerate() {
            assert_eq!((*first, *last), (i == 0, i == read.len() - 1));
            assert!(part.len() <= PART_BYTES);
        }
    }

    #[test]
    fn the_length_of_a_file_may_be_a_parts() {
        let text = "ab\n".repeat(PART_BYTES)[..PART_BYTES].to_owned();
        assert_eq!(of_file(text.as_bytes()), [(text, true, true)]);
        assert_eq!(of_file(b""), []);
    }

    #[test]
    fn what_is_not_utf8_is_replaced() {
        assert_eq!(of_file(b"a\xff\xe4b\xe4\xb8"), [("a\u{fffd}\u{fffd}b\u{fffd}".to_owned(), true, true)]);
    }

    static GPT2: LazyLock<Box<dyn Tokenizer>> = LazyLock::new(|| Spec::Gpt2.load().unwrap());

    /// Cuts `text` into parts of at most `max` bytes and compares the tokens of the parts with those of the whole.
    fn assert_same_tokens(text: &str, max: usize) {
        let (mut whole, mut joined) = (Vec::new(), Vec::new());
        GPT2.encode(text, &mut whole).unwrap();
        let mut rest = text;
        while !rest.is_empty() {
            let (part, later) = rest.split_at(cut(rest, max));
            assert!(!part.is_empty() && part.len() <= max);
            GPT2.encode(part, &mut joined).unwrap();
            rest = later;
        }
        assert!(whole == joined, "{text:?} in parts of {max}");
    }

    proptest! {
        /// With a word and white space at least every 39 bytes, a part of 40 has a place to be cut.
        #[test]
        fn parts_have_the_tokens_of_the_whole(
            text in r"([a-c'é中1!\u{301}]{1,4}[ \n\t\r\u{a0}\u{3000}]{1,5}){1,200}",
            max in 40usize..300,
        ) {
            assert_same_tokens(&text, max);
        }
    }

    #[test]
    fn real_text_in_parts_has_its_tokens() {
        for max in [200, 1000, 5000] {
            assert_same_tokens(include_str!("text.rs"), max);
            assert_same_tokens(include_str!("../../config/schema.rs"), max);
        }
    }
}
