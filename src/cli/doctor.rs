//! `vcycle doctor`: is this machine fit to train on? One line a check, with what to do.

use super::text;
use crate::comm::{Reduction, World};
use crate::error::{Context, Outcome, Result, bail};
use crate::ops::bf16;
use crate::ops::matrix::{Factors, Mat, MatMut, multiply, multiply_parallel};
use rustix::process::{Resource, getrlimit};
use rustix::thread::sched_getaffinity;
use std::fs;
use std::path::Path;
use std::time::Instant;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs the command on the rank it is called on; under mpirun or srun rank 0 prints.
pub fn run(args: Args) -> Result<Outcome> {
    let mut world = World::init();
    let rank = world.as_ref().map_or(0, World::rank);
    let ranks = check_ranks(&mut world);
    let mut outcome = Ok(Outcome::Done);
    if rank == 0 {
        let mut checks = check_machine();
        checks.extend(ranks);
        outcome = report(&checks, args.json);
    }
    if let Ok(world) = &mut world {
        world.communicator().barrier()?;
    }
    outcome
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

/// The result of one check.
#[derive(Debug, serde::Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, status: Status::Ok, found: found.into(), advice: None }
    }

    fn warn_if(self, bad: bool, advice: impl Into<String>) -> Check {
        if bad { Check { status: Status::Warn, advice: Some(advice.into()), ..self } } else { self }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { name, status: Status::Fail, found: found.into(), advice: Some(advice.into()) }
    }
}

fn report(checks: &[Check], json: bool) -> Result<Outcome> {
    if json {
        println!("{}", serde_json::to_string_pretty(checks)?);
    } else {
        for Check { name, status, found, advice } in checks {
            let status = format!("{status:?}").to_lowercase();
            let advice = advice.as_ref().map(|advice| format!("\n{:17}→ {advice}", "")).unwrap_or_default();
            println!("{status:<5}{name:<12}{found}{advice}");
        }
    }
    let failed: Vec<&str> = checks.iter().filter(|c| c.status == Status::Fail).map(|c| c.name).collect();
    if !failed.is_empty() {
        bail!("not fit to train on: {}", failed.join(", "));
    }
    Ok(Outcome::Done)
}

/// What concerns this process and machine alone.
fn check_machine() -> Vec<Check> {
    vec![
        check_build(),
        check_cpu(),
        check_memory(),
        check_gemm("gemm", Factors::Exact),
        check_gemm("bf16", Factors::Bf16),
        check_gpu(),
        check_mpi_library(),
        check_hdf5(),
        check_file_system(),
        check_disk(),
        check_limits(),
        check_slurm(|name| std::env::var(name).ok()),
    ]
}

fn check_build() -> Check {
    let features = [
        ("mpi", cfg!(feature = "mpi")),
        ("cuda", cfg!(feature = "cuda")),
        ("hdf5-static", cfg!(feature = "hdf5-static")),
    ];
    let built: Vec<&str> = features.iter().filter(|(_, built)| *built).map(|(name, _)| *name).collect();
    let list = if built.is_empty() { "none".to_owned() } else { built.join(", ") };
    Check::ok("vcycle", format!("{}, features: {list}", env!("CARGO_PKG_VERSION")))
        .warn_if(cfg!(debug_assertions), "a debug build is many times slower: build with --release")
}

fn check_cpu() -> Check {
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let simd = simd();
    let found = format!("{model}, {} cores for this process, SIMD: {}", cores(), simd.join(", "));
    Check::ok("cpu", found).warn_if(
        simd.is_empty(),
        "neither AVX2 with FMA nor AVX-512: matrix products will be slow; is this an emulated CPU?",
    )
}

/// Cores this process may use by its affinity mask and cgroup.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Instruction sets that matter to matrix products and checksums.
#[cfg(target_arch = "x86_64")]
fn simd() -> Vec<&'static str> {
    let sets = [
        ("avx2", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
        ("avx512", is_x86_feature_detected!("avx512f")),
        ("sha", is_x86_feature_detected!("sha")),
    ];
    sets.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn simd() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}

