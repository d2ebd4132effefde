//! Ranks as MPI processes.
//!
//! Every collective but `split` is started non-blocking and polled, so that a rank that has stopped becomes an error
//! after the time limit instead of a hang. rsmpi's requests borrow their buffers for a scope, while ours outlive the
//! call that starts them; so this file calls MPI itself, through rsmpi's bindings; it and `roll_call` keep all `unsafe`.
//!
//! MPI_IN_PLACE is a macro that the bindings lack: a sum is received into a second, pooled buffer.
//!
//! A scattered sum is an MPI_Ireduce to each rank, a gather an MPI_Ibcast from each: together they send no more than
//! MPI_Ireduce_scatter and MPI_Iallgatherv should, and take parts of any lengths.

use super::mover::Mover;
use super::parcel::Parcel;
use super::pool::Pool;
use super::ring::{self, Algorithm};
use super::roll_call::RollCall;
use super::{Communicator, DEFAULT_TIMEOUT, Ending, Exchange, Reduction, Ticket, TimedOut, told_to_end};
use crate::error::{Context, Result, anyhow, bail, ensure};
use candle_core::Tensor;
use mpi::ffi;
use std::cell::Cell;
use std::ffi::c_int;
use std::fmt::Display;
use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Elements of one MPI call; longer buffers take several. Far under the limit of a C int (2³¹ − 1), so that ordinary
/// buffers already use the path that the largest need.
const MAX_COUNT: usize = 1 << 24;

/// A wait of a busy job is over within this time and only yields the CPU; longer ones sleep between polls.
const YIELD_FOR: Duration = Duration::from_millis(5);
const SLEEP: Duration = Duration::from_micros(50);

/// How long a rank that has been told to end (SIGTERM) listens to the others' answers: a launcher kills it a second after that.
const LISTEN_AT_END: Duration = Duration::from_millis(400);

/// MPI between initialisation and finalisation, which comes when the last group is dropped.
pub struct Session {
    universe: ManuallyDrop<mpi::environment::Universe>,
    /// A group was dropped in the middle of a collective: MPI_Finalize could wait for it for ever.
    unfinished: Cell<bool>,
    /// What this rank has waited in collectives, over all groups.
    waited: Cell<Duration>,
    roll: RollCall,
    algorithm: Algorithm,
    mover: Mover,
}

impl Session {
    /// Initialises MPI; from now on this thread may call it, and the session's mover.
    pub fn start() -> Result<Rc<Session>> {
        use mpi::environment::{Threading, initialize_with_threading, library_version};
        let started = initialize_with_threading(Threading::Serialized);
        let (universe, provided) = started.context("MPI has been initialised before in this process")?;
        ensure!(
            provided >= Threading::Funneled,
            "MPI offers thread level {provided:?}, vcycle computes with threads and needs Funneled ({}): use an MPI built with thread support",
            library_version().unwrap_or_default().trim()
        );
        let serialized = provided >= Threading::Serialized;
        Ok(Rc::new(Session {
            universe: ManuallyDrop::new(universe),
            unfinished: Cell::new(false),
            waited: Cell::default(),
            roll: RollCall::new()?,
            algorithm: Algorithm::find(),
            mover: if serialized { Mover::start().context("cannot start a thread")? } else { Mover::default() },
        }))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.mover = Mover::default();
        if !self.unfinished.get() && !self.roll.is_used() {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.universe) }
        }
    }
}

/// Ends all ranks of the job. Any thread may call it: the thread level forbids that to the others, but the job ends here.
pub fn abort(code: i32) -> ! {
    // SAFETY: plain call; MPI was initialised by whoever has a group or installed the panic hook.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    std::process::exit(code)
}

/// A group of MPI processes.
pub struct Mpi {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// The rank in the job of each rank of this group.
    members: Vec<usize>,
    timeout: Duration,
    flights: Vec<Flight>,
    next: u64,
    pool: Pool,
    idle_requests: Vec<Vec<ffi::MPI_Request>>,
    /// Send and receive buffer of `reduce`.
    small: (Vec<f64>, Vec<f64>),
    session: Rc<Session>,
}

