//! GPT-2's byte-level BPE, by tiktoken (which calls it r50k_base).

use super::{GPT2_VOCAB, Tokenizer};
use crate::error::{Context, Result};
use tiktoken_rs::CoreBPE;

const END_OF_TEXT: u16 = 50_256;

pub struct Gpt2(CoreBPE);

impl Gpt2 {
    pub fn load() -> Result<Gpt2> {
        Ok(Gpt2(tiktoken_rs::r50k_base().context("loading GPT-2's vocabulary")?))
    }
}

impl Tokenizer for Gpt2 {
    fn vocab(&self) -> usize {
        GPT2_VOCAB
    }

    fn end_of_text(&self) -> u16 {
        END_OF_TEXT
    }

    fn encode(&self, text: &str, tokens: &mut Vec<u16>) -> Result<()> {
        tokens.extend(self.0.encode_ordinary(text).into_iter().map(|token| token as u16)); // all < 50,257
        Ok(())
    }

    fn decode(&self, tokens: &[u16]) -> Result<String> {
        let tokens: Vec<u32> = tokens.iter().copied().map(u32::from).collect();
        Ok(String::from_utf8_lossy(&self.0.decode_bytes(&tokens)?).into_owned())
    }
}
