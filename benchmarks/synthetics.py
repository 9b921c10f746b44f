"""Associative recall and induction heads: how well small models of each mixer learn them on a CPU.

    python benchmarks/synthetics.py --patterns h3 h3,attention hyena --out benchmarks/results/here

Trains a model of each pattern on examples that never repeat (in recall, every repeated key asks for its value), and stops when
the accuracy on 500 unseen ones is above --enough, or after --steps. What is printed, a line a pattern and task, is the accuracy
on 500 others that decided nothing; only the final answer counts. Exit code 1 if a pattern that has a goal (GOALS) misses it.
Writes synthetics.json to --out.

Sizes are those of Fu et al. 2022, arXiv:2212.14052 (vocabulary 20; 40 and 30 tokens; 2 layers; H3 of width 32) and Poli et al.
2023, arXiv:2302.10866 (Hyena of width 64). What differs, so that minutes of a CPU do (RECIPES, SETTINGS, `redraw`): initial
matrices of unit gain, heads of 8 channels and 16 states in H3, a learning rate of 4e-3, batches of 64, no dropout. Seeds 0, 1
and 2 reach every goal within 1300 steps; a case takes 15 to 100 seconds of one core.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection, ScheduleSection
from seqengine.data.recall import RecallTask, Task, accuracy
from seqengine.model import LanguageModel, build_model
from seqengine.optim import build_optimizer, clip_gradients, gradient_norm, learning_rate, set_learning_rate

LENGTHS = {"recall": 40, "induction": 30}
GOALS = {"h3": 0.97, "h3,attention": 0.97, "hyena": 0.90}
"""Accuracy that a pattern must reach."""
UNSEEN = 500
"""Examples that accuracy is measured on."""
SETTINGS = {"h3": {"head_dim": 8, "d_state": 16}}
"""Of mixers, where not as by default. Heads of 8 channels hold 8 products of keys and values a channel: ten keys fit."""


@dataclass(frozen=True)
class Recipe:
    """How a pattern is trained."""

    width: int = 32
    lr: float = 4e-3
    batch: int = 64
    steps: int = 3000
    """At most."""


RECIPES = {"hyena": Recipe(width=64)}
"""By pattern; others have the default."""


def recipe_of(pattern: str, arguments: argparse.Namespace) -> Recipe:
    """The pattern's, with what the command line says instead."""
    given = {name: getattr(arguments, name) for name in ("width", "lr", "batch", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(RECIPES.get(pattern, Recipe()), **given)


def build(pattern: list[str], task: RecallTask, width: int, seed: int) -> LanguageModel:
    config = ModelConfig.model_validate(
        {
            "arch": "lm", "d_model": width, "n_layer": max(2, len(pattern)), "pattern": tuple(pattern),
            "max_len": task.length, "vocab_size": task.num_tokens, "embed_dropout": 0.0, "mixers": SETTINGS,
        }
    )  # fmt: skip
    model = build_model(config, seed=seed, params="fp32", device=torch.device("cpu"))
    redraw(model)
    return model


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draw matrices and embedding again, N(0, 1 / inputs); filters' networks stay.

    N(0, 0.02) is for hundreds of channels. With 32 it makes q, k and v of size 0.1 and their product of 0.001: the gradient of
    what recall needs begins near 0, and H3 still had only a third of the answers right after 1200 steps.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and ".filter." not in name:
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)


@torch.no_grad()
def accuracy_on(model: LanguageModel, examples: tuple[Tensor, Tensor]) -> float:
    ids, labels = examples
    found = accuracy(model.eval()(ids), labels)
    model.train()
    return found


def train(model: LanguageModel, task: RecallTask, recipe: Recipe, enough: float) -> tuple[float, int]:
    """The accuracy on examples that nothing has seen, and the steps taken."""
    optimizer = build_optimizer(model, OptimSection(lr=recipe.lr, weight_decay=0.1))
    schedule = ScheduleSection(warmup=0.05, min_ratio=0.1)
    watched, unseen = (replace(task, seed=task.seed + i).batch(0, UNSEEN) for i in (1, 2))
    steps = 0
    for step in range(recipe.steps):
        ids, labels = task.batch(step * recipe.batch, recipe.batch, every=True)
        set_learning_rate(optimizer, learning_rate(step, recipe.steps, recipe.lr, schedule))
        optimizer.zero_grad()
        nats, count = model.loss(ids, labels)
        (nats / count).backward()
        clip_gradients(model, float(gradient_norm(model)), 1.0)
        optimizer.step()
        steps = step + 1
        if steps % 100 == 0 and accuracy_on(model, watched) > enough:
            break
    return accuracy_on(model, unseen), steps


def run_case(pattern: str, name: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    task = RecallTask(name, vocab_size=arguments.vocab, length=arguments.length or LENGTHS[name], seed=arguments.seed)
    recipe = recipe_of(pattern, arguments)
    model = build(pattern.split(","), task, recipe.width, arguments.seed)
    begin, cpu_begin = time.monotonic(), time.process_time()
    found, steps = train(model, task, recipe, arguments.enough)
    goal = GOALS.get(pattern)
    return {
        "pattern": pattern, "task": name, "length": task.length, "vocab_size": task.vocab_size, "recipe": asdict(recipe),
        "settings": {mixer: s for mixer, s in SETTINGS.items() if mixer in pattern.split(",")}, "seed": arguments.seed,
        "layers": len(model.blocks), "accuracy": found, "goal": goal, "met": goal is None or found > goal, "steps": steps,
        "examples": steps * recipe.batch, "seconds": time.monotonic() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--patterns", nargs="+", default=list(GOALS), help="mixers joined by commas, repeated to 2 layers"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--length", type=int, help="tokens of an example; by default 40 and 30")
    parser.add_argument("--vocab", type=int, default=20)
    for option, kind in {"width": int, "batch": int, "steps": int, "lr": float}.items():
        parser.add_argument(f"--{option}", type=kind, help="by default the pattern's (RECIPES)")
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
                f"({result['examples']} examples, {result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of processor time)",
                flush=True,
            )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        (arguments.out / "synthetics.json").write_text(json.dumps(record, indent=2) + "\n")
    return int(not all(result["met"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