fn check_memory() -> Check {
    let bytes =
        |key| field("/proc/meminfo", key).and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok()).map(|k| k << 10);
    let (Some(total), Some(available)) = (bytes("MemTotal"), bytes("MemAvailable")) else {
        return Check::ok("memory", "unknown: /proc/meminfo cannot be read");
    };
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|v| v.trim().parse().ok());
    let limit = limit.map(|limit| format!(", limited to {} here", text::bytes(limit))).unwrap_or_default();
    Check::ok("memory", format!("{} available of {}{limit}", text::bytes(available), text::bytes(total)))
        .warn_if(available < 1 << 30, "less than 1 GiB is available: `vcycle plan` says what a config needs")
}

/// The value of `key : value` in a file of /proc.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = |line: &str| line.split_once(':').filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim().to_owned());
    text.lines().find_map(value)
}

/// Speed of a product of two [n, n] matrices as training computes it: 2 n³ FLOPs.
fn check_gemm(name: &'static str, factors: Factors) -> Check {
    const N: usize = 1024;
    type Product = fn(Factors, f64, Mat<f32>, Mat<f32>, f64, MatMut<f32>);
    let (a, b, mut c) = (vec![1f32; N * N], vec![1f32; N * N], vec![0f32; N * N]);
    let mut gflops = |product: Product| {
        let mut seconds = || {
            let start = Instant::now();
            product(factors, 1.0, Mat::new(&a, N), Mat::new(&b, N), 0.0, MatMut::new(&mut c, N));
            start.elapsed().as_secs_f64()
        };
        let best = (0..5).map(|_| seconds()).fold(f64::INFINITY, f64::min);
        2e-9 * (N as f64).powi(3) / best
    };
    let (one, all) = (gflops(multiply), gflops(multiply_parallel));
    let threads = rayon::current_num_threads();
    let how = match factors {
        Factors::Exact => "f32",
        Factors::Bf16 => bf16::instructions(),
    };
    Check::ok(name, format!("{one:.0} GFLOP/s on one thread, {all:.0} on {threads} ({how}, n = {N})")).warn_if(
        threads > 1 && all < 0.6 * one * threads as f64,
        "threads speed it up badly: other processes use these cores, or they are hyperthreads",
    )
}

#[cfg(not(feature = "cuda"))]
fn check_gpu() -> Check {
    let driver = Path::new("/dev/nvidiactl").exists();
    let found =
        if driver { "an NVIDIA driver, but CUDA is not built in" } else { "no NVIDIA GPU, CUDA is not built in" };
    Check::ok("gpu", found).warn_if(driver, "to use the GPU: cargo build --release --features cuda")
}

#[cfg(feature = "cuda")]
fn check_gpu() -> Check {
    match crate::ops::cuda::select(0) {
        Ok(gpu) => Check::ok("gpu", format!("{} of {} can be used", gpu.name, crate::ops::cuda::visible())),
        Err(e) => Check::ok("gpu", format!("CUDA is built in, but GPU 0 cannot be used: {e:#}"))
            .warn_if(true, "parallel.device = \"auto\" takes the CPU only where no GPU is visible"),
    }
}

#[cfg(feature = "mpi")]
fn check_mpi_library() -> Check {
    let version = mpi::environment::library_version().unwrap_or_default();
    Check::ok("mpi", version.split([',', '\n']).next().unwrap_or_default().trim())
}

#[cfg(not(feature = "mpi"))]
fn check_mpi_library() -> Check {
    Check::ok("mpi", "not built in: one rank; several need the feature `mpi`")
}

/// Writes and reads an HDF5 file here, without its file locks, as checkpoints do.
fn check_hdf5() -> Check {
    let (major, minor, patch) = hdf5::library_version();
    let round_trip = || -> Result<()> {
        let folder = tempfile::tempdir_in(".")?;
        let path = folder.path().join("test.h5");
        let with_options = || {
            let mut options = hdf5::File::with_options();
            options.with_fapl(|fapl| fapl.file_locking(false));
            options
        };
        with_options().create(&path)?.new_dataset::<f32>().shape(2).create("x")?.write_raw(&[1f32, 2.0])?;
        let read: Vec<f32> = with_options().open(&path)?.dataset("x")?.read_raw()?;
        if read != [1.0, 2.0] {
            bail!("wrote [1, 2], read back {read:?}");
        }
        Ok(())
    };
    match round_trip() {
        Ok(()) => Check::ok("hdf5", format!("{major}.{minor}.{patch}, writes and reads here")),
        Err(e) => Check::fail(
            "hdf5",
            format!("{major}.{minor}.{patch}: {e:#}"),
            "checkpoints cannot be written here: use another folder, or export HDF5_USE_FILE_LOCKING=FALSE if it speaks of locks",
        ),
    }
}

