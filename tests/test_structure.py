"""The shape of the project: arrows of imports point down, method files are short, imports cheap.

The oracle is the source itself, read with `ast`, and a fresh interpreter.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deltune as dt

SOURCE = Path(dt.__file__).parent
# From the ground up: a module may import from its own level and from those before it.
LEVELS = [
    ["errors", "_version", "values"],
    ["spec", "vector"],
    ["sites", "store"],
    ["mechanisms", "show"],
    ["families"],
    ["planning", "tree", "container"],
    [
        "delta",
        "fold",
        "attaching",
        "catalogue",
        "routing",
        "banks",
        "reference",
        "saving",
        "storing",
        "algebra",
    ],
    ["exchange", "merging"],
    ["tasks"],
    ["training"],
    ["subspace"],
    ["study", "conversion"],
    ["cli", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names}
ALLOWED = {("spec", "families")}  # `methods()` imports the families so that they register


def _modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path, top: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    nodes = tree.body if top else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            if node.module == "deltune":
                found |= {f"deltune.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    room = _room(path)
    assert room in RANK, f"{room} has no level: add it to LEVELS"
    for name in _imports(path):
        if not name.startswith("deltune."):
            continue
        other = name.split(".")[1]
        allowed = RANK[other] <= RANK[room] or (room, other) in ALLOWED
        assert allowed, f"{path.name} ({room}) imports {name}, which is above it"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    if path.name == "means.py":  # a model of transformers, itself imported where it is used
        return
    heavy = {"transformers", "datasets", "duckdb", "matplotlib", "peft", "sklearn", "scipy"}
    assert not heavy & {name.split(".")[0] for name in _imports(path, top=True)}


def test_only_the_command_line_prints() -> None:
    for path in _modules():
        if _room(path) in ("cli", "__main__"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_methods_are_short_files() -> None:
    files = [p for p in (SOURCE / "families").rglob("*.py") if p.name != "__init__.py"]
    assert len(files) >= 6
    for path in files:
        lines = len(path.read_text().splitlines())
        assert lines <= 140, f"{path.name} has {lines} lines: a mechanism should do more of it"


def test_files_and_functions_stay_readable() -> None:
    for path in _modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                docstring = ast.get_docstring(node) or ""
                length = node.end_lineno - node.lineno - len(docstring.splitlines())
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_the_public_surface_is_one_short_list() -> None:
    assert len(dt.__all__) <= 32
    for name in dt.__all__:
        value = getattr(dt, name)
        assert callable(value) and value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = dt.lora  # type: ignore[attr-defined]


def _fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_brings_nothing_heavy() -> None:
    code = "import sys; {}; print([m for m in {} if m in sys.modules])"
    heavy = ["transformers", "datasets", "duckdb", "matplotlib", "peft", "sklearn", "pandas"]
    assert _fresh(code.format("import deltune", [*heavy, "torch"])) == "[]"
    core = "import deltune as dt; dt.attach, dt.LoRA, dt.methods(), dt.train, dt.load"
    assert _fresh(code.format(core, heavy)) == "[]"
