"""The engine's language model in Hugging Face Accelerate: devices, processes and mixed precision are Accelerate's.

    pip install 'seqengine-train[accelerate]'
    python examples/trainer.py
    accelerate launch --num_processes 2 examples/trainer.py

`seqengine.model.LanguageModel` is a module like any other: any mixture of mixers, by name. Here each process reads sequences of
its own and Accelerate sums the gradients; to split one sequence over processes see examples/sequence_parallel.py.
"""

import argparse
import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from seqengine.config.model import ModelConfig
from seqengine.model import LanguageModel

try:
    from accelerate import Accelerator
except ImportError:
    sys.exit("examples/trainer.py needs Accelerate: pip install 'seqengine-train[accelerate]'")

WORDS, LAG = 16, 3


class WithLoss(torch.nn.Module):
    """Accelerate's wrappers see `forward` alone: here it gives the mean loss."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        nats, tokens = self.model.loss(ids[:, :-1], ids[:, 1:])
        return nats / tokens


def sequences(count: int, length: int) -> TensorDataset:
    """Sequences that repeat themselves after LAG tokens."""
    return TensorDataset(torch.randint(WORDS, (count, LAG)).repeat(1, length // LAG + 1)[:, : length + 1])


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = ModelConfig(
        arch="lm",
        d_model=arguments.width,
        n_layer=2,
        max_len=arguments.length,
        vocab_size=WORDS,
        pattern=("hyena_se", "attention"),
        embed_dropout=0.0,
    )
    model = WithLoss(LanguageModel(config))
    accelerator = Accelerator()
    loader = DataLoader(sequences(8 * arguments.steps, arguments.length), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-2), loader)
    for step, (ids,) in enumerate(loader, start=1):
        loss = model(ids)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step in (1, len(loader)):
            accelerator.print(f"step {step}  loss {loss.item():.4f} nats")
    accelerator.end_training()
    return loss.item()


if __name__ == "__main__":
    main()
