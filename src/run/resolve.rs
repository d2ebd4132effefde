//! The one default that depends on the data: the vocabulary.

use crate::config::Config;
use crate::data::{Dataset, Split};
use crate::error::{Result, ensure};

/// Rows of the embedding are padded to a multiple of this; GEMMs like round shapes.
const VOCAB_MULTIPLE: usize = 64;

/// Fills `model.vocab` from the data: its vocabulary, padded. A given one must hold every token.
pub fn resolve_vocab(config: &mut Config) -> Result<()> {
    let needed = match config.model.vocab {
        Some(_) if !config.data.dir.exists() => return Ok(()),
        _ => Dataset::open(&config.data.dir, Split::Train)?.vocab(),
    };
    let vocab = *config.model.vocab.get_or_insert(needed.next_multiple_of(VOCAB_MULTIPLE));
    ensure!(
        vocab >= needed,
        "model.vocab = {vocab} is too small: the data in {} has {needed} different tokens",
        config.data.dir.display()
    );
    Ok(())
}
