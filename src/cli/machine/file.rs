//! The machine file: TOML as written → checked [`Machine`].

use super::Sum;
use crate::config::nearest;
use crate::error::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use toml::{Table, Value};

/// What the model knows of a machine; docs/SCALING.md explains each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub name: String,
    /// Where the numbers come from.
    pub source: String,
    pub ranks_per_node: usize,
    /// φ: FLOP/s that a rank reaches in the forward and backward pass while all ranks of its node compute.
    pub flops: f64,
    /// φ₁: the same while the node's other ranks wait, from φ on: more where they share cores, memory or a clock. Left out, φ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_alone: Option<f64>,
    /// Bytes of memory a rank.
    pub memory: f64,
    /// Bytes/s at which a rank reads and writes it.
    pub memory_bandwidth: f64,
    /// ω: share of its speed that a sum keeps while the ranks compute: 0 = it waits, 1 = it costs computing nothing. Under 0, it
    /// waits and takes so much more of its time, as where the ranks share cores.
    pub overlap: f64,
    pub sum: Sum,
    /// Between two ranks of a node.
    pub within: Link,
    /// Between two ranks of different nodes.
    pub between: Link,
}

/// A connection between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// α, seconds.
    pub latency: f64,
    /// β, bytes/s in each direction.
    pub bandwidth: f64,
}

const KEYS: [&str; 10] =
    ["name", "source", "ranks_per_node", "flops", "memory", "memory_bandwidth", "overlap", "sum", "within", "between"];
/// What a file may leave out.
const OPTIONAL: [&str; 1] = ["flops_alone"];
const LINK_KEYS: [&str; 2] = ["latency", "bandwidth"];

impl Machine {
    /// Reads and checks the machine file at `path`.
    pub fn load(path: &Path) -> Result<Machine> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the machine file {}", path.display()))?;
        Machine::parse(&text).with_context(|| format!("in the machine file {}", path.display()))
    }

    /// As [`Machine::load`], from the text.
    pub fn parse(text: &str) -> Result<Machine> {
        let written: Table = toml::from_str(text)?;
        check_keys("", &written, &KEYS, &OPTIONAL)?;
        for link in ["within", "between"] {
            match &written[link] {
                Value::Table(table) => check_keys(&format!("{link}."), table, &LINK_KEYS, &[])?,
                other => bail!("{link} = {other}: expected a table, [{link}] with latency and bandwidth"),
            }
        }
        let machine: Machine = written.try_into()?;
        machine.check()?;
        Ok(machine)
    }

    fn check(&self) -> Result<()> {
        let positive = [
            ("flops", self.flops),
            ("memory", self.memory),
            ("memory_bandwidth", self.memory_bandwidth),
            ("within.latency", self.within.latency),
            ("within.bandwidth", self.within.bandwidth),
            ("between.latency", self.between.latency),
            ("between.bandwidth", self.between.bandwidth),
        ];
        for (key, value) in positive {
            ensure!(value > 0.0 && value.is_finite(), "{key} = {value}: expected a number over 0");
        }
        ensure!(self.ranks_per_node >= 1, "ranks_per_node = {}: expected at least 1", self.ranks_per_node);
        ensure!(self.overlap <= 1.0 && self.overlap.is_finite(), "overlap = {}: expected at most 1", self.overlap);
        let (flops, alone) = (self.flops, self.alone());
        ensure!(alone >= flops && alone.is_finite(), "flops_alone = {alone}: expected at least flops, {flops}");
        Ok(())
    }

    /// φ₁
    fn alone(&self) -> f64 {
        self.flops_alone.unwrap_or(self.flops)
    }

    /// φ(n) = min(φ₁, φ R/n): FLOP/s of a rank while n of its node's R ranks compute.
    pub fn speed(&self, computing: f64) -> f64 {
        self.alone().min(self.flops * self.ranks_per_node as f64 / computing)
    }

    /// Nodes, and ranks on each of them: as few nodes as hold `ranks`.
    pub fn shape(&self, ranks: usize) -> (usize, usize) {
        (ranks.div_ceil(self.ranks_per_node), ranks.min(self.ranks_per_node))
    }

    /// The slowest link between two of `ranks`.
    pub fn link(&self, ranks: usize) -> &Link {
        if self.shape(ranks).0 > 1 { &self.between } else { &self.within }
    }
}

/// Every key of `needed`, and no other but `optional` ones, is in `table`, whose keys have `prefix` before them in messages.
fn check_keys(prefix: &str, table: &Table, needed: &[&str], optional: &[&str]) -> Result<()> {
    let known = || needed.iter().chain(optional).copied();
    if let Some(key) = table.keys().find(|key| !known().any(|known| known == key.as_str())) {
        bail!("unknown key {prefix}{key}{}", nearest(key, known()));
    }
    if let Some(key) = needed.iter().find(|key| !table.contains_key(**key)) {
        bail!("{prefix}{key} is missing: a machine file gives it, see docs/SCALING.md");
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const TEXT: &str = "
name = 'test'
source = 'made up'
ranks_per_node = 4
flops = 1e12
memory = 1e9
memory_bandwidth = 1e10
overlap = 0.5
sum = 'open-mpi'
[within]
latency = 1e-6
bandwidth = 1e9
[between]
latency = 10e-6
bandwidth = 100e6
";

    pub fn machine() -> Machine {
        Machine::parse(TEXT).unwrap()
    }

    #[test]
    fn a_machine_reads_back_and_fills_nodes() {
        let machine = machine();
        assert_eq!(Machine::parse(&toml::to_string(&machine).unwrap()).unwrap(), machine);
        assert_eq!([1, 4, 5, 8].map(|ranks| machine.shape(ranks)), [(1, 1), (1, 4), (2, 4), (2, 4)]);
    }

    #[test]
    fn ranks_of_a_node_share_its_speed_up_to_that_of_one_alone() {
        let mut machine = machine();
        assert_eq!([1.0, 2.0, 4.0].map(|computing| machine.speed(computing)), [1e12; 3]);
        machine.flops_alone = Some(3e12);
        assert_eq!([1.0, 2.0, 4.0].map(|computing| machine.speed(computing)), [3e12, 2e12, 1e12]);
        assert_eq!(Machine::parse(&toml::to_string(&machine).unwrap()).unwrap(), machine);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, expected) in [
            ("flops", "flop", "unknown key flop; did you mean `flops`?"),
            ("latency = 1e-6", "latncy = 1e-6", "unknown key within.latncy; did you mean `latency`?"),
            ("overlap = 0.5\n", "", "overlap is missing"),
            ("overlap = 0.5", "overlap = 1.5", "overlap = 1.5: expected at most 1"),
            ("overlap", "flops_alone = 9e11\noverlap", "flops_alone = 900000000000: expected at least flops"),
            ("bandwidth = 100e6", "bandwidth = -1.0", "between.bandwidth = -1: expected a number over 0"),
            ("'open-mpi'", "'mpich'", "unknown variant `mpich`"),
            ("ranks_per_node = 4", "ranks_per_node = 0", "ranks_per_node = 0"),
        ] {
            let e = format!("{:#}", Machine::parse(&TEXT.replace(from, to)).unwrap_err());
            assert!(e.contains(expected), "{to}: {e}");
        }
    }
}
