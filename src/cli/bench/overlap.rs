//! `vcycle bench overlap`

use super::{Common, FINE, PAPER, Subject, agreed_max, configure, joined, median, slowest};
use crate::cli::text::{percent, seconds};
use crate::comm::{Buckets, Communicator, World};
use crate::data::share;
use crate::error::{Outcome, Result};
use crate::run::{self, Ends, Learner, Receivers};
use serde::Serialize;
use std::io::Write;

/// How much of the gradient's sums over the ranks a backward pass hides: mpirun -n 4 vcycle bench overlap
///
/// Times, in turn, the gradient of each rank's share without any sum, the sums of such a gradient with nothing to compute, and
/// both as a training step does them, of the net of `bench step`. Exposed is what the rank that waits least waits for sums after
/// its backward pass; hidden is 1 - exposed / sums.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Times that each is done; medians count.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    times: u32,
}

/// What is printed; field names are those of `--json`. Seconds are medians, but for `exposed_s` of the slowest rank's.
#[derive(Serialize)]
struct Report {
    ranks: usize,
    /// Of one rank's gradient.
    bytes: usize,
    compute_s: f64,
    sums_s: f64,
    both_s: f64,
    exposed_s: f64,
    /// Share of `sums_s`.
    hidden: f64,
}

/// Collective.
pub fn run(args: &Args, world: &mut World) -> Result<Outcome> {
    let overrides = PAPER.iter().copied().chain(args.common.overrides.iter().map(String::as_str));
    let prepared = configure(overrides).and_then(|prepared| {
        run::use_threads(prepared.0.parallel.threads, world.local_size())?;
        Subject::new(prepared)
    });
    let mut subject = world.agree(prepared)?;
    let device = subject.learner.device().clone();
    joined(world, &device, |comm| measure(args, &mut subject, comm))?;
    Ok(Outcome::Done)
}

/// Collective.
fn measure(args: &Args, subject: &mut Subject, comm: &mut dyn Communicator) -> Result<()> {
    let mut buckets = Buckets::default();
    let mut times: [Vec<f64>; 4] = Default::default();
    // The first opens connections and faults in the memory.
    for time in 0..=args.times {
        let compute_s = slowest(comm, |comm| gradient(subject, comm, false))?;
        let sums_s = slowest(comm, |comm| sum(subject, &mut buckets, comm))?;
        let before = subject.learner.differentiator.exposed_seconds();
        let both_s = slowest(comm, |comm| gradient(subject, comm, true))?;
        let exposed_s = -agreed_max(comm, before - subject.learner.differentiator.exposed_seconds())?;
        if time > 0 {
            times.iter_mut().zip([compute_s, sums_s, both_s, exposed_s]).for_each(|(all, one)| all.push(one));
        }
    }
    if comm.rank() == 0 {
        let report = Report::new(subject, comm.size(), times.map(median));
        let text = if args.common.json { serde_json::to_string(&report)? + "\n" } else { report.text() };
        std::io::stdout().write_all(text.as_bytes())?;
    }
    // Ranks that exit while others still work would end them.
    comm.barrier()
}

/// The gradient of this rank's share of a global batch; with `summed`, the sum over all ranks.
fn gradient(subject: &mut Subject, comm: &mut dyn Communicator, summed: bool) -> Result<()> {
    let Subject { config, learner, comm: solo, .. } = subject;
    let batch = config.data.batch;
    let own = share(batch, comm.rank(), comm.size()).len();
    let (comm, sequences): (&mut dyn Communicator, usize) = if summed { (comm, batch) } else { (solo, own) };
    let Learner { differentiator, hierarchy, .. } = learner;
    differentiator.gradient(comm, hierarchy, FINE, 0, sequences, Ends::Sum, Receivers::All).map(drop)
}

/// The sums of a gradient, in a backward pass's order.
fn sum(subject: &Subject, buckets: &mut Buckets, comm: &mut dyn Communicator) -> Result<()> {
    let hierarchy = &subject.learner.hierarchy;
    for &row in hierarchy.row_indices(FINE.level, FINE.coset).iter().rev() {
        buckets.add(comm, &hierarchy.group(FINE.level).grad, row, &[])?;
    }
    buckets.add(comm, &hierarchy.ends(FINE.level).grad, 0, &[])?;
    buckets.finish(comm)
}

impl Report {
    fn new(subject: &Subject, ranks: usize, [compute_s, sums_s, both_s, exposed_s]: [f64; 4]) -> Report {
        let hierarchy = &subject.learner.hierarchy;
        let values = hierarchy.group(FINE.level).grad.elem_count() + hierarchy.ends(FINE.level).grad.elem_count();
        Report { ranks, bytes: 4 * values, compute_s, sums_s, both_s, exposed_s, hidden: 1.0 - exposed_s / sums_s }
    }

    fn text(&self) -> String {
        let Report { ranks, bytes, compute_s, sums_s, both_s, exposed_s, hidden } = self;
        let [compute, sums, both, exposed] = [*compute_s, *sums_s, *both_s, *exposed_s].map(seconds);
        format!(
            "{ranks} ranks, a gradient of {:.2} MB\ncomputing {compute}, sums {sums}, both as in a step {both}, of which {exposed} are exposed: {} of the sums is hidden\n",
            *bytes as f64 / 1e6,
            percent(*hidden)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;

    #[test]
    fn ranks_sum_what_a_step_sums() {
        let small =
            ["model.vocab=64", "model.width=16", "model.heads=2", "model.depth=3", "data.context=8", "data.batch=4"];
        let values = thread::run(2, |comm| {
            let mut subject = Subject::new(configure(small).unwrap()).unwrap();
            let read = |subject: &Subject| {
                let ends = &subject.learner.hierarchy.ends(0).grad;
                ends.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            gradient(&mut subject, comm, false).unwrap();
            let own = read(&subject);
            sum(&subject, &mut Buckets::default(), comm).unwrap();
            (own, read(&subject))
        });
        let [(a, sum), (b, _)] = &values[..] else { panic!("two ranks") };
        assert!(a.iter().zip(b).zip(sum).all(|((a, b), sum)| a + b == *sum) && sum.iter().any(|&x| x != 0.0));
    }
}
