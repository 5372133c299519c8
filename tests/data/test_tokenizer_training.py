"""A trained tokenizer: T5's layout around pieces learnt from text, the same whenever it is trained."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.denoisers import sentinel_ids
from flanmoe.data.documents import Document, DocumentsConfig, load_documents
from flanmoe.data.example import Rendered
from flanmoe.data.pairs import tokenize_pairs
from flanmoe.data.tokenizer_training import (
    TokenizerTrainingConfig,
    TrainedTokenizer,
    train_tokenizer,
)

CONFIG = TokenizerTrainingConfig(vocabulary_size=400, num_sentinels=12)


def corpus(seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "te"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]
    texts = (" ".join(draw.choices(words, k=60)) + "." for _ in range(80))
    return [Document.of(text, f"document {number}") for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def trained() -> TrainedTokenizer:
    return train_tokenizer(corpus(), CONFIG)


@pytest.fixture(scope="module")
def loaded(trained: TrainedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer as transformers loads it from where it was saved."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    trained.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_vocabulary_is_laid_out_as_t5s(loaded: Any) -> None:
    assert len(loaded) == 400
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert (loaded.pad_token, loaded.eos_token, loaded.unk_token) == ("<pad>", "</s>", "<unk>")
    assert loaded.bos_token is None
    assert loaded.chat_template is None
    assert sentinel_ids(loaded) == tuple(range(399, 387, -1))
    assert loaded.convert_ids_to_tokens(399) == "<extra_id_0>"
    # What comes between are bytes and pieces learnt, none of which spells a special token.
    assert not set(loaded.all_special_ids) & set(range(3, 388))
    assert len(loaded.all_special_ids) == 3 + 12


def test_pieces_are_learnt(loaded: Any) -> None:
    text = corpus(seed=0)[3].text
    assert len(loaded(text)["input_ids"]) < 0.5 * len(text)


@given(text=st.text(max_size=40))
def test_every_text_is_given_back(loaded: Any, text: str) -> None:
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == text
    assert not set(ids) & set(loaded.all_special_ids)


def test_one_end_behind_every_text(loaded: Any) -> None:
    without = loaded("bado", add_special_tokens=False)["input_ids"]
    assert loaded("bado")["input_ids"] == [*without, 1]
    assert loaded("")["input_ids"] == [1]
    one = Rendered(prompt="bado", response="", task="t", key="k", content_hash="h")
    (pair,) = tokenize_pairs([one], loaded)
    assert pair.input_ids.tolist() == [*without, 1]
    assert pair.target_ids.tolist() == [1]


def test_a_sentinel_in_a_text_is_one_token(loaded: Any) -> None:
    ids = loaded("ba<extra_id_3>do", add_special_tokens=False)["input_ids"]
    assert ids.count(396) == 1
    assert loaded.decode(ids) == "ba<extra_id_3>do"


def test_what_is_loaded_is_what_transformers_makes_of_it_in_memory(
    trained: TrainedTokenizer, loaded: Any, tmp_path: Path
) -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained.backend, **trained.settings)
    wrapped.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = corpus()[5].text + " <extra_id_1> ü"
    for other in (wrapped, again):
        assert other(text)["input_ids"] == loaded(text)["input_ids"]
        assert other.special_tokens_map == loaded.special_tokens_map
        assert other.all_special_ids == loaded.all_special_ids


def test_the_same_documents_give_the_same_tokenizer(trained: TrainedTokenizer) -> None:
    assert train_tokenizer(corpus(), CONFIG).backend.to_str() == trained.backend.to_str()
    assert train_tokenizer(corpus(1), CONFIG).backend.to_str() != trained.backend.to_str()


_TRAIN = """
import hashlib, sys
from pathlib import Path
from flanmoe.data.documents import DocumentsConfig, load_documents
from flanmoe.data.tokenizer_training import TokenizerTrainingConfig, train_tokenizer

documents = load_documents(DocumentsConfig.parse({"sources": [sys.argv[1]]}))
config = TokenizerTrainingConfig(vocabulary_size=400, num_sentinels=12)
print(hashlib.sha256(train_tokenizer(documents, config).backend.to_str().encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["true", "false"])
def test_another_process_gives_the_same_tokenizer(
    trained: TrainedTokenizer,
    tmp_path: Path,
    write_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    parallel: str,
) -> None:
    """With threads and without."""
    path = write_rows(tmp_path / "texts.jsonl", [{"text": one.text} for one in corpus()])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    finished = subprocess.run(
        [sys.executable, "-c", _TRAIN, str(path)], capture_output=True, text=True, check=True
    )
    expected = hashlib.sha256(trained.backend.to_str().encode()).hexdigest()
    assert finished.stdout.strip() == expected


def test_too_little_text_for_so_many_pieces_is_refused() -> None:
    config = TokenizerTrainingConfig(vocabulary_size=400, num_sentinels=12)
    with pytest.raises(DataError) as caught:
        train_tokenizer([Document.of("ab ab", "here")], config)
    assert str(caught.value) == (
        "The documents must hold enough text for 129 pieces of more than one byte, but give only 2. Add "
        "documents, or lower `vocabulary_size` by 127."
    )


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be at least 359 with 100 sentinels, but is 300"):
        TokenizerTrainingConfig.parse({"vocabulary_size": 300})
    bytes_alone = TokenizerTrainingConfig(vocabulary_size=359)
    backend = train_tokenizer([Document.of("ab ab", "here")], bytes_alone).backend
    assert backend.get_vocab_size() == 359


def test_real_text(real_data_dir: Path) -> None:
    sources = [{"name": "web_text", "split": "c4"}]
    documents = load_documents(DocumentsConfig.parse({"sources": sources}), data_dir=real_data_dir)
    config = TokenizerTrainingConfig(vocabulary_size=2048)
    trained = train_tokenizer(documents[:150], config)
    assert trained.backend.get_vocab_size() == 2048
    text = documents[200].text
    encoding = trained.backend.encode(text, add_special_tokens=False)
    assert trained.backend.decode(encoding.ids) == text
    # English web text at 2,048 tokens: about 3 characters a token.
    assert 2.5 < len(text) / len(encoding.ids) < 5
