//! The machine a rank runs on: cores, threads, peak speed, provenance.

use crate::comm::{Communicator, Reduction};
use crate::error::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Cores this process may run on (its affinity mask) and cores of the machine.
pub fn cores() -> (usize, usize) {
    let may_use = std::thread::available_parallelism().map_or(1, |n| n.get());
    // SAFETY: sysconf reads a system constant.
    let machine = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    (may_use, usize::try_from(machine).unwrap_or(may_use).max(may_use))
}

/// Starts the thread pool of this rank and returns its size. `wanted = 0`: the cores the launcher bound this rank to, or,
/// unbound, its share of the node's.
pub fn use_threads(wanted: usize, ranks_on_node: usize) -> Result<usize> {
    let (may_use, machine) = cores();
    let share = if may_use < machine { may_use } else { machine / ranks_on_node };
    let threads = if wanted > 0 { wanted } else { share.max(1) };
    // The calling thread is one of them: an operation need not wake another thread and wait for it.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread();
    pool.build_global().context("cannot start the thread pool")?;
    Ok(threads)
}

/// FLOP/s that the matrix products of all ranks reach together, each on its threads, all at once. Collective.
pub fn gemm_peak(comm: &mut dyn Communicator) -> Result<f64> {
    comm.barrier()?;
    let mut peak = [own_gemm_peak()];
    comm.reduce(&mut peak, Reduction::Sum)?;
    Ok(peak[0])
}

/// FLOP/s of the fastest of some square products, large enough for the cost of a call not to count.
fn own_gemm_peak() -> f64 {
    const SIZE: usize = 768;
    let (a, b) = (vec![0.5f32; SIZE * SIZE], vec![0.5f32; SIZE * SIZE]);
    let mut c = vec![0f32; SIZE * SIZE];
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(150) {
        let one = Instant::now();
        let row = SIZE as isize;
        // SAFETY: all three matrices are SIZE × SIZE, row-major, and c aliases neither a nor b.
        unsafe {
            gemm::gemm(
                SIZE,
                SIZE,
                SIZE,
                c.as_mut_ptr(),
                1,
                row,
                false,
                a.as_ptr(),
                1,
                row,
                b.as_ptr(),
                1,
                row,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(rayon::current_num_threads()),
            );
        }
        best = best.min(one.elapsed().as_secs_f64());
    }
    2.0 * (SIZE as f64).powi(3) / best
}

/// What a reader needs to repeat a run: versions, machine, ranks, data.
pub fn provenance(comm: &dyn Communicator, threads: usize, peak_flops: f64, data: &Path) -> Value {
    let data_meta = std::fs::read(data.join("meta.json")).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    json!({
        "started_unix_s": std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        "command": std::env::args().collect::<Vec<_>>(),
        "version": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("VCYCLE_COMMIT"),
        "host": hostname(),
        "cpu": cpu_model(),
        "ranks": comm.size(),
        "threads_per_rank": threads,
        "gemm_peak_flops": peak_flops,
        "hdf5": hdf5::library_version(),
        "slurm_job": std::env::var("SLURM_JOB_ID").ok(),
        "slurm_nodes": std::env::var("SLURM_JOB_NODELIST").ok(),
        "data": data_meta,
    })
}

fn hostname() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|s| s.trim().to_owned())
}

fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}
