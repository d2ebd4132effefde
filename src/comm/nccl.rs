//! Ranks with a GPU each: tensors on GPUs are exchanged by NCCL, everything else by the communicator of the hosts.
//!
//! NCCL works in place, on a stream of its own. An exchange waits for what the compute stream was given before it, and nothing waits
//! for the exchange until [`Communicator::wait`]: the adjoint of the next block runs meanwhile. Communicators are non-blocking, so
//! that no call into NCCL hangs: this file polls for the end, for errors and for the time limit, and aborts.
//!
//! All `unsafe` calls of NCCL are sound for the same reasons: communicators are live until `Drop`, one host thread uses them, and
//! the tensors of an exchange are kept until it is done.

use super::{Communicator, DEFAULT_TIMEOUT, Exchange, Reduction, Ticket, TimedOut, agree};
use crate::error::{Error, Result, anyhow, bail, ensure};
use crate::ops::cuda::Gpu;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DriverError};
use candle_core::cuda_backend::cudarc::nccl::sys::{self, ncclResult_t};
use candle_core::{CudaDevice, DType, Tensor};
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Display;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at an exchange that has not come to its end within [`SPIN_FOR`].
const SLEEP: Duration = Duration::from_micros(20);
const SPIN_FOR: Duration = Duration::from_millis(1);

/// How long the hosts look for the rank that keeps the others waiting.
const MEET_FOR: Duration = Duration::from_secs(5);

/// NCCL's word for a rank that joins no group of a split.
const NO_COLOR: c_int = -1;

/// A group of ranks with GPUs.
pub struct Nccl {
    /// The same ranks.
    host: Box<dyn Communicator>,
    comm: sys::ncclComm_t,
    gpu: Rc<Streams>,
    timeout: Duration,
    flights: Vec<(Ticket, Flight)>,
    next: u64,
    /// Aborted: of no more use.
    broken: Cell<bool>,
}

/// What all groups of a rank share.
struct Streams {
    device: CudaDevice,
    exchanges: Arc<CudaStream>,
    /// What this rank has waited for NCCL.
    waited: Cell<Duration>,
}

enum Flight {
    /// Recorded behind the exchange; the tensors stay alive until then.
    Gpu {
        done: CudaEvent,
        name: String,
        _tensors: Vec<Vec<Tensor>>,
    },
    Host(Ticket),
}

impl Nccl {
    /// The ranks of `host`, of which this one's GPU is `device`. Collective.
    pub fn new(mut host: Box<dyn Communicator>, device: &CudaDevice) -> Result<Nccl> {
        let streams = (|| {
            let exchanges = device.cuda_stream().context().new_stream().map_err(driver_error)?;
            Ok(Rc::new(Streams { device: device.clone(), exchanges, waited: Cell::default() }))
        })();
        let gpu = agree(&mut *host, streams)?;
        let own = if host.rank() == 0 { unique_id() } else { Ok(Vec::new()) };
        let mut id = agree(&mut *host, own)?;
        host.broadcast(&mut id, 0)?;
        ensure!(id.len() == 128, "rank 0 sent an NCCL id of {} bytes", id.len());
        let id = sys::ncclUniqueId { internal: std::array::from_fn(|i| id[i] as c_char) };
        let (ranks, rank) = (c_int::try_from(host.size())?, host.rank() as c_int);
        let mut group = Nccl::empty(host, gpu, DEFAULT_TIMEOUT);
        group.bind()?;
        let mut config = config();
        let code = unsafe { sys::ncclCommInitRankConfig(&mut group.comm, ranks, id, rank, &mut config) };
        group.settle(code, group.comm, &"meeting of the GPUs")?;
        Ok(group)
    }

    fn empty(host: Box<dyn Communicator>, gpu: Rc<Streams>, timeout: Duration) -> Nccl {
        let (comm, flights, next, broken) = (ptr::null_mut(), Vec::new(), 0, Cell::new(false));
        Nccl { host, comm, gpu, timeout, flights, next, broken }
    }

