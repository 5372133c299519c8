"""The model that a chain of stages works on, loaded when it is first needed."""

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.errors import ModelError
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.results import read_training_hashes
from flanmoe.models.loading import load_model, load_tokenizer, resolve_reference


class HeldModel:
    """A model by reference, with its tokenizer and the hashes of what it was trained on.

    Args:
        reference: a known name, a folder or a hub id; None where the first stage makes a model.
    """

    def __init__(self, reference: str | None) -> None:
        self._reference = reference
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def reference(self) -> str:
        """Where the model comes from.

        Raises:
            ModelError: if there is none yet.
        """
        if self._reference is None:
            raise ModelError(
                "This needs a model, but there is none yet: begin with a stage `pretrain` that has a `shape`, "
                "or name a model."
            )
        return self._reference

    def model(self) -> PreTrainedModel:
        """Return the model with float32 weights, loading it the first time."""
        if self._model is None:
            self._model = load_model(self.reference)
        return self._model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer, loading it the first time."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.reference)
        return self._tokenizer

    def text_tokenizer(self) -> Tokenizer:
        """Return the tokenizer as the data package sees one."""
        return cast(Tokenizer, self.tokenizer())

    def training_hashes(self) -> frozenset[str]:
        """Return the content hashes of the examples that flanmoe has trained this model on."""
        if self._reference is None:
            return frozenset()
        folder = Path(resolve_reference(self._reference))
        return read_training_hashes(folder) if folder.is_dir() else frozenset()

    def saved(
        self,
        model: PreTrainedModel,
        folder: Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "HeldModel":
        """Return a holder of `model`, which has been written to `folder`, without loading it again.

        Its tokenizer is this one's unless another is given.
        """
        successor = HeldModel(str(folder))
        successor._model = model
        successor._tokenizer = tokenizer or self._tokenizer
        return successor
