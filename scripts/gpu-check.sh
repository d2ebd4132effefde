#!/usr/bin/env bash
# Every op on a real GPU against its CPU twin, in f32 and bf16, and NCCL, as one table. Nothing is built on the GPU's machine:
#   scripts/gpu-check.sh prepare FOLDER   here, with a toolkit (scripts/cuda-toolkit.sh): the test binary and its libraries
#   scripts/gpu-check.sh run FOLDER       there; FOLDER and this script are all that it takes
set -euo pipefail

usage() {
    sed -n '2,5s/^# \?//p' "$0" >&2
    exit 2
}
[ $# -eq 2 ] || usage
folder=$2

prepare() {
    cd "$(dirname "$0")/.."
    local binary
    binary=$(cargo test --release --locked --no-default-features --features cuda --lib --no-run --message-format=json |
        grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d '"' -f 4)
    mkdir -p "$folder/lib"
    cp "$binary" "$folder/check"
    strip --strip-debug "$folder/check"
    # What the machine with the GPU may lack; CUDA's libraries and the C library are its own.
    LD_LIBRARY_PATH="${CUDA_HOME:+$CUDA_HOME/lib}" ldd "$binary" | awk '/=> \// {print $3}' | grep -E 'hdf5|libsz|libaec|libcurl|nccl' | xargs -r -I{} cp -L {} "$folder/lib/"
    echo "$folder is ready: $(du -sh "$folder" | cut -f 1)"
}

run() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    local status=0
    # One at a time: all share the GPU, and the lines of one op stay together.
    LD_LIBRARY_PATH="$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$folder/check" \
        --nocapture --test-threads 1 ops::cuda model::net::tests::a_gpu optim::laws::a_gpu >"$folder/log" 2>&1 || status=$?
    grep -E ' GPU +(F32|BF16): ' "$folder/log" | sed 's/^test .* \.\.\. //' || echo "no op has run on the GPU; see $folder/log"
    grep -E 'panicked|expected|^test result' "$folder/log" || tail -n 20 "$folder/log"
    nccl || status=$?
    return $status
}

# NCCL with one rank; with two on this GPU, as threads (NCCL 2.30 and newer) and as processes that pass for two hosts.
nccl() {
    local status=0 meet rank
    export LD_LIBRARY_PATH="$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    NCCL_MULTI_RANK_GPU_ENABLE=1 timeout 300 "$folder/check" --nocapture --test-threads 1 comm::nccl >"$folder/nccl.log" 2>&1 || status=$?
    meet=$(mktemp -d)
    for rank in 0 1; do
        NCCL_HOSTID=rank-$rank NCCL_SOCKET_IFNAME=lo VCYCLE_NCCL_MEET=$rank:$meet timeout 300 "$folder/check" --nocapture --exact --ignored \
            comm::nccl::tests::one_of_two_processes >"$folder/nccl-$rank.log" 2>&1 &
    done
    wait -n || status=$?
    wait -n || status=$?
    rm -rf "$meet"
    grep -hE 'NCCL  |panicked|error|^test result' "$folder"/nccl*.log | sed 's/^test .* \.\.\. //' || tail -n 20 "$folder"/nccl*.log
    return $status
}

case $1 in
    prepare) prepare ;;
    run) run ;;
    *) usage ;;
esac
