//! Files → shards, streamed: one thread reads, all tokenize, one writes, in the order of the input.

use super::dataset::check_vocab;
use super::source::{self, Content, Input, Piece, jsonl, text};
use super::tokenizer::{Spec, TOKENIZER_FILE, Tokenizer};
use super::{Meta, Split, SplitMeta, folder_of, shard};
use crate::error::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

/// Bytes of input tokenized at once. At most three batches are in memory.
const BATCH_BYTES: usize = 8 << 20;

/// What to prepare.
#[derive(Clone, Debug)]
pub struct Options {
    /// Files and folders.
    pub inputs: Vec<PathBuf>,
    /// Folder of the dataset; must not exist, or be empty.
    pub out: PathBuf,
    pub tokenizer: Spec,
    /// Share of the documents held out for validation, in [0, 1), chosen by their hash.
    pub val_fraction: f64,
    /// Extensions of the files taken from folders; `None` = all that can be read.
    pub extensions: Option<Vec<String>>,
}

/// Writes a dataset: shards and `meta.json`, whole or not at all. The same files give the same bytes, whatever the number
/// of threads. `progress(read, total)` is called with bytes of input.
///
/// # Errors
/// An input cannot be read (file and line, row or token are named), `out` holds something, or a split would be empty.
pub fn prepare(options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Meta> {
    let Options { inputs, out, tokenizer: spec, val_fraction, extensions } = options;
    ensure!((0.0..1.0).contains(val_fraction), "--val-fraction {val_fraction}: expected 0 ≤ F < 1");
    let inputs = source::find(inputs, extensions.as_deref())?;
    let total = source::total_bytes(&inputs)?;
    let tokenizer = spec.load()?;
    let folder = Partial::create(out)?;
    if let Spec::File(path) = spec {
        let json = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        shard::write_synced(&folder.path.join(TOKENIZER_FILE), &json)?;
    }

    let encoder = Encoder { inputs: &inputs, tokenizer: tokenizer.as_ref(), val_fraction: *val_fraction };
    let mut writer = Writer::new(&folder.path);
    let mut read = 0;
    std::thread::scope(|scope| -> Result<()> {
        let (sender, batches) = sync_channel(1);
        scope.spawn(|| read_batches(&inputs, tokenizer.end_of_text(), sender));
        for batch in batches {
            let batch = batch?;
            read += batch.iter().map(|(_, piece)| piece.read).sum::<u64>();
            let encoded: Vec<Result<Encoded>> = batch.into_par_iter().map(|item| encoder.encode(item)).collect();
            for piece in encoded {
                writer.write(piece?)?;
            }
            progress(read.min(total), total);
        }
        Ok(())
    })?;
    progress(total, total);

    let (train, val) = writer.finish()?;
    ensure!(train.documents > 0, "no training data: every document is empty or went to validation");
    if val.documents == 0 && *val_fraction > 0.0 {
        let documents = train.documents;
        bail!(
            "no validation data: none of {documents} documents was chosen at --val-fraction {val_fraction}. \
             Raise it, or give the validation data as a file val.* beside train.* (0 = do without)"
        );
    }
    let meta = Meta::new(spec.name(), tokenizer.vocab(), tokenizer.end_of_text(), train, val);
    meta.write(&folder.path)?;
    folder.complete(out)?;
    Ok(meta)
}

/// A piece and the index of its input.
type Item = (usize, Piece);

/// Reads all inputs into batches. Stops at the first error, which it sends, and when nobody takes the batches any more.
fn read_batches(inputs: &[Input], end_of_text: u16, sender: SyncSender<Result<Vec<Item>>>) {
    let (mut batch, mut size) = (Vec::new(), 0);
    let items = inputs.iter().enumerate().flat_map(|(index, input)| {
        let pieces = input.open(end_of_text).unwrap_or_else(|error| Box::new(std::iter::once(Err(error))));
        pieces.map(move |piece| piece.map(|piece| (index, piece)))
    });
    for item in items {
        match item {
            Ok(item) => {
                size += item.1.size();
                batch.push(item);
            }
            Err(error) => {
                let _ = sender.send(Err(error)); // the receiver may have failed first
                return;
            }
        }
        if size >= BATCH_BYTES {
            size = 0;
            if sender.send(Ok(std::mem::take(&mut batch))).is_err() {
                return;
            }
        }
    }
    let _ = sender.send(Ok(batch));
}

/// Tokens of a piece, and what its document's other pieces need to know.
#[derive(Default)]
struct Encoded {
    /// A document starts here: it goes to this split.
    starts: Option<Split>,
    /// With the end of text where a document ends.
    tokens: Vec<u16>,
    bytes: u64,
}

struct Encoder<'a> {
    inputs: &'a [Input],
    tokenizer: &'a dyn Tokenizer,
    val_fraction: f64,
}

