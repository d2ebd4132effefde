#!/usr/bin/env python3
"""The rival: the training step of `vcycle bench step` (forward, backward, clip, AdamW) in PyTorch, on the CPU or a GPU.

    python benches/pytorch_step.py --batch 4 --context 256 --vocab 50257 [--compile] [--device cuda --dtype bf16]

Prints JSON. The net is that of tests/oracle (flash attention, tanh GELU, tied head) in the usual GPT form; the optimizer is
PyTorch's fused AdamW. With --serve it reads a number of steps from each line of standard input and prints their seconds,
as `vcycle bench step --serve` does.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests" / "oracle"))
from gpt_oracle import Net  # noqa: E402

WARM_UP = 3


def memory(key):
    """Bytes of this process: VmRSS resident now, VmHWM the most at once."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


def gpt_block(block, h, x):
    """Euler's step at h = 1, without the multiplications and additions that only other h need."""
    x = x + block.sa(x)
    return x + block.ff(x)


def build(args):
    """A function that does one training step."""
    torch.manual_seed(1337)
    net = Net(args.vocab, args.width, args.heads, args.context, args.depth).to(args.device)
    net.step = gpt_block
    for p in net.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    groups = [
        {"params": [p for p in net.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    implementation = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **implementation[args.adamw])
    forward = torch.compile(net, dynamic=False) if args.compile else net

    def step():
        tokens, targets = torch.randint(args.vocab, (2, args.batch, args.context), device=args.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = forward(tokens, targets, reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def timed(step, count):
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = dict(depth=12, width=256, heads=8, context=256, batch=4, vocab=50257, threads=2, steps=7)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the net (on a CPU it needs a C++ compiler)")
    parser.add_argument("--adamw", default="fused", choices=["fused", "foreach", "loop"])
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16"], help="bf16: under torch.autocast")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    before = memory("VmRSS")
    step = build(args)
    timed(step, WARM_UP)
    usage = {"before": before, "peak": memory("VmHWM")}
    if args.serve:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "memory": usage}), flush=True)
        for line in sys.stdin:
            print(json.dumps({"step_s": timed(step, int(line))}), flush=True)
        return
    seconds = timed(step, args.steps)
    median = statistics.median(seconds)
    report = {
        "torch": torch.__version__,
        **vars(args),
        "step_s": median,
        "fastest_step_s": min(seconds),
        "tokens_per_s": args.batch * args.context / median,
        "memory": usage,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
