"""The pages say what the code does."""

import re
import runpy
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from seqengine import runfiles
from seqengine.checkpoint.manifest import MANIFEST
from seqengine.checkpoint.state import FORMAT, RECORD, Progress, Record
from seqengine.config.load import load
from seqengine.config.write import dump
from seqengine.launch.cli import _parse

ROOT = Path(__file__).parent.parent


def test_config_page_is_made_from_the_sections():
    page = runpy.run_path(str(ROOT / "docs" / "config_page.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page, "run: python docs/config_page.py"


def test_links_between_pages_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("plug_in.md", 5), ("streaming.md", 2), ("parallel.md", 2), ("weights.md", 3), ("generation.md", 2)],
)
def test_code_on_the_page_runs(name, blocks):
    page = (ROOT / "docs" / name).read_text().replace("10_000_000", "300_000")
    found = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(found) >= blocks
    namespace: dict[str, object] = {}
    for block in found:
        exec(compile(block, name, "exec"), namespace)


def blocks(name: str, kind: str) -> list[str]:
    """What stands between ``` and ``` on a page; kind: the word behind the first."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for word, text in found if word == kind]


@pytest.mark.parametrize("block", blocks("training.md", "toml"))
def test_configs_on_the_training_page_are_valid(tmp_path, block):
    file = tmp_path / "run.toml"
    file.write_text(block)
    loaded = load(file, need_data=False)
    (tmp_path / "again.toml").write_text(dump(loaded))
    assert load(tmp_path / "again.toml", need_data=False).config == loaded.config


def test_commands_on_the_training_page_are_commands(tmp_path):
    page = "".join(blocks("training.md", ""))
    found = [shlex.split(line, comments=True) for line in page.splitlines()]
    commands = [words[words.index("seqengine") + 1 :] for words in found if "seqengine" in words]
    assert len(commands) >= 12
    (tmp_path / "my.toml").write_text(blocks("training.md", "toml")[0])
    for words in commands:
        arguments = _parse(words)
        if words[0] in ("train", "check"):
            load(tmp_path / words[1], arguments.overrides, need_data=False)


def test_files_of_a_checkpoint_are_those_on_the_page():
    page = (ROOT / "docs" / "formats.md").read_text()
    record = asdict(Record(Progress(), {"seed": 1, "epoch": 0, "samples": 0}, {}, ""))
    for name in (*record, *record["progress"], *record["stream"], RECORD, MANIFEST, *runfiles.FOLDERS, *runfiles.FILES):
        assert f"`{name}`" in page or f"`{name}/" in page or name in page.split("## Checkpoints")[1], name
    assert f"| `format` | {FORMAT}." in page


def test_the_bytes_on_the_parallel_page_are_those_it_prints(capsys):
    page = (ROOT / "docs" / "parallel.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    exec(compile(code, "parallel.md", "exec"), {})
    assert capsys.readouterr().out.strip() in page
