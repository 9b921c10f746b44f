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
    for i in range(4):
        (folder / f"{i}.raw").write_bytes(random.Random(i).randbytes(500 + i))
    return folder


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
    mix = [{**tables[name], "weight": w} for name, w in (("separate", 0.5), ("synthetic", 0.3), ("recall", 0.2))]
    tables["mixture"] = {"source": "mixture", "mix": mix}
    return {
        name: DataSection.model_validate({**table, "cache": str(cache), "seq_len": 32})
        for name, table in tables.items()
    }
