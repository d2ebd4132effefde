//! `vcycle bench machine`

use super::breakdown::breakdown;
use super::{FINE, PAPER, Subject, agreed_max, configure, median, profiled};
use crate::cli::machine::{Cost, Link, Machine};
use crate::cli::setting;
use crate::cli::text::{percent, seconds};
use crate::comm::{Communicator, Exchange, World};
use crate::error::{Context, Outcome, Result, bail, ensure};
use crate::model::Layout;
use crate::ops::matrix::{Factors, Mat, MatMut, multiply_parallel};
use crate::{optim, run};
use candle_core::{DType, Device, Tensor};
use std::fmt::Write;
use std::time::Instant;

/// Measure the numbers of a machine file on the ranks it is started on: mpirun -n 4 vcycle bench machine > machine.toml
///
/// On one node it measures the link within it, on several with one rank each the link between them; the other link is written with
/// the same figures, to be replaced. Speed and memory are those of training steps on all ranks at once, of the net of `bench
/// step`, and then of one rank while the others wait; give the shape of yours by --set.
#[derive(clap::Args)]
pub struct Args {
    /// Override a key of the benchmark's config.
    #[arg(long = "set", value_name = "TABLE.KEY=VALUE", value_parser = setting)]
    overrides: Vec<String>,
    /// Times that each thing is done; medians count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
}

/// f32 values of the sums that are timed: from the loss's to those of many buckets.
const VALUES: [usize; 6] = [6, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20];

/// What the numbers of a machine file follow from.
struct Measured {
    ranks: usize,
    ranks_per_node: usize,
    speed: Speed,
    overlap: f64,
    /// (bytes, seconds) of each sum.
    sums: Vec<(f64, f64)>,
    link: Link,
}

/// Of a rank in training steps.
struct Speed {
    /// FLOP/s in the forward and backward pass, while all compute.
    flops: f64,
    /// The same of one rank while all others wait; not less, but for the clock's noise.
    flops_alone: f64,
    /// Bytes/s of the update, while all do theirs.
    memory_bandwidth: f64,
}

/// Collective.
pub fn run(args: &Args, world: &mut World) -> Result<Outcome> {
    let (ranks, local) = (world.size(), world.local_size());
    ensure!(ranks >= 2, "a link needs two ranks at least: start it as in mpirun -n 2 vcycle bench machine");
    let one_each = agreed_max(world.communicator(), local as f64)? == 1.0;
    ensure!(
        local == ranks || one_each,
        "{ranks} ranks, {local} of them on this node: start it on one node, or on several with one rank each, so that one link is measured"
    );
    let overrides = PAPER.iter().copied().chain(args.overrides.iter().map(String::as_str));
    let prepared = configure(overrides).and_then(|prepared| {
        run::use_threads(prepared.0.parallel.threads, local)?;
        let subject = Subject::new(prepared)?;
        ensure!(
            subject.learner.device().is_cpu(),
            "this measures CPUs and Open MPI: set parallel.device = \"cpu\", or write the file of a machine with GPUs by hand, \
             after machines/h100-nodes.toml, from `vcycle bench step` and `vcycle bench allreduce`"
        );
        Ok(subject)
    });
    let mut subject = world.agree(prepared)?;
    let speed = speed(&mut subject, world.communicator(), args.times)?;
    let sums = sums(world.communicator(), args.times)?;
    let link = fit(&sums, ranks);
    let overlap = overlap(world.communicator(), args.times)?;
    if world.rank() == 0 {
        let measured = Measured { ranks, ranks_per_node: local, speed, overlap, sums, link };
        print!("{}", measured.text()?);
    }
    // Ranks that exit while others still work would end them.
    world.communicator().barrier()?;
    Ok(Outcome::Done)
}

