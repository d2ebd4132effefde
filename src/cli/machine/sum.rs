//! How long ranks take to sum a buffer: the α-β model of an all-reduce.
//!
//! A message of n bytes takes α + n/β: latency and bandwidth of a [`super::Link`].

use super::Machine;
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

/// Under this size Open MPI sends the whole buffer up and down a tree.
const OPEN_MPI_SMALL: f64 = 65_536.0;

impl Cost {
    /// Seconds on a link of this latency and bandwidth.
    pub fn seconds(self, link: &super::Link) -> f64 {
        self.latencies * link.latency + self.bytes / link.bandwidth
    }

    /// Open MPI's sum of `n` bytes over K ranks. With under 4 ranks or 64 KiB, a binomial tree up and down:
    ///
    /// ```text
    /// 2 ⌈log₂ K⌉ (α + n/β)
    /// ```
    ///
    /// else halving and doubling (Rabenseifner): 2 ⌈log₂ K⌉ α + 2 (K−1)/K n/β.
    pub fn open_mpi(n: f64, ranks: usize) -> Cost {
        let (k, rounds) = (ranks as f64, 2.0 * log2_up(ranks));
        let tree = ranks < 4 || n < OPEN_MPI_SMALL;
        Cost { latencies: rounds, bytes: if tree { rounds * n } else { 2.0 * (k - 1.0) / k * n } }
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

impl Sum {
    /// Seconds to sum `n` bytes over `ranks` ranks of `machine`, filled node by node.
    pub fn seconds(self, machine: &Machine, n: f64, ranks: usize) -> f64 {
        let (nodes, per_node) = machine.shape(ranks);
        match self {
            Sum::OpenMpi => {
                Cost::open_mpi(n, ranks).seconds(if nodes > 1 { &machine.between } else { &machine.within })
            }
            Sum::Nccl => {
                let share = n / per_node as f64;
                let [ring, tree] = [Cost::ring, Cost::double_tree].map(|of| of(share, nodes).seconds(&machine.between));
                Cost::ring(n, per_node).seconds(&machine.within) + ring.min(tree)
            }
        }
    }
}

impl Sum {
    /// Seconds to send `n` bytes from one rank to all: Open MPI's sends them from there to each of up to 4 ranks, and along a
    /// chain in pieces of 64 KiB to more; NCCL's along a ring in small pieces.
    pub fn broadcast_seconds(self, machine: &Machine, n: f64, ranks: usize) -> f64 {
        let link = if machine.shape(ranks).0 > 1 { &machine.between } else { &machine.within };
        let others = ranks as f64 - 1.0;
        let cost = match self {
            _ if ranks == 1 => Cost { latencies: 0.0, bytes: 0.0 },
            Sum::OpenMpi if ranks <= 4 => Cost { latencies: 1.0, bytes: others * n },
            Sum::OpenMpi => Cost { latencies: others, bytes: n + (others - 1.0) * OPEN_MPI_SMALL.min(n) },
            Sum::Nccl => Cost { latencies: others, bytes: n },
        };
        cost.seconds(link)
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
            assert_eq!(sum.seconds(&machine(), 1e9, 1), 0.0);
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
        let seconds = |sum: Sum, ranks| sum.seconds(&machine(), 1e6, ranks) * 1e6;
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} against {b}");
        near(seconds(Sum::OpenMpi, 2), 2.0 * 1001.0);
        near(seconds(Sum::OpenMpi, 3), 4.0 * 1001.0);
        near(seconds(Sum::OpenMpi, 4), 4.0 + 1500.0);
        near(seconds(Sum::OpenMpi, 8), 6.0 * 10.0 + 1.75 * 10_000.0);
        near(seconds(Sum::Nccl, 4), 6.0 + 1500.0);
        // Two nodes: the ring of two moves half of what the tree does.
        near(seconds(Sum::Nccl, 8), 6.0 + 1500.0 + 2.0 * 10.0 + 2500.0);
        // Many nodes and little to sum: the tree.
        let small = Sum::Nccl.seconds(&machine(), 4.0, 4 * 256) * 1e6;
        near(small, 6.0 + 6e-3 + 2.0 * 8.0 * 10.0 + 2e-2);
        assert_eq!(Cost::open_mpi(65_535.0, 8).bytes, 6.0 * 65_535.0);
    }
}
