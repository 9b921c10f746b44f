"""The pages say what the code does."""

import re
import runpy
from pathlib import Path

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


def test_code_on_the_plug_in_page_runs():
    page = (ROOT / "docs" / "plug_in.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/plug_in.md", "exec"), namespace)
