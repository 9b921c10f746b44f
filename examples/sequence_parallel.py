"""One sequence over several processes, in a module of your own: the twins of the kernels, and one sum of gradients.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py
    python examples/sequence_parallel.py

Every process holds its part of each sequence. The module is that of examples/loop.py with three changes: it calls the twins in
`seqengine.parallel.api`, it takes a context that says who holds what, and the gradients of parameters are summed over the
processes before the optimiser's step, as in data parallelism. The loss is that of one process: the last line says by how much
they differ.
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqengine.parallel import api as parallel

WORDS, LAG = 16, 5


class LongConvolution(nn.Module):
    """post * (filter (*) (pre * v)) on this process's part of the tokens."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, 3 * channels)
        self.short = nn.Parameter(torch.randn(3 * channels, 3) / 3)
        self.filter = nn.Parameter(torch.randn(channels, length) / math.sqrt(length))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, ctx: parallel.SequenceContext) -> Tensor:
        u, _ = parallel.short_conv(self.project(x).transpose(1, 2), self.short, ctx=ctx)
        post, pre, v = u.chunk(3, dim=1)
        y, _ = parallel.long_conv(v, self.filter, pre_gate=pre, post_gate=post, ctx=ctx)
        return self.out(y.transpose(1, 2))


class Model(nn.Module):
    """Embedding, one mixer, and a head that is the embedding."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, channels)
        self.mixer = LongConvolution(channels, length)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, ids: Tensor, labels: Tensor, ctx: parallel.SequenceContext) -> Tensor:
        """Mean loss of the whole sequences in nats, the same on every process."""
        x = self.embedding(ids)
        x = self.norms[1](x + self.mixer(self.norms[0](x), ctx))
        nats, tokens = parallel.linear_cross_entropy(x, self.embedding.weight, labels, ctx=ctx)
        return nats / tokens


def train(group: dist.ProcessGroup | None, steps: int, length: int) -> tuple[list[float], Model, int]:
    """Losses, the model, and the bytes that this process sent. Every process draws the same model and the same sequences."""
    torch.manual_seed(0)
    model = Model(16, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ctx = parallel.SequenceContext.even(group, length)
    losses = []
    for _ in range(steps):
        ids = torch.randint(WORDS, (4, LAG)).repeat(1, length // LAG + 1)[:, : length + 1]
        inputs, labels = ctx.split(ids[:, :-1], 1), ctx.split(ids[:, 1:], 1)  # labels are shifted, then split
        loss = model(inputs, labels, ctx)
        optimizer.zero_grad()
        loss.backward()
        if group is not None:
            for parameter in model.parameters():  # partial sums: add them over the processes
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        losses.append(loss.item())
    return losses, model, ctx.ledger().sent_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=120)
    arguments = parser.parse_args()
    group = None
    if "WORLD_SIZE" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    losses, _, sent = train(group, arguments.steps, arguments.length)
    alone, _, _ = train(None, arguments.steps, arguments.length)
    if group is None or group.rank() == 0:
        ranks = 1 if group is None else group.size()
        print(f"{ranks} processes: loss {losses[0]:.6f} to {losses[-1]:.6f} nats, {sent:,} bytes sent by process 0")
        print(f"one process:  largest difference of a step's loss {max(abs(a - b) for a, b in zip(losses, alone)):.1e}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
