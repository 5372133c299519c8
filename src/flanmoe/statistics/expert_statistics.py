"""`ExpertStatistics`: what the experts of a model did with some data, as one value and one file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor

from flanmoe.core.errors import RunError
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.statistics.layer_statistics import LayerStatistics
from flanmoe.statistics.logit_sample import LogitSample, joined
from flanmoe.statistics.parts import StatisticsParts
from flanmoe.statistics.tensor_file import read_tensor_file, write_tensor_file


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """What experts did. Adds up: parts of the data give the statistics of the whole.

    Attributes:
        layers: sparse layers, in the order of the model.
        groups: names of the groups (tasks), in the order of their numbers.
        tokens: real tokens by side.
        parts: what was gathered.
        model_hash: of the model's weights (`flanmoe.models.model_hash`).
        data_hash: of the data, all of them where this is the part of one process.
    """

    layers: tuple[LayerStatistics, ...]
    groups: tuple[str, ...]
    tokens: dict[Side, int]
    parts: StatisticsParts
    model_hash: str
    data_hash: str

    def __add__(self, other: "ExpertStatistics") -> "ExpertStatistics":
        require_same(self, other, what="Statistics that are added", way_out="Collect them alike.")
        samples = self._joined_samples(other)
        return replace(
            self,
            layers=tuple(
                own.added(theirs, sample)
                for own, theirs, sample in zip(self.layers, other.layers, samples, strict=True)
            ),
            tokens={side: count + other.tokens[side] for side, count in self.tokens.items()},
        )

    @staticmethod
    def merged(parts: Iterable["ExpertStatistics"]) -> "ExpertStatistics":
        """Return the statistics over the tokens of all parts, such as those of several processes.

        Counts and the tokens of the sample do not depend on the order; other sums do in their last bits.

        Raises:
            RunError: if there are no parts, they are of different models, data or kinds, or share tokens.
        """
        given = list(parts)
        if not given:
            raise RunError("Merging statistics needs at least 1 part, but there are 0.")
        return reduce(add, given)

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, atomically.

        Raises:
            DiskError: if the disk is full or the folder cannot be written.
        """
        write_statistics(path, self, batches=None)

    @classmethod
    def load(
        cls, path: Path, *, model_hash: str | None = None, data_hash: str | None = None
    ) -> "ExpertStatistics":
        """Read a file that `save` wrote.

        Args:
            path: the file.
            model_hash, data_hash: what it must have been collected with; None for whatever it is.

        Raises:
            RunError: if it is missing, torn, something else, unfinished, or of another model or other data.
        """
        found, batches = read_statistics(path)
        if batches is not None:
            raise RunError(
                f"The statistics in {path} must be complete, but their collection was stopped after "
                f"{batches} batches. Collect again with the same `path`, which goes on from there."
            )
        _require_hash(path, "model", model_hash, found.model_hash)
        _require_hash(path, "data", data_hash, found.data_hash)
        return found

    def _joined_samples(self, other: "ExpertStatistics") -> list[LogitSample | None]:
        found: list[LogitSample | None] = [None] * len(self.layers)
        for side in self.tokens:
            places = [place for place, layer in enumerate(self.layers) if layer.side == side]
            samples = joined(
                _samples(self, places),
                _samples(other, places),
                size=self.parts.logit_sample,
                seed=self.parts.seed,
            )
            # Nothing where no sample is kept.
            for place, sample in zip(places, samples, strict=bool(self.parts.logit_sample)):
                found[place] = sample
        return found


def _samples(statistics: ExpertStatistics, places: Sequence[int]) -> list[LogitSample]:
    samples = [statistics.layers[place].logit_sample for place in places]
    return [sample for sample in samples if sample is not None]


def require_same(
    expected: ExpertStatistics, found: ExpertStatistics, *, what: str, way_out: str
) -> None:
    """Refuse statistics of another model, other data, other groups, layers or parts.

    Args:
        expected, found: the statistics.
        what: whose they are, as the beginning of a sentence.
        way_out: what the user can do, as a sentence.

    Raises:
        RunError: names what differs, with what was expected and what was found.
    """
    own, theirs = _kind(expected), _kind(found)
    different = [
        f"{name} (expected {own.get(name, 'none')}, found {theirs.get(name, 'none')})"
        for name in dict.fromkeys([*own, *theirs])
        if own.get(name) != theirs.get(name)
    ]
    if different:
        raise RunError(f"{what} must agree, but differ in {_listed(different)}. {way_out}")


def _kind(statistics: ExpertStatistics) -> dict[str, Any]:
    """Return what statistics must have in common to be added, by name."""
    return {
        "model_hash": statistics.model_hash,
        "data_hash": statistics.data_hash,
        "groups": list(statistics.groups),
        **{f"parts.{name}": value for name, value in statistics.parts.to_mapping().items()},
        **{f"layer {layer.name}": layer.shape for layer in statistics.layers},
    }


def _listed(different: Sequence[str], *, limit: int = 4) -> str:
    rest = len(different) - limit
    return "; ".join(different[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def _require_hash(path: Path, of: str, expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise RunError(
            f"The statistics in {path} must be of the {of} with the hash {expected}, but are of {found}. "
            f"Name the file of this {of}, or collect statistics with it."
        )


def write_statistics(path: Path, statistics: ExpertStatistics, *, batches: int | None) -> None:
    """Write statistics, complete ones or those of the first `batches` batches.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for place, layer in enumerate(statistics.layers):
        tensors |= {f"layers.{place}.{name}": own for name, own in layer.tensors().items()}
        if layer.logit_sample is not None:
            tensors[f"sample.{layer.side}.token_numbers"] = layer.logit_sample.token_numbers
            tensors[f"sample.{layer.side}.groups"] = layer.logit_sample.groups
    about = {
        "model_hash": statistics.model_hash,
        "data_hash": statistics.data_hash,
        "tokens": statistics.tokens,
        "groups": list(statistics.groups),
        "parts": statistics.parts.to_mapping(),
        "layers": [layer.shape for layer in statistics.layers],
        "batches": batches,
    }
    write_tensor_file(path, tensors, about)


def read_statistics(path: Path) -> tuple[ExpertStatistics, int | None]:
    """Read statistics, and after how many batches their collection was stopped; None for complete ones.

    Raises:
        RunError: if the file is missing, torn, something else, or lacks something.
    """
    tensors, about = read_tensor_file(path)
    try:
        parts = StatisticsParts.parse(about["parts"], origin=str(path))
        layers = tuple(
            _layer(place, shape, tensors, sampled=parts.logit_sample > 0)
            for place, shape in enumerate(about["layers"])
        )
        statistics = ExpertStatistics(
            layers=layers,
            groups=tuple(about["groups"]),
            tokens=about["tokens"],
            parts=parts,
            model_hash=about["model_hash"],
            data_hash=about["data_hash"],
        )
    except (KeyError, TypeError) as error:
        raise RunError(
            f"The statistics in {path} must be whole, but something is missing or foreign: {error}. Collect "
            "them again."
        ) from error
    return statistics, about["batches"]


def _layer(
    place: int, shape: Mapping[str, Any], tensors: Mapping[str, Tensor], *, sampled: bool
) -> LayerStatistics:
    prefix = f"layers.{place}."
    own = {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }
    tokens = None
    if sampled:
        sample = f"sample.{shape['side']}"
        tokens = (tensors[f"{sample}.token_numbers"], tensors[f"{sample}.groups"])
    return LayerStatistics.of_tensors(shape, own, tokens)
