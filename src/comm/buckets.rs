//! Exchanges rows of tensors over ranks in buckets, above all gradients while the backward pass goes on.
//!
//! The backward pass says which part of the gradient is final; its row joins the open bucket, and a full bucket is sent off.
//! [`Buckets::finish`] waits for all. What it waits is the exposed time: the part of communication that computing did not
//! hide.

use super::{Communicator, Exchange, Ticket};
use crate::error::{Result, ensure};
use candle_core::Tensor;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Values from which on a bucket is sent off (512 KiB of f32). Measured with 2 and 4 ranks on a node
/// (Open MPI 4.1): 4 Mi values take the same time in pieces of 2¹⁷ to 2²² values, within noise, and up to twice as long
/// in pieces of 2¹⁴. So small rows are joined, and no more of them than that: a bucket that leaves early is hidden better.
const MIN_VALUES: usize = 1 << 17;

/// Row-by-row exchange of f32 tensors [R, P] over a group.
#[derive(Default)]
pub struct Buckets {
    exchange: Exchange,
    open: Bucket,
    sent: Vec<Ticket>,
    exposed: Duration,
}

/// Rows joined into one exchange.
#[derive(Default)]
struct Bucket {
    parts: Vec<Vec<Tensor>>,
    values: usize,
    /// Values it may hold.
    limit: usize,
}

impl Bucket {
    /// Whether a row of `width` values may join it.
    fn takes(&self, width: usize) -> bool {
        self.values == 0 || self.values + width <= self.limit
    }
}

/// Values that a bucket may hold whose first row has `width`.
fn limit(width: usize) -> usize {
    MIN_VALUES + width
}

impl Buckets {
    pub fn new(exchange: Exchange) -> Buckets {
        Buckets { exchange, ..Buckets::default() }
    }

    /// Adds row `row` of `tensor` [R, P], which nobody touches again before [`Buckets::finish`], to what is exchanged over
    /// `comm`; `parts` are the columns of each rank, of which a sum takes no notice. Every rank adds the same rows in the same
    /// order. Does nothing with one rank.
    pub fn add(
        &mut self,
        comm: &mut dyn Communicator,
        tensor: &Tensor,
        row: usize,
        parts: &[Range<usize>],
    ) -> Result<()> {
        if comm.size() == 1 {
            return Ok(());
        }
        let (rows, width) = tensor.dims2()?;
        ensure!(row < rows, "row {row} of a tensor of {rows} rows");
        let whole = 0..width;
        let parts = if self.exchange == Exchange::Sum { std::slice::from_ref(&whole) } else { parts };
        // Decided by lengths alone, which are the same on all ranks.
        if !self.open.takes(width) {
            self.send(comm)?;
        }
        if self.open.values == 0 {
            self.open = Bucket { parts: vec![Vec::new(); parts.len()], values: 0, limit: limit(width) };
        }
        let row = tensor.narrow(0, row, 1)?;
        for (part, columns) in self.open.parts.iter_mut().zip(parts).filter(|(_, columns)| !columns.is_empty()) {
            part.push(row.narrow(1, columns.start, columns.len())?);
        }
        self.open.values += width;
        if self.open.values >= MIN_VALUES {
            self.send(comm)?;
        }
        comm.progress()
    }

    /// The reductions that rows of these widths, added in this order, become: how many rows have been added when each is
    /// sent off, and its values.
    pub fn cut(widths: &[usize]) -> Vec<(usize, usize)> {
        let mut sent = Vec::new();
        let (mut values, mut room) = (0, 0);
        for (added, &width) in widths.iter().enumerate() {
            if values > 0 && values + width > room {
                sent.push((added, std::mem::take(&mut values)));
            }
            if values == 0 {
                room = limit(width);
            }
            values += width;
            if values >= MIN_VALUES {
                sent.push((added + 1, std::mem::take(&mut values)));
            }
        }
        sent.extend((values > 0).then_some((widths.len(), values)));
        sent
    }

    fn send(&mut self, comm: &mut dyn Communicator) -> Result<()> {
        let Bucket { parts, .. } = std::mem::take(&mut self.open);
        self.sent.push(comm.start(self.exchange, parts)?);
        Ok(())
    }

    /// Every row added since the last call is exchanged.
    pub fn finish(&mut self, comm: &mut dyn Communicator) -> Result<()> {
        let start = Instant::now();
        if self.open.values > 0 {
            self.send(comm)?;
        }
        self.sent.drain(..).try_for_each(|ticket| comm.wait(ticket))?;
        self.exposed += start.elapsed();
        Ok(())
    }

    /// Seconds spent in [`Buckets::finish`] so far.
    pub fn exposed_seconds(&self) -> f64 {
        self.exposed.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Solo, thread};
    use super::*;
    use candle_core::Device;

    fn filled(rows: usize, width: usize, value: f32) -> Tensor {
        Tensor::full(value, (rows, width), &Device::Cpu).unwrap()
    }

