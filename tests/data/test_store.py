"""Stores: what is looked up equals what is read, whoever writes, dies, changes or damages what."""

import ast
import datetime
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flanmoe.data.store as store_module
from flanmoe.core.errors import DataError, DiskError
from flanmoe.data import store_places
from flanmoe.data.example import Example
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources import hub
from flanmoe.data.sources.base import Locator, Source
from flanmoe.data.sources.exemplars import exemplar_source
from flanmoe.data.sources.hub import HubDataset
from flanmoe.data.sources.json_lines import JsonLines
from flanmoe.data.sources.parquet import Parquet
from flanmoe.data.store import ExampleStore, example_store
from flanmoe.data.stored_values import encoded, from_json, to_json
from flanmoe.data.tasks import CHOICE_SCORER, REFERENCE_SCORER, TaskConfig, load_task

Write = Callable[[Path, Sequence[Any]], Path]

BAD = {"question": "left out", "answer": ""}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain(number: int) -> dict[str, Any]:
    return {"id": f"n{number}", "question": f"{number} plus one?", "answer": f"{number + 1}"}


def kinds_of_rows(number: int) -> dict[str, Any]:
    """Records of several forms, with empty and odd values."""
    forms: list[dict[str, Any]] = [
        plain(number),
        {"question": f"Which, {number}?", "choices": ["one", "two", "three"], "label": number % 3},
        {
            "question": f"é😀 {number}",
            "answer": "ü",
            "rationale": f"Because {number}.\nThe answer is ü.",
        },
        {
            "instruction": "Do",
            "input": f"it {number}",
            "output": "done",
            "subject": "x",
            "depth": 1.5,
        },
        {
            "inputs": f"in {number}",
            "targets": ["a", "b"],
            "nested": {"list": [1, None, {"a": True}]},
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Count to {number}."},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": "é, please?"},
                {"role": "assistant", "content": "One."},
            ]
        },
    ]
    return forms[number % len(forms)]


def many(number: int = 700) -> list[dict[str, Any]]:
    return [kinds_of_rows(index) for index in range(number)]


def read(source: Source, **options: Any) -> ExampleStore:
    return example_store(source, **{"labels": None, "on_bad_record": "error", **options})


def written_out(source: Source, labels: dict[str, str] | None = None) -> list[Example]:
    """Every record made into an example, one after the other."""
    return [example_from_row(row, locator, labels=labels) for locator, row in source.rows()]


def stores(cache_folder: Path) -> list[Path]:
    return sorted(path.parent for path in cache_folder.rglob("store.json"))


def is_stored(store: ExampleStore) -> bool:
    return not isinstance(store.examples, tuple)


def assert_equal(store: ExampleStore, expected: Sequence[Example]) -> None:
    order = list(range(len(expected)))
    random.Random(0).shuffle(order)
    assert len(store.examples) == len(store.content_hashes) == len(expected)
    for row in order:
        assert store.examples[row] == expected[row]
        assert store.content_hashes[row] == expected[row].content_hash()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_every_row_equals_the_written_out_reading(
    tmp_path: Path, write_rows: Write, name: str
) -> None:
    source = JsonLines(write_rows(tmp_path / name, many()))
    expected = written_out(source)
    for _ in range(2):
        store = read(source)
        assert is_stored(store)
        assert_equal(store, expected)
        assert store.examples[5:400:7] == tuple(expected[5:400:7])
        assert store.content_hashes[-2:] == tuple(one.content_hash() for one in expected[-2:])
        assert store.examples[-1] == expected[-1]
        assert list(store.examples) == expected
        assert not store.all_have_choices
        with pytest.raises(IndexError):
            store.examples[700]