    /// This thread's context is the GPU's from now on.
    fn bind(&self) -> Result<()> {
        self.gpu.exchanges.context().bind_to_thread().map_err(driver_error)
    }

    /// Waits until `comm` has carried out the call that returned `code`, so that it can take the next one.
    fn settle(&mut self, code: ncclResult_t, comm: sys::ncclComm_t, op: &dyn Display) -> Result<()> {
        self.expect(code, op)?;
        match self.poll(|| Ok(self.state(comm, op)? == ncclResult_t::ncclSuccess))? {
            true => Ok(()),
            false => Err(self.expired(op)),
        }
    }

    /// What an asynchronous call of `comm` has come to; an error if it failed, here or on another rank.
    fn state(&self, comm: sys::ncclComm_t, op: &dyn Display) -> Result<ncclResult_t> {
        let mut state = ncclResult_t::ncclSuccess;
        self.expect(unsafe { sys::ncclCommGetAsyncError(comm, &mut state) }, op)?;
        self.expect(state, op)?;
        Ok(state)
    }

    /// `code` is none of failure; one of failure ends this group.
    fn expect(&self, code: ncclResult_t, op: &dyn Display) -> Result<()> {
        if under_way(code) {
            return Ok(());
        }
        let why = describe(code, self.comm);
        self.abort_exchanges();
        bail!("rank {}, collective `{op}` on GPUs: {why}", self.host.rank())
    }

    /// Looks again and again until `done`; false if the time limit came first.
    fn poll(&self, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
        let start = Instant::now();
        let complete = loop {
            let waited = start.elapsed();
            match done()? {
                true => break true,
                false if waited > self.timeout => break false,
                false if waited > SPIN_FOR => std::thread::sleep(SLEEP),
                false => std::hint::spin_loop(),
            }
        };
        self.gpu.waited.set(self.gpu.waited.get() + start.elapsed());
        Ok(complete)
    }

