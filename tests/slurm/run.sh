#!/usr/bin/env bash
# Submits to a Slurm of this machine: slurm/train.sbatch, whose run is stopped, requeued and continued, once by a signal and once by
# the death of its node; and a scaling study, from its configs to its report:
#
#     tests/slurm/run.sh VCYCLE
#
# Exits 0 passed or skipped (a line says why), 1 failed.
set -euo pipefail

vcycle=$(realpath "${1:?usage: $0 VCYCLE}")
root=$(realpath "$(dirname "$0")/../..")
dir=$(mktemp -d)
slurm=$dir/slurm
steps=400

cleanup() {
    "$root/tests/slurm/one-machine.sh" stop "$slurm"
    rm -rf "$dir"
}
fail() {
    echo "FAILED: $*" >&2
    tail -n 30 "$dir"/*.out "$dir"/scaling/output/* "$slurm/slurmctld.log" >&2 || true
    { scontrol show job && sinfo --long; } >&2 || true
    exit 1
}
# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local seconds=$1 what=$2
    shift 2
    for _ in $(seq $((seconds * 5))); do
        "$@" && return
        sleep 0.2
    done
    fail "$what did not happen in $seconds s"
}
state() { scontrol show job --oneliner "$job" | sed 's/.*JobState=\([A-Z]*\).*/\1/'; }
is() { [ "$(state)" = "$1" ]; }
requeued() { is PENDING && scontrol show job --oneliner "$job" | grep -q 'Restarts=1'; }
logged() { [ -s "$run/metrics.jsonl" ] && [ "$(wc -l <"$run/metrics.jsonl")" -ge "$1" ]; }
submit() {
    job=$(sbatch --parsable --ntasks-per-node="$ranks" --cpus-per-task=1 --time=10 --output="$run.out" \
        "$root/slurm/train.sbatch" "$dir/config.toml" "$run" "$@")
}
# The requeued job goes on to the last step, every step once and in order.
continues() {
    # Slurm would wait for two minutes. A node refuses the job ("credential revoked") in the second in which it ended there.
    sleep 3
    scontrol update JobId="$job" StartTime=now
    wait_for 200 "the end of the run" is COMPLETED
    sed 's/.*"step":\([0-9]*\).*/\1/' "$run/metrics.jsonl" | sort -c -n -u || fail "steps are repeated or out of order"
    [ "$(wc -l <"$run/metrics.jsonl")" -eq "$steps" ] || fail "not every step is there"
    tail -n 1 "$run/metrics.jsonl" | grep -q "\"step\":$steps," || fail "the run did not get to step $steps"
}

trap cleanup EXIT
chmod 755 "$dir" # munged does not run as root
status=0
"$root/tests/slurm/one-machine.sh" start "$slurm" || status=$?
[ "$status" -ne 77 ] || exit 0
[ "$status" -eq 0 ] || fail "no Slurm: exit $status"
export SLURM_CONF=$slurm/slurm.conf

"$vcycle" data prepare "$root/src" --out "$dir/data" --tokenizer bytes --ext rs
cat >"$dir/config.toml" <<CONFIG
run = { steps = $steps }
data = { dir = "$dir/data", context = 64, batch = 4 }
model = { width = 64, heads = 4, depth = 4 }
log = { every_steps = 1, eval_sequences = 4 }
CONFIG

export VCYCLE=$vcycle
ranks=$(($(nproc) < 2 ? 1 : 2))
run=$dir/run
submit
wait_for 60 "training" logged 10
# What Slurm does before the time limit.
scancel --signal=USR1 --batch "$job"
wait_for 60 "requeueing after exit 75" requeued
before=$(tail -n 1 "$run/metrics.jsonl")
continues
grep -qF "$before" "$run/metrics.jsonl" || fail "the run started afresh instead of going on"
echo "passed: trained on $ranks ranks under srun, stopped by a signal, requeued, continued to step $steps"

# srun exits 0 and nothing was done, for a run that was done before and now has more steps to do.
VCYCLE=true MAX_REQUEUES=0 submit --set run.steps=$((2 * steps))
wait_for 60 "the end of the job" is FAILED
grep -q "the ranks did not start" "$run.out" || fail "a job that did nothing passes for a finished run"
echo "passed: a job whose ranks did not start is no finished run"

# The node dies with all that runs on it, and comes back.
run=$dir/crash
submit --set checkpoint.every_steps=50
wait_for 60 "training" logged 110
kill -KILL "$(cat "$slurm/slurmd.pid")"
pkill -KILL -f "slurmstepd: \\[$job\\."
pkill -KILL -f "$run" || true # what was left of the job
slurmd
missed() { requeued || { scontrol reconfigure && sleep 1 && false; }; } # slurmctld asks the node what it runs
wait_for 100 "requeueing after the loss of the node" missed
continues
grep -q "resumed at step" "$run.out" || fail "the run started afresh instead of going on"
[ "$(sed 's/"elapsed_s".*//' "$run/metrics.jsonl")" = "$(sed 's/"elapsed_s".*//' "$dir/run/metrics.jsonl")" ] ||
    fail "the run that lost its node has other losses"
echo "passed: the run that lost its node and its ranks went on from its last checkpoint, bit for bit"

study=$dir/scaling
"$vcycle" scaling init "$dir/config.toml" --out "$study" --ranks-per-node "$(seq -s, "$ranks")" --repeats 2 --steps 20 \
    --minutes 5 --set levels.count=2 --set cycle.kind=cascade --set 'cycle.fractions=[0.5, 0.5]'
"$vcycle" scaling submit "$study" -- --comment=test
[ "$(wc -l <"$study/jobs.txt")" -eq "$ranks" ] || fail "not every job array is in jobs.txt"
queue_is_empty() { [ -z "$(squeue --noheader)" ]; }
wait_for 120 "the end of the study" queue_is_empty
"$vcycle" scaling report "$study" --csv "$dir/scaling.csv" --out "$dir/report.html" >"$dir/report.txt" 2>&1
cat "$dir/report.txt"
! grep -q warning "$dir/report.txt" || fail "the report warns"
# Modes times numbers of ranks times levels, each with two runs, an efficiency and a deviation.
rows=$((2 * ranks * 2))
[ "$(grep -c ' ± .* ± .* ± ' "$dir/report.txt")" -eq "$rows" ] || fail "the report has not $rows rows with deviations"
awk -F, -v rows="$rows" 'NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }
    $column["runs"] != 2 || $column["step_s_mean"] <= 0 || $column["step_s_sd"] == "" || $column["efficiency_mean"] <= 0 { exit 1 }
    $column["ranks"] == 1 && ($column["efficiency_mean"] < 0.99 || $column["exposed_mean"] != 0) { exit 1 }
    $column["ranks"] == 2 && ($column["exposed_mean"] <= 0 || $column["exposed_mean"] >= 1) { exit 1 }
    END { if (NR != rows + 1) exit 1 }' "$dir/scaling.csv" || fail "the figures of the report: $(cat "$dir/scaling.csv")"
grep -q "hosts.$(hostname)" "$dir/report.html" || fail "the report has no provenance"
again=$("$vcycle" scaling submit "$study")
[[ $again == *"are finished"* ]] || fail "finished runs are submitted again: $again"
echo "passed: a scaling study on 1 to $ranks ranks, from init to report"
