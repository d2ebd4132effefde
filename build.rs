//! Records the commit the binary was built from, for the provenance of its runs.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/refs/heads");
    let describe = Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]).output();
    if let Ok(output) = describe
        && output.status.success()
    {
        println!("cargo::rustc-env=VCYCLE_COMMIT={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}
