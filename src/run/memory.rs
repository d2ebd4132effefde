//! Memory of this rank: on a CPU what is resident, as the kernel counts it; on a GPU what its tensors take.

use crate::error::{Context, Result};
use candle_core::Device;

/// Bytes.
pub struct Memory {
    pub current: u64,
    /// The most at once. Unlike `getrusage`'s figure a CPU's knows nothing of the parent process.
    pub peak: u64,
}

/// What is taken now, and has been.
pub fn memory(device: &Device) -> Result<Memory> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let [current, peak] = crate::ops::cuda::memory(device)?;
        return Ok(Memory { current, peak });
    }
    debug_assert!(device.is_cpu());
    Ok(Memory { current: status("VmRSS")?, peak: status("VmHWM")? })
}

/// After what was measured with tensors of its own: a GPU's peak counts from now on, and what is freed goes back to the driver.
pub fn forget_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        crate::ops::cuda::forget_peak_memory(device)?;
    }
    debug_assert!(!device.is_cpu(), "the kernel's figure of a CPU cannot be reset");
    Ok(())
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
        assert!(super::memory(&Device::Cpu).unwrap().current >= 64 << 20);
        drop(memory);
        assert!(super::memory(&Device::Cpu).unwrap().peak >= 64 << 20);
    }
}
