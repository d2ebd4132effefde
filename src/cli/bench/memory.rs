//! Resident memory of this process, as the kernel counts it.

use crate::error::{Context, Result};

/// Bytes resident now (VmRSS).
pub fn resident() -> Result<u64> {
    status("VmRSS")
}

/// The most bytes that were resident at once (VmHWM). Unlike `getrusage`'s figure it knows nothing of the parent process.
pub fn peak() -> Result<u64> {
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
        assert!(resident().unwrap() >= 64 << 20);
        drop(memory);
        assert!(peak().unwrap() >= 64 << 20);
    }
}
