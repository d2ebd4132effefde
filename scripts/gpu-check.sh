#!/usr/bin/env bash
# What a GPU alone can show, in one go. Nothing is built on the GPU's machine:
#   scripts/gpu-check.sh prepare FOLDER   here, with a toolkit (scripts/cuda-toolkit.sh): programs, libraries, text, as one file
#   scripts/gpu-check.sh run FOLDER       there; FOLDER and this script are all that it takes
# `run` writes a table and a log, after each check, to the folder OUT, by default FOLDER. It begins no check after
# GPU_CHECK_SECONDS (570), and only those that are named in GPU_CHECKS, by default all.
set -euo pipefail

usage() {
    sed -n '2,6s/^# \?//p' "$0" >&2
    exit 2
}
[ $# -eq 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)

# What CUDA and the C library bring: the GPU's machine has its own.
own_libraries='/(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|gcc_s|stdc\+\+|cuda|cudart|cublas|cublasLt|curand|nvrtc|nccl))\.so'

prepare() {
    cd "$(dirname "$0")/.."
    local build=(--release --locked --no-default-features --features cuda --message-format=json)
    local executable='s/.*"executable":"([^"]*)".*/\1/p' libraries program check
    program=$(cargo build "${build[@]}" --bin vcycle | sed -nE "$executable" | tail -n 1)
    check=$(cargo test "${build[@]}" --lib --no-run | sed -nE "$executable" | tail -n 1)
    local stage
    stage=$(mktemp -d)
    mkdir -p "$stage"/{lib,benches,tests/oracle}
    strip -o "$stage/vcycle" "$program"
    strip -o "$stage/check" "$check"
    # No driver is needed to look at what they load, or to prepare the text.
    libraries=${CUDA_HOME:?has the toolkit}/lib:$CUDA_HOME/lib/stubs
    LD_LIBRARY_PATH=$libraries ldd "$program" "$check" | awk '/=> \// {print $3}' | grep -vE "$own_libraries" | sort -u |
        xargs -I{} cp -L {} "$stage/lib/"
    LD_LIBRARY_PATH=$libraries "$stage/vcycle" data prepare src docs tests README.md --out "$stage/text" --tokenizer bytes \
        --ext rs,md,cu,cuh,py
    cp configs/quickstart.toml "$stage/"
    cp benches/pytorch_step.py "$stage/benches/"
    cp tests/oracle/gpt_oracle.py "$stage/tests/oracle/"
    tar -czf "$folder/gpu-check.tgz" -C "$stage" .
    rm -rf "$stage"
    echo "$folder/gpu-check.tgz is ready: $(du -h "$folder/gpu-check.tgz" | cut -f 1)"
}

run() {
    out=${OUT:-$folder} scratch=$(mktemp -d) failures=0
    trap 'rm -rf "$scratch"' EXIT
    : | tee "$out/table" >"$out/log"
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1)"
    mkdir "$scratch/bin" "$scratch/carried"
    tar -xzf "$folder/gpu-check.tgz" -C "$scratch/carried"
    folder=$scratch/carried
    local libraries program check
    libraries=$(library_path) || {
        say "FAILED  $libraries"
        return 1
    }
    say "libraries: $libraries"
    # Programs that load CUDA; Python has its own way to it.
    for program in vcycle check; do
        printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$folder/$program" >"$scratch/bin/$program"
        chmod +x "$scratch/bin/$program"
    done
    for check in ${GPU_CHECKS:-ops learn resume speed rival nccl sanitize}; do
        "check_$check"
    done
    say "$failures failed, after $SECONDS s"
    [ "$failures" -eq 0 ]
}

# To the table.
say() { echo "$*" | tee -a "$out/table"; }

failed() {
    failures=$((failures + 1))
    say "FAILED  $*"
}

# Folders with what the loader does not find by itself: what was carried, then CUDA's of this machine, PyTorch's too.
library_path() {
    local path=$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} places=(/usr/local/cuda) missing found
    mapfile -t -O 1 places < <(python3 -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null)
    places+=(/usr/local /opt /usr/lib)
    # A library that is found may want another.
    while missing=$(LD_LIBRARY_PATH=$path ldd "$folder/vcycle" "$folder/check" | awk '/not found/ {print $1; exit}') && [ -n "$missing" ]; do
        found=$(find -L "${places[@]}" -maxdepth 9 -name "$missing" -not -path '*/stubs/*' -not -path '*/compat/*' -print -quit 2>/dev/null || true)
        if [ -z "$found" ] || [[ :$path: == *:$(dirname "$found"):* ]]; then
            echo "this machine has no $missing"
            return 1
        fi
        path+=:$(dirname "$found")
    done
    echo "$path"
}

