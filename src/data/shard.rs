//! Shards: files of uint16 tokens.
//!
//! llm.c's format: a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then the tokens,
//! little-endian. nanoGPT's `train.bin` and `val.bin` are the tokens alone.

use super::meta::ShardMeta;
use super::{Split, words};
use crate::error::{Context, Result, bail, ensure};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: u32 = 20_240_520;
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 256 * 4;

/// Tokens in a full shard (200 MB).
pub const TOKENS_PER_SHARD: u64 = 100_000_000;

/// Where the tokens of an open shard are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes before the first token; 0 in nanoGPT's format.
    pub offset: usize,
    /// Number of tokens.
    pub tokens: u64,
}

impl Layout {
    /// Reads and checks the header; `file` then stands at the first token. A file without llm.c's magic is taken as nanoGPT's
    /// only under nanoGPT's names, `train.bin` and `val.bin`.
    fn read(path: &Path, file: &mut File) -> Result<Layout> {
        let bytes = file.metadata()?.len();
        let mut header = Vec::with_capacity(HEADER_BYTES);
        Read::by_ref(file).take(HEADER_BYTES as u64).read_to_end(&mut header)?;
        let field = |i: usize| header.get(4 * i..4 * i + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));

        if field(0) == Some(MAGIC) {
            ensure!(field(1) == Some(VERSION), "version {:?}, expected {VERSION}", field(1).unwrap_or(0));
            let tokens = u64::from(field(2).unwrap_or(0));
            let expected = HEADER_BYTES as u64 + 2 * tokens;
            ensure!(bytes == expected, "{tokens} tokens make {expected} bytes, but the file has {bytes}: truncated?");
            return Ok(Layout { offset: HEADER_BYTES, tokens });
        }
        if path.ends_with("train.bin") || path.ends_with("val.bin") {
            ensure!(bytes % 2 == 0, "an odd number of bytes ({bytes}) does not hold uint16 tokens: truncated?");
            file.seek(SeekFrom::Start(0))?;
            return Ok(Layout { offset: 0, tokens: bytes / 2 });
        }
        bail!("magic {}, expected {MAGIC}: not a shard of uint16 tokens in llm.c's format", field(0).unwrap_or(0))
    }
}

/// Opens the shard `path` for reading from its first token on.
pub fn open(path: &Path) -> Result<(File, Layout)> {
    let mut file = File::open(path).with_context(|| format!("cannot open shard {}", path.display()))?;
    let layout = Layout::read(path, &mut file).with_context(|| format!("shard {}", path.display()))?;
    Ok((file, layout))
}

/// Calls `visit(position, tokens)` for the tokens of a shard, in order, a few at a time.
pub fn scan(path: &Path, mut visit: impl FnMut(u64, &[u16]) -> Result<()>) -> Result<Layout> {
    let (file, layout) = open(path)?;
    let mut reader = Tokens::new(file, layout);
    let (mut position, mut tokens) = (0, Vec::new());
    while reader.next_into(&mut tokens, 1 << 16).with_context(|| format!("reading {}", path.display()))? {
        visit(position, &tokens)?;
        position += tokens.len() as u64;
    }
    Ok(layout)
}

/// The tokens of a shard as a stream, for what reads all of it once.
pub struct Tokens {
    file: BufReader<File>,
    left: u64,
    bytes: Vec<u8>,
}

impl Tokens {
    pub fn new(file: File, layout: Layout) -> Tokens {
        Tokens { file: BufReader::new(file), left: layout.tokens, bytes: Vec::new() }
    }

    /// Replaces `tokens` by the next ones, at most `max`; false at the end.
    pub fn next_into(&mut self, tokens: &mut Vec<u16>, max: usize) -> std::io::Result<bool> {
        let count = self.left.min(max as u64);
        self.left -= count;
        self.bytes.resize(2 * count as usize, 0);
        self.file.read_exact(&mut self.bytes)?;
        tokens.clear();
        tokens.extend(self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
        Ok(count > 0)
    }
}

/// A shard mapped into memory. Reading costs page faults, not heap.
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    layout: Layout,
}

impl Shard {
    pub fn map(path: &Path) -> Result<Shard> {
        let (file, layout) = open(path)?;
        // SAFETY: a shard is renamed into place complete and never written again; who truncates one under a run gets SIGBUS.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        Ok(Shard { path: path.to_owned(), map, layout })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.layout.tokens
    }

    /// Copies the tokens from `position` on into `out`; all of them exist.
    pub fn read(&self, position: u64, out: &mut [u32]) {
        let start = self.layout.offset + 2 * position as usize;
        let bytes = &self.map[start..start + 2 * out.len()];
        for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *out = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
    }
}

