"""The public names: those that the docs list, loaded late, with a hint for a wrong one."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flanmoe

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "src" / "flanmoe"
_MARKED = re.compile(r"<!-- public names: start -->(.*)<!-- public names: end -->", flags=re.DOTALL)
_HEAVY = ("torch", "transformers", "matplotlib", "datasets", "lm_eval", "accelerate", "pandas")


def _documented() -> dict[str, str]:
    """Name to module, as the table in docs/index.md has them."""
    marked = _MARKED.search((_ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert marked is not None
    rows = re.findall(r"^\| `([^`]+)` \| .+ \| `([^`]+)` \|$", marked[1], flags=re.MULTILINE)
    return dict(rows)


def test_all_is_what_the_docs_list() -> None:
    assert sorted(flanmoe.__all__) == sorted(_documented())
    assert len(flanmoe.__all__) == len(set(flanmoe.__all__))


@pytest.mark.parametrize("name", sorted(flanmoe.__all__))
def test_every_name_is_there_and_lives_where_the_docs_say(name: str) -> None:
    value = getattr(flanmoe, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", value)
    else:
        assert value.__module__ == _documented()[name]
        assert value.__name__ == name
        assert value.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((_PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    expected = {name: home for name, home in _documented().items() if name != "__version__"}
    assert imported == expected


def test_a_wrong_name_gets_a_hint() -> None:
    with pytest.raises(AttributeError) as raised:
        flanmoe.Exmaple  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert str(raised.value) == ("flanmoe has no `Exmaple`. Did you mean `Example`?")


def test_a_name_that_is_like_none_gets_no_hint() -> None:
    with pytest.raises(AttributeError) as raised:
        flanmoe.zzz  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert str(raised.value) == "flanmoe has no `zzz`."


def test_names_are_offered_for_completion() -> None:
    assert set(flanmoe.__all__) <= set(dir(flanmoe))


def _loaded_after(statement: str) -> set[str]:
    """Which heavy packages a fresh process has loaded after a statement."""
    program = (
        f"import sys\n{statement}\nprint(*[name for name in {_HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    # What the statement itself printed comes before.
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import flanmoe; flanmoe.Ledger; flanmoe.__version__",
        "import flanmoe.cli.main",
        "from flanmoe.cli.main import invoke; assert invoke(['--help']) == 0",
        "from flanmoe.cli.main import invoke; assert invoke(['run', '--help']) == 0",
        "from flanmoe.cli.main import invoke; assert invoke(['--version']) == 0",
    ],
)
def test_help_and_plain_imports_load_nothing_heavy(statement: str) -> None:
    assert _loaded_after(statement) == set()


def test_the_check_above_can_fail() -> None:
    assert "torch" in _loaded_after("import flanmoe; flanmoe.Routing")
