"""The token cache: the same tokens as without it, whoever else writes, dies or damages a file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import flanmoe.data.token_cache as cache_module
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Rendered
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig, TokenizedExample, tokenize_all
from flanmoe.data.stream import PackedStream
from flanmoe.data.token_cache import TokenCache, tokenizer_identity
from flanmoe.testing.tiny_models import tiny_tokenizer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def rendered(prompt: str, response: str, task: str = "t") -> Rendered:
    return Rendered(
        prompt=prompt, response=response, task=task, key=f"k {prompt}", content_hash="h"
    )


def texts(number: int, first: int = 0) -> list[Rendered]:
    return [
        rendered(f"question {index}?\n", f"answer {index}")
        for index in range(first, first + number)
    ]


def plain(examples: Sequence[TokenizedExample]) -> list[tuple[Any, ...]]:
    return [
        (
            one.input_ids.tolist(),
            one.input_ids.dtype,
            one.loss_mask.tolist(),
            one.loss_mask.dtype,
            one.task,
            one.key,
            one.content_hash,
        )
        for one in examples
    ]


def segments(cache_folder: Path) -> list[Path]:
    return sorted(cache_folder.glob("*/*.tokens"))


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.num_texts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        self.num_texts += len(text) if isinstance(text, list) else 0
        return self._inner(text, **options)


_pairs = st.tuples(st.text("ab \n", max_size=4), st.text("ab", max_size=4), st.sampled_from("tu"))


@given(batches=st.lists(st.lists(_pairs, max_size=8), max_size=5), closes=st.lists(st.booleans()))
def test_tokens_are_those_of_the_tokenizer_itself(
    tokenizer: Any, batches: list[list[tuple[str, str, str]]], closes: list[bool]
) -> None:
    """Repeats within a batch, between batches and between processes; borders and tasks that differ."""
    cache = TokenCache(tokenizer)
    for number, batch in enumerate(batches):
        found = cache.tokenize_all([rendered(*pair) for pair in batch])
        assert plain(found) == plain(tokenize_all([rendered(*pair) for pair in batch], tokenizer))
        if number < len(closes) and closes[number]:
            cache.close()
            cache = TokenCache(tokenizer)


def test_no_text_is_tokenised_twice(tokenizer: Any, cache_folder: Path) -> None:
    counting = Counting(tokenizer)
    cache = TokenCache(counting)
    first = cache.tokenize_all(texts(40))
    assert counting.num_texts == 40
    assert plain(cache.tokenize_all(texts(40))) == plain(first)
    cache.tokenize_all(texts(40, first=20))
    assert counting.num_texts == 60
    cache.close()
    assert plain(cache.tokenize_all(texts(40))) == plain(first)
    other = TokenCache(counting)
    assert plain(other.tokenize_all(texts(40))) == plain(first)
    other.tokenize_all(texts(40, first=20))
    assert counting.num_texts == 60
    other.close()
    assert len(segments(cache_folder)) == 1


def test_the_border_between_prompt_and_response_is_part_of_the_text(tokenizer: Any) -> None:
    cache = TokenCache(tokenizer)
    left, right = cache.tokenize_all([rendered("ab", "c"), rendered("a", "bc")])
    assert left.input_ids.tolist() == right.input_ids.tolist()
    assert left.loss_mask.tolist() == [False, False, True]
    assert right.loss_mask.tolist() == [False, True, True]


def test_full_segments_are_written_while_texts_come(
    tokenizer: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_SEGMENT_TOKENS", 100)
    counting = Counting(tokenizer)
    cache = TokenCache(counting)
    for number in range(10):
        cache.tokenize_all(texts(5, first=5 * number))
    assert len(segments(cache_folder)) > 5
    assert plain(cache.tokenize_all(texts(50))) == plain(tokenize_all(texts(50), tokenizer))
    assert counting.num_texts == 50


def _words(**options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<s>": 3}
    merges = options.pop("merges", [("a", "b")])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), **options
    )


def test_tokenizers_that_differ_have_folders_of_their_own() -> None:
    first = tokenizer_identity(_words())
    assert first == tokenizer_identity(_words())
    others = [
        _words(merges=[]),
        _words(eos_token="<s>"),
        _words(split_special_tokens=True),
        tiny_tokenizer(),
    ]
    assert len({first, *map(tokenizer_identity, others)}) == 5


def test_a_call_with_truncation_leaves_the_identity_as_it_was() -> None:
    tokenizer = _words(pad_token="<s>")
    before = tokenizer_identity(tokenizer)
    tokenizer(["ab", "abab"], truncation=True, max_length=1, padding="max_length")
    assert tokenizer_identity(tokenizer) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"\x00",
    ],
)
def test_a_damaged_segment_is_left_out_with_a_warning(
    tokenizer: Any, cache_folder: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    cache = TokenCache(tokenizer)
    cache.tokenize_all(texts(20))
    cache.close()
    (path,) = segments(cache_folder)
    content = damage(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
    other = TokenCache(tokenizer)
    assert f"Warning: The cached tokens in {path} are damaged and left out: " in (
        capsys.readouterr().err.replace("\n", "")
    )
    assert not path.exists()
    assert plain(other.tokenize_all(texts(20))) == plain(tokenize_all(texts(20), tokenizer))


def test_a_cache_that_cannot_be_written_is_said_once(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    monkeypatch.setenv("FLANMOE_CACHE", str(occupied))
    cache = TokenCache(tokenizer)
    for _ in range(2):
        assert plain(cache.tokenize_all(texts(9))) == plain(tokenize_all(texts(9), tokenizer))
        cache.close()
    errors = capsys.readouterr().err
    assert (
        errors.count("Warning: Tokens are not kept any more, but made anew for every text: ") == 1
    )


def test_who_is_not_to_write_only_looks_up(tokenizer: Any, cache_folder: Path) -> None:
    reading = TokenCache(tokenizer, writes=False)
    reading.tokenize_all(texts(5))
    reading.close()
    assert segments(cache_folder) == []
    writing = TokenCache(tokenizer)
    writing.tokenize_all(texts(5))
    writing.close()
    counting = Counting(tokenizer)
    found = TokenCache(counting, writes=False).tokenize_all(texts(5))
    assert plain(found) == plain(tokenize_all(texts(5), tokenizer))
    assert counting.num_texts == 0


def test_the_oldest_segments_make_room(
    tokenizer: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(tokenizer)
    written: list[str] = []
    for number in range(6):
        cache.tokenize_all(texts(10, first=10 * number))
        cache.close()
        written.append(segments(cache_folder)[-1].name)
    size = segments(cache_folder)[-1].stat().st_size
    monkeypatch.setattr(cache_module, "_MOST_BYTES", 3 * size + size // 2)
    cache.tokenize_all(texts(10, first=60))
    cache.close()
    kept = [path.name for path in segments(cache_folder)]
    assert kept[:2] == written[-2:]
    assert len(kept) == 3
    monkeypatch.setattr(cache_module, "_MOST_SEGMENTS", 1)
    cache.tokenize_all(texts(10, first=70))
    cache.close()
    assert len(segments(cache_folder)) == 1
    # What was mapped before it was removed is still there.
    assert plain(cache.tokenize_all(texts(80))) == plain(tokenize_all(texts(80), tokenizer))


def test_what_a_killed_writer_left_is_removed_in_the_end(
    tokenizer: Any, cache_folder: Path
) -> None:
    cache = TokenCache(tokenizer)
    cache.tokenize_all(texts(3))
    cache.close()
    folder = segments(cache_folder)[0].parent
    fresh, old = folder / ".00-aa.tokens.123", folder / ".01-bb.tokens.456"
    for path in (fresh, old):
        path.write_bytes(b"part")
    long_ago = time.time() - 7 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    TokenCache(tokenizer)
    assert fresh.exists()
    assert not old.exists()


@pytest.mark.parametrize("window", [1, 7])
def test_a_stream_gives_the_same_rows_and_states_with_and_without(
    data_dir: Path, tokenizer: Any, cache_folder: Path, window: int
) -> None:
    def stream(**options: Any) -> PackedStream:
        config = MixtureConfig.parse({"tasks": ["few", "some", "many"]})
        mixture = Mixture.load(config, seeds=SeedTree(0), data_dir=data_dir)
        packing = PackingConfig(length=100, window=window, **options)
        return PackedStream(mixture, tokenizer, packing, SeedTree(1))

    without, cold = stream(token_cache=False), stream()
    assert cold.config.token_cache
    expected = list(islice(without, 60))
    for cached in (cold, stream()):
        for row, other in zip(expected, islice(cached, 60), strict=True):
            assert np.array_equal(row.input_ids, other.input_ids)
            assert np.array_equal(row.labels, other.labels)
            assert row.tasks == other.tasks
        assert cached.state_dict() == without.state_dict()
        cached.load_state_dict(without.state_dict())


_WRITE = """
import sys
import flanmoe.data.token_cache as cache_module
from flanmoe.data.example import Rendered
from flanmoe.data.token_cache import TokenCache
from flanmoe.testing.tiny_models import tiny_tokenizer

