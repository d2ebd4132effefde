//! The `vcycle` binary.

use std::process::ExitCode;

/// mimalloc keeps freed pages for the next allocation, so that long runs do not fault them in anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ExitCode::from(vcycle::cli::main())
}