/// An exchange under way.
struct Flight {
    ticket: Ticket,
    exchange: Exchange,
    parcel: Parcel,
    pending: Pending<Buffers>,
}

/// What is sent, and what is received into: sums, or nothing where `sent` itself is received into (a gather).
type Buffers = (Vec<f32>, Vec<f32>);

/// A stretch of a part of a buffer.
struct Piece {
    part: usize,
    first: usize,
    count: c_int,
}

/// Buffers that MPI reads or writes until `requests` are complete. Dropped before, it leaks the buffers: MPI may still
/// write to them.
struct Pending<B> {
    buffers: ManuallyDrop<B>,
    requests: Vec<ffi::MPI_Request>,
}

impl<B> Pending<B> {
    fn new(buffers: B, requests: Vec<ffi::MPI_Request>) -> Self {
        Pending { buffers: ManuallyDrop::new(buffers), requests }
    }

    /// Moves the requests on; true once all are complete (and from then on).
    fn test(&mut self) -> Result<bool> {
        let mut done: c_int = 0;
        let (count, requests) = (self.requests.len() as c_int, self.requests.as_mut_ptr());
        // SAFETY: `requests` are requests that this type owns; complete ones are MPI_REQUEST_NULL, which MPI skips.
        check(unsafe { ffi::MPI_Testall(count, requests, &mut done, ffi::RSMPI_STATUSES_IGNORE) })?;
        Ok(done != 0)
    }

    /// The buffers of complete requests, and the list of requests to use again.
    fn take(self) -> (B, Vec<ffi::MPI_Request>) {
        let Pending { buffers, mut requests } = self;
        requests.clear();
        (ManuallyDrop::into_inner(buffers), requests)
    }
}

/// MPI's return code as a result (MPI_ERRORS_RETURN is set on every group).
pub(super) fn check(code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len: c_int = 0;
    // SAFETY: the buffer has room for MPI_MAX_ERROR_STRING characters and a final zero.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    Err(anyhow!("MPI error {code}: {}", String::from_utf8_lossy(&text[..len as usize])))
}

/// Ranges of at most [`MAX_COUNT`] elements that cover `0..len`, as (first, count).
fn pieces(len: usize) -> impl Iterator<Item = (usize, c_int)> {
    (0..len).step_by(MAX_COUNT).map(move |first| (first, (len - first).min(MAX_COUNT) as c_int))
}

/// The pieces of every part, `first` counted from the buffer's begin.
fn pieces_of(parcel: &Parcel) -> impl Iterator<Item = Piece> {
    parcel.ranges.iter().enumerate().flat_map(|(part, range)| {
        pieces(range.len()).map(move |(first, count)| Piece { part, first: range.start + first, count })
    })
}

impl Mpi {
    /// All processes of the job, as a group of its own.
    pub fn world(session: &Rc<Session>) -> Result<Mpi> {
        // SAFETY: MPI is initialised while a session lives.
        let (world, all) = (unsafe { ffi::RSMPI_COMM_WORLD }, Some(0));
        let group = Mpi::split_off(world, session, DEFAULT_TIMEOUT, all)?;
        group.context("MPI_Comm_split of all ranks gave no group")
    }

    /// Rank and size among the processes of this group on this node.
    pub fn on_this_node(&self) -> Result<(usize, usize)> {
        let mut comm = self.comm;
        // SAFETY: collective on a live group; the new handle is owned by the `Mpi` made of it.
        check(unsafe {
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            ffi::MPI_Comm_split_type(self.comm, kind, self.rank as c_int, info, &mut comm)
        })?;
        let node = Mpi::adopt(comm, &self.session, self.timeout)?;
        Ok((node.rank, node.size))
    }

    fn split_off(
        parent: ffi::MPI_Comm,
        session: &Rc<Session>,
        timeout: Duration,
        color: Option<usize>,
    ) -> Result<Option<Mpi>> {
        let mut comm = parent;
        // SAFETY: collective on a live group; ranks that join none pass MPI_UNDEFINED and get MPI_COMM_NULL. Equal keys
        // keep the order of ranks.
        check(unsafe {
            let color = color.map_or(Ok(ffi::RSMPI_UNDEFINED), c_int::try_from)?;
            ffi::MPI_Comm_split(parent, color, 0, &mut comm)
        })?;
        color.map(|_| Mpi::adopt(comm, session, timeout)).transpose()
    }

