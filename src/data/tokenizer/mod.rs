//! Tokenizers: text → token numbers below 65,536 (a shard holds uint16) and back.

mod bytes;
mod file;
mod gpt2;

use crate::error::{Error, Result, bail};
use std::path::{Path, PathBuf};

/// Vocabulary of GPT-2, and of shards that say nothing else.
pub const GPT2_VOCAB: usize = 50_257;

/// Name under which a dataset keeps its Hugging Face tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Text → tokens and back. No marker in a text is special: only [`Tokenizer::end_of_text`], which is added
/// to a document by whoever writes it, ends one.
pub trait Tokenizer: Send + Sync {
    /// Number of tokens, end of text included; at most 65,536.
    fn vocab(&self) -> usize;
    /// The token that ends every document.
    fn end_of_text(&self) -> u16;
    /// Appends the tokens of `text`.
    fn encode(&self, text: &str, tokens: &mut Vec<u16>) -> Result<()>;
    /// Text of `tokens`, for people to read; what is not UTF-8 becomes U+FFFD. Fails on a token that does not exist.
    fn decode(&self, tokens: &[u16]) -> Result<String>;
}

/// Which tokenizer: `gpt2`, `bytes` or the path of a Hugging Face `tokenizer.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    Gpt2,
    Bytes,
    File(PathBuf),
}

impl std::str::FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Spec> {
        Ok(match text {
            "gpt2" => Spec::Gpt2,
            "bytes" => Spec::Bytes,
            _ if text.ends_with(".json") => Spec::File(text.into()),
            _ => bail!("unknown tokenizer `{text}`: expected gpt2, bytes or the path of a tokenizer.json"),
        })
    }
}

impl Spec {
    /// The tokenizer that a dataset in `dir` calls `name` in its `meta.json`.
    pub fn of_dataset(dir: &Path, name: &str) -> Result<Spec> {
        let spec = name.parse()?;
        Ok(if let Spec::File(file) = spec { Spec::File(dir.join(file)) } else { spec })
    }

    /// Name in `meta.json`.
    pub fn name(&self) -> &'static str {
        match self {
            Spec::Gpt2 => "gpt2",
            Spec::Bytes => "bytes",
            Spec::File(_) => TOKENIZER_FILE,
        }
    }

    pub fn load(&self) -> Result<Box<dyn Tokenizer>> {
        Ok(match self {
            Spec::Gpt2 => Box::new(gpt2::Gpt2::load()?),
            Spec::Bytes => Box::new(bytes::Bytes),
            Spec::File(path) => Box::new(file::File::load(path)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(spec: &Spec, text: &str) -> Vec<u16> {
        let mut tokens = Vec::new();
        spec.load().unwrap().encode(text, &mut tokens).unwrap();
        tokens
    }

    #[test]
    fn every_tokenizer_gives_its_text_back() {
        let text = "Größe 中文 \u{1F980}\r\n\t  x <|endoftext|> 'll 123";
        for spec in [Spec::Gpt2, Spec::Bytes] {
            let tokenizer = spec.load().unwrap();
            let tokens = encode(&spec, text);
            assert!(!tokens.contains(&tokenizer.end_of_text()), "{spec:?}: a text cannot end a document");
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text, "{spec:?}");
            assert_eq!(tokenizer.vocab(), tokenizer.end_of_text() as usize + 1);
            assert!(tokenizer.decode(&[60_000]).is_err(), "{spec:?}");
        }
    }

    #[test]
    fn gpt2_is_openais() {
        // The example of OpenAI's tiktoken and of Hugging Face's GPT2Tokenizer.
        assert_eq!(encode(&Spec::Gpt2, "Hello world"), [15496, 995]);
        assert_eq!(encode(&Spec::Gpt2, "tiktoken is great!"), [83, 1134, 30001, 318, 1049, 0]);
    }

    #[test]
    fn bytes_are_bytes() {
        assert_eq!(encode(&Spec::Bytes, "aé"), [97, 0xc3, 0xa9]);
    }

    #[test]
    fn an_unknown_name_is_refused() {
        let message = "gpt3".parse::<Spec>().unwrap_err().to_string();
        assert!(message.contains("gpt3") && message.contains("tokenizer.json"), "{message}");
    }
}
