"""A report's data as a small quickstart would give it, drawn from a fixed seed; tiny models, small sums, and
studies that run in the process of the test."""

import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.errors import FlanmoeError
from flanmoe.core.ledger import Ledger
from flanmoe.core.rundir import RunDir
from flanmoe.study.arm_report import (
    ArmReport,
    ClusterScore,
    CurvePoint,
    Evaluation,
    ExpertLoadReport,
    Flops,
    LossCurve,
    Memory,
    Parameters,
    RouterLosses,
    Score,
    TaskScore,
)
from flanmoe.study.executor import Leg, errand
from flanmoe.study.leg import run_leg
from flanmoe.study.plots import Drawing, drawings
from flanmoe.study.report import html_report
from flanmoe.study.report_data import (
    Comparison,
    DataReport,
    Hardware,
    MixtureData,
    ReportData,
    TaskData,
)
from flanmoe.study.runner import run_study
from flanmoe.study.study import Study
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer

_TASKS = (
    "exemplars/bbh/boolean_expressions",
    "exemplars/bbh/date_understanding",
    "exemplars/gsm8k_cot",
)


def _curve(rng: random.Random, *, steps: int, start: float) -> LossCurve:
    points = [
        CurvePoint(
            tokens=1987 * (step + 1),
            loss=start - 0.5 * (1 - math.exp(-step / 20)) + rng.gauss(0, 0.06),
        )
        for step in range(steps)
    ]
    return LossCurve(seed=0, points=tuple(points))


def _evaluation(rng: random.Random, *, loss: float, accuracy: float) -> Evaluation:
    tasks = tuple(
        TaskScore(
            task=name,
            loss=Score(mean=loss + rng.gauss(0, 0.1), standard_error=0.08, num_examples=61 + index),
            accuracy=None
            if index == 2
            else Score(
                mean=accuracy + rng.gauss(0, 0.03),
                standard_error=0.051,
                num_examples=61 + index,
                chance=0.35,
            ),
            num_seen=17 if index == 2 else 0,
        )
        for index, name in enumerate(_TASKS)
    )
    return Evaluation(
        loss=Score(mean=loss, standard_error=0.0437, num_examples=186),
        accuracy=Score(mean=accuracy, standard_error=0.0341, num_examples=123, chance=0.3512),
        tasks=tasks,
        clusters=tuple(
            ClusterScore(
                cluster=name,
                num_tasks=index + 1,
                loss=Score(mean=loss + index / 10, standard_error=0.061, num_examples=index + 1),
                accuracy=None
                if index
                else Score(mean=accuracy, standard_error=0.047, num_examples=1, chance=0.35),
            )
            for index, name in enumerate(("reasoning", "knowledge"))
        ),
    )


def _load(rng: random.Random, *, num_layers: int, num_experts: int) -> ExpertLoadReport:
    rows: list[tuple[float, ...]] = []
    for layer in range(num_layers):
        weights = [rng.gammavariate(4, 1) for _ in range(num_experts)]
        if layer == 4:
            weights[3] = 0.0
        rows.append(tuple(weight / sum(weights) for weight in weights))
    return ExpertLoadReport(
        layers=tuple(range(num_layers)),
        shares=tuple(rows),
        entropy_nats=tuple(-sum(share * math.log(share) for share in row if share) for row in rows),
    )


def _dense(rng: random.Random) -> ArmReport:
    gib = 2**30
    return ArmReport(
        label="dense",
        description="SmolLM2-135M-Instruct, all weights tuned",
        parameters=Parameters(total=134_515_008, active=134_515_008, trainable=134_515_008),
        flops=Flops(body=212.3e6, head=56.6e6, attention_scores=35.4e6, context_length=512),
        ledger=Ledger(
            sequences=256,
            real_tokens=127_168,
            padding_tokens=3_904,
            loss_tokens=81_231,
            steps=64,
            flops=1.19e14,
            seconds=221.4,
            peak_memory_bytes=int(3.31 * gib),
        ),
        memory=Memory(
            estimate={
                "weights": int(0.5 * gib),
                "gradients": int(0.5 * gib),
                "optimizer": int(1.0 * gib),
                "activations": int(0.82 * gib),
                "runtime": int(0.38 * gib),
            },
            measured=int(3.31 * gib),
        ),
        before=_evaluation(rng, loss=1.912, accuracy=0.412),
        after=_evaluation(rng, loss=1.671, accuracy=0.434),
        curves=(_curve(rng, steps=64, start=1.9),),
    )


def _sparse(rng: random.Random) -> ArmReport:
    gib = 2**30
    dense = _dense(rng)
    return dense.model_copy(
        update={
            "label": "sparse",
            "description": "upcycled to 8 experts of half width, top-2",
            "parameters": Parameters(total=373_248_576, active=134_653_248, trainable=373_248_576),
            "flops": dense.flops.model_copy(update={"body": 212.6e6}),
            "ledger": dense.ledger.model_copy(
                update={"seconds": 498.2, "flops": 1.193e14, "peak_memory_bytes": int(7.42 * gib)}
            ),
            "memory": Memory(
                estimate={
                    "weights": int(1.39 * gib),
                    "gradients": int(1.39 * gib),
                    "optimizer": int(2.78 * gib),
                    "activations": int(1.21 * gib),
                    "runtime": int(0.38 * gib),
                },
                measured=int(7.42 * gib),
            ),
            "after": _evaluation(rng, loss=1.652, accuracy=0.4309),
            "curves": (_curve(rng, steps=64, start=1.91),),
            "expert_load": _load(rng, num_layers=30, num_experts=8),
            "router_losses": RouterLosses(
                settings={"balance_coefficient": 0.01, "z_coefficient": 0.001, "scope": "global"},
                last={"balance": 2.0713, "z": 5.402},
            ),
            "step0_max_abs_diff": 3.62e-5,
        }
    )


