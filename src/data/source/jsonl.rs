//! JSON lines: a document a line, in the field `text`.

use super::{Content, Piece};
use crate::error::{Context, Result};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// The lines of a file that are not blank.
pub struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    /// Lines read.
    line: u64,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Lines> {
        Ok(Lines { path: path.to_owned(), file: BufReader::with_capacity(1 << 18, File::open(path)?), line: 0 })
    }
}

impl Iterator for Lines {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        let mut line = Vec::new();
        loop {
            line.clear();
            match self.file.read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(_) => self.line += 1,
                Err(error) => return Some(Err(error).with_context(|| format!("reading {}", self.path.display()))),
            }
            if !line.trim_ascii().is_empty() {
                break;
            }
        }
        let read = line.len() as u64;
        Some(Ok(Piece { content: Content::Json(line), position: self.line, first: true, last: true, read }))
    }
}

/// The field `text` of a line.
pub fn text(line: &[u8]) -> serde_json::Result<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    struct Document<'a> {
        #[serde(borrow)]
        text: Cow<'a, str>,
    }
    serde_json::from_slice::<Document>(line).map(|document| document.text)
}
