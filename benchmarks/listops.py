"""Does it help to train on a task's own inputs first? ListOps, a tiny model of long convolutions, the same steps either way.

    python benchmarks/listops.py --runs runs/listops --out benchmarks/results/latest

trains configs/lra/listops-tiny.toml: once without classes, on the expressions alone, then for each seed from scratch and from
the weights of that run, all but the head. Each run has the same steps; the accuracy is that of 2,000 unseen expressions, whose
standard error is 1.1 points. The report of all runs is written beside them. Ended runs are not run again.

References: Amos et al. 2024, Never Train from Scratch, arXiv:2310.02980.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from seqengine.launch.cli import main as seqengine
from seqengine.metrics import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "lra" / "listops-tiny.toml"
BASELINE = "the same steps from scratch"


def run(folder: Path, name: str, *settings: str) -> Path:
    """A run of the recipe, trained to its end."""
    code = seqengine(["train", str(CONFIG), f"run.name={name}", f"run.dir={folder}/{{name}}", *settings])
    if code:
        sys.exit(code)
    return folder / name


def result(path: Path, seed: int, is_tuned: bool) -> dict[str, Any]:
    line = [line for line in read_metrics(path) if line.get("split") == "valid"][-1]
    kept = ("step", "tokens", "loss", "accuracy")
    return {
        "run": path.name,
        "seed": seed,
        "begins": "own inputs" if is_tuned else "scratch",
        **{k: line[k] for k in kept},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/listops"), help="where the runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="where listops.json is written")
    parser.add_argument("settings", nargs="*", help="of all runs, such as train.steps=300")
    arguments = parser.parse_args(argv)
    first = run(arguments.runs, "inputs", "model.num_classes=0", *arguments.settings)
    paths, results = [], []
    for seed in arguments.seeds:
        for begins in ("scratch", "tuned"):
            own = [f"train.init_from={first}"] if begins == "tuned" else []
            paths.append(run(arguments.runs, f"{begins}-{seed}", f"run.seed={seed}", *own, *arguments.settings))
            results.append(result(paths[-1], seed, begins == "tuned"))
    for one in results:
        print(f"seed {one['seed']}, {one['begins']:10}  accuracy {one['accuracy']:.2%}  loss {one['loss']:.4f} nats")
    scratch, tuned = (
        statistics.mean(r["accuracy"] for r in results if r["begins"] == begins) for begins in ("scratch", "own inputs")
    )
    print(f"mean accuracy {scratch:.2%} from scratch (baseline: {BASELINE}), {tuned:.2%} from the task's own inputs")
    seqengine(["report", *map(str, [*paths, first]), "--out", str(arguments.runs / "report")])
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        (arguments.out / "listops.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
