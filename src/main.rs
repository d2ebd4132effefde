//! The `vcycle` binary.

use std::process::ExitCode;

/// mimalloc keeps freed pages for the next allocation, so that long runs do not fault them in anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Huge pages come whole, though tensors fill those at their ends in part only: without them a rank takes the memory that `plan`
    // predicts. Steps are as fast (docs/PERFORMANCE.md). A system that cannot switch them off has none.
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    ExitCode::from(vcycle::cli::main())
}
