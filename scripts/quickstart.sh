#!/usr/bin/env bash
# The quick start: real text, a multilevel run, its single-level baseline, and what was saved.
#
#     scripts/quickstart.sh VCYCLE
#
# Everything it writes is under quickstart/; what an earlier quick start left there is replaced.
set -euo pipefail
vcycle=$(realpath "${1:?usage: $0 VCYCLE}")
cd "$(dirname "$0")/.."

# The text: sources and docs of crates that cargo has downloaded to build vcycle, in the versions of Cargo.lock. They are
# chosen by hand, since most large crates are generated code, of which nothing can be learnt.
crates=(aho-corasick anyhow candle-core clap clap_builder hashbrown indicatif itertools memchr mpi ndarray parquet
    plotters rand rayon rayon-core regex-automata serde serde_core serde_json tokenizers toml tracing-subscriber)

# Folder of crate $1. Of two versions only the newest that is there: the other's text would leak from training to validation.
crate_folder() {
    local version folder
    for version in $(grep -A 1 "^name = \"$1\"$" Cargo.lock | sed -n 's/^version = "\(.*\)"$/\1/p' | sort -rV); do
        for folder in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$1-$version"; do
            [ -d "$folder" ] && echo "$folder" && return
        done
    done
    echo "quickstart: cargo has no sources of $1 under ${CARGO_HOME:-$HOME/.cargo}/registry/src" >&2
    return 1
}

# mpirun on a small machine, whoever runs it: as root in a container, with fewer cores than ranks. Open MPI 4 reads the
# OMPI variables, Open MPI 5 those of PRTE, and other MPIs neither.
ranks() {
    local root=()
    [ "$(id -u)" -ne 0 ] || root=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
    env "${root[@]}" OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none \
        PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none \
        mpirun -n 2 "$@"
}

say() { printf '\n== %s\n' "$*"; }

folders=()
for crate in "${crates[@]}"; do
    folder=$(crate_folder "$crate")
    folders+=("$folder")
done
rm -rf quickstart/data quickstart/multilevel quickstart/baseline
mkdir -p quickstart

say "preparing text: the Rust sources and docs of ${#folders[@]} crates"
"$vcycle" data prepare "${folders[@]}" --out quickstart/data --tokenizer bytes --ext rs,md

say "training by a multilevel cycle on 2 MPI ranks (configs/quickstart.toml)"
ranks "$vcycle" train configs/quickstart.toml --run-dir quickstart/multilevel

say "training its single-level baseline (configs/quickstart-baseline.toml)"
ranks "$vcycle" train configs/quickstart-baseline.toml --run-dir quickstart/baseline

say "what multilevel training saved"
"$vcycle" compare quickstart/baseline quickstart/multilevel --out quickstart/report.html
say "the pictures: open $PWD/quickstart/report.html, or quickstart/report-flops.svg and report-time.svg"
