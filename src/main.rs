//! The `vcycle` binary.

use std::process::ExitCode;

/// candle and the tokenizers allocate often in set-up; mimalloc keeps freed pages, so that later steps do not fault them in anew.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result = vcycle::cli::run(vcycle::cli::parse());
    if let Err(error) = &result {
        eprintln!("error: {error:#}");
    }
    ExitCode::from(vcycle::error::exit_code(&result))
}