impl Encoder<'_> {
    fn encode(&self, (index, piece): Item) -> Result<Encoded> {
        let input = &self.inputs[index];
        let mut encoded = Encoded::default();
        match &piece.content {
            Content::Tokens(tokens) => {
                check_vocab(tokens, self.tokenizer.vocab(), &input.path, piece.position)?;
                let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
                self.start(input, &piece, &bytes, &mut encoded);
                encoded.tokens.extend_from_slice(tokens);
                encoded.bytes = bytes.len() as u64;
            }
            Content::Text(text) => self.encode_text(input, &piece, text, &mut encoded)?,
            Content::Json(line) => {
                let place =
                    || format!("{}: line {}: expected {{\"text\": \"...\"}}", input.path.display(), piece.position);
                let text: Cow<str> = jsonl::text(line).with_context(place)?;
                self.encode_text(input, &piece, &text, &mut encoded)?;
            }
        }
        let empty_document = piece.first && encoded.bytes == 0;
        if empty_document {
            return Ok(Encoded::default());
        }
        if piece.last {
            encoded.tokens.push(self.tokenizer.end_of_text());
        }
        Ok(encoded)
    }

    fn encode_text(&self, input: &Input, piece: &Piece, text: &str, encoded: &mut Encoded) -> Result<()> {
        self.start(input, piece, &text.as_bytes()[..text::first_part(text)], encoded);
        for part in text::parts(text) {
            self.tokenizer.encode(part, &mut encoded.tokens)?;
        }
        encoded.bytes = text.len() as u64;
        Ok(())
    }

    /// Assigns a document that starts with `part` to a split: that of its file, else val if the first 64 bits of the part's
    /// sha256, as a fraction of 2^64, are below `val_fraction`.
    fn start(&self, input: &Input, piece: &Piece, part: &[u8], encoded: &mut Encoded) {
        let by_hash = || {
            let hash = Sha256::digest(part);
            let fraction = hash[..8].iter().rev().fold(0.0, |low, &byte| (low + f64::from(byte)) / 256.0);
            if fraction < self.val_fraction { Split::Val } else { Split::Train }
        };
        encoded.starts = piece.first.then(|| input.split.unwrap_or_else(by_hash));
    }
}

/// Both splits as they are written.
struct Writer {
    train: (shard::Writer, SplitMeta),
    val: (shard::Writer, SplitMeta),
    /// Where the document goes that is being written.
    current: Split,
}

impl Writer {
    fn new(dir: &Path) -> Writer {
        let split = |split| (shard::Writer::new(dir, split, shard::TOKENS_PER_SHARD), SplitMeta::default());
        Writer { train: split(Split::Train), val: split(Split::Val), current: Split::Train }
    }

    fn write(&mut self, piece: Encoded) -> Result<()> {
        self.current = piece.starts.unwrap_or(self.current);
        let (writer, meta) = match self.current {
            Split::Train => &mut self.train,
            Split::Val => &mut self.val,
        };
        meta.documents += u64::from(piece.starts.is_some());
        meta.tokens += piece.tokens.len() as u64;
        meta.bytes += piece.bytes;
        writer.write(&piece.tokens)
    }

