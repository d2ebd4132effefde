//! Moves exchanges on while the rank computes.
//!
//! Over TCP, MPI sends, receives and adds inside its own calls only: a sum takes several rounds of messages, and between two
//! calls at most one of them is done. So a thread of its own calls MPI every now and then while any is under way. Two
//! threads never call MPI at the same time (the thread level is Serialized): whoever calls it holds [`Mover::exclusive`].

use mpi::ffi;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, park, sleep};
use std::time::Duration;

/// Between two calls. A call without news takes a few microseconds; a message on a fast network about as long as this.
const INTERVAL: Duration = Duration::from_micros(200);

/// The thread, asleep while no exchange is under way.
#[derive(Default)]
pub struct Mover {
    shared: Arc<Shared>,
    /// `None`: this MPI may be called by one thread only, and exchanges move in the rank's own calls.
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    mpi: Mutex<()>,
    under_way: AtomicUsize,
    ended: AtomicBool,
}

impl Mover {
    /// MPI is initialised with the level Serialized at least.
    pub fn start() -> std::io::Result<Mover> {
        let shared = Arc::<Shared>::default();
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("mpi".to_owned()).spawn(move || of_thread.run())?;
        Ok(Mover { shared, thread: Some(thread) })
    }

    /// The right to call MPI.
    pub fn exclusive(&self) -> MutexGuard<'_, ()> {
        self.shared.mpi.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exchange is under way.
    pub fn started(&self) {
        if self.shared.under_way.fetch_add(1, Ordering::Relaxed) == 0 {
            self.wake();
        }
    }

    /// One exchange fewer is under way.
    pub fn finished(&self) {
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    fn wake(&self) {
        self.thread.iter().for_each(|thread| thread.thread().unpark());
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // It ends without a panic, and there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            if self.under_way.load(Ordering::Relaxed) == 0 {
                park();
                continue;
            }
            // The rank itself moves them on while it holds the lock.
            if let Ok(_mpi) = self.mpi.try_lock() {
                poke();
            }
            sleep(INTERVAL);
        }
    }
}

/// A call that does nothing but move everything on.
fn poke() {
    let mut found: c_int = 0;
    // SAFETY: MPI is initialised, and the caller holds the lock. Nobody sends to COMM_SELF. An error shows where it matters, in
    // the call that waits.
    unsafe {
        let (source, tag) = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
        ffi::MPI_Iprobe(source, tag, ffi::RSMPI_COMM_SELF, &mut found, ffi::RSMPI_STATUS_IGNORE);
    }
}
