"""Hook of mkdocs: shows mkdocstrings the package as it is imported.

kernels/, parallel/ and launch/ are links in seqengine/ without an `__init__.py`; mkdocstrings, which reads sources and imports
nothing, does not look into such folders. So it reads a copy in which they are plain packages.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
_copy = tempfile.TemporaryDirectory(prefix="seqengine-docs-")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> Any:
    package = Path(_copy.name) / "seqengine"
    shutil.copytree(ROOT / "seqengine", package, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for folder in [path for path in package.rglob("*") if path.is_dir() and not (path / "__init__.py").exists()]:
        (folder / "__init__.py").touch()
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_copy.name]
    return config