    fn finish(self) -> Result<(SplitMeta, SplitMeta)> {
        let (mut train, mut val) = (self.train.1, self.val.1);
        train.shards = self.train.0.finish()?;
        val.shards = self.val.0.finish()?;
        Ok((train, val))
    }
}

/// The folder `OUT.partial-PID`, which becomes `OUT` when all is written and is removed if that fails. A killed process
/// leaves it, under this name.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn create(out: &Path) -> Result<Partial> {
        let occupied = match fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => out.exists(),
        };
        ensure!(!occupied, "{} exists already: remove it or choose another --out", out.display());
        let name = out.file_name().ok_or_else(|| anyhow!("--out {}: not the name of a folder", out.display()))?;
        let mut partial = name.to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let path = out.with_file_name(partial);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Partial { path })
    }

    /// Everything in it must be on the disk.
    fn complete(self, out: &Path) -> Result<()> {
        let sync = |dir: &Path| fs::File::open(dir)?.sync_all();
        sync(&self.path)
            .and_then(|()| fs::rename(&self.path, out))
            .and_then(|()| sync(folder_of(out)))
            .with_context(|| format!("cannot rename {} to {}", self.path.display(), out.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path); // gone already if complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, inspect};
    use ::parquet::data_type::{ByteArray, ByteArrayType};
    use ::parquet::file::writer::SerializedFileWriter;
    use std::sync::Arc;
    use tempfile::{TempDir, tempdir};

    /// A folder `in` with these files.
    fn corpus(files: &[(&str, &str)]) -> TempDir {
        let dir = tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        for (name, content) in files {
            fs::write(dir.path().join("in").join(name), content).unwrap();
        }
        dir
    }

    /// Options to prepare `in` to `out`, as bytes.
    fn options(dir: &TempDir) -> Options {
        Options {
            inputs: vec![dir.path().join("in")],
            out: dir.path().join("out"),
            tokenizer: Spec::Bytes,
            val_fraction: 0.0,
            extensions: None,
        }
    }

    fn run(options: &Options) -> Meta {
        prepare(options, &mut |_, _| ()).unwrap()
    }

    fn error(options: &Options) -> String {
        let message = format!("{:#}", prepare(options, &mut |_, _| ()).expect_err("an error"));
        let parent = options.out.parent().unwrap();
        let names: Vec<_> = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().contains("partial")), "left behind: {names:?}");
        message
    }

    fn tokens(options: &Options, split: Split) -> Vec<u32> {
        let data = Dataset::open(&options.out, split).unwrap();
        let mut tokens = vec![0; data.len() as usize];
        data.read(0, &mut tokens).unwrap();
        tokens
    }

    fn write_parquet(path: &Path, texts: &[Option<&str>]) {
        let schema = "message m { required int64 id; optional binary text (UTF8); }";
        let schema = Arc::new(::parquet::schema::parser::parse_message_type(schema).unwrap());
        let mut file = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Default::default()).unwrap();
        let mut group = file.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..texts.len() as i64).collect();
        column.typed::<::parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = texts.iter().flatten().map(|&text| text.into()).collect();
        let levels: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        file.close().unwrap();
    }

    #[test]
    fn the_bytes_of_a_tiny_corpus() {
        let dir = corpus(&[("train.txt", "ab"), ("val.txt", "c")]);
        let meta = run(&options(&dir));
        let mut expected = vec![0u8; 1024];
        expected[..12].copy_from_slice(&[0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0]);
        expected.extend([b'a', 0, b'b', 0, 0, 1]);
        assert_eq!(fs::read(dir.path().join("out/train_000000.bin")).unwrap(), expected);
        assert_eq!((meta.train.tokens, meta.train.documents, meta.train.bytes), (3, 1, 2));
        assert_eq!((meta.val.tokens, meta.val.documents, meta.val.bytes), (2, 1, 1));
        assert_eq!(Meta::read(&options(&dir).out).unwrap(), Some(meta));
    }

    #[test]
    fn every_format_gives_documents_that_end() {
        let jsonl = "{\"id\": 1, \"text\": \"j\\u00e9\"}\n\n{\"text\": \"\"}\r\n{\"text\": \"k\", \"x\": [1]}";
        let dir = corpus(&[("a.md", "é"), ("b.jsonl", jsonl), ("c.txt", "")]);
        write_parquet(&dir.path().join("in/d.parquet"), &[Some("p"), None, Some("q")]);
        fs::write(dir.path().join("in/train.bin"), [b'n', 0, 0, 1, b'm', 0]).unwrap();
        let options = options(&dir);
        let meta = run(&options);
        assert_eq!(meta.train.documents, 7);
        let e = 256;
        let expected = [0xc3, 0xa9, e, 0x6a, 0xc3, 0xa9, e, 0x6b, e, 0x70, e, 0x71, e, 0x6e, e, 0x6d, e];
        assert_eq!(tokens(&options, Split::Train), expected);

        // Its own shards, prepared again, are the same dataset.
        let again = Options { inputs: vec![options.out.clone()], out: dir.path().join("again"), ..options.clone() };
        run(&again);
        assert_eq!(tokens(&again, Split::Train), expected);
        let other = Options { tokenizer: Spec::Gpt2, out: dir.path().join("other"), ..again };
        assert!(error(&other).contains("its tokens are of bytes"));
    }

    #[test]
    fn the_hash_of_a_document_decides_its_split() {
        let texts: Vec<String> = (0..400).map(|i| format!("document {i}")).collect();
        let lines: String = texts.iter().map(|text| format!("{{\"text\": \"{text}\"}}\n")).collect();
        let together = corpus(&[("a.jsonl", &lines)]);
        // The same documents as files, in another order.
        let apart = corpus(&[]);
        for (i, text) in texts.iter().enumerate() {
            fs::write(apart.path().join(format!("in/{:03}.txt", 999 - i)), text).unwrap();
        }

        let held_out = |dir: &TempDir| {
            let options = Options { val_fraction: 0.25, ..options(dir) };
            let meta = run(&options);
            assert_eq!(meta.train.documents + meta.val.documents, 400);
            let tokens = tokens(&options, Split::Val);
            let mut documents: Vec<_> = tokens.split_inclusive(|&token| token == 256).map(<[u32]>::to_vec).collect();
            documents.sort();
            documents
        };
        let documents = held_out(&together);
        assert!((60..140).contains(&documents.len()), "{}", documents.len());
        assert_eq!(documents, held_out(&apart));
    }

    #[test]
    fn threads_do_not_change_a_byte() {
        let line = |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("line {i}\\n").repeat(i % 7 * 400 + 1));
        let lines: String = (0..3000).map(line).collect();
        assert!(lines.len() > 2 * BATCH_BYTES);
        let dir = corpus(&[("a.jsonl", &lines), ("b.txt", &"a long text \n".repeat(100_000))]);
        let metas = [1, 5].map(|threads| {
            let out = dir.path().join(threads.to_string());
            let options = Options { out, val_fraction: 0.1, ..options(&dir) };
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(&options))
        });
        assert_eq!(metas[0], metas[1]); // checksums included
    }

    #[test]
    fn a_long_text_is_one_document() {
        let text = "No document\nends here. ".repeat(60_000);
        let dir = corpus(&[("long.txt", &text)]);
        let options = Options { tokenizer: Spec::Gpt2, ..options(&dir) };
        assert_eq!(run(&options).train.documents, 1);
        let mut expected = Vec::new();
        Spec::Gpt2.load().unwrap().encode(&text, &mut expected).unwrap();
        expected.push(50_256);
        assert!(tokens(&options, Split::Train).into_iter().eq(expected.into_iter().map(u32::from)));
    }

    #[test]
    fn a_tokenizer_json_goes_with_its_dataset() {
        let dir = corpus(&[("a.txt", "to be or not to be")]);
        let path = dir.path().join("mine.json");
        let json = r#"{"version":"1.0","added_tokens":[],"pre_tokenizer":{"type":"Whitespace"},"model":
            {"type":"WordLevel","unk_token":"?","vocab":{"?":0,"to":1,"be":2,"or":3,"</s>":4}}}"#;
        fs::write(&path, json).unwrap();
        let options = Options { tokenizer: Spec::File(path.clone()), ..options(&dir) };
        assert_eq!(run(&options).vocab, 5);
        assert_eq!(tokens(&options, Split::Train), [1, 2, 3, 0, 1, 2, 4]);
        fs::remove_file(path).unwrap();
        let report = inspect(&options.out).unwrap();
        assert!(report.contains("tokenizer.json, vocab 5") && report.contains("to be or"), "{report}");
    }

    #[test]
    fn inspect_finds_damage() {
        let dir = corpus(&[("a.txt", "hello")]);
        let options = options(&dir);
        run(&options);
        let shard = options.out.join("train_000000.bin");
        for path in [&options.out, &shard] {
            let report = inspect(path).unwrap();
            assert!(report.contains("6 tokens  1 ends of text  sha256 ok") && report.contains("hello"), "{report}");
        }
        let bytes = fs::read(&shard).unwrap();
        for (at, byte, expected) in [(1024, b'j', "damaged"), (1025, 2, "token 616 at position 0"), (4, 9, "version 9")]
        {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            fs::write(&shard, bytes).unwrap();
            let message = format!("{:#}", inspect(&options.out).unwrap_err());
            assert!(message.contains(expected) && message.contains("train_000000.bin"), "{message}");
        }
    }

    #[test]
    fn errors_name_the_place_and_leave_nothing() {
        let dir = corpus(&[("b.txt", "fine")]);
        let (good, file) = (options(&dir), |name: &str| dir.path().join(name));
        let with = |path: &Path| Options { inputs: vec![path.to_owned()], ..good.clone() };

        fs::write(file("a.jsonl"), "{\"text\": \"x\"}\n{\"txt\": 1}\n").unwrap();
        assert!(error(&with(&file("a.jsonl"))).contains("a.jsonl: line 2"));
        fs::write(file("a.parquet"), "not parquet").unwrap();
        assert!(error(&with(&file("a.parquet"))).contains("a.parquet"));
        fs::write(file("train.bin"), [1, 0, 2, 1]).unwrap();
        assert!(error(&with(&file("train.bin"))).contains("train.bin: token 258 at position 1"));
        fs::write(file("other.bin"), [1, 0, 2, 1]).unwrap();
        assert!(error(&with(&file("other.bin"))).contains("other.bin: magic"));
        fs::write(file("empty.txt"), "").unwrap();
        assert!(error(&with(&file("empty.txt"))).contains("no training data"));
        assert!(error(&Options { val_fraction: 1e-9, ..good.clone() }).contains("no validation data"));
        assert!(error(&Options { val_fraction: 1.0, ..good.clone() }).contains("--val-fraction 1"));
        assert!(!good.out.exists());
        run(&good);
        assert!(error(&good).contains("exists already"));
    }

    #[test]
    fn a_damaged_parquet_file_is_an_error() {
        let dir = corpus(&[]);
        let path = dir.path().join("in/d.parquet");
        write_parquet(&path, &[Some("p"), None, Some("q")]);
        let bytes = fs::read(&path).unwrap();
        let mut errors = 0;
        for i in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[i] ^= 0xff;
            fs::write(&path, bytes).unwrap();
            let input = Input { path: path.clone(), split: None };
            let result = input.open(256).and_then(|pieces| pieces.collect::<Result<Vec<_>>>());
            errors += usize::from(result.is_err());
        }
        assert!(errors > bytes.len() / 4, "{errors} of {}", bytes.len()); // and no panic
    }
}