def test_many_batches(tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", many(401)))
    expected = written_out(source)
    monkeypatch.setattr(store_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 150)
    assert_equal(read(source), expected)
    assert_equal(read(source), expected)


def test_small_sources_stay_in_memory_and_leave_nothing(
    tmp_path: Path, write_rows: Write, cache_folder: Path
) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", many(128)))
    store = read(source)
    assert not is_stored(store)
    assert_equal(store, written_out(source))
    assert not cache_folder.exists()
    assert not is_stored(read(exemplar_source("exemplars/gsm8k_cot")))


def test_the_second_start_reads_no_record(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", many())
    first = load_task(TaskConfig(name=str(file)))
    expected = list(first.examples)
    monkeypatch.setattr(
        JsonLines, "readable_rows", lambda self, leave_out: pytest.fail("the file was read")
    )
    second = load_task(TaskConfig(name=str(file)))
    assert second.size == 700
    assert second.content_hashes[3] == expected[3].content_hash()
    assert second.scorer == REFERENCE_SCORER
    assert list(second.examples) == expected


def test_size_scorer_and_hashes_read_no_example(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"{i}?", "choices": ["a", "b"], "label": i % 2} for i in range(300)]
    task = load_task(TaskConfig(name=str(write_rows(tmp_path / "rows.jsonl", rows))))
    assert task.size == 300
    monkeypatch.setattr(store_module, "Example", lambda **_: pytest.fail("an example was read"))
    assert task.scorer == CHOICE_SCORER
    assert len(set(task.content_hashes)) == 300
    assert task.rejected == ()


def test_what_was_left_out_is_kept_with_its_reason(
    tmp_path: Path, write_rows: Write, cache_folder: Path
) -> None:
    file = write_rows(tmp_path / "here" / "rows.jsonl", [*many(250), BAD, *many(50), {"text": "x"}])
    first = read(JsonLines(file), on_bad_record="skip")
    second = read(JsonLines(file), on_bad_record="skip")
    assert is_stored(second)
    assert first.rejected == second.rejected
    assert [record.locator for record in second.rejected] == [f"{file}:251", f"{file}:302"]
    assert second.rejected[0].reason.startswith(f"{file}:251: the record has no target: ")
    # The same bytes elsewhere share the store, but not the place.
    moved = write_rows(tmp_path / "there" / "rows.jsonl", [])
    moved.write_bytes(file.read_bytes())
    third = read(JsonLines(moved), on_bad_record="skip")
    assert len(stores(cache_folder)) == 1
    assert third.rejected[1].locator == f"{moved}:302"
    assert third.rejected[1].reason == second.rejected[1].reason.replace(str(file), str(moved))


def test_a_store_with_rejected_records_stops_whoever_wants_none_left_out(
    tmp_path: Path, write_rows: Write
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*many(200), BAD])
    messages: list[str] = []
    for skip_first in (False, True):
        if skip_first:
            assert len(read(JsonLines(file), on_bad_record="skip").examples) == 200
        with pytest.raises(DataError) as caught:
            read(JsonLines(file))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{file}:201: the record has no target: ")


