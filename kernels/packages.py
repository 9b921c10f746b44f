"""Optional packages behind explicit backends: imported when asked for, refused with what to install."""

import importlib
from typing import Any

from seqengine.kernels.checks import check


def load_package(name: str, backend: str, module: str, package: str, extra: str, lowest: tuple[int, int]) -> Any:
    """The module; ValueError without it, or unless it is `lowest` or later with the same major number."""
    install = f"pip install seqengine-train[{extra}]"
    try:
        found: Any = importlib.import_module(module)
    except ImportError as missing:
        raise ValueError(
            f"{name}: backend '{backend}' needs the package {package}: {install}; got {missing}."
        ) from missing
    version = str(found.__version__)
    major, minor = (int(part) if part.isdigit() else 0 for part in [*version.split("."), "0"][:2])
    fits = major == lowest[0] and minor >= lowest[1]
    must = "backend '{}' needs {} >= {}.{}, < {}: {}"
    check(name, fits, must, version, backend, package, *lowest, lowest[0] + 1, install)
    return found
