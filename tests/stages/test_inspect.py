"""What an inspection says, against counts made one example at a time; what it warns of and refuses."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from flanmoe.core.errors import ConfigError, DataError, ModelError, RunError
from flanmoe.data.tasks import TaskConfig, load_task
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.loading import load_model
from flanmoe.models.plan import ParameterCount
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.stages.expert_batches import ReadExamples, group_name
from flanmoe.stages.inspect import InspectConfig, inspect_reference
from flanmoe.stages.inspect_alerts import inspect_alerts
from flanmoe.stages.inspect_report import DEFINITIONS, InspectReport, side_reports
from flanmoe.stages.inspect_tables import legend, spread, tables
from flanmoe.statistics import ExpertStatistics, LayerStatistics, StatisticsParts
from flanmoe.testing.tiny_models import tiny_model, tiny_text_tokenizer, tiny_tokenizer

from .inspecting import Counted, counted, data_folder, saved_decoder, saved_flan_moe_t5

FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe")
TASKS = ("numbers", "words")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets and an empty one."""
    return data_folder(tmp_path_factory.mktemp("data"))


def inspect(model: Path, data: Path, *names: str, out: Path | None = None, **config: Any) -> Any:
    """Inspect a saved model."""
    config = {"limit": 100, **config}
    return inspect_reference(
        str(model), names or TASKS, InspectConfig(**config), data_dir=data, out=out
    )


def require_same(side: dict[str, Any], folder: Path, data: Path, *, share: float) -> None:
    """Compare one side of a report with what is counted example by example."""
    model = load_model(str(folder))
    routers = {
        block.name: name
        for block in moe_blocks(model)
        for name, module in model.named_modules()
        if module is block.router
    }
    own = [routers[name] for name in side["names"]]
    for place, name in enumerate(TASKS):
        found = counted(folder, load_task(TaskConfig(name=name), data_dir=data), own)
        row = side["routing"]["tasks"]["rows"][place]
        assert (row["name"], row["tokens"]) == (name, found[0].tokens)
        layers = zip(found, row["layers"], side["measures"][name], strict=True)
        for number, (layer, shown, measures) in enumerate(layers):
            num_experts = len(shown["counts"])
            assert shown["counts"] == [layer.counts[expert] for expert in range(num_experts)]
            assert measures["confidence"] == pytest.approx(layer.confidence / layer.tokens, 1e-4)
            entropy = layer.entropy / layer.tokens
            assert measures["router_entropy_nats"] == pytest.approx(entropy, abs=1e-4)
            assert measures["unused_share"] == pytest.approx(shown["counts"].count(0) / num_experts)
            busiest = max(shown["counts"]) / sum(shown["counts"]) * num_experts
            assert measures["max_over_mean"] == pytest.approx(busiest, 1e-4)
            assert side["needs"]["experts"][number][place] == needed(layer, share)


def needed(layer: Counted, share: float) -> list[int]:
    """The fewest experts that hold a share of the gates, the largest first."""
    wanted = share * sum(layer.mass.values())
    chosen: list[int] = []
    for expert, _ in layer.mass.most_common():
        if sum(layer.mass[one] for one in chosen) < wanted:
            chosen.append(expert)
    return chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_one_example_at_a_time(
    family: str, data: Path, tmp_path: Path
) -> None:
    folder = saved_decoder(tmp_path / "model", family)
    said = inspect(folder, data, share=0.8)
    assert said["shares_rows"] == (family != "gpt_oss")
    (side,) = said["sides"]
    assert side["side"] == "decoder"
    require_same(side, folder, data, share=0.8)
    assert side["coactivation"] is None
    assert side["needs"]["share"] == 0.8


def test_an_encoder_decoder_side_by_side(data: Path, tmp_path: Path) -> None:
    folder = saved_flan_moe_t5(tmp_path / "model")
    said = inspect(folder, data, coactivation=True)
    assert [side["side"] for side in said["sides"]] == ["encoder", "decoder"]
    for side, num_experts in zip(said["sides"], (5, 4), strict=True):
        assert side["routing"]["num_experts"] == [num_experts]
        assert side["names"] == [f"{side['side']}.block.1.layer.{1 + (num_experts == 4)}.mlp"]
        require_same(side, folder, data, share=0.9)


