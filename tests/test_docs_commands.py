"""Every command, config and Python block of the README and of docs/ runs here, in a small world of its own.

How a page is written:

- A block between ``` and ``` whose first line begins with a program (PROGRAMS) holds commands, one a line. The blocks of a page
  run in order in one folder, in which genomes, a config, runs and published weights already lie (`world`).
- What a machine may lack is said in a comment above a block: `<!-- needs: slurm -->` (NEEDS). They are parsed, not run.
- torchrun, srun, sbatch and accelerate start processes of their own: what they start is parsed, and its config is read. Words
  of LACKING are only parsed too.
- RUN, CONFIG and so on stand for names (STANDS_FOR). A line with [ or | in it tells how a command is written: it is left out.
- Settings that make runs small are added here (SMALL), so that the pages show those that a reader wants.
- A block of TOML is a valid config; if its first line is a comment with a file's name, it is also written to that file.
"""

import gzip
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from seqengine.config.load import load
from seqengine.launch import process
from seqengine.launch.cli import _parse, main
from tests import test_docs, test_examples

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PROGRAMS = {
    *("seqengine", "python", "torchrun", "srun", "sbatch", "accelerate", "make", "pip"),
    *("touch", "ls", "cat", "mkdir", "cp", "tail"),
}
NEEDS = {"gpu", "slurm", "network", "minutes", "several machines", "a run that goes on"}
LAUNCHERS = ("torchrun", "srun", "sbatch", "accelerate")
SMALL = (
    *("model.d_model=8", "model.max_len=64", "data.seq_len=32", "train.batch_tokens=64", "train.steps=2"),
    *("eval.windows=2", "parallel.sequence=1", "parallel.backend=none", "parallel.replicate=1", "parallel.shard=1"),
)
LACKING = {
    "log.memory_snapshot=true": "gpu",
    "log.wandb=true": "wandb",
    "--scheduler local --gpus-per-node": "gpu",
    "launch status": "a launched run",
    "launch logs": "a launched run",
    "launch cancel": "a launched run",
}
"""Words that tell by themselves what a command needs."""
STANDS_FOR = {"RUN": "runs/run", "RUN2": "runs/other", "CONFIG": "my.toml", "DIR": "out", "FOLDER": "out"}
PRELUDES = {
    "README.md": "import torch\nu, k, d, group = torch.randn(1, 4, 50), torch.randn(4, 9), torch.randn(4), None"
}
"""What a page's Python speaks of without making it."""


class Block(NamedTuple):
    page: Path
    kind: str
    text: str
    needs: str | None


def blocks(page: Path) -> list[Block]:
    """What stands between ``` and ``` on a page, with the comment above it."""
    pattern = r"(?:^<!-- needs: ([^>]*?) -->\n\n?)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(page, kind, text, needs or None) for needs, kind, text in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block; none if it is no block of commands."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    if block.kind not in ("", "sh", "bash") or not lines or _program(lines[0].split())[0] not in PROGRAMS:
        return []
    found = [_program(shlex.split(line, comments=True)) for line in lines]
    return [words for words in found if words[0] == "pip" or not any(mark in word for word in words for mark in "[|")]


def _program(words: list[str]) -> list[str]:
    """Without the variables that are set before it."""
    while "=" in words[0] and len(words) > 1:
        words = words[1:]
    return words


PAGES_WITH_COMMANDS = [page for page in PAGES if any(commands(block) for block in blocks(page))]
TOML = [block for page in PAGES for block in blocks(page) if block.kind == "toml"]
ELSEWHERE = {name for name, _ in test_docs.test_code_on_the_page_runs.pytestmark[0].args[1]}
"""Pages whose Python runs in tests/test_docs.py."""
PYTHON = [
    page for page in PAGES if page.name not in ELSEWHERE and any(block.kind == "python" for block in blocks(page))
]