/// Magic numbers of statfs(2). `true`: cluster file systems on which HDF5's file locks may fail or hang.
const FILE_SYSTEMS: &[(u64, &str, bool)] = &[
    (0x0bd0_0bd0, "Lustre", true),
    (0x4750_4653, "GPFS", true),
    (0x1983_0326, "BeeGFS", true),
    (0x0000_6969, "NFS", true),
    (0x0000_ef53, "ext4", false),
    (0x5846_5342, "XFS", false),
    (0x9123_683e, "Btrfs", false),
    (0x2fc1_2fc1, "ZFS", false),
    (0x794c_7630, "overlay", false),
    (0x0102_1994, "tmpfs", false),
];

fn check_file_system() -> Check {
    let stat = match rustix::fs::statfs(".") {
        Ok(stat) => stat,
        Err(e) => return Check::ok("files", "unknown file system").warn_if(true, format!("statfs fails here: {e}")),
    };
    let magic = stat.f_type as u64;
    let (name, locks) = match FILE_SYSTEMS.iter().find(|(number, ..)| *number == magic) {
        Some(&(_, name, locks)) => (name.to_owned(), locks),
        None => (format!("file system of type {magic:#x}"), false),
    };
    let off = std::env::var("HDF5_USE_FILE_LOCKING").is_ok_and(|v| v == "FALSE" || v == "0");
    let free = stat.f_bavail as u64 * stat.f_bsize as u64;
    let check = Check::ok("files", format!("{name}, {} free in the current folder", text::bytes(free)));
    if free < 1 << 30 {
        return check.warn_if(true, "less than 1 GiB is free: `vcycle plan` says what a checkpoint needs");
    }
    check.warn_if(
        locks && !off,
        "vcycle itself needs no file locks; to read checkpoints by h5py here: export HDF5_USE_FILE_LOCKING=FALSE",
    )
}

/// The operations that make a checkpoint safe: write, fsync, rename, fsync of the folder.
fn check_disk() -> Check {
    const MIB: usize = 16;
    let write = || -> Result<f64> {
        let folder = tempfile::tempdir_in(".").context("cannot create a folder")?;
        let (temporary, target) = (folder.path().join("temporary"), folder.path().join("final"));
        let content = vec![7u8; MIB << 20];
        let start = Instant::now();
        fs::write(&temporary, &content).context("cannot write a file")?;
        fs::File::open(&temporary)?.sync_all().context("cannot sync a file")?;
        fs::rename(&temporary, &target).context("cannot rename a file")?;
        fs::File::open(folder.path())?.sync_all().context("cannot sync a folder")?;
        Ok(start.elapsed().as_secs_f64())
    };
    match write() {
        Ok(seconds) => Check::ok("disk", format!("write, fsync, rename: {MIB} MiB in {:.0} ms", 1e3 * seconds)),
        Err(e) => {
            Check::fail("disk", format!("{e:#}"), "checkpoints cannot be written here: use another folder for runs")
        }
    }
}

fn check_limits() -> Check {
    let mib = |resource| getrlimit(resource).current.map(|bytes| bytes >> 20);
    let show = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |mib| format!("{mib} MiB"));
    let (locked, stack) = (mib(Resource::Memlock), mib(Resource::Stack));
    let check = Check::ok("limits", format!("locked memory {}, stack {}", show(locked), show(stack)));
    if stack.is_some_and(|mib| mib < 8) {
        return check.warn_if(true, "the stack is small: ulimit -s 8192");
    }
    // RDMA registers its buffers as locked memory; on one node it is not used.
    let fabric = Path::new("/sys/class/infiniband").is_dir();
    check.warn_if(
        fabric && locked.is_some(),
        "InfiniBand or RoCE needs locked memory: ask for ulimit -l unlimited on the nodes",
    )
}

fn check_slurm(variable: impl Fn(&str) -> Option<String>) -> Check {
    let Some(job) = variable("SLURM_JOB_ID") else { return Check::ok("slurm", "not inside a job") };
    let names = ["SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE"];
    let set = names.iter().filter_map(|&name| variable(name).map(|value| format!(", {name}={value}")));
    let lost = variable("SLURM_CPUS_PER_TASK").is_some()
        && variable("SLURM_STEP_ID").is_none()
        && variable("SRUN_CPUS_PER_TASK").is_none();
    Check::ok("slurm", format!("job {job}{}", set.collect::<String>())).warn_if(
        lost,
        "srun does not take --cpus-per-task over from sbatch: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
    )
}

