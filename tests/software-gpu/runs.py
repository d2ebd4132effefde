#!/usr/bin/env python3
"""Runs of every kind on the software GPU against the same on CPUs: python3 tests/software-gpu/runs.py VCYCLE [NAME...]

VCYCLE is built with the feature `cuda` and the settings that build.sh prints. Losses, gradient norms and validation losses of each
step must agree; a run that goes on from a checkpoint must have the bits of one without a stop.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
[run]
steps = 8
[data]
context = 16
batch = 4
[model]
width = 16
heads = 2
depth = 4
[levels]
count = 2
[cycle]
kind = "cascade"
[log]
every_steps = 1
eval_every = 4
eval_sequences = 2
"""
V = ["cycle.kind=v", "cycle.pre=1", "cycle.post=1", "cycle.coarse=2"]
COSETS = ["levels.transfer=injection", "cycle.kind=paper"]

# Name: ranks, settings.
RUNS = {
    "flat": (1, ["levels.count=1", "cycle.kind=flat"]),
    "cascade": (1, []),
    "bf16": (1, ["model.dtype=bf16"]),
    "accumulated": (1, ["data.micro_batch=1"]),
    "recomputed": (1, ["model.recompute=true", "model.tied=false"]),
    "split": (1, ["model.integrator=split"]),
    "heun": (1, ["model.integrator=heun"]),
    "completep": (1, ["model.parametrization=completep"]),
    "sgd": (1, ["optimizer.kind=sgd"]),
    "muon": (1, ["optimizer.kind=muon"]),
    "coherence": (1, [*V, "levels.update=correct", "levels.coherence=true", "levels.coherence_batches=1"]),
    "mixed": (1, [*V, "levels.transfer=linear", "levels.update=mix", "levels.alpha=0.5"]),
    "averaged": (1, [*V, "levels.transfer=average", "levels.update=correct"]),
    "paper": (1, [*COSETS, "levels.state=keep"]),
    "pulled": (1, [*COSETS, "levels.pull=0.1", "levels.coset=random"]),
    "adaptive": (1, ["cycle.kind=adaptive", "cycle.window=2", "levels.noise=0.1"]),
    "short": (1, ["levels.context=[16, 8]", "levels.batch=[4, 8]"]),
    "two ranks": (2, []),
    "two ranks, bf16": (2, ["model.dtype=bf16"]),
    "large gradients": (2, ["model.width=256", "data.context=4", "levels.count=1", "cycle.kind=flat"]),
    "zero": (2, ["parallel.zero=1"]),
    "zero, muon, coherence": (2, ["parallel.zero=1", "optimizer.kind=muon", *V, "levels.update=correct", "levels.coherence=true"]),
    "cosets in groups": (2, ["levels.transfer=injection", "levels.coset=all", "parallel.placement=cosets"]),
    "cosets that meet": (2, ["levels.transfer=injection", "levels.coset=all", "parallel.placement=cosets", "parallel.sync_every=2"]),
    "beside": (2, [*V, "levels.update=correct", "parallel.placement=beside"]),
}
FIELDS = ["loss", "grad_norm", "val_loss"]


def train(program, directory, ranks, settings, *options, order="late"):
    """The metrics of a run, a dictionary for each step. `order` is that of the streams, see gpu.h."""
    command = [program, "train", str(directory.parent / "config.toml"), "--run-dir", str(directory), *options]
    for setting in settings:
        command += ["--set", setting]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    environment = {**os.environ, "VCYCLE_SOFTWARE_GPU": order}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def compare(found, expected, allowed):
    """The largest relative difference; an error over `allowed`."""
    assert [m["step"] for m in found] == [m["step"] for m in expected], "other steps"
    worst = 0.0
    for a, b in zip(found, expected):
        for field in FIELDS:
            if b[field] is None:
                assert a[field] is None, f"step {a['step']}: {field} {a[field]}, expected none"
                continue
            difference = abs(a[field] - b[field]) / max(1.0, abs(b[field]))
            worst = max(worst, difference)
            assert difference <= allowed, f"step {a['step']}: {field} {a[field]}, expected {b[field]}"
    return worst


def check(program, folder, name, ranks, settings):
    settings = [f"data.dir={folder / 'data'}", *settings]
    folder = folder / name.replace(" ", "-").replace(",", "")
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    cpu = train(program, folder / "cpu", ranks, [*settings, "parallel.device=cpu"])
    on_gpu = [*settings, "parallel.device=cuda"]
    gpu = train(program, folder / "gpu", ranks, [*on_gpu, "checkpoint.every_steps=4", "checkpoint.keep=0"])
    allowed = 5e-2 if "model.dtype=bf16" in settings else 1e-4
    worst = compare(gpu, cpu, allowed)
    if ranks > 1:
        # Exchanges not as late as they may be, but as early.
        compare(train(program, folder / "crossed", ranks, on_gpu, order="crossed"), cpu, allowed)
    # Again from the middle.
    shutil.copytree(folder / "gpu", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step-00000008")
    again = train(program, folder / "again", ranks, [*on_gpu, "checkpoint.every_steps=4", "checkpoint.keep=0"], "--resume")
    assert compare(again, gpu, 0.0) == 0.0
    print(f"passed: {name} on {ranks} rank(s), differs from CPUs by at most {worst:.1e}", flush=True)


def main():
    program, names = sys.argv[1], sys.argv[2:] or RUNS
    os.environ.setdefault("VCYCLE_SOFTWARE_GPUS", "2")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(__file__).resolve().parents[2] / "src"
        prepare = [program, "data", "prepare", str(sources), "--out", f"{folder}/data", "--tokenizer", "bytes", "--ext", "rs"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        for name in names:
            try:
                check(program, Path(folder), name, *RUNS[name])
            except AssertionError as error:
                failed += 1
                print(f"FAILED: {name}: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
