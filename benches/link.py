#!/usr/bin/env python3
"""What placements gain on a slow link: 4 ranks of one thread, each on a host of its own (network namespaces, tests/net/hosts.py),
1 Gbit/s and 1 ms between them.

    python3 benches/link.py target/release/vcycle DATA [--rounds 3] [--mbit 1000] [--ms 1]        (root; minutes)

DATA is a prepared dataset. Three things are measured, all in turns, and medians are reported:

- `vcycle bench overlap`: the share of the gradient's sums that the backward pass hides.
- placement `cosets` against `sequential` with `levels.coset = "all"`. Both compute the same numbers up to rounding (it is checked),
  so the time to the same loss is that of the run.
- placement `beside` against `sequential`, the same visits: the time at which the better one has reached the loss that the other
  ends with, by `vcycle compare`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

RANKS = 4
# As small as a net can be whose sums take about as long as its gradient: 4 ranks and the link share few cores.
NET = {
    "data.context": 64,
    "data.batch": 8,
    "model.width": 128,
    "model.heads": 4,
    "model.depth": 8,
    "levels.count": 2,
    "levels.factor": 4,
    "parallel.threads": 1,
    "optimizer.lr": 2e-3,
    "log.every_steps": 10,
    "log.eval_sequences": 64,
}
COSETS = {
    "run.steps": 60,
    "levels.transfer": '"injection"',
    "levels.coset": '"all"',
    "levels.state": '"keep"',
    "cycle.kind": '"paper"',
    "cycle.fractions": "[0.6667, 0.3333]",
    "log.eval_every": 0,
}
# The coarse level on one rank, which needs no network. The other three do few steps on the fine level meanwhile: more of them
# correct the same error twice, and end with a higher loss (docs/PLACEMENT.md).
BESIDE = {
    "run.steps": 554,
    "levels.update": '"correct"',
    "cycle.kind": '"phases"',
    "cycle.phases": "[{level=0,steps=20},{level=1,steps=400},{level=0,steps=4},{level=0,steps=130}]",
    "parallel.sync_every": 1,
    "log.eval_every": 10,
}
OVERLAP = {"model.vocab": 320, "data.batch": 32}


def launched(command, ranks=RANKS):
    """`command` on the hosts, its standard output."""
    words = ["mpirun", "-n", str(ranks), "--host", os.environ["VCYCLE_HOSTS"], *command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return done.stdout


def settings(*tables):
    keys = {key: value for table in tables for key, value in table.items()}
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def train(vcycle, run, *tables, ranks=RANKS):
    """The lines of metrics."""
    config = run.parent / "config.toml"
    config.write_text("")
    launched([vcycle, "train", str(config), "--run-dir", str(run), *settings(*tables)], ranks)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def show(name, values, unit="s", digits=1):
    listed = ", ".join(f"{value:.{digits}f}" for value in values)
    print(f"  {name}: median {statistics.median(values):.{digits}f} {unit} of {listed}", flush=True)


def overlap(vcycle, rounds):
    keys = {key: value for key, value in NET.items() if key.startswith(("data", "model", "parallel"))} | OVERLAP
    reports = []
    for _ in range(rounds):
        reports.append(json.loads(launched([vcycle, "bench", "overlap", "--json", *settings(keys)]).splitlines()[-1]))
    print(f"overlap: sums of {reports[0]['bytes'] / 1e6:.1f} MB a step over {RANKS} ranks")
    for key, name in [
        ("compute_s", "computing alone"),
        ("sums_s", "sums alone"),
        ("both_s", "both, as in a step"),
        ("exposed_s", "of that, waiting for sums after the backward pass"),
    ]:
        show(name, [1e3 * report[key] for report in reports], "ms", 0)
    show("hidden", [100 * report["hidden"] for report in reports], "% of the sums (bar: 60)", 0)


def cosets(vcycle, data, folder, rounds):
    seconds = {"sequential": [], "cosets": []}
    for number in range(rounds):
        lines = {}
        for placement, taken in seconds.items():
            run = folder / f"cosets-{placement}-{number}"
            lines[placement] = train(vcycle, run, NET, data, COSETS, {"parallel.placement": f'"{placement}"'})
            taken.append(lines[placement][-1]["elapsed_s"])
        # Rounding makes runs part slowly: at first they are the same, in the end nearly.
        early = [run[1]["loss"] for run in lines.values()]
        losses = [run[-1]["val_loss"] for run in lines.values()]
        for (one, other), tolerance in [(early, 1e-4), (losses, 1e-2)]:
            if abs(one / other - 1) > tolerance:
                sys.exit(f"the two trained differently: losses {early} at step 10, {losses} of validation")
    print(f"cosets: 4 cosets of 2 blocks, validation loss {losses[0]:.4f} and {losses[1]:.4f}")
    for placement, taken in seconds.items():
        show(placement, taken)
    ratio = statistics.median(seconds["cosets"]) / statistics.median(seconds["sequential"])
    print(f"  cosets takes {ratio:.2f} of the time of sequential")


def beside(vcycle, data, folder, rounds):
    placed = {"parallel.placement": '"beside"', "parallel.groups": "[3,1]"}
    runs, saved = {"sequential": [], "beside": []}, []
    for number in range(rounds):
        for placement, ended in runs.items():
            run = folder / f"beside-{placement}-{number}"
            ended.append(train(vcycle, run, NET, data, BESIDE, placed if placement == "beside" else {})[-1])
        saved.append(saving(vcycle, *(folder / f"beside-{placement}-{number}" for placement in runs)))
    print("beside: 2 blocks on one rank beside 8 blocks on three")
    for placement, ended in runs.items():
        show(f"{placement}, validation loss {ended[0]['val_loss']:.4f}", [line["elapsed_s"] for line in ended])
    alone = train(vcycle, folder / "alone", NET, data, BESIDE, ranks=1)[-1]
    print(f"  (one rank alone, without a network: {alone['elapsed_s']:.1f} s, validation loss {alone['val_loss']:.4f})")
    show("beside saves", [100 * value for value in saved], "% of the time to the same loss", 0)


def saving(vcycle, sequential, beside):
    """1 - (time of beside) / (time of sequential) to the loss that the worse of them ends with."""

    def compare(baseline, run):
        words = [vcycle, "compare", str(baseline), str(run), "--json"]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["runs"][0]

    to_sequential = compare(sequential, beside)
    if to_sequential["reached"]:
        return to_sequential["wall_clock_saved"]
    # Sequential is the better: it needs (1 - s) of the time of beside.
    return 1 - 1 / (1 - compare(beside, sequential)["wall_clock_saved"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vcycle", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--ms", type=float, default=1)
    parser.add_argument("--only", choices=["overlap", "cosets", "beside"])
    arguments = parser.parse_args()
    if "VCYCLE_HOSTS" not in os.environ:
        hosts = pathlib.Path(__file__).resolve().parent.parent / "tests/net/hosts.py"
        link = ["--mbit", str(arguments.mbit), "--ms", str(arguments.ms)]
        os.execv(sys.executable, [sys.executable, str(hosts), str(RANKS), *link, "--", sys.executable, *sys.argv])
    vcycle, data = str(arguments.vcycle.resolve()), {"data.dir": f'"{arguments.data.resolve()}"'}
    print(f"{RANKS} ranks on hosts of their own, {arguments.mbit:g} Mbit/s and {arguments.ms:g} ms between them")
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "overlap": lambda: overlap(vcycle, arguments.rounds),
            "cosets": lambda: cosets(vcycle, data, pathlib.Path(folder), arguments.rounds),
            "beside": lambda: beside(vcycle, data, pathlib.Path(folder), arguments.rounds),
        }
        for part in [arguments.only] if arguments.only else parts:
            parts[part]()


if __name__ == "__main__":
    main()
