"""Time of `parallel.placement = "cosets"` on two ranks of one thread, over that of one rank of one thread which trains the same
cosets one after the other. Both do the same steps on the same batches; they are run in turns, and medians are compared.

    python3 benches/placement.py target/release/vcycle DATA [--rounds 5] [--steps 20] [--set KEY=VALUE ...]

DATA is a prepared dataset. Needs two cores that nobody else uses.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

# Big enough for communication to be a small part, small enough for a few seconds a run.
NET = {
    "data.context": 128,
    "data.batch": 8,
    "model.width": 256,
    "model.heads": 8,
    "model.depth": 8,
    "levels.count": 2,
    "levels.transfer": '"injection"',
    "levels.state": '"keep"',
    "cycle.kind": '"phases"',
    "parallel.placement": '"cosets"',
    "parallel.threads": 1,
    "log.every_steps": 1,
    "log.eval_every": 0,
    "log.eval_sequences": 1,
}
WARM_UP = 2  # steps before the clock starts: buffers are allocated


def seconds(vcycle, data, ranks, steps, settings):
    """Seconds of `steps` steps on both cosets, evaluation and start-up left out."""
    total = WARM_UP + steps
    phases = f"[{{ level = 1, steps = {total} }}, {{ level = 0, steps = 1 }}]"
    keys = NET | {"data.dir": f'"{data}"', "run.steps": total + 1, "cycle.phases": phases}
    launch = ["mpirun", "--bind-to", "none", "-n", str(ranks)] if ranks > 1 else []
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "config.toml")
        config.write_text("")
        run = pathlib.Path(folder, "run")
        command = [*launch, vcycle, "train", str(config), "--run-dir", str(run)]
        for setting in [f"{key}={value}" for key, value in keys.items()] + settings:
            command += ["--set", setting]
        done = subprocess.run(command, env=os.environ | root, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    elapsed = {line["step"]: line["elapsed_s"] for line in lines}
    losses = [line["loss"] for line in lines]
    return elapsed[total] - elapsed[WARM_UP], losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vcycle")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    args = parser.parse_args()
    times = {1: [], 2: []}
    for _ in range(args.rounds):
        losses = {}
        for ranks in times:
            took, losses[ranks] = seconds(args.vcycle, args.data, ranks, args.steps, args.settings)
            times[ranks].append(took)
        worst = max(abs(a - b) / abs(a) for a, b in zip(losses[1], losses[2]))
        if worst > 1e-3:
            sys.exit(f"the two trained differently: losses differ by {worst:.1e}")
    one, two = (statistics.median(times[ranks]) for ranks in (1, 2))
    for ranks, all_times in times.items():
        print(f"{ranks} rank(s) of 1 thread: median {statistics.median(all_times):.3f} s of {[round(t, 3) for t in all_times]}")
    print(f"ratio {two / one:.3f} (bar: 0.60)")


if __name__ == "__main__":
    main()
