"""The public names: each resolves, the documentation lists exactly these, and a wrong one gets a hint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import flanmoe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", flanmoe.__all__)
def test_every_public_name_resolves(name: str) -> None:
    found = getattr(flanmoe, name)
    assert isinstance(found, str) or found.__doc__


def test_the_documentation_lists_exactly_the_public_names() -> None:
    text = (DOCS / "index.md").read_text()
    table = text.split("<!-- public names -->")[1]
    listed = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(flanmoe.__all__) - {"__version__"})


def test_a_wrong_name_gets_a_hint() -> None:
    with pytest.raises(AttributeError, match=r"flanmoe has no `upcicle`. Did you mean `upcycle`\?"):
        flanmoe.upcicle  # noqa: B018 the access is what is tested


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import flanmoe, sys\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"loaded by `import flanmoe`: {result.stderr}"
