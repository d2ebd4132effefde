//! Ranks as threads of one process: the semantics of MPI without processes, for tests.
//!
//! Collectives are matched by their order. Unlike MPI, which would hang or corrupt memory, ranks that call different
//! collectives get an error that names both. A sum adds in the order of ranks.

use super::parcel::Parcel;
use super::pool::Pool;
use super::{Communicator, DEFAULT_TIMEOUT, Exchange, Reduction, Ticket, TimedOut};
use crate::error::{Result, anyhow, bail, ensure};
use candle_core::Tensor;
use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Calls `body` once a rank, each on a thread of its own, and returns the results in the order of ranks.
///
/// # Panics
/// If a rank panics. The others' pending collectives then fail.
pub fn run<T: Send>(size: usize, body: impl Fn(&mut Thread) -> T + Sync) -> Vec<T> {
    let group = Arc::new(Group::new(size, Arc::default()));
    std::thread::scope(|scope| {
        let start = |rank| {
            let (group, body) = (group.clone(), &body);
            scope.spawn(move || body(&mut Thread::new(group, rank, DEFAULT_TIMEOUT, Rc::default())))
        };
        let ranks: Vec<_> = (0..size).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// One rank of a group of threads.
pub struct Thread {
    group: Arc<Group>,
    rank: usize,
    /// Collectives called so far: the next one's number.
    called: u64,
    timeout: Duration,
    /// Exchanges that were started.
    parcels: HashMap<Ticket, (Exchange, Parcel)>,
    /// Shared by all groups of this thread.
    waited: Rc<Cell<Duration>>,
}

struct Group {
    size: usize,
    collectives: Mutex<HashMap<u64, Collective>>,
    changed: Condvar,
    job: Arc<Job>,
}

/// What all groups of a job share: why it ended early.
#[derive(Default)]
struct Job {
    ended: OnceLock<String>,
}

/// A collective that some ranks have called and not all have finished.
struct Collective {
    op: Op,
    /// What each rank brought; once all have arrived, what each takes away.
    data: Vec<Option<Data>>,
    arrived: usize,
    taken: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum Op {
    Exchange { exchange: Exchange, ranges: Vec<Range<usize>> },
    Reduce { len: usize, reduction: Reduction },
    Broadcast { root: usize },
    Barrier,
    Split,
}

enum Data {
    Nothing,
    Singles(Vec<f32>),
    Doubles(Vec<f64>),
    Bytes(Vec<u8>),
    Color(Option<usize>),
    Member { group: Arc<Group>, rank: usize },
}

impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Op::Exchange { exchange, ranges } => {
                f.write_str(&exchange.describe(ranges.last().map_or(0, |range| range.end)))
            }
            Op::Reduce { len, reduction } => write!(f, "{reduction:?} of {len} numbers"),
            Op::Broadcast { root } => write!(f, "broadcast from rank {root}"),
            Op::Barrier => f.write_str("barrier"),
            Op::Split => f.write_str("split"),
        }
    }
}

impl Group {
    fn new(size: usize, job: Arc<Job>) -> Group {
        Group { size, collectives: Mutex::default(), changed: Condvar::new(), job }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Collective>> {
        self.collectives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `rank` calls its `number`-th collective; the last rank to arrive computes the results of all.
    fn arrive(&self, number: u64, rank: usize, op: Op, data: Data) -> Result<()> {
        let mut collectives = self.lock();
        let empty =
            || Collective { op: op.clone(), data: (0..self.size).map(|_| None).collect(), arrived: 0, taken: 0 };
        let collective = collectives.entry(number).or_insert_with(empty);
        if collective.op != op {
            let other = &collective.op;
            let why = format!(
                "collective {number}: rank {rank} calls `{op}`, another rank `{other}`: all must call the same"
            );
            self.job.ended.get_or_init(|| why.clone());
            bail!("{why}");
        }
        collective.data[rank] = Some(data);
        collective.arrived += 1;
        if collective.arrived == self.size {
            combine(&op, &mut collective.data, &self.job);
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Waits until all ranks have called the `number`-th collective and takes the result of `rank`.
    fn leave(&self, number: u64, rank: usize, timeout: Duration) -> Result<Data> {
        let start = Instant::now();
        let mut collectives = self.lock();
        loop {
            let Some(collective) = collectives.get_mut(&number) else {
                bail!("{:?} was not started or was waited for before", Ticket(number));
            };
            if collective.arrived == self.size {
                let data = collective.data[rank].take();
                let data = data.ok_or_else(|| anyhow!("{:?} was waited for before", Ticket(number)))?;
                collective.taken += 1;
                if collective.taken == self.size {
                    collectives.remove(&number);
                }
                return Ok(data);
            }
            if let Some(why) = self.job.ended.get() {
                bail!("{why}");
            }
            if start.elapsed() > timeout {
                let missing = (0..self.size).filter(|&rank| collective.data[rank].is_none());
                let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
                let why = format!("not called by rank {}", missing.join(", "));
                return Err(TimedOut::new(rank, &collective.op, timeout, &why, Duration::ZERO).into());
            }
            // Short, because the end of a job wakes nobody: a rank may wait in any of several groups.
            let pause = Duration::from_millis(5);
            collectives = self.changed.wait_timeout(collectives, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Turns what the ranks brought into what they take away.
fn combine(op: &Op, data: &mut [Option<Data>], job: &Arc<Job>) {
    match op {
        Op::Exchange { exchange: Exchange::Gather, ranges } => gather(&mut singles(data), ranges),
        // Scattered too: a rank reads its part only.
        Op::Exchange { .. } => reduce(&mut singles(data), |a, b| a + b),
        Op::Reduce { reduction: Reduction::Sum, .. } => reduce(&mut doubles(data), |a, b| a + b),
        Op::Reduce { reduction: Reduction::Max, .. } => reduce(&mut doubles(data), f64::max),
        Op::Broadcast { root } => {
            let Some(Data::Bytes(bytes)) = &data[*root] else { unreachable!("a broadcast brings bytes") };
            let bytes = bytes.clone();
            data.fill_with(|| Some(Data::Bytes(bytes.clone())));
        }
        Op::Barrier => {}
        Op::Split => split(data, job),
    }
}

/// x_r = x_0 ∘ x_1 ∘ …, in this order, on every rank r.
fn reduce<T: Copy>(ranks: &mut [&mut Vec<T>], op: impl Fn(T, T) -> T) {
    let Some((first, others)) = ranks.split_first_mut() else { return };
    for other in others.iter() {
        first.iter_mut().zip(other.iter()).for_each(|(a, &b)| *a = op(*a, b));
    }
    others.iter_mut().for_each(|other| other.copy_from_slice(first));
}

/// Part k of every rank = that of rank k.
fn gather(ranks: &mut [&mut Vec<f32>], parts: &[Range<usize>]) {
    let gathered: Vec<f32> = parts.iter().zip(&*ranks).flat_map(|(part, own)| own[part.clone()].to_vec()).collect();
    ranks.iter_mut().for_each(|rank| rank.copy_from_slice(&gathered));
}

fn singles(data: &mut [Option<Data>]) -> Vec<&mut Vec<f32>> {
    data.iter_mut().flatten().filter_map(|d| if let Data::Singles(x) = d { Some(x) } else { None }).collect()
}

fn doubles(data: &mut [Option<Data>]) -> Vec<&mut Vec<f64>> {
    data.iter_mut().flatten().filter_map(|d| if let Data::Doubles(x) = d { Some(x) } else { None }).collect()
}

fn split(data: &mut [Option<Data>], job: &Arc<Job>) {
    let color = |d: &Option<Data>| if let Some(Data::Color(c)) = d { *c } else { None };
    let colors: Vec<_> = data.iter().map(color).collect();
    let mut groups = HashMap::new();
    for (rank, &color) in colors.iter().enumerate() {
        let Some(color) = color else {
            data[rank] = Some(Data::Nothing);
            continue;
        };
        let size = colors.iter().filter(|&&c| c == Some(color)).count();
        let (group, members) = groups.entry(color).or_insert_with(|| (Arc::new(Group::new(size, job.clone())), 0usize));
        data[rank] = Some(Data::Member { group: group.clone(), rank: *members });
        *members += 1;
    }
}

impl Thread {
    fn new(group: Arc<Group>, rank: usize, timeout: Duration, waited: Rc<Cell<Duration>>) -> Thread {
        Thread { group, rank, called: 0, timeout, parcels: HashMap::new(), waited }
    }

    fn call(&mut self, op: Op, data: Data) -> Result<Ticket> {
        let number = self.called;
        self.called += 1;
        self.group.arrive(number, self.rank, op, data)?;
        Ok(Ticket(number))
    }

    fn finish(&self, ticket: Ticket) -> Result<Data> {
        let start = Instant::now();
        let data = self.group.leave(ticket.0, self.rank, self.timeout);
        self.waited.set(self.waited.get() + start.elapsed());
        data
    }

    fn collective(&mut self, op: Op, data: Data) -> Result<Data> {
        let ticket = self.call(op, data)?;
        self.finish(ticket)
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn waited(&self) -> Duration {
        self.waited.get()
    }

    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
        exchange.check(&parts, self.size())?;
        let parcel = Parcel::new(exchange, parts);
        let data = parcel.pack(self.rank, &mut Pool::default())?;
        let ticket = self.call(Op::Exchange { exchange, ranges: parcel.ranges.clone() }, Data::Singles(data))?;
        self.parcels.insert(ticket, (exchange, parcel));
        Ok(ticket)
    }

    fn progress(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        let Some((exchange, parcel)) = self.parcels.remove(&ticket) else {
            bail!("{ticket:?} was not started or was waited for before");
        };
        let Data::Singles(values) = self.finish(ticket)? else { bail!("{ticket:?} is not that of an exchange") };
        match exchange {
            Exchange::Scatter => parcel.unpack(self.rank, &values[parcel.ranges[self.rank].clone()]),
            Exchange::Gather => parcel.unpack_others(self.rank, &values),
            Exchange::Sum => parcel.unpack_all(&values),
        }
    }

    fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()> {
        let op = Op::Reduce { len: values.len(), reduction };
        if let Data::Doubles(result) = self.collective(op, Data::Doubles(values.to_vec()))? {
            values.copy_from_slice(&result);
        }
        Ok(())
    }

    fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        ensure!(root < self.size(), "broadcast from rank {root}: there are {} ranks", self.size());
        if let Data::Bytes(bytes) = self.collective(Op::Broadcast { root }, Data::Bytes(std::mem::take(data)))? {
            *data = bytes;
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.collective(Op::Barrier, Data::Nothing)?;
        Ok(())
    }

    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
        match self.collective(Op::Split, Data::Color(color))? {
            Data::Member { group, rank } => {
                Ok(Some(Box::new(Thread::new(group, rank, self.timeout, self.waited.clone()))))
            }
            _ => Ok(None),
        }
    }

    fn abort(&self, code: i32) -> ! {
        let why = format!("rank {} ended the job with code {code}", self.rank);
        self.group.job.ended.get_or_init(|| why.clone());
        panic!("{why}")
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.group.job.ended.get_or_init(|| format!("rank {} panicked", self.rank));
        }
    }
}
