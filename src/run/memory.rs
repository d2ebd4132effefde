//! Memory of this rank: on a CPU what is resident, as the kernel counts it; on a GPU what its tensors take.

use crate::error::{Context, Result};
use candle_core::Device;

/// Bytes taken now.
pub fn current(device: &Device) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return Ok(crate::ops::cuda::memory(device)?.current);
    }
    debug_assert!(device.is_cpu());
    status("VmRSS")
}

/// The most bytes taken at once. Unlike `getrusage`'s figure a CPU's knows nothing of the parent process.
pub fn peak(device: &Device) -> Result<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return Ok(crate::ops::cuda::memory(device)?.peak);
    }
    debug_assert!(device.is_cpu());
    status("VmHWM")
}

fn status(key: &str) -> Result<u64> {
    const FILE: &str = "/proc/self/status";
    let text = std::fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(1024 * kib.with_context(|| format!("{FILE} has no {key} in kB"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_is_counted() {
        // Other tests take and free memory meanwhile: only what is held here is certain.
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(current(&Device::Cpu).unwrap() >= 64 << 20);
        drop(memory);
        assert!(peak(&Device::Cpu).unwrap() >= 64 << 20);
    }
}
