#!/usr/bin/env python3
"""The rival: the same training step (forward, backward, clip, AdamW) in PyTorch eager. Prints JSON.

    python benches/pytorch_step.py --batch 4 --context 256 --vocab 50257
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

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
defaults = dict(depth=12, width=256, heads=8, context=256, batch=4, vocab=50257, threads=2, steps=10, warmup=2)
for name, default in defaults.items():
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--integrator", default="euler")
args = parser.parse_args()

torch.manual_seed(1337)
torch.set_num_threads(args.threads)
net = Net(args.vocab, args.width, args.heads, args.context, args.depth, args.integrator)
for p in net.parameters():
    if p.dim() == 2:
        torch.nn.init.normal_(p, std=0.02)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
tokens, targets = torch.randint(args.vocab, (2, args.batch, args.context))


def step():
    optimizer.zero_grad(set_to_none=True)
    loss = net(tokens, targets, reduction="mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return loss.item()


seconds = []
for n in range(args.warmup + args.steps):
    start = time.perf_counter()
    step()
    if n >= args.warmup:
        seconds.append(time.perf_counter() - start)
median = statistics.median(seconds)
report = {
    "torch": torch.__version__,
    **vars(args),
    "seconds_per_step": round(median, 4),
    "fastest_seconds_per_step": round(min(seconds), 4),
    "tokens_per_s": round(args.batch * args.context / median, 1),
}
print(json.dumps(report))