    /// Takes over a new MPI communicator.
    fn adopt(comm: ffi::MPI_Comm, session: &Rc<Session>, timeout: Duration) -> Result<Mpi> {
        let (mut rank, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: `comm` is a live communicator.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(comm, &mut rank))?;
            check(ffi::MPI_Comm_size(comm, &mut size))?;
        }
        Ok(Mpi {
            comm,
            rank: rank as usize,
            size: size as usize,
            members: members(comm, size)?,
            timeout,
            flights: Vec::new(),
            next: 0,
            pool: Pool::default(),
            idle_requests: Vec::new(),
            small: Default::default(),
            session: session.clone(),
        })
    }

    /// Starts `call(buffers, piece, request)` for every piece.
    fn call<B, P>(
        &mut self,
        buffers: B,
        pieces: impl Iterator<Item = P>,
        mut call: impl FnMut(&mut B, P, &mut ffi::MPI_Request) -> c_int,
    ) -> Result<Pending<B>> {
        let mut pending = Pending::new(buffers, self.idle_requests.pop().unwrap_or_default());
        for piece in pieces {
            // SAFETY: reads a constant of the library.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            let code = call(&mut pending.buffers, piece, &mut request);
            pending.requests.push(request);
            check(code).inspect_err(|_| self.session.unfinished.set(true))?;
        }
        Ok(pending)
    }

    fn start_sum(&mut self, sent: Vec<f32>) -> Result<Pending<Buffers>> {
        let (comm, len, ranks, session) = (self.comm, sent.len(), self.size, self.session.clone());
        let sums = self.pool.take(len);
        self.call((sent, sums), pieces(len), |(sent, sums), (first, count), request| {
            let (sent, sums) = (sent[first..].as_ptr().cast(), sums[first..].as_mut_ptr().cast());
            let ring = ring::takes(size_of::<f32>() * count as usize, ranks);
            // SAFETY: `Pending` keeps both buffers in place until the request is complete; the piece lies inside them.
            session.algorithm.with(ring, || unsafe {
                ffi::MPI_Iallreduce(sent, sums, count, ffi::RSMPI_FLOAT, ffi::RSMPI_SUM, comm, request)
            })
        })
    }

    /// The received buffer holds this rank's part alone.
    fn start_scatter(&mut self, sent: Vec<f32>, parcel: &Parcel) -> Result<Pending<Buffers>> {
        let (comm, rank, own) = (self.comm, self.rank, parcel.ranges[self.rank].clone());
        let sums = self.pool.take(own.len());
        self.call((sent, sums), pieces_of(parcel), |(sent, sums), Piece { part, first, count }, request| {
            let sent = sent[first..].as_ptr().cast();
            // Of no meaning on other ranks.
            let sums = if part == rank { sums[first - own.start..].as_mut_ptr() } else { std::ptr::null_mut() };
            // SAFETY: `Pending` keeps both buffers in place until the request is complete; the piece lies inside them.
            unsafe {
                let (kind, sum, root) = (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM, part as c_int);
                ffi::MPI_Ireduce(sent, sums.cast(), count, kind, sum, root, comm, request)
            }
        })
    }

    fn start_gather(&mut self, sent: Vec<f32>, parcel: &Parcel) -> Result<Pending<Buffers>> {
        let comm = self.comm;
        self.call((sent, Vec::new()), pieces_of(parcel), |(sent, _), Piece { part, first, count }, request| {
            let sent = sent[first..].as_mut_ptr().cast();
            // SAFETY: `Pending` keeps the buffer in place until the request is complete; the piece lies inside it.
            unsafe { ffi::MPI_Ibcast(sent, count, ffi::RSMPI_FLOAT, part as c_int, comm, request) }
        })
    }

    /// Polls until complete; gives the buffers back.
    fn finish<B>(&mut self, mut pending: Pending<B>, op: &dyn Display) -> Result<B> {
        let start = Instant::now();
        let complete = self.poll(&mut pending, op, start);
        self.session.waited.set(self.session.waited.get() + start.elapsed());
        complete.inspect_err(|_| self.session.unfinished.set(true))?;
        let (buffers, requests) = pending.take();
        self.idle_requests.push(requests);
        Ok(buffers)
    }

    /// Waits until `pending` is complete. Before the time limit the other ranks are asked what they wait in, so that the
    /// error can name those that do not answer.
    fn poll<B>(&self, pending: &mut Pending<B>, op: &dyn Display, start: Instant) -> Result<()> {
        let (roll, ending) = (&self.session.roll, Ending::of(self.timeout));
        let (mut called, mut last_words) = (None, LastWords::default());
        while !pending.test().with_context(|| format!("rank {}, collective `{op}`", self.world_rank()))? {
            let waited = start.elapsed();
            // Ranks may share a core: let the others run.
            if waited < YIELD_FOR {
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(SLEEP);
            roll.attend(|| op.to_string());
            last_words.poll(self, op);
            if waited > ending.call && called.is_none() {
                called = Some(Instant::now());
                roll.call(&op.to_string());
            }
            if let Some(called) = called.filter(|_| waited > ending.give_up) {
                let why = roll.verdict(&self.members, &op.to_string(), called);
                roll.give_up(&op.to_string());
                let turn = ending.turn * roll.answered_before(self.world_rank(), called).min(3) as u32;
                return Err(TimedOut::new(self.world_rank(), op, self.timeout, &why, turn).into());
            }
        }
        Ok(())
    }

    /// This rank's number in the job, by which messages call it.
    fn world_rank(&self) -> usize {
        self.members[self.rank]
    }

    /// Broadcast of bytes whose number all ranks know.
    fn broadcast_bytes(&mut self, data: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        let (comm, len) = (self.comm, data.len());
        let pending = self.call(data, pieces(len), |data, (first, count), request| {
            let data = data[first..].as_mut_ptr().cast();
            // SAFETY: `Pending` keeps the buffer in place until the request is complete; the piece lies inside it.
            unsafe { ffi::MPI_Ibcast(data, count, ffi::RSMPI_UINT8_T, root as c_int, comm, request) }
        })?;
        self.finish(pending, &format_args!("broadcast from rank {root}"))
    }
}

