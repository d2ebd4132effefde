#!/usr/bin/env python3
"""Compares the α-β model with runs over links of known speed:

    validate.py VCYCLE [--runs N]        (root; minutes)

For each link and number of ranks, each rank a host of its own (hosts.py): `vcycle bench machine` measures how fast ranks compute,
`vcycle train` takes steps on two levels, and `vcycle plan --machine` predicts them, once with the link as it was made and once
with the link as bench machine measured it.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

LINKS = [(200, 5.0), (200, 20.0), (1000, 1.0)]  # Mbit/s, ms
RANKS = [2, 3, 4]
CONFIG = """
run = {{ steps = 24 }}
data = {{ dir = "{data}", context = 64, batch = 12 }}
model = {{ vocab = 512, width = 128, heads = 4, depth = 8 }}
levels = {{ count = 2 }}
cycle = {{ kind = "cascade" }}
parallel = {{ threads = 1 }}
log = {{ every_steps = 1, eval_every = 0, eval_sequences = 4 }}
"""


def measured(metrics):
    """Median seconds of a step on each level; the first steps on a level warm up, the last is evaluated."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = {0: [], 1: []}
    for before, line in zip(lines, lines[1:]):
        if before["level"] == line["level"] and line["val_loss"] is None:
            seconds[line["level"]].append((line["tokens"] - before["tokens"]) / line["tokens_per_s"])
    return {level: statistics.median(of_level[1:]) for level, of_level in seconds.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("vcycle", type=pathlib.Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    vcycle, here = arguments.vcycle.resolve(), pathlib.Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        sources = here.parent.parent / "src"
        prepare = [vcycle, "data", "prepare", sources, "--out", folder / "data", "--tokenizer", "bytes", "--ext", "rs"]
        subprocess.run(prepare, check=True, capture_output=True)
        (folder / "config.toml").write_text(CONFIG.format(data=folder / "data"))
        shape = ["context=64", "batch=12"]
        settings = [f"data.{s}" for s in shape] + ["model.vocab=512", "model.width=128", "model.heads=4", "model.depth=8"]

        def predicted(machine, ranks):
            plan = [vcycle, "plan", folder / "config.toml", "--ranks", str(ranks), "--machine", machine, "--json"]
            levels = json.loads(subprocess.run(plan, check=True, capture_output=True).stdout)["forecast"]["levels"]
            return {level["level"]: level["step_s"] for level in levels}

        print("link             ranks  level   measured [ms]   link as made   link as measured")
        for mbit, ms in LINKS:
            for ranks in RANKS:
                rows = {0: [], 1: []}
                for run in range(arguments.runs):
                    started = ["mpirun", "-n", str(ranks), "--host", "$VCYCLE_HOSTS"]
                    of_bench = [*started, vcycle, "bench", "machine", "--set", "parallel.threads=1", "--set", f"data.batch={12 // ranks}"]
                    of_bench += [word for setting in settings if "batch" not in setting for word in ("--set", setting)]
                    train = f"{' '.join(started)} {vcycle} train {folder}/config.toml --run-dir {folder}/run"
                    shell = f"rm -rf {folder}/run; {' '.join(map(str, of_bench))} >{folder}/m.toml && {train} 2>{folder}/out"
                    hosts = [sys.executable, here / "hosts.py", str(ranks), "--mbit", str(mbit), "--ms", str(ms)]
                    done = subprocess.run([*hosts, "--", "bash", "-c", shell])
                    if done.returncode:
                        print((folder / "out").read_text() if (folder / "out").exists() else "", file=sys.stderr)
                        return done.returncode
                    text = (folder / "m.toml").read_text()
                    text = re.sub(r"latency = \S+", f"latency = {ms / 1e3}", text)
                    (folder / "made.toml").write_text(re.sub(r"\nbandwidth = \S+", f"\nbandwidth = {mbit * 125e3}", text))
                    times = measured(folder / "run/metrics.jsonl")
                    made, bench = predicted(folder / "made.toml", ranks), predicted(folder / "m.toml", ranks)
                    for level in rows:
                        rows[level].append((times[level], made[level] / times[level] - 1, bench[level] / times[level] - 1))
                for level, runs in rows.items():
                    step, made, bench = (statistics.median(column) for column in zip(*runs))
                    link = f"{mbit} Mbit/s, {ms:g} ms"
                    print(f"{link:<18} {ranks:>3} {level:>6} {1e3 * step:>14.0f} {100 * made:>+13.0f} % {100 * bench:>+15.0f} %", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