def test_another_content_is_another_store_whatever_the_time_stamps_say(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_places, "_REMEMBERED_BYTES", 0)
    monkeypatch.setattr(store_places, "_SETTLED_NANOSECONDS", -1)
    file = write_rows(tmp_path / "rows.jsonl", [plain(number) for number in range(200)])
    before = file.stat()
    assert read(JsonLines(file)).examples[7].target == "8"
    file.write_text(file.read_text().replace('"answer": "8"', '"answer": "9"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert read(JsonLines(file)).examples[7].target == "9"


def test_labels_and_their_order_make_a_store_of_their_own(
    tmp_path: Path, write_rows: Write, cache_folder: Path
) -> None:
    rows = [{"premise": f"{i}", "hypothesis": "h", "label": "yn"[i % 2]} for i in range(300)]
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", rows))
    for labels in ({"y": "yes", "n": "no"}, {"n": "no", "y": "yes"}, {"y": "sure", "n": "no"}):
        for _ in range(2):
            assert_equal(read(source, labels=labels), written_out(source, labels))
    assert len(stores(cache_folder)) == 3


def test_a_large_file_is_hashed_once(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_places, "_REMEMBERED_BYTES", 0)
    file = write_rows(tmp_path / "rows.jsonl", many())
    hour_ago = time.time() - 3600
    os.utime(file, (hour_ago, hour_ago))
    hashed: list[Path] = []
    hash_of = store_places._hash_of
    monkeypatch.setattr(store_places, "_hash_of", lambda path: hashed.append(path) or hash_of(path))
    # Fresh by its change time: it could still change within one tick of the clock.
    read(JsonLines(file))
    read(JsonLines(file))
    assert hashed == [file, file]
    monkeypatch.setattr(store_places, "_SETTLED_NANOSECONDS", -1)
    read(JsonLines(file))
    read(JsonLines(file))
    assert hashed == [file, file, file]


def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, write_rows: Write, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", many(300))
    rows = JsonLines.readable_rows

    def rows_of_a_growing_file(self: JsonLines, leave_out: Any) -> Any:
        for number, item in enumerate(rows(self, leave_out)):
            if number == 250:
                with file.open("a") as stream:
                    stream.write(json.dumps(plain(1)) + "\n")
            yield item

    monkeypatch.setattr(JsonLines, "readable_rows", rows_of_a_growing_file)
    with pytest.raises(DataError) as caught:
        read(JsonLines(file))
    assert str(caught.value) == (
        f"{file} must stay as it is while it is read, but changed. Start again when nothing writes to it."
    )
    assert stores(cache_folder) == []


def damage_by_cutting(folder: Path) -> None:
    path = folder / "examples.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def damage_by_writing_zeros(folder: Path) -> None:
    path = folder / "examples.arrow"
    path.write_bytes(bytes(path.stat().st_size))


def damage_the_facts(folder: Path) -> None:
    (folder / "store.json").write_text("{")


def lose_a_file(folder: Path) -> None:
    (folder / "examples.arrow").unlink()


@pytest.mark.parametrize(
    "damage", [damage_by_cutting, damage_by_writing_zeros, damage_the_facts, lose_a_file]
)
def test_a_damaged_store_is_made_again_with_a_warning(
    tmp_path: Path,
    write_rows: Write,
    cache_folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", many()))
    read(source)
    (folder,) = stores(cache_folder)
    damage(folder)
    capsys.readouterr()
    assert_equal(read(source), written_out(source))
    assert f"Warning: The store of {source.path} in the cache is damaged and made again: " in (
        capsys.readouterr().err
    )
    assert_equal(read(source), written_out(source))
    assert capsys.readouterr().err == ""


def test_a_damaged_row_is_one_sentence(
    tmp_path: Path, write_rows: Write, cache_folder: Path
) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", [plain(n) for n in range(300)]))
    read(source)
    (folder,) = stores(cache_folder)
    path = folder / "examples.arrow"
    path.write_bytes(path.read_bytes().replace(b'"question": "7 plus', b'"question": \xff7 plus'))
    store = read(source)
    assert store.examples[8] == written_out(source)[8]
    with pytest.raises(
        DataError, match=r"^Row 8 of the store .* cannot be read back: .* Delete that"
    ):
        store.examples[7]


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", many()))
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    monkeypatch.setenv("FLANMOE_CACHE", str(occupied))
    with pytest.raises(DiskError) as caught:
        read(source)
    assert str(caught.value) == (
        f"The examples of {source.path} must be kept in the cache folder {occupied}, but it cannot be "
        "written: Not a directory. Free some space, or name another folder with the environment variable "
        "FLANMOE_CACHE."
    )


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, write_rows: Write, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = JsonLines(write_rows(tmp_path / "rows.jsonl", many()))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "flush", full)
    with pytest.raises(DiskError, match=r"cannot be written: No space left on device\. Free some"):
        read(source)
    assert not any(path.is_dir() for path in (cache_folder / "examples").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("FLANMOE_CACHE", str(cache_folder))
    assert_equal(read(source), written_out(source))


def test_messages_of_a_source_come_through(tmp_path: Path, write_rows: Write) -> None:
    file = write_rows(tmp_path / "rows.jsonl", many(300))
    with file.open("a") as stream:
        stream.write("not json\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:301: the line is not valid JSON"):
        read(JsonLines(file), on_bad_record="error")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(file.read_bytes())[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: the gzip stream is broken"):
        read(JsonLines(cut))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read(JsonLines(tmp_path / "absent.jsonl"))


def test_half_a_character_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"question": "half \\ud83d", "answer": "a"}\n{"question": "q", "answer": "a"}\n'
    )
    with pytest.raises(DataError) as caught:
        read(JsonLines(file))
    assert str(caught.value) == (
        f"{file}:1: the record must be Unicode text, but holds half a character ('\\ud83d'). Write both "
        "halves of it, or leave it out."
    )
    assert len(read(JsonLines(file), on_bad_record="skip").examples) == 1


def test_half_a_character_where_nothing_is_made_of_it_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    line = '{"question": "q", "answer": "a", "note": "\\ud83d", "more": ["\\ud83d"]}\n'
    file.write_text(line * 200)
    assert_equal(read(JsonLines(file)), written_out(JsonLines(file)))
    assert_equal(read(JsonLines(file)), written_out(JsonLines(file)))


def test_values_of_parquet_that_json_lacks(tmp_path: Path) -> None:
    number = 200
    columns = {
        "question": [f"{index}?" for index in range(number)],
        "answer": ["a"] * number,
        "when": [datetime.datetime(2020, 1, 2, 3, 4, 5, 6)] * number,
        "zoned": arrow.array(
            [datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)] * number,
            arrow.timestamp("us", "UTC"),
        ),
        "day": [datetime.date(2020, 1, 2)] * number,
        "clock": [datetime.time(1, 2, 3)] * number,
        "span": [datetime.timedelta(days=-1, microseconds=7)] * number,
        "price": [Decimal("1.50")] * number,
        "raw": [b"\x00\xff"] * number,
        "pairs": arrow.array([[("a", 1), ("b", 2)]] * number, arrow.map_("string", "int64")),
        "nothing": [None] * number,
    }
    file = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table(columns), file)
    store = read(Parquet(file))
    assert is_stored(store)
    assert_equal(store, written_out(Parquet(file)))
    assert store.examples[0].metadata["pairs"] == [("a", 1), ("b", 2)]


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.dates()
    | st.datetimes().filter(lambda moment: not moment.fold)
    | st.times().filter(lambda moment: not moment.fold)
    | st.timedeltas()
    | st.decimals(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.just("\x00python"), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=_values)
