#!/usr/bin/env bash
# Builds the program with the feature `cuda` for a software GPU (gpu.h), made in FOLDER with all that is built, and runs on it the
# library's tests, two ranks as processes, and runs of every kind (runs.py):
#
#     tests/software-gpu/run.sh FOLDER
set -euo pipefail

folder=${1:?usage: $0 FOLDER}
here=$(realpath "$(dirname "$0")")
mkdir -p "$folder"
folder=$(realpath "$folder")
cd "$here/../.."

settings=$("$here/build.sh" "$folder")
eval "$settings"
export CARGO_TARGET_DIR=$folder/target
# Ranks started here may be root's, and more than there are cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1

cargo build --release --locked --features cuda --bin vcycle
NCCL_MULTI_RANK_GPU_ENABLE=1 cargo test --release --locked --features cuda --lib
check=$(cargo test --release --locked --features cuda --lib --no-run --message-format=json 2>/dev/null | sed -nE 's/.*"executable":"([^"]*)".*/\1/p' | tail -n 1)
meet=$(mktemp -d)
trap 'rm -rf "$meet"' EXIT
for rank in 0 1; do
    VCYCLE_NCCL_MEET=$rank:$meet "$check" --nocapture --exact --ignored comm::nccl::tests::one_of_two_processes &
done
wait -n && wait -n
python3 "$here/runs.py" "$CARGO_TARGET_DIR/release/vcycle"