    /// The error of what has not come to its end within the time limit. All that is under way is aborted; the hosts, which run
    /// into the limit alike, meet to find out who is missing.
    fn expired(&mut self, op: &dyn Display) -> Error {
        self.abort_exchanges();
        self.host.set_timeout(MEET_FOR.min(self.timeout));
        let why = match self.host.barrier() {
            Ok(()) => "all ranks are there, so look at the links between their GPUs (NCCL_DEBUG=WARN)".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        TimedOut::new(self.rank(), op, self.timeout, &why, Duration::ZERO).into()
    }

    /// False if not all ranks have come to it in time. Their hosts do not meet then: a rank that leaves after an error would be
    /// taken for one that waits as the others do.
    fn take_leave(&mut self) -> Result<bool> {
        let op = &"leave";
        self.timeout = MEET_FOR;
        self.expect(unsafe { sys::ncclCommFinalize(self.comm) }, op)?;
        self.poll(|| Ok(self.state(self.comm, op)? == ncclResult_t::ncclSuccess))
    }

    /// Ends what is under way on this rank; that the others notice by their time limits, or by NCCL.
    fn abort_exchanges(&self) {
        if !self.broken.replace(true) && !self.comm.is_null() {
            unsafe { sys::ncclCommAbort(self.comm) };
        }
    }

    /// An abort has freed what NCCL keeps of the group.
    fn ensure_whole(&self) -> Result<()> {
        ensure!(!self.broken.get(), "a group of GPUs is used after an error");
        Ok(())
    }

    /// Calls NCCL for every tensor, as one launch on the stream of exchanges.
    fn launch(&mut self, exchange: Exchange, parts: &[Vec<Tensor>], op: &dyn Display) -> Result<()> {
        let mut tensors = Vec::new();
        for (part, list) in parts.iter().enumerate() {
            for tensor in list {
                tensors.push((part as c_int, address(tensor)?, tensor.elem_count()));
            }
        }
        let (comm, stream) = (self.comm, self.gpu.exchanges.cu_stream().cast());
        let (kind, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        self.expect(unsafe { sys::ncclGroupStart() }, op)?;
        let calls = tensors.into_iter().map(|(root, at, n)| unsafe {
            match exchange {
                Exchange::Sum => sys::ncclAllReduce(at, at, n, kind, sum, comm, stream),
                Exchange::Scatter => sys::ncclReduce(at, at, n, kind, sum, root, comm, stream),
                Exchange::Gather => sys::ncclBroadcast(at, at, n, kind, root, comm, stream),
            }
        });
        let failed = calls.into_iter().find(|&code| !under_way(code));
        // A group that is started is ended, or this thread's later calls would all be part of it.
        let ended = unsafe { sys::ncclGroupEnd() };
        self.settle(failed.unwrap_or(ended), self.comm, op)
    }

    fn start_on_gpu(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Flight> {
        self.ensure_whole()?;
        let name = exchange.describe(parts.iter().flatten().map(Tensor::elem_count).sum());
        self.bind()?;
        let gpu = self.gpu.clone();
        let computed = gpu.device.cuda_stream().record_event(None).map_err(driver_error)?;
        gpu.exchanges.wait(&computed).map_err(driver_error)?;
        self.launch(exchange, &parts, &name)?;
        let done = gpu.exchanges.record_event(None).map_err(driver_error)?;
        Ok(Flight::Gpu { done, name, _tensors: parts })
    }
}

/// Not an answer of failure.
fn under_way(code: ncclResult_t) -> bool {
    matches!(code, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress)
}

/// Rank 0's name for a meeting of GPUs.
fn unique_id() -> Result<Vec<u8>> {
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    match unsafe { sys::ncclGetUniqueId(&mut id) } {
        ncclResult_t::ncclSuccess => Ok(id.internal.map(|byte| byte as u8).to_vec()),
        code => bail!("no id for a meeting of GPUs: {}", describe(code, ptr::null_mut())),
    }
}

/// NCCL_CONFIG_INITIALIZER, a macro that the bindings lack, but non-blocking.
fn config() -> sys::ncclConfig_t {
    const UNSET: c_int = c_int::MIN;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 23000,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
    }
}

/// NCCL's words for `code`, and its last warning.
fn describe(code: ncclResult_t, comm: sys::ncclComm_t) -> String {
    // SAFETY: both strings are NCCL's own and live until its next call.
    let text = |text: *const c_char| match text.is_null() {
        true => String::new(),
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
    };
    let (error, last) = unsafe { (text(sys::ncclGetErrorString(code)), text(sys::ncclGetLastError(comm))) };
    format!("NCCL: {error} ({code:?}){}{last}", if last.is_empty() { "" } else { ": " })
}

fn address(tensor: &Tensor) -> Result<*mut c_void> {
    ensure!(tensor.is_contiguous() && tensor.dtype() == DType::F32, "NCCL exchanges contiguous f32, not {tensor:?}");
    match Gpu::of(tensor) {
        Some(gpu) => Ok(gpu.at(tensor)?.0),
        None => bail!("an exchange of tensors on a GPU and of others"),
    }
}

fn driver_error(error: DriverError) -> crate::error::Error {
    anyhow!("the NVIDIA driver answers: {error:?}")
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
        self.host.set_timeout(timeout);
    }

    fn waited(&self) -> Duration {
        self.host.waited() + self.gpu.waited.get()
    }

    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
        exchange.check(&parts, self.size())?;
        let on_host = parts.iter().flatten().all(|tensor| tensor.device().is_cpu());
        let flight = match on_host {
            true => Flight::Host(self.host.start(exchange, parts)?),
            false => self.start_on_gpu(exchange, parts)?,
        };
        let ticket = Ticket(self.next);
        self.next += 1;
        self.flights.push((ticket, flight));
        Ok(ticket)
    }