def test_whatever_metadata_holds_comes_back(value: Any) -> None:
    text = to_json(encoded(value))
    assert repr(from_json(text)) == repr(value)


def test_values_that_no_text_can_hold_keep_the_source_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_folder: Path
) -> None:
    kept = [{**plain(number), "sound": object()} for number in range(200)]
    loaded = datasets.Dataset.from_list([plain(number) for number in range(200)])
    monkeypatch.setattr(hub, "_load", lambda *_: loaded)
    monkeypatch.setattr(
        HubDataset, "rows", lambda self: ((Locator("o/n", n), row) for n, row in enumerate(kept, 1))
    )
    store = read(HubDataset("o/n", "train"))
    assert not is_stored(store)
    assert len(store.examples) == 200
    assert "o/n/train stays in memory: its records hold a object" in capsys.readouterr().err
    assert stores(cache_folder) == []


def test_a_hub_set_is_stored_by_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    loaded = datasets.Dataset.from_list([plain(number) for number in range(200)])
    monkeypatch.setattr(hub, "_load", lambda *_: loaded)
    source = HubDataset("owner/stored", "train")
    for _ in range(2):
        assert_equal(read(source), written_out(source))
    assert len(stores(cache_folder)) == 1
    loaded = loaded.map(lambda row: {"answer": row["answer"] + "!"})
    assert_equal(read(source), written_out(source))
    assert read(source).examples[0].target == "1!"
    assert len(stores(cache_folder)) == 2


def test_stores_that_nobody_opens_are_removed_in_the_end(
    tmp_path: Path, write_rows: Write, cache_folder: Path
) -> None:
    old, used, new = (
        JsonLines(write_rows(tmp_path / f"{name}.jsonl", many(300 + index)))
        for index, name in enumerate(("old", "used", "new"))
    )
    read(old)
    (first,) = stores(cache_folder)
    read(used)
    long_ago = time.time() - 100 * 24 * 3600
    for folder in stores(cache_folder):
        os.utime(folder, (long_ago, long_ago))
    read(used)
    read(new)
    assert first not in stores(cache_folder)
    assert len(stores(cache_folder)) == 2


def test_everything_that_reads_records_is_part_of_the_name() -> None:
    """A module of the data package that a reader imports is a reader too."""
    folder = Path(store_places.__file__).parent
    named = {Path(str(module.__file__)) for module in store_places._READERS}
    for path in named:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flanmoe.data."):
                imported = folder.joinpath(*node.module.split(".")[2:]).with_suffix(".py")
                # The base holds what sources have in common, and how records are named in messages.
                assert imported in named or imported.name == "base.py", (path.name, imported.name)


