//! The machine a rank runs on: cores, threads, peak speed, provenance.

use super::memory::forget_peak;
use crate::comm::{self, Communicator, Reduction};
use crate::error::{Context, Result};
use crate::model::Spec;
use crate::ops::linear;
use crate::ops::matrix::{Factors, Mat, MatMut, multiply_parallel};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
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

/// FLOP/s that the matrix products of `spec` reach on all ranks together, each on its threads or its GPU, all at once.
/// Collective.
pub fn gemm_peak(comm: &mut dyn Communicator, device: &Device, spec: &Spec) -> Result<f64> {
    comm.barrier()?;
    let mut peak =
        [if device.is_cpu() { gemm_peak_of_cpu(spec.factors)? } else { gemm_peak_of_gpu(device, spec.dtype)? }];
    comm.reduce(&mut peak, Reduction::Sum)?;
    Ok(peak[0])
}

/// FLOP/s of the fastest of some square products, large enough for the cost of a call not to count.
fn peak(size: usize, mut product: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(150) {
        let one = Instant::now();
        product()?;
        best = best.min(one.elapsed().as_secs_f64());
    }
    Ok(2.0 * (size as f64).powi(3) / best)
}

fn gemm_peak_of_gpu(device: &Device, dtype: DType) -> Result<f64> {
    const SIZE: usize = 8192;
    // Numbers that are all the same draw less power, and a GPU then runs faster than with any real ones.
    let matrix = || Tensor::rand(-1f32, 1f32, (SIZE, SIZE), device)?.to_dtype(dtype);
    let (a, b, c) = (matrix()?, matrix()?, matrix()?);
    let found = peak(SIZE, || {
        linear::backward_input(Factors::Exact, &a, &b, 1.0, 0.0, &c)?;
        Ok(device.synchronize()?)
    });
    drop((a, b, c));
    forget_peak(device)?;
    found
}

fn gemm_peak_of_cpu(factors: Factors) -> Result<f64> {
    const SIZE: usize = 768;
    let (a, b) = (vec![0.5f32; SIZE * SIZE], vec![0.5f32; SIZE * SIZE]);
    let mut c = vec![0f32; SIZE * SIZE];
    peak(SIZE, || {
        let (a, b, c) = (Mat::new(&a, SIZE), Mat::new(&b, SIZE), MatMut::new(&mut c, SIZE));
        multiply_parallel(factors, 1.0, a, b, 0.0, c);
        Ok(())
    })
}

/// The host of each rank. Collective.
pub fn hosts(comm: &mut dyn Communicator) -> Result<Vec<String>> {
    let mut hosts = Vec::new();
    for root in 0..comm.size() {
        let mut name = hostname().unwrap_or_default().into_bytes();
        comm.broadcast(&mut name, root)?;
        hosts.push(String::from_utf8_lossy(&name).into_owned());
    }
    Ok(hosts)
}

/// What a reader needs to repeat a run: versions, machine, ranks, network, data. `hosts` has one entry a rank.
pub fn provenance(hosts: Vec<String>, threads: usize, peak_flops: f64, data: &Path) -> Value {
    let data_meta = std::fs::read(data.join("meta.json")).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    json!({
        "started_unix_s": std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        "command": std::env::args().collect::<Vec<_>>(),
        "version": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("VCYCLE_COMMIT"),
        "host": hostname(),
        "cpu": cpu_model(),
        "ranks": hosts.len(),
        "hosts": counted(hosts),
        "threads_per_rank": threads,
        "gemm_peak_flops": peak_flops,
        "mpi": comm::library(),
        "interconnect": interconnect(Path::new("/sys/class")),
        "network_settings": network_settings(std::env::vars()),
        "hdf5": hdf5::library_version(),
        "slurm_job": std::env::var("SLURM_JOB_ID").ok(),
        "slurm_nodes": std::env::var("SLURM_JOB_NODELIST").ok(),
        "data": data_meta,
    })
}

/// Ranks on each host.
fn counted(hosts: Vec<String>) -> BTreeMap<String, usize> {
    let mut ranks = BTreeMap::new();
    hosts.into_iter().for_each(|host| *ranks.entry(host).or_default() += 1);
    ranks
}

/// The network devices of this host that are up, with their speed: `mlx5_0: 400 Gb/sec (4X NDR)`, `eth0: 10000 Mb/s`.
/// Which of them MPI takes is for MPI to say.
fn interconnect(class: &Path) -> Vec<String> {
    let entries = |kind: &str| {
        let listed = std::fs::read_dir(class.join(kind)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            listed.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect();
        names.sort();
        names
    };
    let read =
        |path: &Path, file: &str| std::fs::read_to_string(path.join(file)).map(|text| text.trim().to_owned()).ok();
    let infiniband = entries("infiniband")
        .into_iter()
        .filter_map(|(name, path)| Some(format!("{name}: {}", read(&path, "ports/1/rate")?)));
    let ethernet = entries("net").into_iter().filter_map(|(name, path)| {
        let up = name != "lo" && read(&path, "operstate")? != "down";
        let speed = read(&path, "speed").filter(|speed| !speed.starts_with('-'));
        up.then(|| format!("{name}: {}", speed.map_or("speed unknown".to_owned(), |speed| format!("{speed} Mb/s"))))
    });
    infiniband.chain(ethernet).collect()
}

/// Variables that tell MPI, UCX, libfabric or NCCL how to communicate.
fn network_settings(environment: impl Iterator<Item = (String, String)>) -> BTreeMap<String, String> {
    const PREFIXES: [&str; 6] = ["OMPI_MCA_", "PRTE_MCA_", "MPICH_", "UCX_", "FI_", "NCCL_"];
    // What mpirun tells its own processes is not a setting.
    let internal = |name: &str| name.starts_with("OMPI_MCA_orte_") || name.starts_with("OMPI_MCA_ess");
    environment.filter(|(name, _)| PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && !internal(name)).collect()
}

fn hostname() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|s| s.trim().to_owned())
}

/// As the kernel calls it.
pub fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_devices_are_listed_with_their_speed() {
        let class = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = class.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)\n");
        for (name, state, speed) in
            [("eth0", "up", "10000"), ("eth1", "down", "-1"), ("tap0", "unknown", "-1"), ("lo", "unknown", "0")]
        {
            write(&format!("net/{name}/operstate"), state);
            write(&format!("net/{name}/speed"), speed);
        }
        let expected = ["mlx5_0: 400 Gb/sec (4X NDR)", "eth0: 10000 Mb/s", "tap0: speed unknown"];
        assert_eq!(interconnect(class.path()), expected);
        assert_eq!(interconnect(&class.path().join("none")), [""; 0]);
    }

    #[test]
    fn hosts_are_counted_and_settings_of_the_network_kept() {
        let hosts = ["b", "a", "b"].map(str::to_owned).to_vec();
        assert_eq!(counted(hosts), BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 2)]));
        let names = ["PATH", "UCX_TLS", "OMPI_MCA_btl", "OMPI_MCA_orte_ess_num_procs"];
        let settings = network_settings(names.iter().map(|name| (name.to_string(), "x".to_owned())));
        assert_eq!(settings.into_keys().collect::<Vec<_>>(), ["OMPI_MCA_btl", "UCX_TLS"]);
    }
}
