"""The house keeps its shape: imports point down, third parties have one door, files stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels": 0, "parallel": 1, "seqengine": 2, "launch": 3}
LONGEST_FILE = 500


def sources() -> list[Path]:
    """Every Python file of the four floors, by its real path: the links in seqengine/ are not followed."""
    return [
        p
        for floor in FLOORS
        for p in sorted((ROOT / floor).rglob("*.py"))
        if not any(parent.is_symlink() for parent in p.parents)
    ]


def module_name(path: Path) -> str:
    """kernels/conv/op.py is seqengine.kernels.conv.op; seqengine/train.py is seqengine.train."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "seqengine":
        parts.insert(0, "seqengine")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "seqengine":
        return None
    return FLOORS.get(parts[1], FLOORS["seqengine"]) if len(parts) > 1 else FLOORS["seqengine"]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, whether at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def faults(path: Path, text: str) -> list[str]:
    """What a file does that its place does not allow."""
    mine, found = module_name(path), []
    tree = ast.parse(text)
    for module, line in imports(tree):
        root = module.split(".")[0]
        if root in ("kernels", "parallel", "launch", "tests"):
            found.append(f"{path}:{line} imports {module}, which is not an import name")
        target = floor_of(module)
        if target is not None and target > (floor_of(mine) or 0) and mine != "seqengine.__main__":
            found.append(f"{path}:{line} imports {module} from a floor above")
        if root == "triton" and not mine.startswith("seqengine.kernels."):
            found.append(f"{path}:{line} imports triton outside kernels")
        if root == "deepspeed" and mine != "seqengine.parallel.zero":
            found.append(f"{path}:{line} imports deepspeed outside parallel/zero.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            allowed = mine in ("seqengine.launch.environment", "seqengine.kernels.environment")
            if not allowed:
                found.append(f"{path}:{node.lineno} reads the environment")
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body):
            found.append(f"{path}:{node.lineno} swallows an exception")
        if isinstance(node, ast.Global):
            found.append(f"{path}:{node.lineno} has a global statement")
    return found


def test_imports_point_down_and_third_parties_have_one_door():
    assert len(sources()) > 40
    assert [fault for path in sources() for fault in faults(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("kernels/conv/op.py", "from seqengine.parallel import api"),
        ("parallel/conv.py", "import seqengine.train"),
        ("seqengine/train.py", "def f():\n    from seqengine.launch import cli"),
        ("seqengine/train.py", "import kernels.api"),
        ("seqengine/train.py", "import triton"),
        ("parallel/conv.py", "import deepspeed"),
        ("launch/cli.py", "import os\nos.environ['X']"),
        ("launch/cli.py", "try:\n    pass\nexcept ValueError:\n    pass"),
    ],
)
def test_the_check_finds_planted_faults(place, text):
    assert faults(ROOT / place, text)


def test_no_import_cycle():
    known = {module_name(p): p for p in sources()}
    edges = {
        name: {m for m, _ in imports(ast.parse(path.read_text())) if m in known and m != name}
        for name, path in known.items()
    }
    state: dict[str, str] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"import cycle: {' -> '.join((*trail, name))}"
        if name not in state:
            state[name] = "open"
            for other in sorted(edges[name]):
                visit(other, (*trail, name))
            state[name] = "done"

    for name in known:
        visit(name, ())


def test_no_file_is_longer_than_the_limit():
    tests = list((ROOT / "tests").rglob("*.py"))
    long = {str(p): n for p in (*sources(), *tests) if (n := len(p.read_text().splitlines())) > LONGEST_FILE}
    assert long == {}


def test_floors_are_links_without_an_init():
    for floor in ("kernels", "parallel", "launch"):
        link = ROOT / "seqengine" / floor
        assert link.is_symlink()
        assert link.readlink() == Path("..") / floor
        assert not (ROOT / floor / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_public_modules_export_what_they_name_and_nothing_else():
    import seqengine.kernels.api as kernels
    import seqengine.parallel.api as parallel

    for module in (kernels, parallel):
        public = {name for name in vars(module) if not name.startswith("_")}
        assert public == set(module.__all__)
