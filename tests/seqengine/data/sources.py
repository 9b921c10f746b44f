"""Small sections of every source, for tests."""

import json
import random
from pathlib import Path

from seqengine.config.data import DataSection

SEPARATOR = "\n\n\n"
_WORDS = ["der", "tree", "naïve", "7", "λ", "𝄞", "of", "and", "and", "the", "the", "sea-green", ",", "."]


def documents(count: int, seed: int = 0) -> list[str]:
    """Made-up text in words of one to four bytes a letter."""
    pick = random.Random(seed)
    return [
        "".join(pick.choice(_WORDS) + pick.choice(" \n") for _ in range(pick.randint(1, 60))).strip() + "!"
        for _ in range(count)
    ]


def write(folder: Path) -> Path:
    """The files that `sections` name, in a new folder."""
    folder.mkdir()
    texts = documents(60)
    (folder / "a.txt").write_text(SEPARATOR.join(texts[:40]), encoding="utf-8")
    (folder / "b.txt").write_text(SEPARATOR.join(texts[40:]), encoding="utf-8")
    (folder / "valid.txt").write_text(SEPARATOR.join(documents(9, seed=1)), encoding="utf-8")
    (folder / "lines.jsonl").write_text("".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(texts)))
    write_labelled(folder)
    for i in range(4):
        (folder / f"{i}.raw").write_bytes(random.Random(i).randbytes(500 + i))
    return folder


def write_labelled(folder: Path) -> None:
    """Reviews, genomic sequences, pictures and pairs of papers, of 1 to 60 tokens where that is free."""
    pick = random.Random(5)
    for split, count in (("train", 12), ("test", 4)):
        for name in ("neg", "pos", "unsup")[: 3 if split == "train" else 2]:
            (folder / "reviews" / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / "reviews" / split / name / f"{i}_7.txt").write_bytes(
                    pick.randbytes(pick.choice((1, 20, 32, 33, 60)))
                )
    for split in ("train", "valid", "test"):
        for name in ("coding", "intergenic", "promoter"):
            (folder / "genomic" / split / name).mkdir(parents=True)
            for i in range(8):
                letters = "".join(pick.choice("ACGTNacgt") for _ in range(pick.choice((5, 31, 32, 50))))
                (folder / "genomic" / split / name / f"{i}.txt").write_text(letters + "\n")
    (folder / "cifar").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / "cifar" / f"{name}.bin").write_bytes(
            b"".join(bytes([pick.randrange(10)]) + pick.randbytes(3072) for _ in range(6))
        )
    (folder / "papers").mkdir()
    for name in ("train", "eval", "test"):
        texts = ("x" * pick.choice((0, 4, 15, 16, 40)) for _ in range(40))
        lines = [f"{float(i % 2)}\t{i}\t{i + 1}\t{next(texts)}\t{next(texts)} é" for i in range(20)]
        (folder / "papers" / f"new_aan_pairs.{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


LONGER = {"pathfinder": 260, "pictures": 1024}
"""Lengths of windows where the others have 32."""
LABELLED = ("listops", "pathfinder", "reviews", "genomic", "pictures", "papers")


def sections(folder: Path, cache: Path) -> dict[str, DataSection]:
    """One section of each kind; the files lie in `folder`."""
    text = {"source": "text", "files": [f"{folder}/[ab].txt"], "separator": SEPARATOR, "valid_fraction": 0.2}
    trained = {**text, "tokenizer": "train", "tokenizer_vocab": 300}
    tables = {
        "synthetic": {"source": "synthetic", "synthetic": {"length": 3000, "lag": 7}, "valid_fraction": 0.2},
        "text": text,
        "separate": {**text, "documents": "separate", "window": "jitter"},
        "trained": trained,
        "trained apart": {**trained, "valid_files": [f"{folder}/valid.txt"], "documents": "separate"},
        "jsonl": {"source": "jsonl", "files": [f"{folder}/lines.jsonl"], "field": "body", "valid_fraction": 0.2},
        "bytes": {"source": "bytes", "files": [f"{folder}/*.raw"], "valid_fraction": 0.3},
        "recall": {"source": "recall", "recall": {"examples": 40, "valid_examples": 5, "every": True}},
        "induction": {"source": "induction", "recall": {"examples": 40, "valid_examples": 5}},
    }
    tables |= {
        "listops": {"source": "listops", "listops": {"min_length": 8, "max_length": 30, "examples": 60, "valid_examples": 20}},
        "pathfinder": {
            "source": "pathfinder", "pathfinder": {"size": 16, "distractors": 0, "examples": 40, "valid_examples": 10},
        },
        "reviews": {"source": "class_folders", "folder": f"{folder}/reviews", "classes": ["pos", "neg"]},
        "genomic": {"source": "class_folders", "folder": f"{folder}/genomic", "alphabet": "dna"},
        "pictures": {"source": "cifar10", "folder": f"{folder}/cifar"},
        "papers": {"source": "aan", "folder": f"{folder}/papers"},
    }  # fmt: skip
    mix = [{**tables[name], "weight": w} for name, w in (("separate", 0.5), ("synthetic", 0.3), ("recall", 0.2))]
    tables["mixture"] = {"source": "mixture", "mix": mix}
    return {
        name: DataSection.model_validate({**table, "cache": str(cache), "seq_len": LONGER.get(name, 32)})
        for name, table in tables.items()
    }