def name_of(value: object) -> str:
    page = value.page if isinstance(value, Block) else value
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else str(value)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A run takes all cores that it sees: here it sees one. What it changes for the whole process is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "available_cores", lambda: 1)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the pages take for granted: genomes, sequences with classes, my.toml, a run, and published weights."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    genome = "".join(f">chr{i}\n{''.join(draw.choices('ACGT', k=40_000))}\n" for i in (1, 2))
    for name in ("genome.fa", "genome.fa.gz", "ecoli536.fa.gz"):
        content = genome.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for split, name in product(("train", "test"), ("negative", "positive")):
        place = folder / "genomic_benchmarks/human_nontata_promoters" / split / name
        place.mkdir(parents=True)
        for i in range(3):
            (place / f"{i}.txt").write_text("".join(draw.choices("ACGT", k=20 + 10 * i)))
    (folder / "my.toml").write_text(
        'extends = "hyenadna-tiny-1k"\n[run]\nname = "run"\n[data]\nfasta = "genome.fa"\n[optim]\nema = 0.99\n'
    )
    (folder / "configs").symlink_to(ROOT / "configs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in (
            ["train", "hyenadna-tiny-1k", "run.name=other", "data.fasta=genome.fa", *SMALL],
            ["train", "my.toml", *SMALL],
            ["ckpt", "export", "runs/run", "hyenadna-tiny-1k-seqlen-hf", "--format", "hyenadna"],
        ):
            assert main(words) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A copy of the world, and the working directory."""
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return Path.cwd()


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=name_of)
def test_commands_on_the_page_run(page, folder):
    for block in blocks(page):
        assert block.needs is None or block.needs in NEEDS, f"needs: {block.needs}; known are {sorted(NEEDS)}"
        if block.kind == "toml" and (name := file_name(block)):
            (folder / name).write_text(block.text)
        for command in commands(block):
            words = [STANDS_FOR.get(word, word) for word in command]
            parse(words)
            if block.needs is None and lacking(words) is None:
                run(words, folder)


@pytest.mark.parametrize("block", TOML, ids=name_of)
def test_configs_on_the_page_are_valid(block, folder):
    (folder / "page.toml").write_text(block.text)
    load("page.toml", need_data=False)


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_on_the_page_runs(page, folder):
    namespace: dict[str, object] = {}
    exec(PRELUDES.get(page.name, ""), namespace)
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, str(page), "exec"), namespace)


def file_name(block: Block) -> str | None:
    found = re.match(r"# ([\w.-]+\.toml)\n", block.text)
    return found[1] if found else None


def lacking(words: list[str]) -> str | None:
    """What a command needs by itself."""
    if words[0] in LAUNCHERS:
        return words[0]
    return next((what for mark, what in LACKING.items() if mark in " ".join(words)), None)


def parse(words: list[str]) -> None:
    """The real parser takes the words, and what a launcher starts is there, with a config that says nothing wrong."""
    if "seqengine" in words:
        rest = words[words.index("seqengine") + 1 :]
        arguments = _parse(rest)
        if words[0] in LAUNCHERS and rest[0] == "train":
            load(arguments.config, arguments.overrides, need_data=False)
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        wanted = {word for word in words[1:] if "=" not in word}
        assert wanted <= targets, f"no target {wanted - targets} in the Makefile"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")}
        assert asked <= set(extras), f"no extra {asked - set(extras)}"
    for word in words:
        if word.endswith((".py", ".sbatch")):
            assert (ROOT / word).is_file(), f"no file {word}"


def run(words: list[str], folder: Path) -> None:
    """As a reader would type it, but small and in this process."""
    if words[0] == "seqengine":
        assert main(small(words[1:])) == 0, shlex.join(words)
    elif words[0] == "python":
        assert words[1] in test_examples.SCRIPTS, (
            f"not run by tests/test_examples.py; say what it needs: {shlex.join(words)}"
        )
    elif words[0] not in ("make", "pip"):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def small(words: list[str]) -> list[str]:
    """A command, with the settings that make it small, and of the checkpoints that are here."""
    words = [word if Path(word).exists() else re.sub(r"step-\d+", "step-00000002", word) for word in words]
    extra = {
        "train": ["--max-restarts", "0", *SMALL],
        "check": SMALL,
        "generate": ["-n", "4"],
        "watch": ["--once"],
        "plan": ["--nodes", "1", "--gpus-per-node", "2"],
        "launch": ["--dry-run", "run.name=launched", *SMALL[:3], "train.batch_tokens=64Ki"],
    }
    if words[:2] == ["ckpt", "import"]:
        return [*words, *SMALL]
    if words[0] == "train" and load(words[1], need_data=False).config.model.num_classes:
        extra["train"].append("model.max_len=66")  # the published l_max of the weights that are here
    return [*words, *extra.get(words[0], ())]


@pytest.mark.parametrize(
    ("program", "page"), [("commands_page.py", "reference/commands.md"), ("benchmarks_page.py", "benchmarks.md")]
)
def test_pages_made_by_programs_are_as_they_make_them(program, page):
    made = runpy.run_path(str(ROOT / "docs" / program))["page"]()
    assert (ROOT / "docs" / page).read_text() == made, f"run: python docs/{program}"


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_bytes_on_the_page_of_exchanges_are_those_that_it_prints(capsys):
    code, printed = (b.text for b in blocks(ROOT / "docs" / "concepts" / "exchanges.md") if b.kind in ("python", ""))
    exec(compile(code, "exchanges.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_site_is_built_strictly(tmp_path):
    """Every page is in the menu, links and anchors lead somewhere, every name of the reference is found."""
    for module in ("material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = (tmp_path / "site" / "reference" / "kernels" / "index.html").read_text()
    assert 'id="seqengine.kernels.api.long_conv"' in kernels
    assert "<strong>Shapes:</strong>" in kernels
