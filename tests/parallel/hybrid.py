"""A tiny language model with every mixer, made of the twins, and the steps that tests of composition train it with."""

from dataclasses import dataclass

import torch
from torch import nn

from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

# torch.compile breaks its graph at a twin and runs it as it is: exchanges are not traced.
VOCAB, D, H, K = 11, 8, 2, 4
WINDOWS, TOKENS = 8, 26  # 26 tokens are cut unevenly by 8, 4 and 3 ranks


def weight(*shape, scale=0.3):
    return nn.Parameter(scale * torch.randn(*shape))


class ShortConv(nn.Module):
    mixes_sequence = True

    def __init__(self):
        super().__init__()
        self.taps, self.bias = weight(D, 4), weight(D)

    def forward(self, x, ctx):
        y, _ = parallel.short_conv(x.transpose(1, 2), self.taps, self.bias, activation="silu", ctx=ctx)
        return y.transpose(1, 2)


class LongConv(nn.Module):
    mixes_sequence = True

    def __init__(self):
        super().__init__()
        self.taps, self.skip, self.project = weight(D, TOKENS), weight(D), nn.Linear(D, 3 * D)

    def forward(self, x, ctx):
        post, pre, v = self.project(x).transpose(1, 2).contiguous().chunk(3, dim=1)
        y, _ = parallel.long_conv(v, self.taps, skip=self.skip, pre_gate=pre, post_gate=post, ctx=ctx)
        return y.transpose(1, 2)


class Modal(nn.Module):
    mixes_sequence = True

    def __init__(self):
        super().__init__()
        self.decays, self.residues = weight(D, 3), weight(D, 3)

    def forward(self, x, ctx):
        poles = -nn.functional.softplus(self.decays)
        y, _ = parallel.modal_conv(x.transpose(1, 2).contiguous(), poles, self.residues, ctx=ctx)
        return y.transpose(1, 2)


class HeadMixer(nn.Module):
    """Projections to heads and back."""

    mixes_sequence = True

    def __init__(self, outputs):
        super().__init__()
        self.project, self.out = nn.Linear(D, outputs), nn.Linear(H * K, D)

    def heads(self, x, count):
        return self.project(x)[..., : count * H * K].unflatten(-1, (count, H, K)).unbind(2)


class Gla(HeadMixer):
    def __init__(self):
        super().__init__(4 * H * K)

    def forward(self, x, ctx):
        q, k, v, g = self.heads(x, 4)
        o, _ = parallel.gla(q, k, v, nn.functional.logsigmoid(g), ctx=ctx)
        return self.out(o.flatten(2))


class Attention(HeadMixer):
    def __init__(self):
        super().__init__(3 * H * K)

    def forward(self, x, ctx):
        q, k, v = self.heads(x, 3)
        return self.out(parallel.attention(q, k, v, ctx=ctx).flatten(2))


class DeltaRule(HeadMixer):
    def __init__(self):
        super().__init__(3 * H * K + H)

    def forward(self, x, ctx):
        q, k, v = self.heads(x, 3)
        beta = self.project(x)[..., 3 * H * K :].sigmoid()
        o, _ = parallel.delta_rule(q, nn.functional.normalize(k, dim=-1), v, beta, ctx=ctx)
        return self.out(o.flatten(2))


class Slstm(HeadMixer):
    def __init__(self):
        super().__init__(4 * H * K)
        self.recurrent = weight(4, H, K, K)

    def forward(self, x, ctx):
        gates = self.project(x).unflatten(-1, (4, H, K))
        h, _ = parallel.rnn(gates, self.recurrent, cell="slstm", ctx=ctx)
        return self.out(h.flatten(2))


MIXERS = (ShortConv, LongConv, Modal, Gla, Attention, DeltaRule, Slstm)


class Block(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(D), mixer

    def forward(self, x, ctx):
        return x + self.mixer(self.norm(x), ctx=ctx)


class Hybrid(nn.Module):
    """(sum of nats, tokens) of the whole windows; `run` calls a block, so that a test can put something around it."""

    def __init__(self, mixers=MIXERS, run=lambda block, x, ctx: block(x, ctx)):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(Block(mixer()) for mixer in mixers)
        self.norm, self.head = nn.LayerNorm(D), weight(VOCAB, D)
        self.run = run

    def forward(self, ids, labels, ctx):
        x = self.embedding(ids)
        for block in self.blocks:
            x = self.run(block, x, ctx)
        return parallel.linear_cross_entropy(self.norm(x), self.head, labels, ctx=ctx)


def hybrid(dtype=torch.float64, **options):
    """The same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Hybrid(**options).to(dtype)


def windows(step):
    """(ids, labels) [WINDOWS, TOKENS] of a step, the same in every process; labels are shifted and unequally masked."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (WINDOWS, TOKENS + 1), generator=generator)
    kept = torch.rand(WINDOWS, TOKENS, generator=generator) < torch.linspace(0.0, 1.0, TOKENS)
    kept[1], kept[:, 7:11] = False, False  # a window without labels, and of eight parts one without any
    return tokens[:, :-1], tokens[:, 1:].masked_fill(~kept, -100)


def part_of(mesh, ids, labels):
    """(ids, labels, ctx) of this rank: its replica's windows, and its part of them."""
    ctx = SequenceContext.even(mesh.sequence, TOKENS)
    mine = slice(mesh.replica * WINDOWS // mesh.num_replicas, (mesh.replica + 1) * WINDOWS // mesh.num_replicas)
    return ctx.split(ids[mine], 1), ctx.split(labels[mine], 1), ctx


@dataclass
class History:
    """Nats per token and gradient norm of every step, the parameters at the end, and what this rank's exchanges sent."""

    losses: list
    norms: list
    parameters: dict
    sent_bytes: int


def adamw(parameters):
    """With a larger eps than usual: softmax does not see a bias of its keys, nor sLSTM one of its input gate. Their gradients
    are rounding alone, which Adam would otherwise scale up until it shows.
    """
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-5)


def train(model, mesh, steps, *, reduce, norm_of, optimizer=None):
    """`steps` steps; `reduce(model)` completes the gradients, `norm_of(model)` is their norm."""
    optimizer = (optimizer or adamw)(model.parameters())
    losses, norms, sent_bytes = [], [], 0
    for step in range(steps):
        ids, labels, ctx = part_of(mesh, *windows(step))
        total = mesh.count_tokens(labels)
        nats, _ = model(ids, labels, ctx)
        (nats / total).backward()
        sent_bytes += ctx.ledger().sent_bytes()
        reduce(model)
        norms.append(float(norm_of(model)))
        losses.append(mesh.sum(float(nats.detach()) / mesh.sequence_size)[0] / int(total))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.data for n, p in model.named_parameters()}
    return History(losses, norms, {n: p.detach().clone() for n, p in whole.items()}, sent_bytes)
