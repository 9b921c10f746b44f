"""A training loop of your own around the kernels: plain PyTorch, no engine, no config.

    python examples/loop.py
    python examples/loop.py --steps 300 --device cuda

The model is made of functions from `seqengine.kernels.api`: a gated long convolution (Hyena, arXiv:2302.10866), gated linear
attention (arXiv:2312.06635) and the loss. The data are made up: every sequence repeats itself after 5 tokens, so that a model
that looks back reaches a loss near 0, and one that does not stays near log(16) = 2.77 nats.
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.kernels.api import gla, linear_cross_entropy, long_conv, short_conv

WORDS, LAG = 16, 5


class LongConvolution(nn.Module):
    """post * (filter (*) (pre * v)): a long filter between two gates."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, 3 * channels)
        self.short = nn.Parameter(torch.randn(3 * channels, 3) / 3)
        self.filter = nn.Parameter(torch.randn(channels, length) / math.sqrt(length))
        self.skip = nn.Parameter(torch.ones(channels))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        u, _ = short_conv(self.project(x).transpose(1, 2), self.short)  # kernels of convolutions take [B, D, T]
        post, pre, v = u.chunk(3, dim=1)
        y, _ = long_conv(v, self.filter, skip=self.skip, pre_gate=pre, post_gate=post)
        return self.out(y.transpose(1, 2))


class LinearAttention(nn.Module):
    """Gated linear attention over `heads` heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(channels, 4 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = self.project(x).unflatten(2, (4 * self.heads, -1)).chunk(4, dim=2)  # each [B, T, H, K]
        o, _ = gla(q, k, v, F.logsigmoid(g) / 16)  # g is the logarithm of the gate
        return self.out(o.flatten(2))


class Model(nn.Module):
    """Embedding, two mixers with a norm before each, and a head that is the embedding."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, channels)
        self.mixers = nn.ModuleList([LongConvolution(channels, length), LinearAttention(channels, heads=2)])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss in nats."""
        x = self.embedding(ids)
        for mixer, norm in zip(self.mixers, self.norms):
            x = x + mixer(norm(x))
        nats, tokens = linear_cross_entropy(self.norms[-1](x), self.embedding.weight, labels)
        return nats / tokens


def batch(size: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels: the labels are the inputs one token later."""
    ids = torch.randint(WORDS, (size, LAG)).repeat(1, length // LAG + 1)[:, : length + 1].to(device)
    return ids[:, :-1], ids[:, 1:]


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Model(arguments.channels, arguments.length).to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, arguments.steps + 1):
        loss = model(*batch(8, arguments.length, arguments.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step in (1, arguments.steps):
            print(f"step {step}  loss {loss.item():.4f} nats")
    return loss.item()


if __name__ == "__main__":
    main()
