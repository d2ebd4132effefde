#!/usr/bin/env bash
# Trains on several hosts, network namespaces of this one (tests/net/hosts.py): their ranks train as one host's do, and when
# one is cut off the others end in time and name its rank.
#
#     tests/net/run.sh VCYCLE
#
# Exits 0 passed or skipped (a line says why), 1 failed.
set -euo pipefail

vcycle=$(realpath "${1:?usage: $0 VCYCLE}")
here=$(realpath "$(dirname "$0")")
dir=$(mktemp -d)
timeout=6
trap 'rm -rf "$dir"' EXIT
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

"$vcycle" data prepare "$here/../../src" --out "$dir/data" --tokenizer bytes --ext rs
cat >"$dir/config.toml" <<CONFIG
run = { steps = 12 }
data = { dir = "$dir/data", context = 32, batch = 8 }
model = { width = 32, heads = 2, depth = 4 }
levels = { count = 2 }
cycle = { kind = "cascade" }
parallel = { threads = 1, timeout = $timeout }
log = { every_steps = 1, eval_sequences = 4 }
checkpoint = { every_steps = 5 }
CONFIG
export vcycle dir timeout

hosts=(python3 "$here/hosts.py" 4 --mbit 1000 --ms 1 -- bash -euo pipefail -c)
status=0
"${hosts[@]}" 'mpirun --host "$VCYCLE_HOSTS" -n 4 "$vcycle" train "$dir/config.toml" --run-dir "$dir/four"' || status=$?
[ "$status" -ne 77 ] || exit 0
[ "$status" -eq 0 ] || fail "training on four hosts: exit $status"
for host in 1 2 3 4; do
    grep -q "\"node$host\": 1" "$dir/four/provenance.json" || fail "no rank ran on node$host"
done
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun --oversubscribe --bind-to none -n 4 "$vcycle" train "$dir/config.toml" --run-dir "$dir/one"
losses() { sed 's/.*"loss":\([^,]*\),.*/\1/' "$1/metrics.jsonl"; }
[ "$(losses "$dir/one")" = "$(losses "$dir/four")" ] || fail "four hosts and one give other losses"
echo "passed: four hosts train as four ranks of one"

# What placements gain on this link, once; that the same numbers come out is checked.
python3 "$here/../../benches/link.py" "$vcycle" "$dir/data" --only cosets --rounds 1
echo "passed: the cosets of a level train on four hosts as in turn"

# Cut host 3 (rank 2) off in the middle of a step; mpirun runs on host 1.
"${hosts[@]}" '
    mpirun --host "$VCYCLE_HOSTS" -n 4 "$vcycle" train "$dir/config.toml" --run-dir "$dir/cut" --set run.steps=100000 \
        >"$dir/cut.out" 2>&1 &
    job=$!
    for _ in $(seq 300); do
        [ "$(cat "$dir/cut/metrics.jsonl" 2>/dev/null | wc -l)" -lt 12 ] || break
        sleep 0.1
    done
    namespace=$(cut -d, -f3 <<<"$VCYCLE_NAMESPACES")
    ip -n "$namespace" link set net0 down
    cut=$(date +%s%N)
    for _ in $(seq 150); do
        pgrep -f "^$vcycle train $dir/config.toml" >/dev/null || break
        sleep 0.1
    done
    took=$((($(date +%s%N) - cut) / 1000000))
    echo "all ranks ended $took ms after the cut, parallel.timeout is $timeout s"
    [ "$took" -le $((1000 * timeout)) ] || exit 1
    # mpirun has no more ranks, but waits for the daemon of the host that is gone as long as TCP does.
    kill -KILL "$job"
' || { cat "$dir/cut.out" >&2; fail "a cut did not end all ranks in time"; }
grep -q 'in the collective `.*`: rank 2 does not answer' "$dir/cut.out" || { cat "$dir/cut.out" >&2; fail "rank 2 is not named"; }
"$vcycle" checkpoint verify "$dir/cut"
status=0
mpirun --oversubscribe --bind-to none -n 4 "$vcycle" train "$dir/config.toml" --run-dir "$dir/cut" --resume \
    --set run.steps=100000 --set run.max_minutes=0.02 >"$dir/cut.out" 2>&1 || status=$?
[ "$status" -eq 75 ] && grep -q 'resumed at step' "$dir/cut.out" || { cat "$dir/cut.out" >&2; fail "the run does not go on"; }
echo "passed: a host that is cut off ends all ranks, its rank is named, and the run goes on from its last checkpoint"
