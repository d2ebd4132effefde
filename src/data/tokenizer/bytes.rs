//! Bytes as tokens: 0..=255, and 256 ends a text.

use super::Tokenizer;
use crate::error::{Context, Result};

const END_OF_TEXT: u16 = 256;

pub struct Bytes;

impl Tokenizer for Bytes {
    fn vocab(&self) -> usize {
        END_OF_TEXT as usize + 1
    }

    fn end_of_text(&self) -> u16 {
        END_OF_TEXT
    }

    fn encode(&self, text: &str, tokens: &mut Vec<u16>) -> Result<()> {
        tokens.extend(text.bytes().map(u16::from));
        Ok(())
    }

    fn decode(&self, tokens: &[u16]) -> Result<String> {
        let mut bytes = Vec::with_capacity(tokens.len());
        for &token in tokens {
            match token {
                END_OF_TEXT => bytes.extend_from_slice(b"<|endoftext|>"),
                _ => bytes.push(u8::try_from(token).with_context(|| format!("token {token} is not a byte"))?),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}
