//! Input files → pieces of documents.
//!
//! Reading is serial and cheap; what costs time (parsing, hashing, tokenizing) is left to who takes the pieces, in parallel.

mod bin;
pub mod jsonl;
mod parquet;
pub mod text;

use super::{Split, words};
use crate::error::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// Extensions taken from a folder unless told otherwise.
const EXTENSIONS: [&str; 6] = ["txt", "md", "rs", "jsonl", "parquet", "bin"];

/// A document, or a part of a long one.
#[derive(Debug, PartialEq)]
pub struct Piece {
    pub content: Content,
    /// Where in the file: line, row or token.
    pub position: u64,
    /// A document starts here.
    pub first: bool,
    /// A document ends here.
    pub last: bool,
    /// Bytes of the file behind this piece, for progress.
    pub read: u64,
}

#[derive(Debug, PartialEq)]
pub enum Content {
    Text(String),
    /// A line of JSONL, not parsed yet.
    Json(Vec<u8>),
    /// Tokens of a shard, without the end of text.
    Tokens(Vec<u16>),
}

impl Piece {
    /// Bytes it takes in memory, about.
    pub fn size(&self) -> usize {
        let content = match &self.content {
            Content::Text(text) => text.len(),
            Content::Json(line) => line.len(),
            Content::Tokens(tokens) => 2 * tokens.len(),
        };
        content + size_of::<Piece>()
    }
}

/// The pieces of a file, in order.
pub type Pieces = Box<dyn Iterator<Item = Result<Piece>>>;

/// A file to read.
#[derive(Debug, PartialEq)]
pub struct Input {
    pub path: PathBuf,
    /// Set if the file as a whole belongs to one split; else each document is assigned by its hash.
    pub split: Option<Split>,
}

impl Input {
    fn extension(&self) -> &str {
        extension(&self.path)
    }

    /// Reads by extension; what is not .jsonl, .parquet or .bin is text. `end_of_text` ends the documents of a shard.
    pub fn open(&self, end_of_text: u16) -> Result<Pieces> {
        let open = || -> Result<Pieces> {
            Ok(match self.extension() {
                "jsonl" => Box::new(jsonl::Lines::open(&self.path)?),
                "parquet" => Box::new(parquet::rows(&self.path)?),
                "bin" => Box::new(bin::Documents::open(&self.path, end_of_text)?),
                _ => Box::new(text::Parts::open(&self.path)?),
            })
        };
        open().with_context(|| format!("cannot read {}", self.path.display()))
    }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or_default()
}

/// The files that `paths` name, in the order given; folders recursively, sorted by name, only files ending in one of
/// `extensions`, without hidden names and symbolic links to folders.
///
/// A file with the word `val`, `valid` or `validation` in its name, in the same folder as one of the same extension with the
/// word `train`, is validation data; then all other files are training data.
pub fn find(paths: &[PathBuf], extensions: Option<&[String]>) -> Result<Vec<Input>> {
    let taken = |path: &Path| match extensions {
        Some(chosen) => chosen.iter().any(|chosen| chosen.trim_start_matches('.') == extension(path)),
        None => EXTENSIONS.contains(&extension(path)),
    };
    let mut files = Vec::new();
    for path in paths {
        let info = std::fs::metadata(path).with_context(|| format!("no input {}", path.display()))?;
        if info.is_dir() {
            walk(path, &taken, &mut files)?;
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        let wanted = extensions.map_or(EXTENSIONS.join(" "), |chosen| chosen.join(" "));
        bail!("no input: the folders hold no file with an extension of: {wanted} (--ext chooses others)");
    }
    Ok(assign(files))
}

fn walk(dir: &Path, taken: &dyn Fn(&Path) -> bool, files: &mut Vec<PathBuf>) -> Result<()> {
    let read = || std::fs::read_dir(dir)?.collect::<std::io::Result<Vec<_>>>();
    let mut entries = read().with_context(|| format!("cannot read folder {}", dir.display()))?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(&path, taken, files)?;
        } else if taken(&path) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// Finds the pairs of training and validation files.
fn assign(files: Vec<PathBuf>) -> Vec<Input> {
    let named = |path: &Path, names: &[&str]| words(path).iter().any(|word| names.contains(&word.as_str()));
    let place = |path: &Path| (path.parent().map(Path::to_owned), extension(path).to_owned());
    let with_train: std::collections::HashSet<_> =
        files.iter().filter(|path| named(path, &["train"])).map(|path| place(path)).collect();
    let is_val = |path: &Path| named(path, &["val", "valid", "validation"]) && with_train.contains(&place(path));

    let paired = files.iter().any(|path| is_val(path));
    let split = |path: &Path| paired.then(|| if is_val(path) { Split::Val } else { Split::Train });
    files.into_iter().map(|path| Input { split: split(&path), path }).collect()
}

/// Bytes in all of `inputs`.
pub fn total_bytes(inputs: &[Input]) -> Result<u64> {
    let size = |input: &Input| {
        let info = std::fs::metadata(&input.path).with_context(|| format!("no input {}", input.path.display()))?;
        ensure!(info.is_file(), "{}: not a file", input.path.display());
        Ok(info.len())
    };
    inputs.iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str], extensions: Option<&[&str]>) -> Vec<(String, Option<Split>)> {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let extensions: Option<Vec<String>> = extensions.map(|list| list.iter().map(|e| e.to_string()).collect());
        let inputs = find(&[dir.path().to_owned()], extensions.as_deref()).unwrap();
        let name = |input: &Input| input.path.strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned();
        inputs.iter().map(|input| (name(input), input.split)).collect()
    }

    #[test]
    fn folders_are_read_sorted_and_filtered() {
        let files = ["b/z.md", "b/a.rs", "a.txt", "c.png", ".git/x.txt", "c.jsonl"];
        let found: Vec<String> = names(&files, None).into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, ["a.txt", "b/a.rs", "b/z.md", "c.jsonl"]);
        assert_eq!(names(&files, Some(&["png", ".md"])).len(), 2);
    }

    #[test]
    fn a_val_file_beside_a_train_file_is_the_validation_data() {
        let (train, val) = (Some(Split::Train), Some(Split::Val));
        let found = names(&["train.jsonl", "val.jsonl", "val.txt"], None);
        let expected = [("train.jsonl", train), ("val.jsonl", val), ("val.txt", train)];
        assert_eq!(found, expected.map(|(name, split)| (name.to_owned(), split)));
        let found = names(&["fineweb_train_000001.bin", "fineweb_val_000000.bin"], None);
        assert_eq!(found.iter().map(|(_, split)| *split).collect::<Vec<_>>(), [train, val]);
        for alone in [["val.rs", "train/train.rs"], ["val.rs", "train.md"], ["interval.txt", "train.txt"]] {
            assert!(names(&alone, None).iter().all(|(_, split)| split.is_none()), "{alone:?}");
        }
    }

    #[test]
    fn nothing_to_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find(&[dir.path().to_owned()], None).unwrap_err().to_string().contains("txt md rs"));
        let message = find(&[dir.path().join("gone")], None).unwrap_err().to_string();
        assert!(message.contains("gone"), "{message}");
    }
}
