//! A Hugging Face `tokenizer.json`.

use super::Tokenizer;
use crate::error::{Result, anyhow, bail, ensure};
use std::path::{Path, PathBuf};

/// Usual names of the token that ends a document, the most specific first.
const END_OF_TEXT: [&str; 6] = ["<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[EOS]"];

pub struct File {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    vocab: usize,
    end_of_text: u16,
}

impl File {
    pub fn load(path: &Path) -> Result<File> {
        let shown = path.display();
        let mut inner = tokenizers::Tokenizer::from_file(path)
            .map_err(|error| anyhow!("{shown}: not a readable tokenizer.json: {error}"))?;
        // Markers inside a text are text, and a long text is neither cut nor padded.
        inner.set_encode_special_tokens(true);
        inner.with_padding(None).with_truncation(None).map_err(|error| anyhow!("{shown}: {error}"))?;

        let vocab = inner.get_vocab(true).values().max().map_or(0, |&last| last as usize + 1);
        ensure!(vocab <= 65_536, "{shown}: {vocab} tokens, but shards hold uint16: at most 65,536");
        let Some(end_of_text) = END_OF_TEXT.iter().find_map(|name| inner.token_to_id(name)) else {
            bail!("{shown}: no end-of-text token: add one of {} to it", END_OF_TEXT.join(" "));
        };
        Ok(File { path: path.to_owned(), inner, vocab, end_of_text: end_of_text as u16 })
    }
}

impl Tokenizer for File {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn end_of_text(&self) -> u16 {
        self.end_of_text
    }

    fn encode(&self, text: &str, tokens: &mut Vec<u16>) -> Result<()> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|error| anyhow!("{}: {error}", self.path.display()))?;
        tokens.extend(encoding.get_ids().iter().map(|&token| token as u16)); // all < vocab ≤ 65,536
        Ok(())
    }

    fn decode(&self, tokens: &[u16]) -> Result<String> {
        let tokens: Vec<u32> = tokens.iter().copied().map(u32::from).collect();
        if let Some(token) = tokens.iter().find(|&&token| self.inner.id_to_token(token).is_none()) {
            bail!("{}: there is no token {token}", self.path.display());
        }
        self.inner.decode(&tokens, false).map_err(|error| anyhow!("{}: {error}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word-level tokenizer with the given vocabulary.
    fn write(dir: &Path, vocab: &str) -> PathBuf {
        let path = dir.join("tokenizer.json");
        let json = format!(
            r#"{{"version":"1.0","truncation":{{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}},
            "padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{{"type":"Whitespace"}},
            "post_processor":null,"decoder":null,"model":{{"type":"WordLevel","vocab":{{{vocab}}},"unk_token":"?"}}}}"#
        );
        std::fs::write(&path, json).unwrap();
        path
    }

    fn error(vocab: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        File::load(&write(dir.path(), vocab)).err().expect("an error").to_string()
    }

    #[test]
    fn reads_a_tokenizer_json() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::load(&write(dir.path(), r#""?":0,"a":1,"b":7,"</s>":3"#)).unwrap();
        assert_eq!((file.vocab(), file.end_of_text()), (8, 3));
        let mut tokens = Vec::new();
        file.encode("a b c a", &mut tokens).unwrap();
        assert_eq!(tokens, [1, 7, 0, 1], "not truncated");
        assert!(file.decode(&[5]).unwrap_err().to_string().contains("no token 5"));
    }

    #[test]
    fn refuses_what_a_shard_cannot_hold() {
        assert!(error(r#""?":0"#).contains("no end-of-text token"));
        assert!(error(r#""?":0,"</s>":65536"#).contains("65537 tokens"));
        assert!(File::load(Path::new("/nowhere.json")).err().unwrap().to_string().contains("/nowhere.json"));
    }
}
