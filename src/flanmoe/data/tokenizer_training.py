"""A tokenizer trained on documents, for models that start from nothing.

Byte-level byte-pair encoding (Sennrich et al., 2016; Radford et al., 2019): it can write every text and give
it back byte by byte, and its training only counts, so the same texts give the same tokenizer; that of a unigram
model adds up floating-point numbers in parallel. Around it stands what T5's tokenizer has: `<pad>`, `</s>` and
`<unk>` are 0, 1 and 2, `</s>` is put behind every text, and the last ids are the sentinels, `<extra_id_0>` the
very last.
"""

# `tokenizers` leaves open what its lists hold.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.core.files import whole_folder, write_json, write_text
from flanmoe.data.denoisers import sentinel_token
from flanmoe.data.documents import Document

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "</s>", "<unk>"

_SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, UNK_TOKEN)
_NUM_BYTES = 256
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"


class TokenizerTrainingConfig(Config):
    """Which tokenizer is trained.

    Attributes:
        vocabulary_size: tokens in all: 3 special ones, 256 bytes, the pieces learnt, the sentinels.
        num_sentinels: how many sentinels there are; T5 has 100.
    """

    vocabulary_size: int = Field(default=4096, ge=1)
    num_sentinels: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _room_for_bytes(self) -> "TokenizerTrainingConfig":
        if self.num_learnt < 0:
            least = self.vocabulary_size - self.num_learnt
            raise ValueError(
                f"`vocabulary_size` must be at least {least} with {self.num_sentinels} sentinels, but is "
                f"{self.vocabulary_size}"
            )
        return self

    @property
    def num_learnt(self) -> int:
        """Pieces of more than one byte that are learnt from the documents."""
        return self.vocabulary_size - len(_SPECIAL_TOKENS) - _NUM_BYTES - self.num_sentinels


@dataclass(frozen=True, slots=True)
class TrainedTokenizer:
    """A tokenizer and what transformers is to know of it.

    Attributes:
        backend: the tokenizer itself.
        settings: what `PreTrainedTokenizerFast` takes beside `tokenizer_object=backend`.
    """

    backend: Tokenizer
    settings: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write it to a folder of its own, from which `AutoTokenizer.from_pretrained` loads it.

        Raises:
            DiskError: if the disk is full or the folder cannot be written.
        """
        with whole_folder(folder, marker=_CONFIG_FILE) as partial:
            write_text(partial / _TOKENIZER_FILE, self.backend.to_str(pretty=True))
            write_json(
                partial / _CONFIG_FILE,
                {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings},
            )


def train_tokenizer(
    documents: Sequence[Document], config: TokenizerTrainingConfig
) -> TrainedTokenizer:
    """Train a tokenizer: the same documents in the same order give the same one.

    Raises:
        DataError: if the documents hold too little text for so many tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=config.vocabulary_size - config.num_sentinels,
        special_tokens=[_special(token) for token in _SPECIAL_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((one.text for one in documents), trainer=trainer)
    learnt = tokenizer.get_vocab_size() - len(_SPECIAL_TOKENS) - _NUM_BYTES
    if learnt != config.num_learnt:
        raise DataError(
            f"The documents must hold enough text for {config.num_learnt} pieces of more than one byte, but "
            f"give only {learnt}. Add documents, or lower `vocabulary_size` by {config.num_learnt - learnt}."
        )
    sentinels = [sentinel_token(number) for number in reversed(range(config.num_sentinels))]
    tokenizer.add_special_tokens([_special(token) for token in sentinels])
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {EOS_TOKEN}",
        pair=f"$A {EOS_TOKEN} $B {EOS_TOKEN}",
        special_tokens=[(EOS_TOKEN, _SPECIAL_TOKENS.index(EOS_TOKEN))],
    )
    return TrainedTokenizer(backend=tokenizer, settings=_settings(sentinels))


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _settings(sentinels: Sequence[str]) -> dict[str, Any]:
    return {
        "pad_token": PAD_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": UNK_TOKEN,
        "extra_special_tokens": list(reversed(sentinels)),
        "clean_up_tokenization_spaces": False,
    }
