"""Documents as windows of tokens, all of one length, in another order every epoch.

Every epoch puts the documents in a seeded order of its own, one after the other with an end-of-text token
behind each, and cuts the whole into windows; those too are given in a seeded order. What is left at the end of
an epoch, less than a window, is not given in it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from flanmoe.core.seeds import SeedTree
from flanmoe.data.documents import Document
from flanmoe.data.tokenizer import Tokenizer, end_of_text_id

# Fast tokenizers share the texts of one call out among the cores.
_TEXTS_IN_A_CALL = 256


@dataclass(frozen=True, slots=True)
class Epoch:
    """One time through the documents. W windows.

    Attributes:
        number: number of the epoch.
        length: tokens of a window.
        documents: the documents in the epoch's order.
        bounds: where each of them begins in it, and at last where the last one ends.
        windows: the windows in the order in which they are given.
    """

    number: int
    length: int
    documents: Int[np.ndarray, " N"]
    bounds: Int[np.ndarray, " N+1"]
    windows: Int[np.ndarray, " W"]


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Documents as tokens, an end-of-text token behind each. B - 1 documents, T tokens.

    Attributes:
        tokens: the tokens, document after document.
        bounds: where each document begins, and at last where the last one ends.
    """

    tokens: Int[np.ndarray, " T"]
    bounds: Int[np.ndarray, " B"]

    @classmethod
    def of(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> "TokenizedTexts":
        """Tokenise documents, many in a call.

        Raises:
            DataError: if the tokenizer has no end-of-text token.
        """
        end = end_of_text_id(tokenizer)
        pieces: list[Int[np.ndarray, " _"]] = []
        for first in range(0, len(documents), _TEXTS_IN_A_CALL):
            encoding = tokenizer(
                [document.text for document in documents[first : first + _TEXTS_IN_A_CALL]],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            pieces += [np.array([*ids, end], dtype=np.int32) for ids in encoding["input_ids"]]
        return cls(
            tokens=np.concatenate([np.empty(0, dtype=np.int32), *pieces]),
            bounds=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, ends included."""
        return len(self.tokens)

    def digest(self) -> str:
        """Return a hash of the tokens and of where documents begin."""
        content = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        content.update(self.bounds.tobytes())
        return content.hexdigest()

    def epoch(self, number: int, seeds: SeedTree, length: int) -> Epoch:
        """Return an epoch: a function of the seeds, its number and the windows' length only."""
        branch = seeds.child("epoch", number)
        sizes = np.diff(self.bounds)
        documents = branch.child("documents").numpy().permutation(len(sizes))
        return Epoch(
            number=number,
            length=length,
            documents=documents,
            bounds=np.cumsum(np.append(0, sizes[documents])),
            windows=branch.child("windows").numpy().permutation(self.num_tokens // length),
        )

    def window(self, epoch: Epoch, place: int) -> Int[np.ndarray, " M"]:
        """Return the tokens of the window that an epoch gives at a place."""
        begin = int(epoch.windows[place]) * epoch.length
        end = begin + epoch.length
        first, last = np.searchsorted(epoch.bounds, [begin, end - 1], side="right") - 1
        pieces: list[Int[np.ndarray, " _"]] = []
        for position in range(int(first), int(last) + 1):
            # Where the document begins among the tokens, and where in the epoch.
            here = int(self.bounds[epoch.documents[position]])
            there = int(epoch.bounds[position])
            stop = min(end, int(epoch.bounds[position + 1]))
            pieces.append(self.tokens[here + max(begin - there, 0) : here + stop - there])
        return np.concatenate(pieces).astype(np.int64)
