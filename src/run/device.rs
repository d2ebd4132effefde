//! The device of a rank.

use crate::comm::{Communicator, agree};
use crate::config::{Config, DeviceKind};
use crate::error::{Result, bail, ensure};
use candle_core::Device;

/// The device that `parallel.device` means on this rank; `auto` takes a GPU where the build and the machine have one.
pub fn device(config: &Config) -> Result<Device> {
    match config.parallel.device {
        DeviceKind::Cpu => Ok(Device::Cpu),
        DeviceKind::Auto if !gpu_visible() => Ok(Device::Cpu),
        DeviceKind::Auto | DeviceKind::Cuda => gpu(),
    }
}

#[cfg(feature = "cuda")]
fn gpu_visible() -> bool {
    crate::ops::cuda::visible() > 0
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<Device> {
    use crate::error::Context;
    let selected = crate::ops::cuda::select(local_rank()).context("parallel.device")?;
    tracing::info!("GPU {}: {}", selected.ordinal, selected.name);
    Ok(selected.device)
}

/// Rank among the ranks of this node, as the launcher tells it; 0 without a launcher.
#[cfg(feature = "cuda")]
fn local_rank() -> usize {
    // Slurm; Open MPI; MPICH, Intel MPI; MVAPICH.
    let names = ["SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"];
    let told = names.iter().filter_map(|name| std::env::var(name).ok()?.parse().ok());
    told.max().unwrap_or(0)
}

#[cfg(not(feature = "cuda"))]
fn gpu_visible() -> bool {
    false
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Result<Device> {
    bail!(
        "parallel.device = \"cuda\": this build is without CUDA: build with `cargo build --release --features cuda` \
         (docs/GPU.md), or use \"cpu\" or \"auto\""
    )
}

/// The ranks of `comm` as a group that exchanges what is on their GPUs by NCCL; `None` for one rank, and for CPUs. Collective.
pub fn group_of_gpus(comm: &mut dyn Communicator, device: &Device) -> Result<Option<Box<dyn Communicator>>> {
    check_gpus(comm, device)?;
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(device), 2..) = (device, comm.size()) {
        let host = comm.split(Some(0))?.expect("a rank with a colour is in a group");
        return Ok(Some(Box::new(crate::comm::Nccl::new(host, device)?)));
    }
    Ok(None)
}

/// All ranks have a GPU or none. Two ranks on one GPU take turns and are slower than one: an error that names them, unless
/// VCYCLE_SHARE_GPU is set, for tests. Collective.
fn check_gpus(comm: &mut dyn Communicator, device: &Device) -> Result<()> {
    let own = agree(comm, identity(device))?;
    let all = gather(comm, own)?;
    let without: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].is_empty()).collect();
    ensure!(
        without.is_empty() || without.len() == all.len(),
        "rank {} has no GPU, others have: start no more ranks a node than it has GPUs, or set parallel.device = \"cpu\"",
        without[0]
    );
    if std::env::var_os("VCYCLE_SHARE_GPU").is_some() {
        return Ok(());
    }
    if let Some((first, second)) = shared(&all) {
        bail!(
            "ranks {first} and {second} are on the same GPU: start as many ranks a node as it has GPUs, and let the \
             launcher show each rank all GPUs of its node or its own one only (--gpus-per-node=N --ntasks-per-node=N)"
        );
    }
    Ok(())
}

/// The GPU's UUID; nothing for the CPU.
fn identity(device: &Device) -> Result<Vec<u8>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(crate::ops::cuda::uuid(device)?.to_vec()),
        device => {
            ensure!(device.is_cpu(), "{:?} is neither a CPU nor an NVIDIA GPU", device.location());
            Ok(Vec::new())
        }
    }
}

/// `own` of every rank, in their order.
fn gather(comm: &mut dyn Communicator, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
    let gathered = (0..comm.size()).map(|root| {
        let mut bytes = own.clone();
        comm.broadcast(&mut bytes, root)?;
        Ok(bytes)
    });
    gathered.collect()
}

/// The first two ranks with the same GPU.
fn shared(identities: &[Vec<u8>]) -> Option<(usize, usize)> {
    let mut pairs = (0..identities.len()).flat_map(|second| (0..second).map(move |first| (first, second)));
    let same =
        |&(first, second): &(usize, usize)| !identities[first].is_empty() && identities[first] == identities[second];
    pairs.find(same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;

    #[test]
    fn ranks_on_one_gpu_are_named() {
        let found = thread::run(3, |comm| {
            let own = vec![if comm.rank() == 1 { 7 } else { 8 }];
            shared(&gather(comm, own).unwrap())
        });
        assert_eq!(found, [Some((0, 2)); 3]);
        assert_eq!(shared(&[vec![1], vec![], vec![2], vec![]]), None, "CPUs are no GPU");
    }

    #[test]
    fn ranks_on_cpus_pass() {
        let passed = thread::run(2, |comm| group_of_gpus(comm, &Device::Cpu).is_ok_and(|group| group.is_none()));
        assert_eq!(passed, [true; 2]);
    }
}