/// The shards of `split` in a folder without `meta.json`: `.bin` files with the word `train` or `val` in their names, sorted.
pub fn find(dir: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read folder {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "bin") && words(&path).iter().any(|word| word == split.name()) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Writes one split as a series of shards `SPLIT_000000.bin`, `SPLIT_000001.bin`, ...
pub struct Writer {
    dir: PathBuf,
    split: Split,
    tokens_per_shard: u64,
    /// The shard being written and its number of tokens.
    open: Option<(BufWriter<File>, u64)>,
    finished: Vec<ShardMeta>,
}

impl Writer {
    pub fn new(dir: &Path, split: Split, tokens_per_shard: u64) -> Writer {
        Writer { dir: dir.to_owned(), split, tokens_per_shard, open: None, finished: Vec::new() }
    }

    fn file_name(&self) -> String {
        format!("{}_{:06}.bin", self.split.name(), self.finished.len())
    }

    pub fn write(&mut self, mut tokens: &[u16]) -> Result<()> {
        while !tokens.is_empty() {
            let path = self.dir.join(self.file_name());
            let (file, written) = match &mut self.open {
                Some(open) => open,
                None => self.open.insert((create(&path)?, 0)),
            };
            let room = usize::try_from(self.tokens_per_shard - *written).unwrap_or(usize::MAX);
            let (now, later) = tokens.split_at(tokens.len().min(room));
            let bytes: Vec<u8> = now.iter().flat_map(|token| token.to_le_bytes()).collect();
            file.write_all(&bytes).with_context(|| format!("writing {}", path.display()))?;
            *written += now.len() as u64;
            if *written == self.tokens_per_shard {
                self.close()?;
            }
            tokens = later;
        }
        Ok(())
    }

    /// Completes the open shard: header, fsync, checksum.
    fn close(&mut self) -> Result<()> {
        let Some((mut file, tokens)) = self.open.take() else { return Ok(()) };
        let name = self.file_name();
        let path = self.dir.join(&name);
        let mut complete = || {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header(tokens as u32))?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        complete().with_context(|| format!("writing {}", path.display()))?;
        self.finished.push(ShardMeta { file: name, tokens, sha256: sha256(&path)? });
        Ok(())
    }

    /// Completes the last shard and describes all of them.
    pub fn finish(mut self) -> Result<Vec<ShardMeta>> {
        self.close()?;
        Ok(self.finished)
    }
}

/// A new shard with room for its header.
fn create(path: &Path) -> Result<BufWriter<File>> {
    let new = || {
        let mut file = BufWriter::new(File::create_new(path)?);
        file.write_all(&header(0))?;
        Ok::<_, std::io::Error>(file)
    };
    new().with_context(|| format!("cannot create {}", path.display()))
}

fn header(tokens: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (bytes, field) in header.chunks_exact_mut(4).zip([MAGIC, VERSION, tokens]) {
        bytes.copy_from_slice(&field.to_le_bytes());
    }
    header
}

/// Of a whole file, in hex.
pub fn sha256(path: &Path) -> Result<String> {
    let hash = || {
        let mut hasher = Sha256::new();
        std::io::copy(&mut File::open(path)?, &mut hasher)?;
        Ok::<_, std::io::Error>(format!("{:x}", hasher.finalize()))
    };
    hash().with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a small file and waits until it is on the disk.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(name: &str, bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let message = format!("{:#}", Shard::map(&path).err().expect("an error"));
        assert!(message.contains(path.to_str().unwrap()), "names the file: {message}");
        message
    }

    fn shard(fields: [u32; 3], tokens: &[u16]) -> Vec<u8> {
        let mut bytes = header(fields[2]).to_vec();
        bytes[..4].copy_from_slice(&fields[0].to_le_bytes());
        bytes[4..8].copy_from_slice(&fields[1].to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|t| t.to_le_bytes()));
        bytes
    }

    #[test]
    fn damage_is_named() {
        assert!(error("train_0.bin", &shard([20240801, 1, 1], &[7])).contains("magic 20240801, expected 20240520"));
        assert!(error("train_0.bin", &shard([MAGIC, 2, 1], &[7])).contains("version 2, expected 1"));
        assert!(error("train_0.bin", &shard([MAGIC, 1, 3], &[7])).contains("truncated"));
        assert!(error("train_0.bin", &shard([MAGIC, 1, 0], &[])[..100]).contains("truncated"));
        assert!(error("train_0.bin", b"").contains("magic 0"));
        assert!(error("train.bin", b"abc").contains("odd number"));
    }

    #[test]
    fn a_series_of_shards_is_written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path(), Split::Val, 4);
        writer.write(&[1, 2, 3]).unwrap();
        writer.write(&[4, 5, 6, 7, 8, 9]).unwrap();
        let shards = writer.finish().unwrap();
        let found = find(dir.path(), Split::Val).unwrap();
        assert_eq!(shards.iter().map(|s| s.tokens).collect::<Vec<_>>(), [4, 4, 1]);
        assert_eq!(
            found.iter().map(|p| p.file_name().unwrap()).collect::<Vec<_>>(),
            ["val_000000.bin", "val_000001.bin", "val_000002.bin"]
        );
        let mut tokens = [0; 2];
        Shard::map(&found[1]).unwrap().read(2, &mut tokens);
        assert_eq!(tokens, [7, 8]);
        // The format, byte for byte.
        let bytes = std::fs::read(&found[2]).unwrap();
        assert_eq!(bytes.len(), 1026);
        assert_eq!(bytes[..16], [0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[1024..], [9, 0]);
        let mut seen = Vec::new();
        scan(&found[0], |position, tokens| {
            seen.push((position, tokens.to_vec()));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(0, vec![1, 2, 3, 4])]);
    }
}
