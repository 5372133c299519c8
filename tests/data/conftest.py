import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flanmoe.core.seeds import SeedTree
from flanmoe.data.packing import TokenizedExample
from flanmoe.data.renderers import Occasion
from flanmoe.testing.tiny_models import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a character, with a chat template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def occasion() -> Occasion:
    """One seed, and a token a word."""
    return Occasion(seeds=SeedTree(0), count_tokens=lambda text: len(text.split()))


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, Sequence[Any]], Path]:
    """Write JSON lines, compressed where the name ends in .gz."""

    def write(path: Path, rows: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return path

    return write


@pytest.fixture(scope="session")
def data_dir(
    tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[[Path, Sequence[Any]], Path]
) -> Path:
    """A data folder of three small tasks: 5, 12 and 40 examples of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("few", 5), ("some", 12), ("many", 40)):
        rows = [
            {
                "id": f"{name}-{i}",
                "question": f"{name} {i} " + "q" * (7 * i % 23),
                "answer": "a" * i,
            }
            for i in range(1, size + 1)
        ]
        write_rows(folder / name / "train.jsonl", rows)
    return folder


@pytest.fixture
def real_data_dir() -> Path:
    """The folder of real data that FLANMOE_DATA names; skipped by name where it is absent."""
    named = os.environ.get("FLANMOE_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("FLANMOE_DATA names no data folder")
    return Path(named)


@pytest.fixture
def tokens() -> Callable[..., TokenizedExample]:
    """Make a tokenized example of given ids, all but the first in the loss."""

    def make(ids: Sequence[int], task: str = "task") -> TokenizedExample:
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[:1] = False
        return TokenizedExample(
            input_ids=np.asarray(ids, dtype=np.int64),
            loss_mask=mask,
            task=task,
            key=str(list(ids)),
            content_hash="",
        )

    return make
