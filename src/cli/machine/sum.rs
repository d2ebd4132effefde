//! How long ranks take to sum a buffer: the α-β model of an all-reduce.
//!
//! A message of n bytes takes α + n/β: latency and bandwidth of a [`super::Link`]. Large ones are announced first.

use super::Machine;
use crate::comm::ring;
use serde::{Deserialize, Serialize};

/// How the library sums; the words of a machine file's `sum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sum {
    /// Open MPI's non-blocking all-reduce, which knows no nodes.
    OpenMpi,
    /// NCCL: a ring in each node; between nodes, each rank with its own share of the buffer, a ring or a tree, whichever is
    /// faster.
    Nccl,
}

/// A time of the form latencies · α + bytes / β.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub latencies: f64,
    pub bytes: f64,
}

/// From this size on Open MPI asks the receiver over TCP before it sends (`btl_tcp_eager_limit`): a message takes 3 α + n/β.
const OPEN_MPI_EAGER: f64 = 65_536.0;
/// Pieces in which a broadcast goes along a chain of ranks.
const OPEN_MPI_SEGMENT: f64 = 65_536.0;

impl Cost {
    /// Seconds on a link of this latency and bandwidth.
    pub fn seconds(self, link: &super::Link) -> f64 {
        self.latencies * link.latency + self.bytes / link.bandwidth
    }

    /// Open MPI's sum of `n` bytes over K ranks, with h(m) = 3 latencies for a message of m ≥ 64 KiB, else 1. Under 64 KiB, a
    /// binomial tree up and down, whose root has ⌈log₂ K⌉ children and whose depth is d = ⌊log₂ K⌋:
    ///
    /// ```text
    /// 2 d h(n) α + 2 ⌈log₂ K⌉ n/β
    /// ```
    ///
    /// else in a ring (see [`ring`]), 2 (K−1) (h(n/K) α + n/(Kβ)), or by halving and doubling (Rabenseifner) among k = 2ᵈ
    /// ranks, in rounds of n/2, n/4, ...: 2 Σ_i h(n/2ⁱ) α + 2 (k−1)/k n/β; if that is not all of them, (2 h(n/2) + h(n)) α + 2 n/β
    /// more for the others.
    pub fn open_mpi(n: f64, ranks: usize) -> Cost {
        let depth = ranks.ilog2() as i32;
        let asked = |bytes: f64| if bytes < OPEN_MPI_EAGER { 1.0 } else { 3.0 };
        if n < ring::LARGE as f64 {
            return Cost { latencies: 2.0 * f64::from(depth) * asked(n), bytes: 2.0 * log2_up(ranks) * n };
        }
        if ring::takes(n as usize, ranks) {
            let Cost { latencies, bytes } = Cost::ring(n, ranks);
            return Cost { latencies: latencies * asked(n / ranks as f64), bytes };
        }
        let rounds: f64 = (1..=depth).map(|round| asked(n / 2f64.powi(round))).sum();
        let (folded, k) = (!ranks.is_power_of_two(), 2f64.powi(depth));
        let fold = if folded { (2.0 * asked(n / 2.0) + asked(n), 2.0 * n) } else { (0.0, 0.0) };
        Cost { latencies: 2.0 * rounds + fold.0, bytes: 2.0 * (k - 1.0) / k * n + fold.1 }
    }

    /// A ring of K ranks: 2 (K−1) (α + n/(Kβ)).
    pub fn ring(n: f64, ranks: usize) -> Cost {
        let k = ranks as f64;
        Cost { latencies: 2.0 * (k - 1.0), bytes: 2.0 * (k - 1.0) / k * n }
    }

    /// Two trees, each for half of the buffer, in which every rank receives and sends all of it once up and once down, in
    /// pieces: 2 ⌈log₂ K⌉ α + 2 n/β.
    pub fn double_tree(n: f64, ranks: usize) -> Cost {
        Cost { latencies: 2.0 * log2_up(ranks), bytes: if ranks > 1 { 2.0 * n } else { 0.0 } }
    }
}

/// How long a sum takes, when several follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duration {
    /// Seconds in which no other sum moves.
    pub busy_s: f64,
    /// Seconds from then until the sum is there.
    pub tail_s: f64,
}

impl Duration {
    /// Of a sum alone.
    pub fn seconds(self) -> f64 {
        self.busy_s + self.tail_s
    }
}

impl std::ops::Mul<Duration> for f64 {
    type Output = Duration;

    fn mul(self, Duration { busy_s, tail_s }: Duration) -> Duration {
        Duration { busy_s: self * busy_s, tail_s: self * tail_s }
    }
}

