#!/usr/bin/env python3
"""Compares the α-β model with runs over links of known speed:

    validate.py measure VCYCLE FILE.jsonl [--runs N] [--links MBIT,MS ...] [--ranks K ...]        (root; two minutes for each link, rank count and run)
    validate.py predict VCYCLE FILE.jsonl

For each link and number of ranks, each rank a host of its own (hosts.py), `measure` lets `vcycle train` take steps with each placement
in turn, and `vcycle bench machine` find how fast ranks compute before the first, between them and after the last; FILE gets a line
for each run. `predict` lets `vcycle plan --machine` predict the steps of those lines, as the mean of what the machine was before and after
them makes of them, once with the link as it was made and once as `bench machine` measured it, and prints medians over runs.
"""

import argparse
import itertools
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

CONFIG = """
run = {{ steps = {steps} }}
data = {{ dir = "{data}", context = 64, batch = 24 }}
model = {{ vocab = 512, width = 128, heads = 4, depth = 8 }}
levels = {{ count = 2{levels} }}
cycle = {{ {cycle} }}
parallel = {{ threads = 1, placement = "{placement}", sync_every = 1 }}
log = {{ every_steps = {every}, eval_every = 0, eval_sequences = 4 }}
"""
# Two levels in turn; the two cosets of 4 rows; rounds of 2 steps on 4 rows beside one on 8. A line of metrics takes a sum of its
# own, so there are few.
PLACEMENTS = {
    "sequential": {"steps": 40, "every": 4, "levels": "", "cycle": 'kind = "cascade", fractions = [0.5, 0.5]'},
    "cosets": {
        "steps": 24,
        "every": 4,
        "levels": ', transfer = "injection", coset = "all", state = "keep"',
        "cycle": 'kind = "paper", fractions = [0.84, 0.16]',
    },
    "beside": {
        "steps": 44,
        "every": 6,
        "levels": ', update = "correct"',
        "cycle": 'kind = "phases", phases = [{ level = 0, steps = 4 }, { level = 1, steps = 24 }, { level = 0, steps = 12 }, { level = 0, steps = 4 }]',
    },
}
SHAPE = ["data.context=64", "model.vocab=512", "model.width=128", "model.heads=4", "model.depth=8", "parallel.threads=1"]


def config(placement, data):
    return CONFIG.format(data=data, placement=placement, **PLACEMENTS[placement])