    /// The GPU goes on by itself; only the hosts' exchanges need it.
    fn progress(&mut self) -> Result<()> {
        self.host.progress()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        let Some(i) = self.flights.iter().position(|(started, _)| *started == ticket) else {
            bail!("{ticket:?} was not started or was waited for before");
        };
        match self.flights.swap_remove(i).1 {
            Flight::Host(ticket) => self.host.wait(ticket),
            Flight::Gpu { done, name, _tensors } => {
                self.ensure_whole()?;
                let complete = self.poll(|| {
                    self.state(self.comm, &name)?;
                    done.try_is_complete().map_err(driver_error)
                })?;
                if complete { Ok(()) } else { Err(self.expired(&name)) }
            }
        }
    }

    fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()> {
        self.host.reduce(values, reduction)
    }

    fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        self.host.broadcast(data, root)
    }

    fn barrier(&mut self) -> Result<()> {
        self.host.barrier()
    }

    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
        self.ensure_whole()?;
        let host = self.host.split(color)?;
        let (color, key) = (color.map_or(Ok(NO_COLOR), c_int::try_from)?, self.rank() as c_int);
        let (mut comm, mut config) = (ptr::null_mut(), config());
        self.bind()?;
        // Ranks that join no group call it too, and get none.
        let code = unsafe { sys::ncclCommSplit(self.comm, color, key, &mut comm, &mut config) };
        self.settle(code, self.comm, &"split")?;
        let Some(host) = host else { return Ok(None) };
        let mut group = Nccl::empty(host, self.gpu.clone(), self.timeout);
        group.comm = comm;
        group.settle(ncclResult_t::ncclSuccess, comm, &"split")?;
        Ok(Some(Box::new(group)))
    }

    fn abort(&self, code: i32) -> ! {
        self.host.abort(code)
    }
}

impl Drop for Nccl {
    /// All exchanges done: the ranks take leave of each other. Else, or if one does not come, what is under way is aborted.
    fn drop(&mut self) {
        if self.comm.is_null() || self.broken.get() {
            return;
        }
        let is_idle = self.flights.iter().all(|(_, flight)| matches!(flight, Flight::Host(_)));
        if is_idle && self.take_leave().unwrap_or(false) {
            unsafe { sys::ncclCommDestroy(self.comm) };
        } else {
            self.abort_exchanges();
        }
    }
}

/// On GPUs only (scripts/gpu-check.sh). Several ranks share one GPU where there is one: NCCL from 2.30 on allows that with
/// NCCL_MULTI_RANK_GPU_ENABLE=1, older ones take ranks for those of several hosts by NCCL_HOSTID.
#[cfg(test)]
mod tests {
    use super::super::{Solo, thread};
    use super::*;
    use crate::ops::cuda;
    use crate::ops::testing::alone_on_gpus;
    use candle_core::Device;
    use std::ops::Range;
    use std::path::PathBuf;

    fn gpu(rank: usize) -> CudaDevice {
        match cuda::select(rank).expect("tests of NCCL need a GPU").device {
            Device::Cuda(device) => device,
            _ => unreachable!("`select` gives GPUs"),
        }
    }

    /// Runs `law` on threads of this process, a rank each.
    fn on_threads(law: impl Fn(&mut Nccl) + Sync) {
        let mut version = 0;
        assert_eq!(unsafe { sys::ncclGetVersion(&mut version) }, ncclResult_t::ncclSuccess);
        let shares = version >= 23000 && std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some();
        if cuda::visible() == 1 && !shares {
            println!(
                "NCCL  2 ranks as threads: skipped: one GPU needs NCCL 2.30 (this is {version}) and NCCL_MULTI_RANK_GPU_ENABLE"
            );
            return;
        }
        let _alone = alone_on_gpus();
        thread::run(2, |comm| {
            let host = comm.split(Some(0)).unwrap().unwrap();
            law(&mut Nccl::new(host, &gpu(comm.rank())).unwrap());
        });
    }