impl Sum {
    /// How long it takes to sum `n` bytes over `ranks` ranks of `machine`, filled node by node. Open MPI's sums share the link, so
    /// that one's latencies pass while another sends; NCCL's are done one after another.
    pub fn duration(self, machine: &Machine, n: f64, ranks: usize) -> Duration {
        let (nodes, per_node) = machine.shape(ranks);
        match self {
            Sum::OpenMpi => {
                let (link, Cost { latencies, bytes }) = (machine.link(ranks), Cost::open_mpi(n, ranks));
                Duration { busy_s: bytes / link.bandwidth, tail_s: latencies * link.latency }
            }
            Sum::Nccl => {
                let share = n / per_node as f64;
                let [ring, tree] = [Cost::ring, Cost::double_tree].map(|of| of(share, nodes).seconds(&machine.between));
                let busy_s = Cost::ring(n, per_node).seconds(&machine.within) + ring.min(tree);
                Duration { busy_s, tail_s: 0.0 }
            }
        }
    }
}

impl Sum {
    /// Seconds to send `n` bytes from one rank to all: Open MPI's sends them from there to each of up to 4 ranks, and along a
    /// chain in pieces of 64 KiB to more; NCCL's along a ring in small pieces.
    pub fn broadcast_seconds(self, machine: &Machine, n: f64, ranks: usize) -> f64 {
        let others = ranks as f64 - 1.0;
        let cost = match self {
            _ if ranks == 1 => Cost { latencies: 0.0, bytes: 0.0 },
            Sum::OpenMpi if ranks <= 4 => Cost { latencies: 1.0, bytes: others * n },
            Sum::OpenMpi => Cost { latencies: others, bytes: n + (others - 1.0) * OPEN_MPI_SEGMENT.min(n) },
            Sum::Nccl => Cost { latencies: others, bytes: n },
        };
        cost.seconds(machine.link(ranks))
    }
}

/// ⌈log₂ K⌉
fn log2_up(ranks: usize) -> f64 {
    f64::from(ranks.next_power_of_two().trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::machine;
    use super::*;

    #[test]
    fn one_rank_sums_nothing() {
        for sum in [Sum::OpenMpi, Sum::Nccl] {
            assert_eq!(sum.duration(&machine(), 1e9, 1).seconds(), 0.0);
        }
    }

    #[test]
    fn a_broadcast_takes_at_least_its_bytes() {
        let seconds = |sum: Sum, ranks| sum.broadcast_seconds(&machine(), 1e6, ranks) * 1e6;
        assert_eq!(seconds(Sum::OpenMpi, 1), 0.0);
        assert!((seconds(Sum::OpenMpi, 4) - 3001.0).abs() < 1e-6);
        assert!((seconds(Sum::Nccl, 8) - 10_070.0).abs() < 1e-6);
    }

    /// α = 1 µs and β = 1 GB/s in a node of 4, 10 µs and 100 MB/s between nodes; 1 MB.
    #[test]
    fn times_are_those_of_the_formulas() {
        let duration = |sum: Sum, n, ranks| {
            let Duration { busy_s, tail_s } = sum.duration(&machine(), n, ranks);
            [busy_s * 1e6, tail_s * 1e6]
        };
        let near = |[a, b]: [f64; 2], [c, d]: [f64; 2]| {
            assert!((a - c).abs() < 1e-9 * c && (b - d).abs() <= 1e-9 * d, "{a}, {b} against {c}, {d}")
        };
        // Rings; the pieces of 33 kB of the second are not announced.
        near(duration(Sum::OpenMpi, 1e6, 2), [1000.0, 6.0]);
        near(duration(Sum::OpenMpi, 99e3, 3), [132.0, 4.0]);
        near(duration(Sum::OpenMpi, 1e6, 5), [16_000.0, 240.0]);
        near(duration(Sum::OpenMpi, 1e6, 4), [1500.0, 12.0]);
        near(duration(Sum::OpenMpi, 1e6, 8), [17_500.0, 180.0]);
        // 4 of 12 ranks are folded onto the others.
        near(duration(Sum::OpenMpi, 1e6, 12), [37_500.0, 270.0]);
        // Rounds of 50 and 25 kB; then the whole up and down a tree.
        near(duration(Sum::OpenMpi, 1e5, 4), [150.0, 4.0]);
        near(duration(Sum::OpenMpi, 1e3, 4), [4.0, 4.0]);
        near(duration(Sum::Nccl, 1e6, 4), [1506.0, 0.0]);
        // Two nodes: the ring of two moves half of what the tree does.
        near(duration(Sum::Nccl, 1e6, 8), [6.0 + 1500.0 + 2.0 * 10.0 + 2500.0, 0.0]);
        // Many nodes and little to sum: the tree.
        near(duration(Sum::Nccl, 4.0, 4 * 256), [6.0 + 6e-3 + 2.0 * 8.0 * 10.0 + 2e-2, 0.0]);
        assert_eq!(Cost::open_mpi(65_535.0, 8).bytes, 6.0 * 65_535.0);
    }
}