def step_seconds(placement, metrics):
    """Median seconds of a step: on each level, of `sequential`, or in a stage, where groups work side by side. The first ones on a
    level warm up; the last is evaluated."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    coarse = max(line["step"] for line in lines if line["level"] == 1)
    # A round of `beside` has a line for each side.
    lines = [line for line, next_line in zip(lines, lines[1:]) if line["step"] < next_line["step"] and line["val_loss"] is None]

    def name(line):
        return f"level {line['level']}" if placement == "sequential" else "stage" if line["step"] <= coarse else "steps"

    seconds = {}
    for before, line in zip(lines, lines[1:]):
        if name(before) == name(line):
            per_step = (line["elapsed_s"] - before["elapsed_s"]) / (line["step"] - before["step"])
            seconds.setdefault(name(line), []).append(per_step)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items() if name != "steps"}


def sets(settings):
    return [word for setting in settings for word in ("--set", setting)]


def measure(arguments, folder):
    vcycle, here = arguments.vcycle.resolve(), pathlib.Path(__file__).resolve().parent
    prepare = [vcycle, "data", "prepare", here.parent.parent / "src", "--out", folder / "data", "--tokenizer", "bytes", "--ext", "rs"]
    subprocess.run(prepare, check=True, capture_output=True)
    for placement in PLACEMENTS:
        (folder / f"{placement}.toml").write_text(config(placement, folder / "data"))
    for (mbit, ms), ranks, _ in itertools.product(arguments.links, arguments.ranks, range(arguments.runs)):
        placements = list(PLACEMENTS) if ranks > 1 else ["sequential"]
        bench = " ".join(["bench machine --times 3", *sets(SHAPE), *sets([f"data.batch={24 // ranks}"])])
        # A link takes two ranks, also where one trains.
        bench = f"mpirun -n {max(ranks, 2)} --host $VCYCLE_HOSTS {vcycle} {bench}"
        train = f"mpirun -n {ranks} --host $VCYCLE_HOSTS {vcycle} train {folder}/$placement.toml --run-dir {folder}/$placement 2>{folder}/out"
        shell = (
            f"set -e; {bench} >{folder}/machine-0.toml; n=0; "
            f"for placement in {' '.join(placements)}; do rm -rf {folder}/$placement; {train}; "
            f"n=$((n + 1)); {bench} >{folder}/machine-$n.toml; done"
        )
        hosts = [sys.executable, here / "hosts.py", str(max(ranks, 2)), "--mbit", str(mbit), "--ms", str(ms)]
        done = subprocess.run([*hosts, "--", "bash", "-c", shell])
        if done.returncode:
            print((folder / "out").read_text() if (folder / "out").exists() else "", file=sys.stderr)
            return done.returncode
        line = {"mbit": mbit, "ms": ms, "ranks": ranks}
        line["machines"] = [(folder / f"machine-{n}.toml").read_text() for n in range(len(placements) + 1)]
        line["step_s"] = {placement: step_seconds(placement, folder / placement / "metrics.jsonl") for placement in placements}
        with open(arguments.file, "a") as file:
            print(json.dumps(line), file=file)
    return 0


def with_link(machine, line):
    """The machine file with the link as it was made."""
    machine = re.sub(r"\nlatency = \S+", f"\nlatency = {line['ms'] / 1e3}", machine)
    return re.sub(r"\nbandwidth = \S+", f"\nbandwidth = {line['mbit'] * 125e3}", machine)


def predict(arguments, folder):
    def predicted(machine, ranks, placement):
        """Predicted seconds of a step on each level or in a stage. The hosts are one node: they share its cores."""
        machine = re.sub(r"\nranks_per_node = \d+", f"\nranks_per_node = {max(ranks, 2)}", machine)
        (folder / "config.toml").write_text(config(placement, "none"))
        (folder / "machine.toml").write_text(machine)
        plan = [arguments.vcycle, "plan", folder / "config.toml", "--ranks", str(ranks), "--machine", folder / "machine.toml", "--json"]
        forecast = json.loads(subprocess.run(plan, check=True, capture_output=True).stdout)["forecast"]
        if placement == "sequential":
            return {f"level {level['level']}": level["step_s"] for level in forecast["levels"]}
        [stage] = forecast["stages"]
        return {"stage": (stage["seconds"] - stage["end_s"]) / stage["steps"]}

    runs = {}
    for line in map(json.loads, arguments.file.read_text().splitlines()):
        for placement, *around in zip(line["step_s"], line["machines"], line["machines"][1:]):
            by_link = [predicted(with_link(machine, line), line["ranks"], placement) for machine in around]
            by_bench = [predicted(machine, line["ranks"], placement) for machine in around]
            for part, seconds in line["step_s"][placement].items():
                key = (line["mbit"], line["ms"], line["ranks"], placement, part)
                off = [statistics.mean(forecast[part] for forecast in by) / seconds - 1 for by in (by_link, by_bench)]
                runs.setdefault(key, []).append((seconds, *off))
    print("link                 ranks                       measured   link as made   link as measured")
    errors = {"as made": [], "as measured": []}
    for (mbit, ms, ranks, placement, part), of_key in sorted(runs.items(), key=lambda run: (run[0][3:], run[0])):
        seconds, made, bench = (statistics.median(column) for column in zip(*of_key))
        errors["as made"].append(made)
        errors["as measured"].append(bench)
        link, what = f"{mbit:g} Mbit/s, {ms:g} ms", f"{placement}, {part}"
        print(f"{link:<20} {ranks:>5}  {what:<20} {1e3 * seconds:>7.0f} ms {100 * made:>+12.0f} % {100 * bench:>+16.0f} %")
    for name, off in errors.items():
        within = sum(abs(error) <= 0.2 for error in off)
        print(f"with the link {name}, {within} of {len(off)} within 20 %, from {100 * min(off):+.0f} % to {100 * max(off):+.0f} %")
    return 0


def link(text):
    mbit, ms = map(float, text.split(","))
    return mbit, ms


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for command in (measure, predict):
        of_command = commands.add_parser(command.__name__)
        of_command.set_defaults(command=command)
        of_command.add_argument("vcycle", type=pathlib.Path)
        of_command.add_argument("file", type=pathlib.Path)
        if command is measure:
            of_command.add_argument("--runs", type=int, default=3)
            of_command.add_argument("--links", type=link, nargs="+", default=[(200, 5), (200, 20), (1000, 1)])
            of_command.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return arguments.command(arguments, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())