_READ = """
import sys
from pathlib import Path
from flanmoe.data.tasks import TaskConfig, load_task

task = load_task(TaskConfig(name=sys.argv[1]))
print(task.size, *task.content_hashes[::97])
"""


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(number: int) -> str:
    return "".join(json.dumps(kinds_of_rows(index)) + "\n" for index in range(number))


@pytest.mark.slow
def test_two_writers_at_once(tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines_of(10_000))
    processes = [start(_READ, file) for _ in range(2)]
    found = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    assert found[0][0] == found[1][0]
    assert found[0][0].startswith("10000 ")
    # One of them read the file, the other waited for it.
    assert sum("into the cache, once" in errors for _, errors in found) == 1
    assert len(stores(cache_folder)) == 1
    assert_equal(read(JsonLines(file)), written_out(JsonLines(file)))


@pytest.mark.slow
def test_a_kill_in_the_middle_of_writing(tmp_path: Path, cache_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines_of(20_000))
    process = start(_READ, file)
    deadline = time.monotonic() + 120
    while not any(
        path.stat().st_size > 100_000 for path in cache_folder.rglob("*.partial/*.arrow")
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache_folder.rglob("*.partial"))
    assert stores(cache_folder) == []
    store = read(JsonLines(file))
    assert len(store.examples) == 20_000
    assert list(store.examples[::501]) == written_out(JsonLines(file))[::501]
    assert not list(cache_folder.rglob("*.partial"))


_GROWTH = """
import random, sys
from pathlib import Path
from flanmoe.data.tasks import TaskConfig, load_task

def resident_bytes():
    # What belongs to the process alone: mapped pages of the store are the system's to take back.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

load_task(TaskConfig(name=sys.argv[2])).examples[0]
before = resident_bytes()
task = load_task(TaskConfig(name=sys.argv[1]))
size = task.size
built = resident_bytes()
draw = random.Random(0)
for row in draw.sample(range(size), size):
    task.examples[row]
print(size, built - before, resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_stays_flat(tmp_path: Path) -> None:
    file, small = tmp_path / "rows.jsonl", tmp_path / "small.jsonl"
    with file.open("w") as stream:
        for number in range(200_000):
            words = f"word{number} " * 40
            stream.write(json.dumps({"question": f"{words}?", "answer": f"{number}"}) + "\n")
    small.write_text(lines_of(300))
    assert file.stat().st_size > 80 * 2**20
    process = start(_GROWTH, file, small)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    size, built, drawn = map(int, out.split())
    assert size == 200_000
    # In memory the examples take over 200 MiB.
    assert built < 64 * 2**20
    assert drawn < 64 * 2**20


def test_lines_that_are_no_records_are_left_out_on_request_and_counted(tmp_path: Path) -> None:
    good = json.dumps(plain(1)).encode()
    path = tmp_path / "torn.jsonl.gz"
    whole = gzip.compress(b"\n".join([good, b"{torn", good, b"\xff\xfe", b"[1]", good]) + b"\n")
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz:2: the line is not valid JSON"):
        example_store(JsonLines(path), labels=None, on_bad_record="error")
    store = example_store(JsonLines(path), labels=None, on_bad_record="skip")
    assert len(store.examples) == 3
    places = [record.locator.rpartition(":")[2] for record in store.rejected]
    assert places == ["2", "4", "5"]
    assert "must be UTF-8 text" in store.rejected[1].reason


def test_what_stands_behind_a_broken_place_counts_as_one(tmp_path: Path) -> None:
    rows = [json.dumps({**plain(number), "noise": os.urandom(300).hex()}) for number in range(900)]
    whole = gzip.compress("".join(f"{row}\n" for row in rows).encode())
    path = tmp_path / "torn.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="the gzip stream is broken"):
        example_store(JsonLines(path), labels=None, on_bad_record="error")
    store = example_store(JsonLines(path), labels=None, on_bad_record="skip")
    assert 300 < len(store.examples) < 600
    (record,) = store.rejected
    assert record.locator == f"{path}:{len(store.examples) + 1}"
    assert "the gzip stream is broken" in record.reason
