"""Hub data sets: what is loaded is passed on, and being offline is one sentence."""

from typing import Any

import pytest

from flanmoe.core.errors import DataError
from flanmoe.data.sources import hub
from flanmoe.data.sources.base import Locator, Source
from flanmoe.data.sources.hub import HubDataset


def test_an_id_that_cannot_be_reached() -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(DataError) as caught:
        HubDataset("nobody/no-such-set", "train").size()
    text = str(caught.value)
    assert text.startswith(
        "The data set `nobody/no-such-set` (split `train`) cannot be loaded from the Hugging Face hub: "
    )
    assert text.endswith(
        "Check the id, the split and the connection, or put the rows into a data folder as "
        "no-such-set/train.jsonl and name that."
    )
    assert "\n" not in text


def test_rows_of_a_set_that_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((names, options))
        return [{"a": 1}, {"a": 2}]

    monkeypatch.setattr(hub.datasets, "load_dataset", load_dataset)
    source = HubDataset("owner/set-for-this-test", "train[:2]", "main")
    assert isinstance(source, Source)
    assert list(source.rows()) == [
        (Locator("owner/set-for-this-test/train[:2]", 1), {"a": 1}),
        (Locator("owner/set-for-this-test/train[:2]", 2), {"a": 2}),
    ]
    assert source.size() == 2
    assert asked == [(("owner/set-for-this-test", "main"), {"split": "train[:2]"})]


@pytest.mark.parametrize(
    ("identifier", "only"),
    [("lukaemon/bbh", True), ("maveriq/bigbenchhard", True), ("openai/gsm8k", False)],
)
def test_which_ids_are_for_evaluation_only(identifier: str, only: bool) -> None:
    assert HubDataset(identifier, "test").evaluation_only is only
