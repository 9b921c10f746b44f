"""Associative recall and induction heads: how well small models of each mixer learn them on a CPU.

    python benchmarks/synthetics.py --patterns h3 h3,attention hyena --out benchmarks/results/here

Trains a model of each pattern on examples that never repeat (in recall, every repeated key asks for its value), and stops when
the accuracy on 500 unseen ones is above --enough, or after --steps. Prints a line a pattern and task; exit code 1 if one
that has a goal (GOALS) misses it. Writes synthetics.json to --out.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection, ScheduleSection
from seqengine.data.recall import RecallTask, accuracy
from seqengine.model import LanguageModel, build_model
from seqengine.optim import build_optimizer, clip_gradients, gradient_norm, learning_rate, set_learning_rate

LENGTHS = {"recall": 40, "induction": 30}
GOALS = {"h3": 0.97, "h3,attention": 0.97, "hyena": 0.90}
"""Accuracy that a pattern must reach."""
UNSEEN = 500


def build(pattern: list[str], task: RecallTask, width: int, seed: int) -> LanguageModel:
    config = ModelConfig(
        arch="lm", d_model=width, n_layer=max(2, len(pattern)), pattern=tuple(pattern), max_len=task.length,
        vocab_size=task.num_tokens, embed_dropout=0.0,
    )  # fmt: skip
    return build_model(config, seed=seed, params="fp32", device=torch.device("cpu"))


def train(model: LanguageModel, task: RecallTask, arguments: argparse.Namespace) -> tuple[float, int]:
    """The accuracy on unseen examples, and the steps taken."""
    optimizer = build_optimizer(model, OptimSection(lr=arguments.lr, weight_decay=0.1))
    schedule = ScheduleSection(warmup=0.05, min_ratio=0.1)
    unseen = RecallTask(task.task, task.vocab_size, task.length, seed=task.seed + 1).batch(0, UNSEEN)
    found = 0.0
    for step in range(arguments.steps):
        ids, labels = task.batch(step * arguments.batch, arguments.batch, every=True)
        set_learning_rate(optimizer, learning_rate(step, arguments.steps, arguments.lr, schedule))
        optimizer.zero_grad(set_to_none=True)
        nats, count = model.loss(ids, labels)
        (nats / count).backward()
        clip_gradients(model, float(gradient_norm(model)), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            with torch.no_grad():
                found = accuracy(model.eval()(unseen[0]), unseen[1])
            model.train()
            if found > arguments.enough:
                return found, step + 1
    return found, arguments.steps


def run_case(pattern: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    task = RecallTask(name, vocab_size=arguments.vocab, length=arguments.length or LENGTHS[name], seed=arguments.seed)
    model = build(pattern.split(","), task, arguments.width, arguments.seed)
    begin = time.monotonic()
    found, steps = train(model, task, arguments)
    goal = GOALS.get(pattern)
    return {
        "pattern": pattern, "task": name, "length": task.length, "vocab_size": task.vocab_size, "width": arguments.width,
        "layers": len(model.blocks), "accuracy": found, "goal": goal, "met": goal is None or found > goal, "steps": steps,
        "examples": steps * arguments.batch, "seconds": time.monotonic() - begin,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--patterns", nargs="+", default=list(GOALS), help="mixers joined by commas, repeated to 2 layers"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--length", type=int, help="tokens of an example; by default 40 and 30")
    parser.add_argument("--vocab", type=int, default=20)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--enough", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    results = []
    for pattern in arguments.patterns:
        for name in arguments.tasks:
            result = run_case(pattern, name, arguments)
            results.append(result)
            goal = "" if result["goal"] is None else f", goal {result['goal']:.0%}"
            print(
                f"{pattern:16} {name:10} accuracy {result['accuracy']:.1%}{goal} after {result['steps']} steps "
                f"({result['examples']} examples, {result['seconds']:.0f} s)",
                flush=True,
            )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        (arguments.out / "synthetics.json").write_text(json.dumps(record, indent=2) + "\n")
    return int(not all(result["met"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
