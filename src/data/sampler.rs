//! Which sequences a step reads.

use super::Dataset;
use super::permutation::{Permutation, mix};
use crate::error::{Result, ensure};
use std::ops::Range;

/// Sequences for the net, one after the other: `tokens` and `targets` are [count, context], and a target is the token that
/// follows its token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    pub tokens: Vec<u32>,
    pub targets: Vec<u32>,
}

/// Sequence number → window of the dataset, a pure function of (dataset, context, seed).
///
/// An epoch e cuts the dataset, from an offset o_e on, into M windows of `context` tokens, and visits each once in the order
/// of a permutation π_e; both are drawn from (seed, e):
///
/// ```text
/// M = ⌊(len − 1) / context⌋
/// sequence s:  e = ⌊s / M⌋,  w = π_e(s mod M),  tokens [o_e + w context, o_e + (w + 1) context]
/// ```
///
/// (the last token is only a target). All state is the number of sequences read so far: to resume, go on counting.
/// How many ranks share a batch does not matter: a rank reads its [`share`] of the numbers.
#[derive(Clone)]
pub struct Sampler {
    data: Dataset,
    context: usize,
    /// `None` reads in order.
    seed: Option<u64>,
    /// M.
    windows: u64,
}

impl Sampler {
    /// Shuffled without replacement, anew each epoch.
    ///
    /// # Errors
    /// The dataset has fewer than `context` + 1 tokens.
    pub fn new(data: &Dataset, context: usize, seed: u64) -> Result<Sampler> {
        Sampler::cut(data, context, Some(seed))
    }

    /// In order from the first token on, every epoch alike: for validation.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn in_order(data: &Dataset, context: usize) -> Result<Sampler> {
        Sampler::cut(data, context, None)
    }

    fn cut(data: &Dataset, context: usize, seed: Option<u64>) -> Result<Sampler> {
        let len = data.len();
        ensure!(context > 0, "a context of 0 tokens");
        ensure!(
            len > context as u64,
            "the dataset has {len} tokens, but a sequence of context {context} needs {}: \
             prepare more data or lower data.context",
            context + 1
        );
        Ok(Sampler { data: data.clone(), context, seed, windows: (len - 1) / context as u64 })
    }

    /// M: sequences in an epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// T: tokens in a sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Position in the dataset of the first token of sequence `s`.
    fn position(&self, s: u64) -> u64 {
        let (epoch, index) = (s / self.windows, s % self.windows);
        let context = self.context as u64;
        let Some(seed) = self.seed else { return index * context };
        let (key, slack) = (mix(seed, epoch), self.data.len() - 1 - self.windows * context);
        let offset = mix(key, 0) % (slack + 1);
        offset + Permutation::new(self.windows, key).apply(index) * context
    }

    /// Sequence `s`; `tokens` and `targets` hold `context` entries each.
    ///
    /// # Errors
    /// A token ≥ vocab.
    pub fn sequence(&self, s: u64, tokens: &mut [u32], targets: &mut [u32]) -> Result<()> {
        let (position, last) = (self.position(s), self.context - 1);
        self.data.read(position, tokens)?;
        targets[..last].copy_from_slice(&tokens[1..]);
        self.data.read(position + self.context as u64, &mut targets[last..])
    }

    /// Sequences `first` to `first + count - 1` into `batch`, which allocates only when it grows.
    ///
    /// # Errors
    /// As [`Sampler::sequence`].
    pub fn batch(&self, first: u64, count: usize, batch: &mut Batch) -> Result<()> {
        batch.tokens.resize(count * self.context, 0);
        batch.targets.resize(count * self.context, 0);
        let rows = batch.tokens.chunks_exact_mut(self.context).zip(batch.targets.chunks_exact_mut(self.context));
        for (s, (tokens, targets)) in (first..).zip(rows) {
            self.sequence(s, tokens, targets)?;
        }
        Ok(())
    }
}