/// Whether the launched ranks found each other, and which cores they have. Collective.
fn check_ranks(world: &mut Result<World>) -> Vec<Check> {
    let world = match world {
        Ok(world) => world,
        Err(e) => {
            return vec![Check::fail(
                "ranks",
                format!("{e:#}"),
                "docs/CLUSTER.md says how to launch; a first try: mpirun -n 2 vcycle doctor",
            )];
        }
    };
    let launched = match (world.size(), world.local_size()) {
        (1, _) => "one; try mpirun -n 2 vcycle doctor".to_owned(),
        (size, local) => format!("{size} found each other, {local} of them on this node"),
    };
    let binding =
        check_binding(world).unwrap_or_else(|e| Check::fail("binding", format!("{e:#}"), "MPI does not work here"));
    vec![Check::ok("ranks", launched), binding]
}

/// On the node of rank 0: how many ranks share a core, and how many cores each may use. Collective.
fn check_binding(world: &mut World) -> Result<Check> {
    let here = fs::read("/proc/sys/kernel/hostname").context("cannot read the host's name")?;
    let mine = sched_getaffinity(None).context("cannot ask for the affinity mask")?;
    let comm = world.communicator();
    let mut node = here.clone();
    comm.broadcast(&mut node, 0)?;
    let on_node = node == here;
    // ranks_on[c] = number of ranks of the node that may run on core c
    let mut ranks_on: Vec<f64> =
        (0..rustix::thread::CpuSet::MAX_CPU).map(|c| f64::from(on_node && mine.is_set(c))).collect();
    comm.reduce(&mut ranks_on, Reduction::Sum)?;
    Ok(judge_binding(&ranks_on, world.local_size(), mine.count() as usize))
}

/// `ranks_on[c]`: ranks that may run on core c; `local`: ranks on the node; `mine`: cores rank 0 may use.
fn judge_binding(ranks_on: &[f64], local: usize, mine: usize) -> Check {
    let cores = ranks_on.iter().filter(|&&ranks| ranks > 0.0).count();
    let sharing = ranks_on.iter().copied().fold(0.0, f64::max) as usize;
    let check = Check::ok(
        "binding",
        format!("{local} rank(s) on {cores} cores of this node, {mine} for rank 0, at most {sharing} rank(s) a core"),
    );
    let each = (cores / local).max(1);
    if cores < local {
        check.warn_if(true, format!("{local} ranks on {cores} cores: launch fewer, or the ranks take turns"))
    } else if sharing > 1 {
        check.warn_if(
            true,
            format!("ranks share cores: mpirun --bind-to core --map-by slot:PE={each}, or srun --cpu-bind=cores"),
        )
    } else {
        check
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_cores_are_seen() {
        assert_eq!(judge_binding(&[1.0, 1.0, 1.0, 1.0, 0.0], 2, 2).status, Status::Ok);
        let shared = judge_binding(&[2.0, 2.0, 2.0, 2.0], 2, 4);
        assert_eq!(shared.status, Status::Warn);
        assert!(shared.advice.unwrap().contains("slot:PE=2"));
        let crowded = judge_binding(&[4.0, 4.0], 4, 2);
        assert!(crowded.advice.unwrap().starts_with("4 ranks on 2 cores"));
    }

    #[test]
    fn a_batch_job_that_srun_would_cut_to_one_core_is_seen() {
        let job = |names: &'static [&str]| move |name: &str| names.contains(&name).then(|| "4".to_owned());
        assert_eq!(check_slurm(job(&[])).found, "not inside a job");
        let batch = check_slurm(job(&["SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"]));
        assert_eq!(batch.status, Status::Warn);
        assert_eq!(batch.found, "job 4, SLURM_CPUS_PER_TASK=4");
        let set = job(&["SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"]);
        assert_eq!(check_slurm(set).status, Status::Ok);
    }

    #[test]
    fn only_a_failure_is_an_error() {
        let warned = Check::ok("a", "x").warn_if(true, "do y");
        assert!(report(&[Check::ok("b", ""), warned], true).is_ok());
        let e = report(&[Check::fail("disk", "full", "make room")], true).unwrap_err();
        assert_eq!(e.to_string(), "not fit to train on: disk");
    }
}
