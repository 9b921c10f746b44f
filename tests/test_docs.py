"""The pages say what the code does."""

import re
import runpy
from pathlib import Path

import pytest

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


def test_the_bytes_on_the_parallel_page_are_those_it_prints(capsys):
    page = (ROOT / "docs" / "parallel.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    exec(compile(code, "parallel.md", "exec"), {})
    assert capsys.readouterr().out.strip() in page