def test_co_activation_against_pairs_of_every_token(data: Path, tmp_path: Path) -> None:
    folder = saved_decoder(tmp_path / "model", "olmoe")
    (side,) = inspect(folder, data, coactivation=True)["sides"]
    routers = [f"{name}.gate" for name in side["names"]]
    by_task = [
        counted(folder, load_task(TaskConfig(name=name), data_dir=data), routers) for name in TASKS
    ]
    for number, layer in enumerate(side["coactivation"]):
        both = [task[number] for task in by_task]
        tokens = sum(one.tokens for one in both)
        assert (layer["layer"], layer["tokens"], len(layer["pairs"])) == (number, tokens, 10)
        for pair in layer["pairs"]:
            found = sum(one.pairs[tuple(pair["experts"])] for one in both)
            assert pair["together"] == pytest.approx(found / tokens, abs=1e-5)


def test_what_is_written_is_what_is_said(data: Path, tmp_path: Path) -> None:
    folder = saved_decoder(tmp_path / "model", "mixtral")
    out = tmp_path / "new" / "out"
    said = inspect(folder, data, out=out, coactivation=True)
    assert json.loads((out / "inspect.json").read_text()) == said
    assert {path.name for path in out.iterdir()} == {
        "inspect.json",
        "statistics.safetensors",
        *(f"{name}.svg" for name in ("routing", "layers", "needs", "coactivation")),
    }
    for picture in out.glob("*.svg"):
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    statistics = ExpertStatistics.load(
        out / "statistics.safetensors",
        model_hash=said["model_hash"],
        data_hash=said["data_hash"],
    )
    # Others read this file: it holds everything that can be gathered.
    assert statistics.layers[0].outputs is not None
    assert statistics.layers[0].logit_sample is not None
    assert statistics.layers[0].sums.coactivation is not None
    require_halves(statistics, said["sides"][0])
    said_again = inspect(folder, data, coactivation=True)
    assert said_again == said


def require_halves(statistics: ExpertStatistics, side: dict[str, Any]) -> None:
    """Check that the halves of tasks are there, add up, and give noise."""
    assert statistics.groups == tuple(group_name(name, half) for name in TASKS for half in (0, 1))
    for place, row in enumerate(side["routing"]["tasks"]["rows"]):
        for layer, shown in zip(statistics.layers, row["layers"], strict=True):
            halves = layer.sums.assignments[2 * place : 2 * place + 2]
            assert halves.sum(dim=0).tolist() == shown["counts"]
            assert (halves.sum(dim=1) > 0).all()
    noise = np.array(side["routing"]["tasks"]["distances"]["noise"], dtype=float)
    assert (noise > 0).all()


def test_the_pictures_of_an_encoder_decoder_name_their_side(data: Path, tmp_path: Path) -> None:
    folder = saved_flan_moe_t5(
        tmp_path / "model", decoder_router={"kind": "switch.v1", "num_experts": 4}
    )
    out = tmp_path / "out"
    inspect(folder, data, out=out, coactivation=True)
    # The decoder's tokens have one expert each, so there are no pairs to draw.
    assert {path.stem for path in out.glob("*.svg")} == {
        *(f"{name}-encoder" for name in ("routing", "layers", "needs", "coactivation")),
        *(f"{name}-decoder" for name in ("routing", "layers", "needs")),
    }


