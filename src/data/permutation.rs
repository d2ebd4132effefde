//! A keyed permutation in O(1) memory.

/// Rounds of the Feistel network; 4 make it pseudorandom (Luby & Rackoff 1988), more serve small domains.
const ROUNDS: u64 = 8;

/// A permutation of [0, len), chosen by `key`.
///
/// A Feistel network (l, r) ← (r, l ⊕ f(r)) permutes pairs of h-bit halves whatever f is; with 4^h ≥ len it is repeated until
/// it lands in [0, len) (cycle walking; Black & Rogaway 2002): fewer than 4 times on average.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    len: u64,
    key: u64,
    half: u32,
}

impl Permutation {
    /// 0 < len ≤ 2^62.
    pub fn new(len: u64, key: u64) -> Permutation {
        let bits = u64::BITS - (len - 1).leading_zeros();
        Permutation { len, key, half: bits.div_ceil(2) }
    }

    /// Image of `index`, which is below `len`.
    pub fn apply(&self, index: u64) -> u64 {
        let mut image = self.feistel(index);
        while image >= self.len {
            image = self.feistel(image);
        }
        image
    }

    fn feistel(&self, x: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut l, mut r) = (x >> self.half, x & mask);
        for round in 0..ROUNDS {
            (l, r) = (r, l ^ (mix(mix(self.key, round), r) & mask));
        }
        l << self.half | r
    }
}

/// 64 well-mixed bits of (key, x): the finalizer of SplitMix64 (Steele, Lea & Flood 2014) over a Weyl step.
pub fn mix(key: u64, x: u64) -> u64 {
    let mut z = key.wrapping_add(x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_bijection(len in 1u64..5000, key: u64) {
            let permutation = Permutation::new(len, key);
            let mut images: Vec<u64> = (0..len).map(|i| permutation.apply(i)).collect();
            images.sort_unstable();
            prop_assert!(images.into_iter().eq(0..len));
        }

        #[test]
        fn it_stays_inside_large_domains(len in 1u64..(1 << 62), key: u64, index: u64) {
            prop_assert!(Permutation::new(len, key).apply(index % len) < len);
        }
    }

    #[test]
    fn it_shuffles() {
        // Over many keys each of the 6 orders of 3 things comes up 1 time in 6; standard deviation of a count: 41.
        let mut counts = std::collections::HashMap::new();
        for key in 0..12_000 {
            let p = Permutation::new(3, mix(7, key));
            *counts.entry([p.apply(0), p.apply(1), p.apply(2)]).or_insert(0i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (count - 2000).abs() < 200), "{counts:?}");
    }

    #[test]
    fn neighbours_part() {
        // |p(i+1) − p(i)| of a random permutation is len/3 on average.
        let len = 10_000;
        let p = Permutation::new(len, 1);
        let mean = (1..len).map(|i| p.apply(i).abs_diff(p.apply(i - 1)) as f64).sum::<f64>() / (len - 1) as f64;
        assert!((mean / len as f64 - 1.0 / 3.0).abs() < 0.02, "{mean}");
    }
}
