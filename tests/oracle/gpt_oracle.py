#!/usr/bin/env python3
"""The net in plain PyTorch: an independent answer for loss and every gradient.

Parameters and batch come from a formula (`noise`) that tests/model.rs repeats, so the file written here holds answers
only. The fixture of the tests is what this prints with no arguments but --out:

    python tests/oracle/gpt_oracle.py --out tests/fixtures/gpt_oracle.npz

A larger one, for a check by hand (VCYCLE_ORACLE=FILE cargo test --release --test model oracle):

    python tests/oracle/gpt_oracle.py --width 256 --heads 8 --depth 2 --context 128 --vocab 50257 --out FILE
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm block: SA(LN1 x) and FF(LN2 x), without the residual connections. Parameters in the order of a row."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.mlp_proj = nn.Linear(4 * width, width)

    def sa(self, x):
        batch, context, width = x.shape
        split = lambda u: u.view(batch, context, self.heads, width // self.heads).transpose(1, 2)
        q, k, v = map(split, self.qkv(self.ln1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_proj(y.transpose(1, 2).reshape(batch, context, width))

    def ff(self, x):
        return self.mlp_proj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    def field(self, x):
        a = self.sa(x)
        return a + self.ff(x + a)


def euler(block, h, x):
    return x + h * block.field(x)


def split(block, h, x):
    x = x + h * block.sa(x)
    return x + h * block.ff(x)


def heun(block, h, x):
    k1 = block.field(x)
    k2 = block.field(x + h * k1)
    return x + h / 2 * (k1 + k2)


INTEGRATORS = {"euler": euler, "split": split, "heun": heun}


class Net(nn.Module):
    def __init__(self, vocab, width, heads, context, depth, integrator="euler", tied=True, h=1.0):
        super().__init__()
        self.step, self.h = INTEGRATORS[integrator], h
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens, targets, reduction="sum"):
        x = self.wte(tokens) + self.wpe.weight
        for block in self.blocks:
            x = self.step(block, self.h, x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    def ends(self):
        head = [] if self.head.weight is self.wte.weight else [self.head.weight]
        return [self.wte.weight, self.wpe.weight, self.ln_f.weight, self.ln_f.bias, *head]


def noise(stream, count):
    """uint32 hash of (stream, index)."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(stream * 0x85EBCA77 & 0xFFFFFFFF)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x2C1B3C6D)
    x ^= x >> np.uint32(12)
    x *= np.uint32(0x297A2D39)
    x ^= x >> np.uint32(15)
    return x


def fill(parameters, layer_norm_weights, stream, scale):
    """Uniform in ±scale/2, one hash index after the other through all parameters; layer norm weights plus one."""
    values = (noise(stream, sum(p.numel() for p in parameters)) >> np.uint32(8)) / 2.0**24 - 0.5
    values = torch.from_numpy(np.float32(scale) * values.astype(np.float32))
    for p in parameters:
        value, values = values[: p.numel()], values[p.numel() :]
        with torch.no_grad():
            p.copy_(value.view(p.shape) + (1.0 if any(p is w for w in layer_norm_weights) else 0.0))


def gradient(parameters):
    return torch.cat([p.grad.flatten() for p in parameters]).float().numpy()


def answer(args, integrator, tied, h):
    """Loss and gradients: trajectory [N, P] and ends [1, E]."""
    net = Net(args.vocab, args.width, args.heads, args.context, args.depth, integrator, tied, h)
    scale = 2.0 / args.width**0.5
    for n, block in enumerate(net.blocks):
        fill(list(block.parameters()), [block.ln1.weight, block.ln2.weight], 1 + n, scale)
    fill(net.ends(), [net.ln_f.weight], 0, scale)
    net.to(getattr(torch, args.dtype))
    shape = (args.batch, args.context)
    batch = noise(1000, 2 * args.batch * args.context) % np.uint32(args.vocab)
    tokens, targets = torch.from_numpy(batch.astype(np.int64)).view(2, *shape)
    loss = net(tokens, targets)
    loss.backward()
    blocks = np.stack([gradient(block.parameters()) for block in net.blocks])
    return {"loss": np.float64(loss.item()), "trajectory": blocks, "ends": gradient(net.ends())[None]}


CASES = [("euler", True, 1.0), ("split", False, 1.0), ("heun", True, 1.0), ("euler", False, 0.5)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(vocab=61, width=16, heads=2, context=16, depth=3, batch=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    shape = [args.vocab, args.width, args.heads, args.context, args.depth, args.batch]
    arrays = {
        "torch_version": np.frombuffer(torch.__version__.encode(), dtype=np.uint8),
        "shape": np.array(shape, dtype=np.int64),
    }
    for integrator, tied, h in CASES:
        case = f"{integrator}-{'tied' if tied else 'untied'}-{h}"
        arrays |= {f"{case}-{key}": np.asarray(value) for key, value in answer(args, integrator, tied, h).items()}
        print(case, arrays[f"{case}-loss"])
    np.savez(args.out, **arrays)


if __name__ == "__main__":
    main()