first, number = int(sys.argv[1]), int(sys.argv[2])
cache_module._SEGMENT_TOKENS = 2000
cache = TokenCache(tiny_tokenizer())
print("ready", flush=True)
sys.stdin.readline()
for start in range(first, first + number, 10):
    batch = [
        Rendered(f"question {i}?\\n", f"answer {i}", task="t", key="k", content_hash="h")
        for i in range(start, start + 10)
    ]
    cache.tokenize_all(batch)
print("done", flush=True)
sys.stdin.readline()
"""


def writer(first: int, number: int) -> "subprocess.Popen[str]":
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", _WRITE, str(first), str(number)]
    return subprocess.Popen(command, text=True, **pipes)


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n", process.communicate()


@pytest.mark.slow
def test_two_writers_at_once_and_a_kill(tokenizer: Any, cache_folder: Path) -> None:
    """Both write the same thousand texts; one is killed with a segment open, the other ends."""
    killed, ended = writer(0, 2000), writer(1000, 2000)
    for process in (killed, ended):
        wait_for(process, "ready")
    for process in (killed, ended):
        tell(process)
    for process in (killed, ended):
        wait_for(process, "done")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    tell(ended)
    _, errors = ended.communicate(timeout=60)
    assert (ended.returncode, errors) == (0, "")
    assert len(segments(cache_folder)) > 20
    counting = Counting(tokenizer)
    cache = TokenCache(counting)
    expected = plain(
        [
            TokenizedExample(one.input_ids, one.loss_mask, "t", "k", "h")
            for one in tokenize_all(texts(3000), tokenizer)
        ]
    )
    found = cache.tokenize_all(
        [Rendered(one.prompt, one.response, "t", "k", "h") for one in texts(3000)]
    )
    assert plain(found) == expected
    # Only what was in the open segment of the killed process is missing.
    assert counting.num_texts < 100