    fn values(gradient: &Tensor) -> Vec<f32> {
        gradient.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Small rows share a bucket, large ones fill one each; the ends come last, as in a backward pass.
    #[test]
    fn added_rows_are_summed_and_others_left_alone() {
        for width in [7, MIN_VALUES / 2 + 1, MIN_VALUES + 3] {
            let sums = thread::run(3, |comm| {
                let (blocks, ends) = (filled(5, width, 1.0 + comm.rank() as f32), filled(1, 2 * width, 10.0));
                let mut buckets = Buckets::default();
                for step in 1..=2 {
                    for row in [4, 2, 0] {
                        buckets.add(comm, &blocks, row, &[]).unwrap();
                    }
                    buckets.add(comm, &ends, 0, &[]).unwrap();
                    buckets.finish(comm).unwrap();
                    assert_eq!(buckets.sent.len(), 0, "step {step}");
                }
                assert!(buckets.exposed_seconds() > 0.0);
                (comm.rank() as f32, values(&blocks), values(&ends))
            });
            for (rank, blocks, ends) in sums {
                // 1 + 2 + 3 = 6, and again over three ranks: 18
                for (row, values) in blocks.chunks(width).enumerate() {
                    let expected = if row % 2 == 0 { 18.0 } else { 1.0 + rank };
                    assert!(values.iter().all(|&x| x == expected), "row {row}: {}", values[0]);
                }
                assert!(ends.iter().all(|&x| x == 90.0));
            }
        }
    }

    /// A scattered sum gives a rank its columns, a gather of those gives all ranks all: together, the sum. Ragged parts, one empty.
    #[test]
    fn a_scattered_sum_and_a_gather_are_the_sum() {
        for width in [7, MIN_VALUES / 2 + 1] {
            let parts = [0..2, 2..2, 2..width];
            thread::run(3, |comm| {
                let noise =
                    |seed: f32| (0..4 * width).map(move |i| (i as f32 * 0.37 + seed).sin()).collect::<Vec<f32>>();
                let tensor = |seed| Tensor::from_vec(noise(seed), (4, width), &Device::Cpu).unwrap();
                let (summed, shared) = (tensor(comm.rank() as f32), tensor(comm.rank() as f32));
                let mut exchange = |exchange, tensor: &Tensor, parts: &[Range<usize>]| {
                    let mut buckets = Buckets::new(exchange);
                    [3, 0, 1].into_iter().for_each(|row| buckets.add(comm, tensor, row, parts).unwrap());
                    buckets.finish(comm).unwrap();
                };
                exchange(Exchange::Sum, &summed, &[]);
                exchange(Exchange::Scatter, &shared, &parts);
                exchange(Exchange::Gather, &shared, &parts);
                assert_eq!(values(&summed), values(&shared));
            });
        }
    }

    /// Counts the values of each sum that is started.
    struct Counting {
        inner: Solo,
        started: Vec<usize>,
    }

    impl Communicator for Counting {
        fn rank(&self) -> usize {
            0
        }
        fn size(&self) -> usize {
            2
        }
        fn set_timeout(&mut self, _timeout: Duration) {}
        fn waited(&self) -> Duration {
            Duration::ZERO
        }
        fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
            self.started.push(parts.iter().flatten().map(Tensor::elem_count).sum());
            self.inner.start(exchange, parts)
        }
        fn progress(&mut self) -> Result<()> {
            Ok(())
        }
        fn wait(&mut self, ticket: Ticket) -> Result<()> {
            self.inner.wait(ticket)
        }
        fn reduce(&mut self, _values: &mut [f64], _reduction: super::super::Reduction) -> Result<()> {
            Ok(())
        }
        fn broadcast(&mut self, _data: &mut Vec<u8>, _root: usize) -> Result<()> {
            Ok(())
        }
        fn barrier(&mut self) -> Result<()> {
            Ok(())
        }
        fn split(&mut self, _color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
            Ok(None)
        }
        fn abort(&self, code: i32) -> ! {
            std::process::exit(code)
        }
    }

    #[test]
    fn the_cut_foretells_what_is_sent() {
        for (rows, width, ends) in
            [(8, 10_000, 50), (5, MIN_VALUES / 2 + 1, 7), (3, MIN_VALUES, 3 * MIN_VALUES), (2, 9, 5)]
        {
            let (blocks, ends) = (filled(rows, width, 1.0), filled(1, ends, 1.0));
            let mut comm = Counting { inner: Solo::default(), started: Vec::new() };
            let mut buckets = Buckets::default();
            (0..rows).rev().for_each(|row| buckets.add(&mut comm, &blocks, row, &[]).unwrap());
            buckets.add(&mut comm, &ends, 0, &[]).unwrap();
            buckets.finish(&mut comm).unwrap();
            let widths: Vec<usize> = vec![width; rows].into_iter().chain([ends.elem_count()]).collect();
            let cut: Vec<usize> = Buckets::cut(&widths).into_iter().map(|(_, values)| values).collect();
            assert_eq!(cut, comm.started, "{rows} rows of {width}");
        }
    }

    #[test]
    fn one_rank_has_nothing_to_do() {
        let (gradient, mut buckets) = (filled(2, 3, 1.5), Buckets::default());
        buckets.add(&mut Solo::default(), &gradient, 1, &[]).unwrap();
        assert!(buckets.sent.is_empty() && buckets.open.values == 0);
        buckets.finish(&mut Solo::default()).unwrap();
        assert_eq!(values(&gradient), [1.5; 6]);
    }
}
