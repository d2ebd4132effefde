#!/usr/bin/env python3
"""Several hosts on this one, as network namespaces with an address each, joined by a link of a given speed:

    hosts.py COUNT [--mbit RATE] [--ms DELAY] -- COMMAND...

runs COMMAND on the first host. In its environment VCYCLE_HOSTS is `ADDRESS,ADDRESS,...`, VCYCLE_NAMESPACES the
namespaces in the same order, and mpirun finds all it needs to start ranks on them: mpirun --host $VCYCLE_HOSTS ...
`ip -n NAMESPACE link set net0 down` cuts a host off. Exits as COMMAND does, or 77 with a line that says what is missing.

The link is this program, since few kernels for virtual machines have tc's netem: each host has a TUN device, whose packets
it passes on to the host they are for, RATE megabits a second from each host and to each host, each DELAY milliseconds late.
"""

import argparse
import fcntl
import heapq
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x0001, 0x1000, 0x4000
TUNSETOFFLOAD, TUN_F_CSUM, TUN_F_TSO4 = 0x400454D0, 0x1, 0x2
MTU = 9000
# Before each packet: what the kernel has left undone, such as its checksum and the cut into segments of the MTU.
HEADER = 10
# A host's packets are read while those before it leave within this time; then they wait in its own queue.
BACKLOG = 0.02


def skip(why):
    print(f"skipped: {why}", file=sys.stderr)
    sys.exit(77)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    def __init__(self, count):
        self.name = f"vc{os.getpid()}"
        self.namespaces = [f"{self.name}-{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.devices = []

    def start(self):
        for i, (namespace, address) in enumerate(zip(self.namespaces, self.addresses)):
            ip("netns", "add", namespace)
            device, name = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"{self.name}t{i}"
            self.devices.append(device)
            flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            # As a network card does: the kernel hands over up to 64 KiB at once.
            fcntl.ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
            ip("link", "set", name, "netns", namespace, "name", "net0")
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "net0")
            ip("-n", namespace, "link", "set", "net0", "mtu", str(MTU), "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            # A connection that has been idle keeps its speed, as on networks that are set up for MPI.
            ip("netns", "exec", namespace, "sh", "-c", "echo 0 >/proc/sys/net/ipv4/tcp_slow_start_after_idle")

    def stop(self):
        for namespace in self.namespaces:
            # What a host that was cut off still runs, such as mpirun's daemon.
            left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
            for process in left:
                try:
                    os.kill(int(process), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def environment(self, agent):
        """What COMMAND is told. Hosts share a file system and nothing else that MPI may use."""
        with open(agent, "w") as script:
            # mpirun calls it as ssh: HOST COMMAND...
            script.write(
                "#!/bin/sh\nhost=$1 name=node${1##*.}\nshift\n"
                f'exec ip netns exec {self.name}-$((${{host##*.}} - 1)) unshare --uts sh -c "hostname $name; $*"\n'
            )
        os.chmod(agent, 0o755)
        return os.environ | {
            "VCYCLE_HOSTS": ",".join(self.addresses),
            "VCYCLE_NAMESPACES": ",".join(self.namespaces),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "OMPI_MCA_hwloc_base_binding_policy": "none",
            "OMPI_MCA_plm_rsh_agent": agent,
            "OMPI_MCA_plm": "rsh",
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_btl_tcp_if_include": "net0",
            "OMPI_MCA_oob_tcp_if_include": "net0",
        }

    def pass_on(self, seconds_per_byte, delay, is_over):
        """Passes packets on until is_over()."""
        index = {bytes(map(int, address.split("."))): i for i, address in enumerate(self.addresses)}
        free = [0.0] * len(self.devices)  # when each host's last packet has left it
        taken = list(free)  # when the last packet to each host has come
        late, number = [], 0  # (time of arrival, number, device, packet)
        while not is_over():
            now = time.monotonic()
            while late and late[0][0] <= now:
                _, _, device, packet = heapq.heappop(late)
                try:
                    os.write(device, packet)
                except OSError:
                    pass  # its interface is down
            open_to = [d for d, at in zip(self.devices, free) if at - now < BACKLOG]
            until = min(late[0][0] - now if late else 0.1, 0.1 if len(open_to) == len(free) else 0.001)
            for device in select.select(open_to, [], [], max(until, 0))[0]:
                i = self.devices.index(device)
                for _ in range(16):
                    try:
                        packet = os.read(device, 1 << 17)
                    except OSError:
                        break
                    to = index.get(packet[HEADER + 16 : HEADER + 20]) if packet[HEADER] >> 4 == 4 else None
                    if to is not None:
                        free[i] = max(free[i], time.monotonic()) + len(packet) * seconds_per_byte
                        taken[to] = max(free[i] + delay, taken[to] + len(packet) * seconds_per_byte)
                        number += 1
                        heapq.heappush(late, (taken[to], number, self.devices[to], packet))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--mbit", type=float, default=10000)
    parser.add_argument("--ms", type=float, default=0)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        skip("network namespaces need root")
    for program in ["ip", "unshare", "mpirun"]:
        if not shutil.which(program):
            skip(f"there is no program {program}")
    if not os.path.exists("/dev/net/tun"):
        skip("there is no /dev/net/tun")
    hosts = Hosts(arguments.count)
    agent = f"/tmp/{hosts.name}-agent"
    # An ordinary end also on a signal: the namespaces must go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        try:
            hosts.start()
        except (OSError, subprocess.CalledProcessError) as error:
            skip(f"network namespaces or TUN devices are not permitted here: {getattr(error, 'stderr', '') or error}")
        # The first host is where COMMAND runs, under its own name too.
        first = ["ip", "netns", "exec", hosts.namespaces[0], "unshare", "--uts", "sh", "-c", 'hostname node1; exec "$@"', "sh"]
        command = subprocess.Popen(first + arguments.command, env=hosts.environment(agent))
        # A network needs no turn on a core.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        hosts.pass_on(8e-6 / arguments.mbit, arguments.ms / 1e3, lambda: command.poll() is not None)
        return command.returncode
    finally:
        hosts.stop()
        if os.path.exists(agent):
            os.remove(agent)


if __name__ == "__main__":
    sys.exit(main())