@pytest.fixture(scope="session")
def two_arms() -> ReportData:
    """Dense and sparse, before and after, with four paired comparisons of all three verdicts."""
    rng = random.Random(7)
    dense, sparse = _dense(rng), _sparse(rng)
    return ReportData(
        study="quickstart",
        description="Is an upcycled sparse model worth it at equal FLOPs per token?",
        scale="A demonstration: minutes of tuning on two cores, on a few hundred examples.",
        created="2026-11-24 09:30 UTC",
        versions={
            "python": "3.11.7",
            "flanmoe": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
        },
        hardware=Hardware(cpu="Example CPU 2.4 GHz", num_cores=2, memory_bytes=16 * 2**30),
        baseline="dense",
        arms=(dense, sparse),
        data=DataReport(
            mixtures=(
                MixtureData(
                    arms=("dense", "sparse"),
                    tasks=(
                        TaskData(
                            task="exemplars/mmlu_cot",
                            num_examples=285,
                            rate=0.86,
                            share=0.871,
                            num_tokens=41_000,
                            group="knowledge",
                        ),
                        TaskData(
                            task="exemplars/gsm8k_cot",
                            num_examples=8,
                            rate=0.14,
                            share=0.129,
                            num_tokens=9_000,
                            group="mathematics",
                        ),
                    ),
                ),
            ),
            num_seen=291,
            num_dropped=3,
            num_truncated=1,
            padding_share=0.0298,
            held_out=("exemplars/mmlu_cot/anatomy", "exemplars/gsm8k_cot"),
            evaluation_only=("exemplars/bbh/*",),
        ),
        comparisons=(
            Comparison(
                subject="sparse",
                reference="dense",
                metric="loss",
                mean=-0.0194,
                standard_error=0.0061,
                low=-0.0313,
                high=-0.0076,
                num_examples=186,
            ),
            Comparison(
                subject="sparse",
                reference="dense",
                metric="accuracy",
                mean=-0.0031,
                standard_error=0.0142,
                low=-0.0325,
                high=0.0244,
                num_examples=123,
            ),
            Comparison(
                subject="dense",
                reference="dense",
                kind="tuning",
                metric="loss",
                mean=-0.241,
                standard_error=0.018,
                low=-0.276,
                high=-0.206,
                num_examples=186,
            ),
            Comparison(
                subject="sparse",
                reference="sparse",
                kind="tuning",
                metric="loss",
                mean=-0.26,
                standard_error=0.019,
                low=-0.297,
                high=-0.223,
                num_examples=186,
            ),
        ),
        notes=("17 exemplars of GSM8K were seen in training and are marked.",),
    )


@pytest.fixture(scope="session")
def one_dense_arm(two_arms: ReportData) -> ReportData:
    """A single dense arm without accuracy, memory estimate and comparisons."""
    arm = two_arms.arms[0]
    assert arm.before is not None
    assert arm.after is not None
    bare = arm.model_copy(
        update={
            "memory": None,
            "before": None,
            "after": Evaluation(loss=arm.after.loss),
        }
    )
    return ReportData(study="alone", arms=(bare,))


@pytest.fixture(scope="session")
def two_arms_html(two_arms: ReportData) -> str:
    """The page of `two_arms`, drawn once for all tests that only read it."""
    return html_report(two_arms)


@pytest.fixture(scope="session")
def two_arms_drawings(two_arms: ReportData) -> tuple[Drawing, ...]:
    """The figures of `two_arms`, drawn once."""
    return drawings(two_arms)


@pytest.fixture(scope="session", autouse=True)
def one_code_version() -> Iterator[None]:
    """Finished stages stand while the tests run, whoever edits a source meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLANMOE_CODE_VERSION", "tests")
        yield


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny model with its tokenizer and returns the folder."""

    def save(name: str, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tiny_model(name, **options).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def base(saved: Callable[..., Path]) -> Path:
    """A tiny dense model with its tokenizer, saved."""
    return saved("llama")


class SameProcess:
    """Runs legs in the process of the test, one after the other."""

    workers = 1
    remote = False

    def start(self, leg: Leg) -> "Future[None]":
        """Run a leg here."""
        future: Future[None] = Future()
        values = errand(leg).values
        try:
            run_leg(**values)
        except FlanmoeError as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    def interrupt(self) -> None:
        """Do nothing: nothing runs beside this."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


@pytest.fixture(scope="session")
def same_process() -> type[SameProcess]:
    """The executor that runs legs in the process of the test."""
    return SameProcess


@pytest.fixture(scope="session")
def run_here() -> Callable[..., RunDir]:
    """Runs a study in the process of the test and returns its folder."""

    def run(study: Study, folder: Path, *, resume: bool = False) -> RunDir:
        return run_study(study, folder, executor=SameProcess(), data_dir=None, resume=resume)

    return run


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sums as a JSON-lines file."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    draws = random.Random(0)
    pairs = [(draws.randrange(10), draws.randrange(10)) for _ in range(40)]
    rows = [{"question": f"{a}+{b}?", "answer": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