/// Of the median step; while all compute, the slowest rank's.
fn speed(subject: &mut Subject, comm: &mut dyn Communicator, times: u32) -> Result<Speed> {
    subject.warm_up(FINE)?;
    let (mut passes, mut updates, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..times {
        comm.barrier()?;
        let (pass_s, update_s) = timed_step(subject)?;
        passes.push(agreed_max(comm, pass_s)?);
        updates.push(agreed_max(comm, update_s)?);
        let pass_s = if comm.rank() == 0 { timed_step(subject)?.0 } else { 0.0 };
        alone.push(agreed_max(comm, pass_s)?);
    }
    let spec = subject.learner.spec();
    let moments = optim::new(&subject.config.optimizer).moments().len();
    let parameters = spec.depth * Layout::block(spec).len() + Layout::ends(spec).len();
    // As the forecast counts them.
    let bytes = (4 * (5 + 2 * moments) * parameters) as f64;
    let flops = subject.flops() / median(passes);
    let flops_alone = (subject.flops() / median(alone)).max(flops);
    Ok(Speed { flops, flops_alone, memory_bandwidth: bytes / median(updates) })
}

/// Seconds of the forward and backward pass, and of the update.
fn timed_step(subject: &mut Subject) -> Result<(f64, f64)> {
    let device = subject.learner.device().clone();
    let (step_s, entries) = profiled(&device, || subject.step(FINE))?;
    let parts = breakdown(&subject.config, subject.learner.spec(), step_s, &entries);
    let update = parts.iter().filter(|part| ["optimizer", "gradient norm"].contains(&part.part));
    let update_s: f64 = update.map(|part| part.seconds).sum();
    Ok((step_s - update_s, update_s))
}

/// (bytes, seconds) of the sums of [`VALUES`] over all ranks; the slowest rank's.
fn sums(comm: &mut dyn Communicator, times: u32) -> Result<Vec<(f64, f64)>> {
    let mut measured = Vec::new();
    for values in VALUES {
        let mut taken = Vec::new();
        // The first opens connections and faults in the buffers.
        for time in 0..=times {
            let own = sum(comm, values)?;
            let slowest = agreed_max(comm, own)?;
            taken.extend((time > 0).then_some(slowest));
        }
        measured.push((4.0 * values as f64, median(taken)));
    }
    Ok(measured)
}

/// One part of one tensor.
fn ones(values: usize) -> Result<Vec<Vec<Tensor>>> {
    Ok(vec![vec![Tensor::ones(values, DType::F32, &Device::Cpu)?]])
}

/// Seconds of one sum, the mean of some in a row: ranks leave the barrier up to some latencies apart.
fn sum(comm: &mut dyn Communicator, values: usize) -> Result<f64> {
    const IN_A_ROW: u32 = 4;
    let data = ones(values)?;
    comm.barrier()?;
    let start = Instant::now();
    for _ in 0..IN_A_ROW {
        let ticket = comm.start(Exchange::Sum, data.clone())?;
        comm.wait(ticket)?;
    }
    Ok((start.elapsed() / IN_A_ROW).as_secs_f64())
}

/// α and 1/β that minimise Σ ((a α + b/β) / t − 1)² over sums that cost a latencies and b bytes and took t.
fn fit(sums: &[(f64, f64)], ranks: usize) -> Link {
    let (mut aa, mut ab, mut bb, mut a1, mut b1) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for &(n, t) in sums {
        let Cost { latencies, bytes } = Cost::open_mpi(n, ranks);
        let (a, b) = (latencies / t, bytes / t);
        (aa, ab, bb, a1, b1) = (aa + a * a, ab + a * b, bb + b * b, a1 + a, b1 + b);
    }
    let determinant = aa * bb - ab * ab;
    let latency = ((a1 * bb - b1 * ab) / determinant).max(1e-9);
    let per_byte = ((b1 * aa - a1 * ab) / determinant).max(1e-15);
    Link { latency, bandwidth: 1.0 / per_byte }
}

/// What a sum that runs beside computing costs less than after it, as a share of its own time; under 0, more. The computing is
/// matrix products of about as long, between which the sum is moved on, as a backward pass does after each block.
fn overlap(comm: &mut dyn Communicator, times: u32) -> Result<f64> {
    const VALUES: usize = 1 << 20;
    let alone = |comm: &mut dyn Communicator| -> Result<f64> {
        let own = sum(comm, VALUES)?;
        agreed_max(comm, own)
    };
    let mut work = Work::new();
    let target = alone(comm)?;
    let products = (target / work.seconds(4) * 4.0).ceil().max(1.0);
    let products = agreed_max(comm, products)? as usize;
    let mut shares = Vec::new();
    for _ in 0..times {
        let sum_s = alone(comm)?;
        comm.barrier()?;
        let compute_s = agreed_max(comm, work.seconds(products))?;
        let data = ones(VALUES)?;
        comm.barrier()?;
        let start = Instant::now();
        let ticket = comm.start(Exchange::Sum, data)?;
        for _ in 0..products {
            work.seconds(1);
            comm.progress()?;
        }
        comm.wait(ticket)?;
        let both_s = agreed_max(comm, start.elapsed().as_secs_f64())?;
        shares.push(((sum_s + compute_s - both_s) / sum_s.min(compute_s)).min(1.0));
    }
    Ok(median(shares))
}

/// Matrix products of the size of a small block's.
struct Work {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Work {
    const SIZE: usize = 256;

    fn new() -> Work {
        let matrix = || vec![0.5; Work::SIZE * Work::SIZE];
        Work { a: matrix(), b: matrix(), c: matrix() }
    }

    fn seconds(&mut self, products: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..products {
            let (a, b) = (Mat::new(&self.a, Work::SIZE), Mat::new(&self.b, Work::SIZE));
            multiply_parallel(Factors::Exact, 1.0, a, b, 0.0, MatMut::new(&mut self.c, Work::SIZE));
        }
        start.elapsed().as_secs_f64()
    }
}

impl Measured {
    /// The machine file, with what was measured as comments.
    fn text(&self) -> Result<String> {
        let Measured { ranks, ranks_per_node, speed, overlap, sums, link } = self;
        let Speed { flops, flops_alone, memory_bandwidth } = speed;
        let between = *ranks_per_node == 1;
        let mut out = format!("# Written by `vcycle bench machine` on {ranks} ranks, {ranks_per_node} on a node.\n");
        for &(n, t) in sums {
            let fitted = Cost::open_mpi(n, *ranks).seconds(link);
            let (kibi, off) = (n / 1024.0, percent(fitted / t - 1.0));
            let _ = writeln!(
                out,
                "# a sum of {kibi:.3} KiB: {} measured, {} by the fit ({off})",
                seconds(t),
                seconds(fitted)
            );
        }
        let (measured, copied) = if between { ("between", "within") } else { ("within", "between") };
        let _ = writeln!(out, "# The link [{measured}] was measured, [{copied}] is a copy of it: replace it.\n");
        let cpu = run::cpu_model().unwrap_or_else(|| "unknown CPU".to_owned());
        let memory = memory()? as f64 / *ranks_per_node as f64;
        let Link { latency, bandwidth } = link;
        out += &format!(
            "name = {:?}\nsource = \"vcycle bench machine, {ranks} ranks\"\nranks_per_node = {ranks_per_node}\nflops = {flops:.3e}\n\
             flops_alone = {flops_alone:.3e}\nmemory = {memory:.3e}\nmemory_bandwidth = {memory_bandwidth:.3e}\noverlap = {overlap:.2}\nsum = \"open-mpi\"\n",
            format!("{cpu}, {ranks_per_node} ranks a node"),
        );
        for name in ["within", "between"] {
            let _ = writeln!(out, "\n[{name}]\nlatency = {latency:.3e}\nbandwidth = {bandwidth:.3e}");
        }
        Machine::parse(&out)?;
        Ok(out)
    }
}

/// Bytes of this node's memory.
fn memory() -> Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    match line.trim().trim_end_matches(" kB").parse::<u64>() {
        Ok(kibi) => Ok(kibi << 10),
        Err(_) => bail!("/proc/meminfo has no MemTotal in kB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;

    #[test]
    fn the_fit_finds_the_link_that_made_the_times() {
        let link = Link { latency: 20e-6, bandwidth: 125e6 };
        for ranks in [2, 3, 4, 8, 12] {
            let times: Vec<(f64, f64)> =
                VALUES.map(|v| 4.0 * v as f64).map(|n| (n, Cost::open_mpi(n, ranks).seconds(&link))).to_vec();
            let found = fit(&times, ranks);
            let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} against {b}");
            near(found.latency, link.latency);
            near(found.bandwidth, link.bandwidth);
        }
    }

    #[test]
    fn what_is_written_is_a_machine_file() {
        let link = Link { latency: 1.5e-5, bandwidth: 1.25e8 };
        let measured = |ranks_per_node| {
            let sums = vec![(24.0, 1e-4), (4194304.0, 0.05)];
            let speed = Speed { flops: 3e10, flops_alone: 4e10, memory_bandwidth: 4e9 };
            Measured { ranks: 2, ranks_per_node, speed, overlap: -0.5, sums, link }
        };
        for (ranks_per_node, expected) in [(1, "[between] was measured"), (2, "[within] was measured")] {
            let text = measured(ranks_per_node).text().unwrap();
            assert!(text.contains(expected) && text.contains("# a sum of 4096.000 KiB: 50.0 ms measured"), "{text}");
            assert_eq!(Machine::parse(&text).unwrap().between, link);
        }
    }

    #[test]
    fn sums_and_their_overlap_are_timed_alike_on_all_ranks() {
        let measured = thread::run(2, |comm| (sums(comm, 1).unwrap(), overlap(comm, 1).unwrap()));
        assert_eq!(measured[0], measured[1]);
        let (sums, overlap) = &measured[0];
        assert!(sums.iter().all(|&(_, t)| t > 0.0) && overlap.is_finite() && *overlap <= 1.0);
    }
}
