"""Documents: where they come from, and which of them are kept from training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.documents import Document, DocumentsConfig, load_documents

Write = Callable[[Path, Sequence[Any]], Path]


def config(*sources: Any, **values: Any) -> DocumentsConfig:
    return DocumentsConfig.parse({"sources": sources, **values})


def texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]


@pytest.fixture
def folder(tmp_path: Path, write_rows: Write) -> Path:
    """A data folder with a text collection of two splits, and a plain text beside it."""
    write_rows(tmp_path / "web" / "train.jsonl.gz", [{"text": "One."}, {"text": " Two.\n"}])
    write_rows(tmp_path / "web" / "news.jsonl", [{"body": "Three."}])
    (tmp_path / "book.txt").write_text("Once upon\na time.\n", encoding="utf-8")
    return tmp_path


def test_documents_of_folders_files_and_plain_text_in_order(folder: Path) -> None:
    found = load_documents(
        config(
            str(folder / "book.txt"),
            "web",
            {"name": "web", "split": "news", "field": "body"},
            str(folder / "web" / "train.jsonl.gz"),
        ),
        data_dir=folder,
    )
    assert texts(found) == ["Once upon\na time.", "One.", "Two.", "Three.", "One.", "Two."]
    assert found[2].origin == f"{folder / 'web' / 'train.jsonl.gz'}:2"
    assert found[1].content_hash == found[4].content_hash != found[2].content_hash


@pytest.fixture
def many(tmp_path: Path, write_rows: Write) -> Path:
    write_rows(tmp_path / "many" / "train.jsonl", [{"text": f"Text {n}."} for n in range(400)])
    return tmp_path


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_every_document_is_trained_on_or_held_out(many: Path, share: float) -> None:
    chosen = config("many", held_out_share=share)
    train, held_out = (
        texts(load_documents(chosen, part=part, data_dir=many)) for part in ("train", "held_out")
    )
    everything = [f"Text {n}." for n in range(400)]
    assert sorted(train + held_out, key=everything.index) == everything
    assert abs(len(held_out) / 400 - share) < 0.05
    assert texts(load_documents(config("many"), data_dir=many)) == everything


def test_a_larger_share_holds_out_what_a_smaller_one_does_and_more(many: Path) -> None:
    small, large = (
        texts(load_documents(config("many", held_out_share=s), part="held_out", data_dir=many))
        for s in (0.1, 0.3)
    )
    assert set(small) < set(large)


def test_equal_texts_are_on_one_side(tmp_path: Path, write_rows: Write) -> None:
    """Whatever their case and white space, wherever they come from."""
    rows = [{"text": f"Text  {n}." if n % 2 else f"text {n}."} for n in range(60)]
    write_rows(tmp_path / "first.jsonl", rows)
    write_rows(tmp_path / "second.jsonl", [{"text": f"Text {n}.\n"} for n in reversed(range(60))])
    chosen = config(
        str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl"), held_out_share=0.4
    )
    train, held_out = (
        {one.content_hash for one in load_documents(chosen, part=part)}
        for part in ("train", "held_out")
    )
    assert not train & held_out
    assert len(train | held_out) == 60


def test_a_part_without_documents_is_refused(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_documents(config("web"), part="held_out", data_dir=folder)
    assert str(caught.value) == (
        "The part `held_out` must hold at least 1 document, but holds none of 2 with `held_out_share` 0.0. "
        "Change the share, or add documents."
    )


def test_blank_documents_are_left_out_with_a_warning(
    tmp_path: Path, write_rows: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": " \n"}, {"text": "One."}, {"text": ""}])
    assert texts(load_documents(config(str(path)))) == ["One."]
    message = " ".join(capsys.readouterr().err.split())
    assert "2 are blank and left out" in message


@pytest.mark.parametrize(
    ("row", "found"), [({"body": "x"}, "there is no such field"), ({"text": 3}, "there is a int")]
)
def test_a_record_without_its_text_is_refused(
    tmp_path: Path, write_rows: Write, row: dict[str, Any], found: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "One."}, row])
    with pytest.raises(DataError, match=f"a.jsonl:2: the field `text` .* but {found}"):
        load_documents(config(str(path)))


def test_sets_for_evaluation_are_refused(tmp_path: Path, write_rows: Write) -> None:
    write_rows(tmp_path / "bbh" / "train.jsonl", [{"text": "One."}])
    with pytest.raises(DataError, match="`bbh` are for evaluation only"):
        load_documents(config("bbh"), data_dir=tmp_path)


@pytest.mark.parametrize("values", [{"split": "test"}, {"field": "body"}, {"subset": "en"}])
def test_plain_text_has_no_parts_to_choose(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"as a whole, but found `{next(iter(values))}`; leave"):
        config({"name": "book.txt", **values})


def test_a_config_is_read_back_from_what_it_writes() -> None:
    chosen = config("book.txt", {"name": "web", "split": "c4"}, held_out_share=0.1)
    assert DocumentsConfig.parse(chosen.to_mapping()) == chosen


def test_an_unknown_split_is_refused_with_those_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match="`web` has no split `tain`"):
        load_documents(config({"name": "web", "split": "tain"}), data_dir=folder)


@pytest.mark.parametrize(
    ("name", "split", "number"),
    [("wikitext2", "validation", 60), ("tiny_shakespeare", "train", 6740), ("web_text", "c4", 300)],
)
def test_real_collections(real_data_dir: Path, name: str, split: str, number: int) -> None:
    found = load_documents(config({"name": name, "split": split}), data_dir=real_data_dir)
    assert len(found) == number
    assert all(one.text == one.text.strip() != "" for one in found)
