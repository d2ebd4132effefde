#!/usr/bin/env python3
"""A training step of vcycle against PyTorch's, eager and compiled, on the same machine.

    cargo build --release
    python benches/compare_step.py                      # all cases
    python benches/compare_step.py --case wide --pairs 9 --json

Every contender is a process that keeps its net. They work in turn, a few steps each, while the others sleep: a turn of all
of them is a pair, and a change of the machine's speed meets all alike. Same shapes, type, AdamW, clipping, threads. Printed
are medians over all steps, their ratios (over 1: vcycle is faster) with the range over the pairs, the share of the matrix
product peak that vcycle measured between its turns, and memory: the most that was resident, less what was resident
before the net was built. Needs PyTorch; torch.compile needs a C++ compiler.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# Steps: in a turn.
CASES = {
    "large-vocab": dict(vocab=50257, batch=4, context=256, width=256, heads=8, depth=12, steps=3),
    "small-vocab": dict(vocab=256, batch=8, context=256, width=256, heads=8, depth=12, steps=3),
    "wide": dict(vocab=50257, batch=2, context=512, width=768, heads=12, depth=12, steps=1),
}
KEYS = dict(vocab="model.vocab", batch="data.batch", context="data.context", width="model.width", heads="model.heads",
            depth="model.depth")  # fmt: skip


class Contender:
    """A process that does as many steps as it is asked for."""

    def __init__(self, name, command, threads):
        self.name, self.step_s, self.peaks, self.pairs = name, [], [], []
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.greeting = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early (status {self.process.wait()}): {self.process.args}")
        return json.loads(line)

    def turn(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.read()
        self.step_s += answer["step_s"]
        self.pairs.append(statistics.median(answer["step_s"]))
        if "gemm_peak_flops" in answer:
            self.peaks.append(answer["gemm_peak_flops"])

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def memory(self):
        usage = self.greeting["memory"]
        return usage["peak"] - usage["before"]


def vcycle_command(args, case):
    settings = [f"{key}={case[name]}" for name, key in KEYS.items()] + [
        f"parallel.threads={args.threads}",
        f"model.dtype={args.dtype}",
        *args.set,
    ]
    return [args.vcycle, "bench", "step", "--serve", *(word for setting in settings for word in ("--set", setting))]


def torch_command(args, case, flags):
    sizes = [word for name in KEYS for word in (f"--{name}", str(case[name]))]
    script = str(pathlib.Path(__file__).parent / "pytorch_step.py")
    return [sys.executable, script, "--serve", "--threads", str(args.threads), "--dtype", args.dtype, *sizes, *flags]


def compare(args, name):
    """The report of one case."""
    case = CASES[name]
    contenders = [Contender("vcycle", vcycle_command(args, case), args.threads)]
    rivals = {"eager": [], "compiled": ["--compile"]}
    contenders += [Contender(rival, torch_command(args, case, rivals[rival]), args.threads) for rival in args.rivals]
    for pair in range(args.pairs):
        for contender in contenders:
            contender.turn(case["steps"])
        print(f"{name}: pair {pair + 1} of {args.pairs}", file=sys.stderr)
    for contender in contenders:
        contender.close()

    vcycle, *rest = contenders
    tokens, flops = vcycle.greeting["tokens_per_step"], vcycle.greeting["flops_per_step"]
    peak = statistics.median(vcycle.peaks)
    rows = []
    for contender in contenders:
        step_s = statistics.median(contender.step_s)
        ratios = [theirs / ours for theirs, ours in zip(contender.pairs, vcycle.pairs)]
        rows.append({
            "name": contender.name,
            "step_s": step_s,
            "tokens_per_s": tokens / step_s,
            "flops_per_s": flops / step_s,
            "fraction_of_peak": flops / step_s / peak,
            "speedup": step_s / statistics.median(vcycle.step_s),
            "speedup_range": [min(ratios), max(ratios)],
            "memory": contender.memory(),
            "memory_with_process": contender.greeting["memory"]["peak"],
            "memory_ratio": vcycle.memory() / contender.memory(),
        })  # fmt: skip
    return {
        "case": name,
        **case,
        "threads": args.threads,
        "dtype": args.dtype,
        "pairs": args.pairs,
        "set": args.set,
        "torch": rest[0].greeting["torch"] if rest else None,
        "gemm_peak_flops": peak,
        "memory_predicted": vcycle.greeting["memory"]["predicted"],
        "contenders": rows,
    }


def cpu_model():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def markdown(report):
    """A table for docs/PERFORMANCE.md."""
    sizes = "{dtype}, {vocab:,} tokens, B {batch}, T {context}, width {width}, {heads} heads, {depth} blocks".format(**report)
    peak = report["gemm_peak_flops"] / 1e9
    lines = [
        f"**{report['case']}**: {sizes}; {report['threads']} threads, {report['pairs']} pairs, peak {peak:.0f} GFLOP/s"
        + (f", PyTorch {report['torch']}" if report["torch"] else "")
        + "".join(f", {setting}" for setting in report["set"]),
        "",
        "| | ms a step | tokens/s | of the peak | vcycle is faster by | memory | vcycle's over this |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["contenders"]:
        own = row["name"] == "vcycle"
        low, high = row["speedup_range"]
        speedup = "" if own else f"{row['speedup']:.2f} ({low:.2f}–{high:.2f})"
        ratio = "" if own else f"{row['memory_ratio']:.2f}"
        name = row["name"] if own else f"PyTorch, {row['name']}"
        lines.append(
            f"| {name} | {row['step_s'] * 1e3:.0f} | {row['tokens_per_s']:.0f} | {row['fraction_of_peak']:.0%} "
            f"| {speedup} | {row['memory'] / 2**20:.0f} MiB | {ratio} |"
        )
    predicted = report["memory_predicted"]
    error = report["contenders"][0]["memory"] / predicted - 1
    lines += ["", f"`vcycle plan` predicts {predicted / 2**20:.0f} MiB; measured is {error:+.1%}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of products; PyTorch: torch.autocast")
    parser.add_argument("--rivals", nargs="*", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="a key of vcycle's config")
    parser.add_argument("--vcycle", default=str(ROOT / "target" / "release" / "vcycle"), help="the program")
    parser.add_argument("--json", action="store_true", help="print JSON, a line a case")
    args = parser.parse_args()
    if not pathlib.Path(args.vcycle).exists():
        raise SystemExit(f"{args.vcycle} is missing: run `cargo build --release`, or name it with --vcycle")
    if "compiled" in args.rivals and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        print("left out: compiled. torch.compile needs a C++ compiler, and there is no g++ or clang++", file=sys.stderr)
        args.rivals.remove("compiled")
    if not args.json:
        print(f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores\n")
    for name in CASES if args.case == "all" else [args.case]:
        report = compare(args, name)
        print(json.dumps(report) if args.json else markdown(report) + "\n", flush=True)


if __name__ == "__main__":
    main()
