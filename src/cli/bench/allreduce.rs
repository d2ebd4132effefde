//! `vcycle bench allreduce`

use super::{Common, configure, joined, median, slowest};
use crate::cli::text::{seconds, table};
use crate::comm::{Communicator, Exchange, World};
use crate::error::{Outcome, Result};
use crate::run;
use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use std::io::Write;

/// Time of sums over the ranks by size, as gradients are summed: mpirun -n 4 vcycle bench allreduce
///
/// By NCCL where the ranks have GPUs (--set parallel.device=cuda), else by MPI. Bus bandwidth is what each rank sends and receives in
/// a ring, 2 (K-1)/K of the bytes, over the time, as in NVIDIA's nccl-tests: it is to be held against the link's.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Times that each sum is done; medians count.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
    /// The largest sum, in MiB; the smallest has 4 KiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_mib: u32,
}

/// What is printed; field names are those of `--json`.
#[derive(Serialize)]
struct Report {
    ranks: usize,
    /// `gpu`: by NCCL; `cpu`: by MPI.
    device: &'static str,
    sums: Vec<Timed>,
}

/// A sum of f32 values, each rank's in place.
#[derive(Serialize)]
struct Timed {
    bytes: usize,
    /// The slowest rank's, the median of all times.
    seconds: f64,
    /// Bytes over seconds.
    bytes_per_s: f64,
    bus_bytes_per_s: f64,
}

/// Collective.
pub fn run(args: &Args, world: &mut World) -> Result<Outcome> {
    let device =
        configure(args.common.overrides.iter().map(String::as_str)).and_then(|(config, _)| run::device(&config));
    let device = world.agree(device)?;
    let report = joined(world, &device, |comm| {
        let report = Report::measure(comm, &device, sizes(args.max_mib), args.times)?;
        // Ranks that exit while others still work would end them.
        comm.barrier()?;
        Ok(report)
    })?;
    if world.rank() == 0 {
        let text = if args.common.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
        std::io::stdout().write_all(text.as_bytes())?;
    }
    Ok(Outcome::Done)
}

/// 4 KiB and four times as much each, to `max_mib`; that too.
fn sizes(max_mib: u32) -> impl Iterator<Item = usize> {
    let most = (max_mib as usize) << 20;
    std::iter::successors(Some(4 << 10), move |&size| (size < most).then_some((4 * size).min(most)))
}

fn size(bytes: usize) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes >> 10) } else { format!("{} MiB", bytes >> 20) }
}

/// Seconds that the sum of `values` takes the slowest rank.
fn sum(comm: &mut dyn Communicator, values: &Tensor) -> Result<f64> {
    values.device().synchronize()?;
    slowest(comm, |comm| {
        let ticket = comm.start(Exchange::Sum, vec![vec![values.clone()]])?;
        comm.wait(ticket)
    })
}

impl Report {
    fn measure(
        comm: &mut dyn Communicator,
        device: &Device,
        sizes: impl Iterator<Item = usize>,
        times: u32,
    ) -> Result<Report> {
        let ranks = comm.size();
        let on_bus = 2.0 * (ranks - 1) as f64 / ranks as f64;
        let mut sums = Vec::new();
        for bytes in sizes {
            let values = Tensor::zeros(bytes / size_of::<f32>(), DType::F32, device)?;
            // The first opens connections and faults in the buffers.
            sum(comm, &values)?;
            let seconds = median((0..times).map(|_| sum(comm, &values)).collect::<Result<Vec<_>>>()?);
            let bytes_per_s = bytes as f64 / seconds;
            sums.push(Timed { bytes, seconds, bytes_per_s, bus_bytes_per_s: on_bus * bytes_per_s });
        }
        Ok(Report { ranks, device: if device.is_cpu() { "cpu" } else { "gpu" }, sums })
    }

    fn text(&self) -> String {
        let giga = |bytes_per_s: f64| format!("{:.3}", bytes_per_s / 1e9);
        let mut lines = vec![["f32 values", "time", "GB/s", "GB/s on the bus"].map(str::to_owned)];
        lines.extend(
            self.sums
                .iter()
                .map(|sum| [size(sum.bytes), seconds(sum.seconds), giga(sum.bytes_per_s), giga(sum.bus_bytes_per_s)]),
        );
        let by = if self.device == "gpu" { "GPUs, by NCCL" } else { "CPUs, by MPI" };
        format!("sums over {} ranks on {by}\n\n{}", self.ranks, table(&lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;

    #[test]
    fn sizes_end_at_the_largest() {
        let mebi = 1 << 20;
        assert_eq!(sizes(1).collect::<Vec<_>>(), [4 << 10, 16 << 10, 64 << 10, 256 << 10, mebi]);
        assert_eq!(sizes(3).last(), Some(3 * mebi));
    }

    #[test]
    fn ranks_time_the_same_sums() {
        let measured = thread::run(3, |comm| {
            let report = Report::measure(comm, &Device::Cpu, [4096, 8192].into_iter(), 2).unwrap();
            report
                .sums
                .into_iter()
                .map(|sum| (sum.bytes, sum.seconds, sum.bytes_per_s, sum.bus_bytes_per_s))
                .collect::<Vec<_>>()
        });
        assert!(measured[0] == measured[1] && measured[0] == measured[2]);
        for &(bytes, seconds, bytes_per_s, bus) in &measured[0] {
            assert!(
                seconds > 0.0 && bytes_per_s == bytes as f64 / seconds && (bus / bytes_per_s - 4.0 / 3.0).abs() < 1e-12
            );
        }
    }
}