/// What a rank says that is told to end while it waits for one that does not answer. A launcher that has lost a rank tells
/// the others so: they know which collective it was lost in.
#[derive(Default)]
struct LastWords {
    called: Option<Instant>,
}

impl LastWords {
    fn poll(&mut self, group: &Mpi, op: &dyn Display) {
        let roll = &group.session.roll;
        match self.called {
            None if told_to_end().swap(false, Ordering::Relaxed) => {
                self.called = Some(Instant::now());
                roll.call(&op.to_string());
            }
            Some(called) if called.elapsed() > LISTEN_AT_END => {
                self.called = None;
                if !roll.silent(&group.members, called).is_empty() {
                    let why = roll.verdict(&group.members, &op.to_string(), called);
                    eprintln!("rank {} is told to end and waits in the collective `{op}`: {why}", group.world_rank());
                }
            }
            _ => {}
        }
    }
}

/// The rank in the job of each of the `size` ranks of `comm`.
fn members(comm: ffi::MPI_Comm, size: c_int) -> Result<Vec<usize>> {
    let own: Vec<c_int> = (0..size).collect();
    let mut ranks: Vec<c_int> = vec![0; own.len()];
    // SAFETY: both lists have `size` elements; the two groups are made and freed here.
    unsafe {
        let (mut group, mut world) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
        check(ffi::MPI_Comm_group(comm, &mut group))?;
        check(ffi::MPI_Comm_group(ffi::RSMPI_COMM_WORLD, &mut world))?;
        check(ffi::MPI_Group_translate_ranks(group, size, own.as_ptr(), world, ranks.as_mut_ptr()))?;
        check(ffi::MPI_Group_free(&mut group))?;
        check(ffi::MPI_Group_free(&mut world))?;
    }
    Ok(ranks.into_iter().map(|rank| rank as usize).collect())
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn waited(&self) -> Duration {
        self.session.waited.get()
    }

    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
        exchange.check(&parts, self.size)?;
        let parcel = Parcel::new(exchange, parts);
        let sent = parcel.pack(self.rank, &mut self.pool)?;
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        let pending = match exchange {
            Exchange::Sum => self.start_sum(sent)?,
            Exchange::Scatter => self.start_scatter(sent, &parcel)?,
            Exchange::Gather => self.start_gather(sent, &parcel)?,
        };
        let ticket = Ticket(self.next);
        self.next += 1;
        self.flights.push(Flight { ticket, exchange, parcel, pending });
        session.mover.started();
        Ok(ticket)
    }

    fn progress(&mut self) -> Result<()> {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        for flight in &mut self.flights {
            flight.pending.test().with_context(|| format!("rank {}, {:?}", self.members[self.rank], flight.ticket))?;
        }
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        let Some(i) = self.flights.iter().position(|flight| flight.ticket == ticket) else {
            bail!("{ticket:?} was not started or was waited for before");
        };
        let Flight { exchange, parcel, pending, .. } = self.flights.swap_remove(i);
        let session = self.session.clone();
        let mpi = session.mover.exclusive();
        session.mover.finished();
        let (sent, received) = self.finish(pending, &exchange.describe(parcel.len()))?;
        drop(mpi);
        match exchange {
            Exchange::Sum => parcel.unpack_all(&received)?,
            Exchange::Scatter => parcel.unpack(self.rank, &received)?,
            Exchange::Gather => parcel.unpack_others(self.rank, &sent)?,
        }
        self.pool.give(sent);
        self.pool.give(received);
        Ok(())
    }

    fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()> {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        let (mut data, mut result) = std::mem::take(&mut self.small);
        data.clear();
        data.extend_from_slice(values);
        result.resize(values.len(), 0.0);
        let (comm, len) = (self.comm, values.len());
        let pending = self.call((data, result), pieces(len), |(data, result), (first, count), request| {
            let (data, result) = (data[first..].as_ptr().cast(), result[first..].as_mut_ptr().cast());
            // SAFETY: `Pending` keeps both buffers in place until the request is complete; the piece lies inside them.
            unsafe {
                let op = if reduction == Reduction::Sum { ffi::RSMPI_SUM } else { ffi::RSMPI_MAX };
                ffi::MPI_Iallreduce(data, result, count, ffi::RSMPI_DOUBLE, op, comm, request)
            }
        })?;
        self.small = self.finish(pending, &format_args!("{reduction:?} of {len} numbers"))?;
        values.copy_from_slice(&self.small.1);
        Ok(())
    }

    fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        ensure!(root < self.size, "broadcast from rank {root}: there are {} ranks", self.size);
        let len = self.broadcast_bytes((data.len() as u64).to_le_bytes().to_vec(), root)?;
        let len = u64::from_le_bytes(len.try_into().map_err(|_| anyhow!("a broadcast length is not 8 bytes"))?);
        data.resize(usize::try_from(len)?, 0);
        *data = self.broadcast_bytes(std::mem::take(data), root)?;
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        let comm = self.comm;
        // SAFETY: collective on a live group, without buffers.
        let pending = self.call((), pieces(1), |(), _, request| unsafe { ffi::MPI_Ibarrier(comm, request) })?;
        self.finish(pending, &"barrier")
    }

    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        let group = Mpi::split_off(self.comm, &self.session, self.timeout, color)?;
        Ok(group.map(|group| Box::new(group) as Box<dyn Communicator>))
    }

    fn abort(&self, code: i32) -> ! {
        abort(code)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let session = self.session.clone();
        let _mpi = session.mover.exclusive();
        if self.flights.is_empty() && !self.session.unfinished.get() {
            // SAFETY: the group is live, was made by this file, and no request of it is under way.
            unsafe { ffi::MPI_Comm_free(&mut self.comm) };
        } else {
            self.session.unfinished.set(true);
        }
    }
}