/// The part of a batch of `batch` sequences that `rank` of `ranks` reads: contiguous, in rank order, sizes differ by at most 1.
pub fn share(batch: usize, rank: usize, ranks: usize) -> Range<usize> {
    batch * rank / ranks..batch * (rank + 1) / ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Split, shard};
    use proptest::prelude::*;

    /// The tokens 0..len, so that a token is its position, in shards of 400.
    fn counting(len: u16) -> Dataset {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = shard::Writer::new(dir.path(), Split::Train, 400);
        writer.write(&(0..len).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        Dataset::open(dir.path(), Split::Train).unwrap()
    }

    fn batch(sampler: &Sampler, first: u64, count: usize) -> Batch {
        let mut batch = Batch::default();
        sampler.batch(first, count, &mut batch).unwrap();
        batch
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn an_epoch_covers_every_window_once(len in 2u16..1500, context in 1usize..70, seed: u64, epoch in 0u64..4) {
            prop_assume!(len as usize > context);
            let sampler = Sampler::new(&counting(len), context, seed).unwrap();
            let m = sampler.windows();
            prop_assert_eq!(m, (len as u64 - 1) / context as u64);
            let Batch { tokens, targets } = batch(&sampler, epoch * m, m as usize);
            prop_assert!(tokens.iter().zip(&targets).all(|(token, target)| token + 1 == *target));
            let mut sorted = tokens;
            sorted.sort_unstable();
            let offset = sorted[0];
            prop_assert!(sorted.iter().copied().eq(offset..offset + m as u32 * context as u32));
            prop_assert!(offset as u64 + m * (context as u64) < len as u64);
        }

        #[test]
        fn shares_concatenate_to_the_batch(size in 1usize..40, ranks in 1usize..9, first in 0u64..1000) {
            let sampler = Sampler::new(&counting(500), 8, 3).unwrap();
            let mut joined = Batch::default();
            for rank in 0..ranks {
                let share = share(size, rank, ranks);
                let part = batch(&sampler, first + share.start as u64, share.len());
                joined.tokens.extend(part.tokens);
                joined.targets.extend(part.targets);
            }
            prop_assert_eq!(joined, batch(&sampler, first, size));
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat_exactly() {
        let data = counting(1000);
        let sampler = Sampler::new(&data, 10, 1).unwrap();
        let m = sampler.windows();
        let first = batch(&sampler, 0, m as usize);
        assert_eq!(first, batch(&Sampler::new(&data, 10, 1).unwrap(), 0, m as usize));
        assert_ne!(first, batch(&sampler, m, m as usize));
        assert_ne!(first, batch(&Sampler::new(&data, 10, 2).unwrap(), 0, m as usize));
    }

    /// A change of this order breaks resuming of old runs.
    #[test]
    fn the_order_is_fixed() {
        let sampler = Sampler::new(&counting(1000), 10, 1337).unwrap();
        let positions: Vec<u64> = (0..6).map(|s| sampler.position(s)).collect();
        assert_eq!(positions, [386, 366, 566, 636, 976, 486]);
    }

    #[test]
    fn validation_is_in_order() {
        let sampler = Sampler::in_order(&counting(205), 10).unwrap();
        assert_eq!(batch(&sampler, 0, 20).tokens, (0..200).collect::<Vec<_>>());
        assert_eq!(sampler.windows(), 20);
    }

    #[test]
    fn a_short_dataset_is_refused() {
        let data = counting(10);
        assert_eq!(Sampler::new(&data, 9, 0).unwrap().windows(), 1);
        let message = Sampler::new(&data, 10, 0).err().unwrap().to_string();
        assert!(message.contains("10 tokens") && message.contains("needs 11"), "{message}");
    }

    #[test]
    fn a_batch_keeps_its_memory() {
        let sampler = Sampler::new(&counting(500), 8, 3).unwrap();
        let mut batch = Batch::default();
        sampler.batch(0, 6, &mut batch).unwrap();
        let before = (batch.tokens.as_ptr(), batch.targets.as_ptr());
        sampler.batch(6, 4, &mut batch).unwrap();
        assert_eq!(batch.tokens.len(), 32);
        assert_eq!(before, (batch.tokens.as_ptr(), batch.targets.as_ptr()));
    }
}