# NAME SECONDS COMMAND…: a check with its time limit. Its output goes to $scratch/last and to the log, its verdict to the table.
try() {
    local name=$1 limit=$2 left=$((${GPU_CHECK_SECONDS:-570} - SECONDS)) begin=$SECONDS status=0
    shift 2
    : >"$scratch/last"
    if [ "$left" -lt 5 ]; then
        say "skipped $name: no time is left"
        return 1
    fi
    timeout -k 5 $((limit < left ? limit : left)) "$@" >"$scratch/last" 2>&1 </dev/null || status=$?
    { printf '\n==== %s: %s\n' "$name" "$*" && cat "$scratch/last"; } >>"$out/log"
    case $status in
        0) say "ok      $name ($((SECONDS - begin)) s)" ;;
        124 | 137) failed "$name: not done after $((SECONDS - begin)) s" ;;
        *)
            failed "$name: status $status after $((SECONDS - begin)) s"
            { grep -A 2 -m 1 panicked "$scratch/last" || tail -n 5 "$scratch/last"; } | cut -c 1-300 | sed 's/^/        /' | tee -a "$out/table"
            ;;
    esac
    return "$status"
}

# Lines of the last check's output that match, to the table.
show() { { grep -E "$1" "$scratch/last" || true; } | sed -E 's/^test .* \.\.\. //; s/^/        /' | tee -a "$out/table"; }

# PREFIX…: the tests of these names, a process each: after an access out of bounds CUDA answers nothing but errors.
tests() {
    local prefix names test
    for prefix in "$@"; do
        names=$("$scratch/bin/check" --list --format terse 2>&1 | tee "$scratch/last" | sed -n "s/^\($prefix.*\): test$/\1/p") || true
        [ -n "$names" ] || failed "no test $prefix: $(tail -n 1 "$scratch/last")"
        for test in $names; do
            try "$test" 60 env NCCL_MULTI_RANK_GPU_ENABLE=1 "$scratch/bin/check" --nocapture --exact "$test" || true
            show ' GPU +(F32|BF16): |NCCL  '
        done
    done
}

# Every op against its CPU twin, whole nets, update rules, steps on two levels.
check_ops() { tests ops::cuda:: model::net::tests::a_gpu optim::laws::a_gpu optim::laws::shards run::learner::; }

# NAME SECONDS DIRECTORY OPTION…: 200 steps on four levels.
train() {
    local name=$1 limit=$2 directory=$3
    shift 3
    try "$name" "$limit" "$scratch/bin/vcycle" train "$folder/quickstart.toml" --run-dir "$directory" \
        --set data.dir="$folder/text" --set run.steps=200 --set log.every_steps=1 "$@"
}

# DIRECTORY NAME: a field of the metrics, a line with each step.
field() { sed -nE "s/^\{\"step\":([0-9]+),.*\"$2\":([^,}]+).*/\1 \2/p" "$1/metrics.jsonl" | sort; }

