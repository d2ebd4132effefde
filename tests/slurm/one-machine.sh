#!/usr/bin/env bash
# Slurm on this one machine, for tests, with all of its files in one folder:
#
#     one-machine.sh start DIR    # then: export SLURM_CONF=DIR/slurm.conf
#     one-machine.sh stop DIR
#
# Needs slurmctld, slurmd, munged and root; exits 77 with a line that says what is missing.
set -euo pipefail

skip() {
    echo "skipped: $*" >&2
    exit 77
}

packages_installed() {
    command -v slurmctld slurmd munged srun >/dev/null
}

install_packages() {
    packages_installed && return
    command -v apt-get >/dev/null || skip "slurmctld, slurmd and munged are missing, and there is no apt-get"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge)
    "${install[@]}" >/dev/null 2>&1 || { apt-get update -qq && "${install[@]}" >/dev/null; } ||
        skip "slurm-wlm and munge cannot be installed"
}

write_config() {
    local dir=$1 host
    host=$(hostname -s)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$((20000 + $$ % 10000))
SlurmdPort=$((30001 + $$ % 10000))
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
MpiDefault=pmix
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
KillWait=20
BatchStartTimeout=1
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    local dir=$1
    [ "$(id -u)" -eq 0 ] || skip "slurmd needs root"
    install_packages
    mkdir -p "$dir"/{state,spool,munge}
    chmod 755 "$dir"
    dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
    chmod 600 "$dir/munge/key"
    chown -R munge:munge "$dir/munge"
    runuser -u munge -- munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    write_config "$dir"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 60); do
        sinfo --noheader --format=%t 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    tail -n 5 "$dir"/*.log >&2
    stop "$dir"
    skip "Slurm does not come up here"
}

# A daemon whose parent is gone may stay a zombie in a container; that one has ended too.
running() { grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status"; }

# Ends the daemons and waits for it: slurmctld still writes its state.
stop() {
    local dir=$1 file pid
    for file in "$dir/slurmd.pid" "$dir/slurmctld.pid" "$dir/munge/pid"; do
        [ -s "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            running "$pid" || continue 2
            sleep 0.2
        done
        kill -KILL "$pid" || true
    done
}

case ${1:-}:${2:-} in
    start:/*) start "$2" ;;
    stop:/*) stop "$2" ;;
    *)
        echo "usage: $0 start|stop /ABSOLUTE/DIR" >&2
        exit 2
        ;;
esac
