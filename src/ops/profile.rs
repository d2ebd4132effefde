//! Seconds spent in each op, for `vcycle bench step`. Off, as in training, an op reads one flag. On, each op of a GPU
//! waits until its work is done, so that the time is its own; a step then takes longer than one that is not profiled.

use candle_core::Device;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

static ON: AtomicBool = AtomicBool::new(false);
static ENTRIES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
/// The GPU whose work is waited for.
static GPU: Mutex<Option<Device>> = Mutex::new(None);

/// What an op has taken since the last [`take`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Entry {
    pub op: &'static str,
    /// Shape [o, i] of the weight in a matrix product; [0, 0] for other ops.
    pub weight: [usize; 2],
    pub calls: u64,
    pub seconds: f64,
}

/// Counts until it is dropped.
#[must_use = "an op's timer lives as long as the op"]
pub struct Timer(Option<Running>);

struct Running {
    op: &'static str,
    weight: [usize; 2],
    /// Threads that work on the op at the same time, each with a timer.
    threads: usize,
    start: Instant,
}

/// Turns the profile of the ops on `device` on, for all threads.
pub fn enable(device: &Device) {
    *lock(&GPU) = (!device.is_cpu()).then(|| device.clone());
    ON.store(true, Ordering::Relaxed);
}

pub fn disable() {
    ON.store(false, Ordering::Relaxed);
}

/// Whether ops are timed.
#[cfg(any(feature = "cuda", test))]
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Times `op` until the end of the scope.
#[inline]
pub fn time(op: &'static str) -> Timer {
    start(op, [0, 0], 1)
}

/// As [`time`], for a product with a weight of shape `weight`.
#[inline]
pub fn time_product(op: &'static str, weight: [usize; 2]) -> Timer {
    start(op, weight, 1)
}

/// As [`time`], for a part of an op that all threads of the pool work on, each calling this: counts the thread's share.
#[inline]
pub fn time_on_thread(op: &'static str) -> Timer {
    start(op, [0, 0], rayon::current_num_threads())
}

#[inline]
fn start(op: &'static str, weight: [usize; 2], threads: usize) -> Timer {
    let on = ON.load(Ordering::Relaxed);
    Timer(on.then(|| {
        wait_for_gpu();
        Running { op, weight, threads, start: Instant::now() }
    }))
}

/// Until the work of the ops before is done. An error comes back from the next op.
fn wait_for_gpu() {
    if let Some(gpu) = &*lock(&GPU) {
        let _ = gpu.synchronize();
    }
}

/// The entries so far, in the order of their first calls; counting starts anew.
pub fn take() -> Vec<Entry> {
    lock(&ENTRIES).drain(..).collect()
}

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some(Running { op, weight, threads, start }) = self.0.take() else { return };
        wait_for_gpu();
        let seconds = start.elapsed().as_secs_f64() / threads as f64;
        let mut entries = lock(&ENTRIES);
        match entries.iter_mut().find(|entry| (entry.op, entry.weight) == (op, weight)) {
            Some(entry) => {
                entry.calls += 1;
                entry.seconds += seconds;
            }
            None => entries.push(Entry { op, weight, calls: 1, seconds }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: the profile is shared by all threads. Other tests' ops may be counted meanwhile, by other names.
    #[test]
    fn counts_when_on_and_only_then() {
        let own = |entries: Vec<Entry>| entries.into_iter().filter(|e| e.op == "test").collect::<Vec<_>>();
        drop(time("test"));
        assert_eq!(own(take()), []);

        enable(&Device::Cpu);
        for weight in [[1, 2], [1, 2], [2, 1]] {
            let _time = time_product("test", weight);
            std::thread::sleep(std::time::Duration::from_millis(if weight == [1, 2] { 50 } else { 1 }));
        }
        disable();
        drop(time("test"));
        let entries = own(take());
        assert_eq!(entries.iter().map(|e| (e.weight, e.calls)).collect::<Vec<_>>(), [([1, 2], 2), ([2, 1], 1)]);
        assert!(entries[0].seconds >= 2e-3 && entries[0].seconds > entries[1].seconds, "{entries:?}");
        assert_eq!(own(take()), []);
    }
}