def test_fewer_examples_than_asked_for_are_said(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved_decoder(tmp_path / "model", "mixtral")
    said = inspect(folder, data, limit=8)
    assert said["examples"]["numbers"]["drawn"] == 8
    assert said["examples"]["words"] == {"size": 7, "drawn": 7, "truncated": 0, "left_out": 0}
    assert (
        "All examples are read of tasks that have fewer than 8: `words (7)`."
        in capfd.readouterr().err
    )


def test_cut_examples_are_said(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved_decoder(tmp_path / "model", "mixtral")
    said = inspect(folder, data, length=75)
    cut = [one["truncated"] for one in said["examples"].values()]
    left_out = [one["left_out"] for one in said["examples"].values()]
    assert sum(cut) > 0
    printed = capfd.readouterr().err
    assert (
        f"{sum(cut)} examples are longer than 75 tokens and were cut at their end. See `--length`."
        in printed
    )
    assert ("were left out" in printed) == (sum(left_out) > 0)


def with_routers(folder: Path, name: str, change: Any) -> Path:
    """Save a tiny decoder whose router weights were changed."""
    model = tiny_model(name)
    for block in moe_blocks(model):
        with torch.no_grad():
            change(block.router.get_parameter("weight"))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_planted_collapse_is_said_in_words(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # All logits tie, so that every token goes to the first two experts.
    folder = with_routers(tmp_path / "model", "mixtral", torch.Tensor.zero_)
    said = inspect(folder, data)
    assert said["judged"]
    kinds = [(alert["kind"], alert["layer"]) for alert in said["alerts"]]
    assert {("collapse", 0), ("collapse", 1), ("dead_expert", 0), ("dead_expert", 1)} <= {*kinds}
    dead = next(alert for alert in said["alerts"] if alert["kind"] == "dead_expert")
    unused = [e for e, n in enumerate(counts_of(said, 0, 0)) if not n]
    assert dead["experts"] == unused
    name = said["sides"][0]["names"][0]
    assert dead["words"] == (
        f"Unused: {len(unused)} experts of layer 0 ({name}) got no token of these tasks, more than chance "
        f"explains ({', '.join(map(str, unused))}). Inspect other tasks before you prune; an expert that stays "
        "without tokens in training learns nothing."
    )
    printed = capfd.readouterr().err
    assert f"Warning: Collapse: the router of layer 0 ({name}) sends nearly everything" in printed
    assert "No alert" not in printed


def counts_of(said: Any, task: int, layer: int) -> list[int]:
    """Return the counts of a task in a layer."""
    return said["sides"][0]["routing"]["tasks"]["rows"][task]["layers"][layer]["counts"]


def test_drops_are_shown_and_warned_of(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capacity = {"train": 0.4, "evaluation": 0.4}
    folder = saved_flan_moe_t5(
        tmp_path / "model",
        decoder_router={"kind": "switch.v1", "num_experts": 4, "capacity": capacity},
    )
    said = inspect(folder, data)
    encoder, decoder = said["sides"]
    assert all(one["dropped_share"] == 0 for one in encoder["all"])
    assert all(one["dropped_share"] > 0.1 for one in decoder["all"])
    (drops,) = [alert for alert in said["alerts"] if alert["kind"] == "drops"]
    assert drops["name"].startswith("decoder.")
    assert drops["words"].startswith(
        f"Drops: {100 * decoder['all'][0]['dropped_share']:.0f} % of what was asked of layer 1 "
        f"({decoder['names'][0]}) was not computed (limit 10 %)"
    )
    printed = capfd.readouterr().err
    assert printed.count("drop %") + printed.count("drop") > 2
    assert "bare: tokens that no expert took." in printed


def test_too_few_tokens_are_not_judged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.jsonl").write_text('{"question": "1?", "answer": "2"}\n')
    folder = saved_decoder(tmp_path / "model", "olmoe", num_experts=64)
    said = inspect(folder, tmp_path, str(tmp_path / "tiny.jsonl"))
    assert (said["judged"], said["alerts"]) == (False, [])
    printed = capfd.readouterr().err
    assert "Too few tokens to look for collapse" in printed
    assert "No alert" not in printed


def synthetic(
    loads: np.ndarray,
    *,
    num_groups: int = 2,
    top_k: int = 1,
    tokens: int = 1000,
    dropped: int = 0,
) -> ExpertStatistics:
    """Statistics in which the layers have these loads (L, E), the same for every group."""
    layers: list[LayerStatistics] = []
    for number, load in enumerate(loads):
        counts = torch.tensor(np.round(load * tokens * top_k)).long().expand(num_groups, -1)
        of_tokens = torch.full((num_groups,), tokens)
        sums = RoutingSums(
            tokens=of_tokens,
            asked=of_tokens * top_k,
            dropped=torch.full_like(of_tokens, dropped),
            unserved=torch.full_like(of_tokens, dropped),
            assignments=counts,
            gate_mass=counts.double() / top_k,
            entropy=of_tokens.double(),
            confidence=of_tokens.double() / 2,
            squared_logits=of_tokens.double(),
            coactivation=torch.diag_embed(counts),
        )
        layers.append(
            LayerStatistics(
                name=f"model.layers.{number}.mlp",
                layer=number,
                side="decoder",
                num_experts=len(load),
                top_k=top_k,
                hidden_size=8,
                norm_top_k=True,
                sums=sums,
            )
        )
    names = (group_name(f"task {n // 2}", n % 2) for n in range(num_groups))
    return ExpertStatistics(
        layers=tuple(layers),
        groups=tuple(names),
        tokens={"decoder": tokens * num_groups},
        parts=StatisticsParts(outputs=False, logit_sample=0),
        model_hash="m",
        data_hash="d",
    )


def test_imbalance_that_pooling_hides_is_said() -> None:
    # Each layer sends 70 % to an expert of its own; all layers together look even.
    loads = np.full((4, 4), 0.1) + 0.6 * np.eye(4)
    alerts, judged = inspect_alerts(synthetic(loads))
    assert judged
    (hidden,) = [alert for alert in alerts if alert.kind == "imbalance_hidden_by_pooling"]
    # 4 (0.7^2 + 3 x 0.1^2) = 2.08.
    assert "mean balance score of the layers 2.08, limit 2.00, 1 is even" in hidden.words
    even, _ = inspect_alerts(synthetic(np.full((4, 4), 0.25)))
    assert even == ()


def report_of(statistics: ExpertStatistics) -> InspectReport:
    """The report of synthetic statistics."""
    names = [f"task {number}" for number in range(len(statistics.groups) // 2)]
    return InspectReport(
        model="synthetic",
        parameters=ParameterCount(total=1, active=1, trainable=1),
        length=1024,
        shares_rows=True,
        examples={name: ReadExamples(size=10_000, drawn=32) for name in names},
        model_hash="m",
        data_hash="d",
        alerts=(),
        judged=True,
        definitions=DEFINITIONS,
        sides=side_reports(statistics, names, share=0.9),
    )


def printed(report: InspectReport, *, width: int) -> list[str]:
    """The lines of all tables on a terminal of this width."""
    console = Console(width=width)
    with console.capture() as captured:
        for title, table in tables(report):
            console.print(title, soft_wrap=True)
            console.print(table)
    return captured.get().splitlines()


def test_a_large_model_stays_readable() -> None:
    generator = np.random.default_rng(0)
    loads = generator.dirichlet(np.full(128, 2.0), size=48)
    report = report_of(synthetic(loads, num_groups=20, top_k=8))
    lines = printed(report, width=80)
    assert len(lines) < 200
    text = "\n".join(lines)
    assert "(12 of 48 layers)" in text
    assert "task 9" in text
    # Whole cells: every line of the busiest experts ends in a number of needed experts.
    busiest = [line for line in lines if " e" in line and line.split()[0].isdigit()]
    assert len(busiest) == 10 * 3
    assert all(line.split()[-1].isdigit() for line in busiest)
    needs = report.sides[0].needs
    assert {int(line.split()[-1]) for line in busiest} == {
        needs.numbers[place][0] for place in (0, 24, 47)
    }


@pytest.mark.parametrize("dropped", [0, 20])
def test_a_small_model_is_shown_whole(dropped: int) -> None:
    loads = np.random.default_rng(0).dirichlet(np.full(8, 2.0), size=5)
    report = report_of(synthetic(loads, num_groups=4, dropped=dropped))
    lines = printed(report, width=80)
    assert "…" not in "".join(lines)
    assert not any("of 5 layers" in line for line in lines)
    # The layer, its experts, five measures and two of drops, the needed experts.
    width = 15 + 2 * bool(dropped)
    rows = [line.split() for line in lines if line.startswith("3 ") and len(line.split()) == width]
    assert len(rows) == 2
    counts = report.sides[0].routing.tasks.rows[0].layers[3].counts
    assert rows[0][1:9] == [f"{100 * count / sum(counts):.0f}" for count in counts]
    assert rows[0][-1] == str(report.sides[0].needs.numbers[3][0])
    assert (rows[0][-3:-1] == ["2", "2"]) == bool(dropped)


@pytest.mark.parametrize(("number", "most"), [(1, 4), (4, 4), (48, 12), (13, 12)])
def test_layers_are_spread_from_the_first_to_the_last(number: int, most: int) -> None:
    shown = spread(number, most)
    assert (shown[0], shown[-1], len(shown)) == (0, number - 1, min(number, most))
    gaps = [b - a for a, b in itertools.pairwise(shown)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert spread(48, 12, also=[5])[:3] == [0, 4, 5]


def test_the_legend_says_what_columns_mean() -> None:
    report = report_of(synthetic(np.full((2, 4), 0.25)))
    lines = legend(report)
    assert lines[-1] == "Nothing was dropped, and every token has an expert."
    assert "90 %" in lines[1]


def test_a_dense_model_is_refused_before_its_weights_are_read(data: Path, tmp_path: Path) -> None:
    folder = saved_decoder(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as refused:
        inspect(folder, data)
    assert str(refused.value) == (
        "This needs a sparse model, but LlamaForCausalLM has no module with a router and experts. Make it "
        "sparse first with `flanmoe upcycle`."
    )


def test_a_sparse_encoder_decoder_of_transformers_is_refused(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("switch_transformers").save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError) as refused:
        inspect(folder, data)
    assert str(refused.value) == (
        f"Of sparse encoder-decoders FlanMoeT5 can be inspected, but {folder} is a "
        "SwitchTransformersForConditionalGeneration: transformers keeps each of its experts in a module of its "
        "own, and its routers count padding. The weights of a Switch become a FlanMoeT5 with "
        "`flanmoe.models.flan_moe_t5.switch.load_switch`; for others there is no way yet."
    )


def test_a_dense_encoder_decoder_is_called_dense(data: Path, tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="T5ForConditionalGeneration has no module with a router"):
        inspect(tmp_path / "model", data)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (("numbers", "nowhere"), DataError, "The task `nowhere` is not known."),
        (("numbers", "nothing"), DataError, "`nothing`"),
        (
            ("numbers", "words", "numbers"),
            ConfigError,
            "Every task must be named once, since tasks are compared with each other, but `numbers` is named "
            "several times. Leave the others out.",
        ),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(
    names: tuple[str, ...], error: type[Exception], words: str, data: Path, tmp_path: Path
) -> None:
    # Before the model is looked at: there is none.
    with pytest.raises(error) as refused:
        inspect(tmp_path / "nowhere", data, *names)
    assert words in str(refused.value)


def test_a_task_that_is_cut_away_is_refused(data: Path, tmp_path: Path) -> None:
    folder = saved_decoder(tmp_path / "model", "mixtral")
    with pytest.raises(DataError) as refused:
        inspect(folder, data, length=20)
    assert "`numbers`, `words` are longer than the 20 tokens of a row" in str(refused.value)


def test_a_folder_that_is_none_or_full_is_refused(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError) as refused:
        inspect(tmp_path / "nowhere", data, out=file)
    assert str(refused.value) == (
        f"The output folder {file} must be a folder, but is a file. Choose another with `--out`."
    )
    with pytest.raises(RunError, match="must be empty or new, but already holds files"):
        inspect(tmp_path / "nowhere", data, out=tmp_path)
