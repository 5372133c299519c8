"""One file holds everything, and refuses to be taken for another."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flanmoe.core.errors import RunError
from flanmoe.statistics import ExpertStatistics, StatisticsParts, collect
from flanmoe.statistics.expert_statistics import write_statistics
from flanmoe.statistics.tensor_file import FORMAT

from .rows import GROUPS, batches_of, decoder, encoder_decoder, rows


@pytest.fixture(scope="module")
def statistics() -> ExpertStatistics:
    return _collected()


def _collected() -> ExpertStatistics:
    model = encoder_decoder("gshard")
    parts = StatisticsParts(logit_sample=11, seed=2)
    batches = batches_of(model, rows(), 4)
    return collect(model, batches, groups=GROUPS, data_hash="data", parts=parts)


@pytest.fixture
def saved(statistics: ExpertStatistics, tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "statistics.safetensors"
    statistics.save(path)
    return path


def test_what_is_read_is_what_was_written(statistics: ExpertStatistics, saved: Path) -> None:
    found = ExpertStatistics.load(
        saved, model_hash=statistics.model_hash, data_hash=statistics.data_hash
    )
    assert found.groups == statistics.groups
    assert found.tokens == statistics.tokens
    assert found.parts == statistics.parts
    assert (found.model_hash, found.data_hash) == (statistics.model_hash, "data")
    for own, other in zip(found.layers, statistics.layers, strict=True):
        assert own.shape == other.shape
        for name, values in other.tensors().items():
            assert torch.equal(own.tensors()[name], values)
        assert torch.equal(own.logit_sample.token_numbers, other.logit_sample.token_numbers)
        assert torch.equal(own.logit_sample.groups, other.logit_sample.groups)


def test_parts_that_were_not_gathered_are_none_again(tmp_path: Path) -> None:
    model = decoder()
    parts = StatisticsParts(coactivation=False, outputs=False, logit_sample=0)
    collect(
        model,
        batches_of(model, rows(), 4),
        groups=GROUPS,
        data_hash="data",
        parts=parts,
        path=tmp_path / "file",
    )
    layer = ExpertStatistics.load(tmp_path / "file").layers[1]
    assert (layer.sums.coactivation, layer.outputs, layer.logit_sample) == (None, None, None)


def test_equal_statistics_make_equal_files(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    _collected().save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_what_the_file_says_of_itself(statistics: ExpertStatistics, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    assert about["version"] == 1
    assert about["tokens"] == {"encoder": 40, "decoder": 24}
    assert about["groups"] == list(GROUPS)
    assert about["parts"] == statistics.parts.to_mapping()
    assert about["layers"][0] == {
        "name": "encoder.block.1.layer.1.mlp",
        "layer": 1,
        "side": "encoder",
        "num_experts": 4,
        "top_k": 2,
        "hidden_size": 16,
        "norm_top_k": True,
    }


def refusal(path: Path, **hashes: str) -> str:
    with pytest.raises(RunError) as raised:
        ExpertStatistics.load(path, **hashes)
    return str(raised.value)


def test_another_model_and_other_data_are_refused(
    statistics: ExpertStatistics, saved: Path
) -> None:
    assert refusal(saved, model_hash="0" * 24) == (
        f"The statistics in {saved} must be of the model with the hash {'0' * 24}, but are of "
        f"{statistics.model_hash}. Name the file of this model, or collect statistics with it."
    )
    assert refusal(saved, data_hash="other") == (
        f"The statistics in {saved} must be of the data with the hash other, but are of data. Name the file of "
        "this data, or collect statistics with it."
    )


def test_files_that_are_not_ours(saved: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == (
        f"Statistics of experts are read from a file, but {tmp_path / 'none'} does not exist. Name a file that "
        "`ExpertStatistics.save` wrote."
    )
    assert "is a folder" in refusal(tmp_path)
    torn = tmp_path / "torn"
    torn.write_bytes(saved.read_bytes()[:-100])
    assert refusal(torn).startswith(
        f"Statistics of experts must be one whole safetensors file, but {torn} is not: "
    )
    foreign = tmp_path / "foreign"
    save_file({"weight": torch.ones(2)}, foreign)
    assert refusal(foreign) == (
        f"The file {foreign} must hold statistics of experts, but says nothing of them in its metadata. Name a "
        "file that `ExpertStatistics.save` wrote."
    )


def _with_about(saved: Path, path: Path, **values: object) -> Path:
    with safe_open(saved, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    save_file(load_file(saved), path, metadata={FORMAT: json.dumps({**about, **values})})
    return path


def test_another_version_is_refused(saved: Path, tmp_path: Path) -> None:
    newer = _with_about(saved, tmp_path / "newer", version=2)
    assert refusal(newer) == (
        f"The statistics in {newer} must have format version 1, but have version 2. Collect them again, or "
        "read them with the flanmoe that wrote them."
    )


def test_a_file_that_lacks_tensors_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "less"
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    del tensors["layers.2.routing.entropy"]
    save_file(tensors, path, metadata=metadata)
    assert "must be whole, but something is missing or foreign" in refusal(path)
    assert "entropy" in refusal(path)


def test_unfinished_statistics_are_refused(statistics: ExpertStatistics, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    write_statistics(path, statistics, batches=12)
    assert refusal(path) == (
        f"The statistics in {path} must be complete, but their collection was stopped after 12 batches. "
        "Collect again with the same `path`, which goes on from there."
    )