# The curve of the loss on the GPU is the CPU's up to rounding.
check_learn() {
    local dtype allowed curve
    train "loss curve, CPU" 120 "$scratch/cpu" --set parallel.device=cpu || return 0
    for dtype in f32 bf16; do
        train "loss curve, GPU, $dtype" 90 "$scratch/$dtype" --set parallel.device=cuda --set model.dtype=$dtype || continue
        allowed=$([ $dtype = f32 ] && echo 0.02 || echo 0.1)
        curve=$(join <(field "$scratch/cpu" loss) <(field "$scratch/$dtype" loss) | sort -n | awk -v allowed="$allowed" '
            { d = $2 > $3 ? $2 - $3 : $3 - $2; if (d > most) most = d; if (!(d <= allowed)) bad = 1 }
            NR == 1 || NR % 25 == 0 { print "        step " $1 ": " $2 " on the CPU, " $3 }
            END { print "        largest difference of " NR " steps: " most + 0 " (allowed " allowed ")"; exit bad || NR < 200 }') ||
            failed "loss curve, GPU, $dtype, is not the CPU's"
        say "$curve"
    done
}

# A run that goes on from its checkpoint is the run without a stop, bit for bit.
check_resume() {
    local dtype name whole half
    for dtype in f32 bf16; do
        local settings=(--set parallel.device=cuda --set "model.dtype=$dtype" --set run.steps=20 --set log.eval_every=5 --set log.eval_sequences=16
            --set checkpoint.every_steps=10 --set checkpoint.keep=9)
        whole=$scratch/whole-$dtype half=$scratch/half-$dtype
        train "20 steps, GPU, $dtype" 60 "$whole" "${settings[@]}" || continue
        cp -r "$whole" "$half"
        rm -r "$half"/checkpoints/step-*20
        train "the last 10 of them again" 60 "$half" "${settings[@]}" --resume || continue
        for name in loss grad_norm val_loss; do
            cmp -s <(field "$whole" $name) <(field "$half" $name) || failed "resume, $dtype: $name is another than without a stop"
        done
    done
}

gpt2=(--set model.width=768 --set model.heads=12 --set data.context=1024)

# A step of the paper's net and of GPT-2's, its parts, and each op against what the GPU can do.
check_speed() {
    step "the paper's net, f32" --set model.dtype=f32
    step "the paper's net, bf16" --set model.dtype=bf16
    VCYCLE_CUDA_GRAPHS=0 step "the paper's net, bf16, without graphs" --set model.dtype=bf16
    step "GPT-2 124M, B = 8, bf16" --set model.dtype=bf16 "${gpt2[@]}" --set data.batch=8
    step "GPT-2 124M, B = 32, bf16" --set model.dtype=bf16 "${gpt2[@]}" --set data.batch=32
    ops "GPT-2 124M, B = 32, bf16" --set model.dtype=bf16 "${gpt2[@]}" --set data.batch=32
    ops "the paper's net, bf16" --set model.dtype=bf16
}

# NAME OPTION…
step() { measure "bench step, $1" step --steps 20 "${@:2}"; }
ops() { measure "bench ops, $1" ops "${@:2}"; }

# NAME BENCHMARK OPTION…; a vocabulary of whole tiles, as training pads it to.
measure() {
    local name=$1
    shift
    try "$name" 60 "$scratch/bin/vcycle" bench "$@" --set parallel.device=cuda --set model.vocab=50304 || return 0
    show .
}

# The same steps in PyTorch, if it is there.
check_rival() {
    python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
        say "skipped PyTorch: no python3 here has a torch that sees a GPU"
        return 0
    }
    rival "the paper's net, f32" --dtype f32
    rival "the paper's net, bf16" --dtype bf16
    rival "GPT-2 124M, B = 8, bf16" --dtype bf16 --width 768 --heads 12 --context 1024 --batch 8
    rival "GPT-2 124M, B = 32, bf16" --dtype bf16 --width 768 --heads 12 --context 1024 --batch 32
}

rival() {
    local name=$1 compile
    shift
    for compile in "" --compile; do
        try "PyTorch${compile:+, compiled}: $name" 90 python3 "$folder/benches/pytorch_step.py" --device cuda --vocab 50304 --steps 20 \
            "$@" ${compile:+"$compile"} || continue
        say "        $(sed -nE 's/.*"step_s": ([0-9.e-]+).*"tokens_per_s": ([0-9]+).*/\1 s a step, \2 tokens\/s/p' "$scratch/last")"
    done
}

# One rank; two on this GPU, as threads (NCCL 2.30 and newer) and as processes that pass for two hosts.
check_nccl() {
    tests comm::nccl::tests::one_rank comm::nccl::tests::two_ranks comm::nccl::tests::a_rank
    mkdir "$scratch/meet"
    # shellcheck disable=SC2016
    try "NCCL, two processes" 60 bash -c '
        for rank in 0 1; do
            NCCL_HOSTID=rank-$rank NCCL_SOCKET_IFNAME=lo VCYCLE_NCCL_MEET=$rank:$0/meet \
                "$0/bin/check" --nocapture --exact --ignored comm::nccl::tests::one_of_two_processes &
        done
        wait -n && wait -n' "$scratch" || true
    show 'NCCL  '
}

# Accesses out of bounds, then races in shared memory.
check_sanitize() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || find -L /usr/local/cuda /opt/nvidia -name compute-sanitizer -type f -print -quit 2>/dev/null || true)
    [ -n "$sanitizer" ] || {
        say "skipped compute-sanitizer: not on this machine"
        return 0
    }
    for tool in memcheck racecheck; do
        try "compute-sanitizer $tool" 90 env LD_LIBRARY_PATH="$libraries" "$sanitizer" --tool $tool --error-exitcode 9 \
            "$folder/check" --test-threads 1 ops::cuda:: || true
        show 'ERROR SUMMARY|RACECHECK SUMMARY'
    done
}

case $1 in
    prepare) prepare ;;
    run) run ;;
    *) usage ;;
esac
