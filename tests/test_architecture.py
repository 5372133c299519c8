"""The rules of the house as tests: who may import whom, and what no file may hold (DESIGN 4)."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "flanmoe"
MODELS_AND_BELOW = {"core", "moe", "models"}
TRAINING_AND_BELOW = MODELS_AND_BELOW | {"data", "statistics", "pruning", "tuners"}
STAGES_AND_BELOW = TRAINING_AND_BELOW | {"training", "evaluation", "stages"}

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "moe": {"core"},
    "data": {"core"},
    "models": {"core", "moe"},
    "statistics": MODELS_AND_BELOW,
    "pruning": MODELS_AND_BELOW | {"statistics"},
    "tuners": MODELS_AND_BELOW | {"statistics"},
    "training": TRAINING_AND_BELOW,
    "evaluation": MODELS_AND_BELOW | {"data", "tuners"},
    "stages": STAGES_AND_BELOW - {"stages"},
    "study": STAGES_AND_BELOW,
    "cli": STAGES_AND_BELOW | {"study"},
    "testing": STAGES_AND_BELOW | {"study"},
}

FILES = sorted(SOURCE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    """Parse one file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """Return the modules that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []


def name_of(path: Path) -> str:
    """Return a short name for messages."""
    return str(path.relative_to(SOURCE))


def test_every_package_has_a_rule() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_down(package: str) -> None:
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in (SOURCE / package).rglob("*.py")
        for node in ast.walk(tree(path))
        for module in imported(node)
        if module.startswith("flanmoe.") and module.split(".")[1] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["core", "moe", "data"])
def test_the_lower_packages_load_no_transformers(package: str) -> None:
    wrong = [
        name_of(path)
        for path in (SOURCE / package).rglob("*.py")
        for node in ast.walk(tree(path))
        for module in imported(node)
        if module.split(".")[0] == "transformers"
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_house_rules(path: Path) -> None:
    assert path.name not in {"utils.py", "helpers.py", "common.py"}
    module = tree(path)
    assert ast.get_docstring(module), "a module says what it is"
    problems = [problem for node in ast.walk(module) for problem in _problems(node)]
    assert not problems + _undocumented(module.body)


def _problems(node: ast.AST) -> list[str]:
    found: list[str] = []
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        found.append("no import from __future__: it defeats the checks of shapes")
    if isinstance(node, ast.ExceptHandler) and all(isinstance(x, ast.Pass) for x in node.body):
        found.append(f"line {node.lineno}: an exception is swallowed")
    if isinstance(node, ast.FunctionDef):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        docstring = ast.get_docstring(node, clean=False) or ""
        if length - docstring.count("\n") > 60:
            found.append(f"line {node.lineno}: `{node.name}` has {length} lines")
    return found


def _undocumented(body: list[ast.stmt]) -> list[str]:
    """Return public classes, functions and methods without a docstring; nested functions are private."""
    found: list[str] = []
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append(f"line {node.lineno}: `{node.name}` has no docstring")
        if isinstance(node, ast.ClassDef):
            found += _undocumented(node.body)
    return found


def test_imports_inside_functions_only_in_the_command_line() -> None:
    wrong = [
        f"{name_of(path)}:{inner.lineno}"
        for path in FILES
        if path.parent.name != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not wrong