    fn laws(comm: &mut Nccl) {
        sums_scatters_and_gathers(comm);
        an_exchange_comes_after_what_computes_its_tensors(comm);
        groups_exchange_by_themselves(comm);
        if comm.rank() == 0 {
            println!("NCCL  {} ranks: exchanges, order and groups are right", comm.size());
        }
    }

    fn device(comm: &Nccl) -> Device {
        Device::Cuda(comm.gpu.device.clone())
    }

    fn run(comm: &mut Nccl, exchange: Exchange, parts: Vec<Vec<Tensor>>) {
        let ticket = comm.start(exchange, parts).unwrap();
        comm.wait(ticket).unwrap();
        assert!(comm.wait(ticket).is_err(), "a second wait for one ticket");
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Ragged parts of rows that lie inside a larger tensor; the rest stays as it is.
    fn sums_scatters_and_gathers(comm: &mut Nccl) {
        let (rank, size, width) = (comm.rank(), comm.size(), 1000);
        let cut = |part: usize| if part == size { width } else { part * 7 };
        let columns: Vec<Range<usize>> = (0..size).map(|part| cut(part)..cut(part + 1)).collect();
        for exchange in [Exchange::Sum, Exchange::Scatter, Exchange::Gather] {
            let x = Tensor::full(rank as f32 + 1.0, (3, width), &device(comm)).unwrap();
            let row = x.narrow(0, 1, 1).unwrap();
            let part = |columns: &Range<usize>| vec![row.narrow(1, columns.start, columns.len()).unwrap()];
            run(comm, exchange, columns.iter().map(part).collect());
            let (found, sum) = (values(&x), (size * (size + 1) / 2) as f32);
            for (part, columns) in columns.iter().enumerate() {
                let expected = match exchange {
                    Exchange::Sum => sum,
                    Exchange::Scatter if part == rank => sum,
                    Exchange::Scatter => continue,
                    Exchange::Gather => part as f32 + 1.0,
                };
                assert!(found[width..][columns.clone()].iter().all(|&x| x == expected), "{exchange:?}, part {part}");
            }
            assert!(found[..width].iter().chain(&found[2 * width..]).all(|&x| x == rank as f32 + 1.0));
        }
    }

    /// A product that takes long is done when its sum starts; another goes on beside it.
    fn an_exchange_comes_after_what_computes_its_tensors(comm: &mut Nccl) {
        let ones = Tensor::ones((4096, 4096), DType::F32, &device(comm)).unwrap();
        let product = ones.matmul(&ones).unwrap();
        let ticket = comm.start(Exchange::Sum, vec![vec![product.clone()]]).unwrap();
        let beside = ones.matmul(&ones).unwrap();
        comm.wait(ticket).unwrap();
        assert!(values(&product).iter().all(|&x| x == 4096.0 * comm.size() as f32));
        assert!(values(&beside).iter().all(|&x| x == 4096.0));
    }

    /// Each rank a group of its own; then the last one in none.
    fn groups_exchange_by_themselves(comm: &mut Nccl) {
        let x = Tensor::ones(100, DType::F32, &device(comm)).unwrap();
        let mut alone = comm.split(Some(comm.rank())).unwrap().unwrap();
        let ticket = alone.start(Exchange::Sum, vec![vec![x.clone()]]).unwrap();
        alone.wait(ticket).unwrap();
        assert!(values(&x).iter().all(|&x| x == 1.0));
        let outside = comm.rank() + 1 == comm.size();
        let group = comm.split((!outside).then_some(0)).unwrap();
        assert_eq!(group.is_none(), outside);
        comm.barrier().unwrap();
    }

    #[test]
    fn one_rank() {
        let _alone = alone_on_gpus();
        laws(&mut Nccl::new(Box::new(Solo::default()), &gpu(0)).unwrap());
    }

    #[test]
    fn two_ranks() {
        on_threads(laws);
    }

    /// The time limit ends the wait, and the error says for what and for whom.
    #[test]
    fn a_rank_that_does_not_come_is_named() {
        on_threads(|comm| {
            comm.set_timeout(Duration::from_secs(2));
            if comm.rank() == 0 {
                let x = Tensor::ones(5, DType::F32, &device(comm)).unwrap();
                let told = comm.start(Exchange::Sum, vec![vec![x]]).and_then(|ticket| comm.wait(ticket)).unwrap_err();
                let told = told.to_string();
                assert!(told.contains("`sum of 5 values`") && told.contains("not called by rank 1"), "{told}");
                println!("NCCL  the error of a rank left alone: {told}");
            }
        });
    }

    /// One of two processes, for `scripts/gpu-check.sh`, which sets VCYCLE_NCCL_MEET to `rank:folder`.
    #[test]
    #[ignore = "needs another process"]
    fn one_of_two_processes() {
        let meet = std::env::var("VCYCLE_NCCL_MEET").expect("VCYCLE_NCCL_MEET=rank:folder");
        let (rank, folder) = meet.split_once(':').expect("rank:folder");
        let host = Files { rank: rank.parse().unwrap(), folder: folder.into(), met: 0 };
        laws(&mut Nccl::new(Box::new(host), &gpu(0)).unwrap());
    }

    /// Two processes that meet in files: hosts for a machine without MPI.
    struct Files {
        rank: usize,
        folder: PathBuf,
        met: usize,
    }

    impl Files {
        /// What both ranks bring, in their order.
        fn meet(&mut self, own: &[u8]) -> Result<[Vec<u8>; 2]> {
            self.met += 1;
            let name = |rank: usize| self.folder.join(format!("{}-{rank}", self.met));
            let hidden = name(self.rank).with_extension("tmp");
            std::fs::write(&hidden, own)?;
            std::fs::rename(hidden, name(self.rank))?;
            let start = Instant::now();
            while !(name(0).exists() && name(1).exists()) {
                ensure!(start.elapsed() < DEFAULT_TIMEOUT / 10, "the other process does not come");
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok([std::fs::read(name(0))?, std::fs::read(name(1))?])
        }
    }

    impl Communicator for Files {
        fn rank(&self) -> usize {
            self.rank
        }
        fn size(&self) -> usize {
            2
        }
        fn set_timeout(&mut self, _timeout: Duration) {}
        fn waited(&self) -> Duration {
            Duration::ZERO
        }
        fn start(&mut self, _exchange: Exchange, _parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
            bail!("files exchange no tensors")
        }
        fn progress(&mut self) -> Result<()> {
            Ok(())
        }
        fn wait(&mut self, _ticket: Ticket) -> Result<()> {
            bail!("files exchange no tensors")
        }
        fn reduce(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()> {
            let own: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let [first, second] = self
                .meet(&own)?
                .map(|bytes| bytes.as_chunks::<8>().0.iter().map(|x| f64::from_le_bytes(*x)).collect::<Vec<_>>());
            for (value, (a, b)) in values.iter_mut().zip(first.into_iter().zip(second)) {
                *value = if reduction == Reduction::Sum { a + b } else { a.max(b) };
            }
            Ok(())
        }
        fn broadcast(&mut self, data: &mut Vec<u8>, root: usize) -> Result<()> {
            data.clone_from(&self.meet(&data.clone())?[root]);
            Ok(())
        }
        fn barrier(&mut self) -> Result<()> {
            self.meet(&[]).map(drop)
        }
        /// Every group of the laws has one rank, which needs no files.
        fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
            self.meet(&[])?;
            Ok(color.map(|_| Box::new(Solo::default()) as Box<dyn Communicator>))
        }
        fn abort(&self, code: i32) -> ! {
            std::process::exit(code)
        }
    }
}
