//! Records the commit the binary was built from, for the provenance of its runs, and with the feature `cuda` compiles the
//! kernels.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    record_commit();
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
}

fn record_commit() {
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/refs/heads");
    let describe = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    if let Ok(output) = describe
        && output.status.success()
    {
        println!("cargo::rustc-env=VCYCLE_COMMIT={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}

/// src/ops/cuda/*.cu → libvcycle_kernels.a.
fn compile_kernels() {
    let folder = Path::new("src/ops/cuda");
    let entries = folder.read_dir().expect("the folder of the kernels");
    let mut sources: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
    let is = |path: &Path, kind: &str| path.extension().is_some_and(|extension| extension == kind);
    sources.retain(|path| is(path, "cu") || is(path, "cuh") || is(path, "options"));
    sources.sort();
    sources.iter().for_each(|path| println!("cargo::rerun-if-changed={}", path.display()));
    sources.retain(|path| is(path, "cu"));

    let output = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let status = Command::new(nvcc())
        .arg("--options-file")
        .arg(folder.join("nvcc.options"))
        .args(["-lib", "--threads", &env::var("NUM_JOBS").unwrap_or_else(|_| "1".into())])
        .arg("-o")
        .arg(output.join("libvcycle_kernels.a"))
        .args(&sources)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("nvcc does not compile the kernels: {status}"),
        Err(error) => panic!(
            "the feature `cuda` needs CUDA's compiler, and nvcc does not start ({error}): load the cuda module, set \
             CUDA_HOME, or make a toolkit with scripts/cuda-toolkit.sh"
        ),
    }
    println!("cargo::rustc-link-search=native={}", output.display());
    println!("cargo::rustc-link-lib=static=vcycle_kernels");
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
}

/// $NVCC, $CUDA_HOME/bin/nvcc, or the one on the path.
fn nvcc() -> PathBuf {
    println!("cargo::rerun-if-env-changed=NVCC");
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        println!("cargo::rerun-if-env-changed={variable}");
        if let Some(home) = env::var_os(variable) {
            return Path::new(&home).join("bin/nvcc");
        }
    }
    "nvcc".into()
}
