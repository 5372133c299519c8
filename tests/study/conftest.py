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
from flanmoe.study.analysis.budget import ArmCosts, BudgetMatch, budget_matches
from flanmoe.study.analysis.claim_result import ClaimResult, Measurement
from flanmoe.study.analysis.control import Control
from flanmoe.study.analysis.factorial import EffectResult, FactorialTable, RelativeGain
from flanmoe.study.analysis.metric import ACCURACY, LOSS, NORMALISED_ACCURACY, Metric
from flanmoe.study.analysis.power import Scale
from flanmoe.study.analysis.sentences import sentence
from flanmoe.study.analysis.verdict import Claimed, PValues, Verdict
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
from flanmoe.study.number_text import Metric as ShownMetric
from flanmoe.study.plots import Drawing, drawings
from flanmoe.study.report import ReportFiles, html_report, write_report
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


def _measured(
    estimate: float, reach: float, *, p: float, detectable: float, control: float = 0.81
) -> Measurement:
    ends = (estimate - reach, estimate + reach)
    return Measurement(
        estimate=estimate,
        standard_error=reach / 2.4,
        degrees_of_freedom=5.3,
        low=ends[0],
        high=ends[1],
        t_interval=ends,
        bootstrap_interval=ends,
        tests=PValues(p=p, p_holm=min(1.0, 6 * p), p_margin=p, p_margin_holm=min(1.0, 6 * p)),
        detectable=detectable,
        sufficient=(Scale(seeds=7, examples=2_480),) if detectable > 0.03 else (),
        control=Control(
            planted=detectable, found_share=control, false_share=0.03, level=0.01, num_copies=200
        ),
        seeds=(0, 1, 2),
        num_tasks=12,
        num_examples=1_240,
    )


def _claim(
    name: str,
    statement: str,
    verdict: Verdict,
    metric: Metric,
    found: Measurement | None,
    *,
    claimed: Claimed = "higher",
    margin: float = 0.02,
    budgets: tuple[BudgetMatch, ...] = (),
) -> ClaimResult:
    result = ClaimResult(
        name=name,
        statement=statement,
        metric=metric,
        contrast="switch-flan-direct \N{MINUS SIGN} dense-flan-direct",
        claimed=claimed,
        margin=margin,
        verdict=verdict,
        sentence="`switch-flan-finetune` has no scores: seed 1 diverged at step 212.",
        measurement=found,
        budgets=budgets,
        num_claims=6,
    )
    return result.model_copy(update={"sentence": sentence(result)}) if found else result


def _budgets(ratio: float) -> tuple[BudgetMatch, ...]:
    costs = {
        "switch-flan-direct": ArmCosts(tokens=1.0e6, flops_per_token=3.04e8 * ratio),
        "dense-flan-direct": ArmCosts(tokens=1.0e6, flops_per_token=3.04e8),
    }
    sides = ((("switch-flan-direct",), ("dense-flan-direct",)),)
    return budget_matches(sides, costs, {"flops_per_token": 0.05})


@pytest.fixture(scope="session")
def six_claims() -> tuple[ClaimResult, ...]:
    """A claim for each verdict, of three metrics."""
    return (
        _claim(
            "sparse-gains-more-from-instructions",
            "Instruction tuning helps sparse models more than dense ones.",
            "reproduced",
            ACCURACY,
            _measured(0.041, 0.013, p=0.0004, detectable=0.018),
            budgets=_budgets(1.01),
        ),
        _claim(
            "sparse-below-dense-directly",
            "Fine-tuned directly, sparse models score below the dense one.",
            "contradicted",
            ACCURACY,
            _measured(-0.013, 0.012, p=0.004, detectable=0.019),
        ),
        _claim(
            "frozen-router-is-harmless",
            "A frozen router changes the loss by less than 0.03 nats.",
            "inconclusive",
            LOSS,
            _measured(0.011, 0.021, p=0.21, detectable=0.029, control=0.41),
            claimed="same",
            margin=0.03,
        ),
        _claim(
            "expert_choice_beats_token_choice_held_out",
            "Expert choice generalises better than token choice.",
            "underpowered",
            NORMALISED_ACCURACY,
            _measured(3.1, 6.4, p=0.19, detectable=11.2),
            margin=4.0,
        ),
        _claim(
            "more-experts-help",
            "Thirty-two experts score above eight.",
            "not FLOP-matched",
            ACCURACY,
            _measured(0.022, 0.017, p=0.01, detectable=0.024),
            budgets=_budgets(1.31),
        ),
        _claim(
            "gap-closes-with-finetuning",
            "The gap closes when both are fine-tuned on the task.",
            "not measured",
            ACCURACY,
            None,
        ),
    )


def _effect(
    rng: random.Random, name: str, factors: tuple[str, ...], metric: Metric, size: float
) -> EffectResult:
    estimate, reach = rng.gauss(0, size), size * rng.uniform(0.4, 1.1)
    p = 0.0004 if abs(estimate) > reach else 0.3
    relative = RelativeGain(ratio_of_means=0.131, mean_of_ratios=0.174)
    if metric == NORMALISED_ACCURACY:
        reason = "needs finite scores from 0 upwards, but found -0.1. Take the difference in points instead."
        reasons = tuple(
            f"{reading}: A relative gain {reason}"
            for reading in ("ratio of means", "mean of ratios")
        )
        relative = RelativeGain(ratio_of_means=None, mean_of_ratios=None, reasons=reasons)
    return EffectResult(
        name=name,
        factors=factors,
        metric=metric,
        weights={"switch-flan-direct": 0.5, "dense-flan-direct": -0.5},
        estimate=estimate,
        standard_error=reach / 2.4,
        degrees_of_freedom=4.1,
        low=estimate - reach,
        high=estimate + reach,
        p=p,
        p_holm=min(1.0, 10 * p),
        detectable=2.1 * reach,
        relative=relative if len(factors) == 1 else None,
    )


@pytest.fixture(scope="session")
def two_effect_tables() -> tuple[FactorialTable, ...]:
    """Main effects of four factors and their interactions, on two metrics."""
    rng = random.Random(5)
    mains = {
        "router": ("router gshard over switch", "router expert-choice over switch"),
        "size": ("size base over small", "size large over small"),
        "general": ("general instruction tuning on over off",),
        "shots": ("shots 5 over 0",),
    }
    tables: list[FactorialTable] = []
    for metric, size in ((ACCURACY, 0.02), (NORMALISED_ACCURACY, 3.0)):
        effects = [
            _effect(rng, name, (factor,), metric, size)
            for factor, names in mains.items()
            for name in names
        ]
        effects += [
            _effect(rng, f"{one.name}, and {two.name}", one.factors + two.factors, metric, size)
            for place, one in enumerate(effects)
            for two in effects[place + 1 :]
            if one.factors != two.factors
        ]
        found = FactorialTable(
            effects=tuple(effects),
            num_arms=24,
            failed=("switch-flan-finetune",),
            left_out=("2 examples of mmlu/anatomy that not all runs have were left out.",),
        )
        tables.append(found)
    return tuple(tables)


def _curves(rng: random.Random, *, steps: int, start: float, flops: float) -> tuple[LossCurve, ...]:
    """Three seeds, with what each step cost."""
    found: list[LossCurve] = []
    for seed in range(3):
        points = [
            point.model_copy(update={"flops": flops * point.tokens})
            for point in _curve(rng, steps=steps, start=start).points
        ]
        found.append(LossCurve(seed=seed, points=tuple(points)))
    return tuple(found)


def _one_of_many(rng: random.Random, label: str) -> ArmReport:
    sparse = not label.startswith("dense")
    arm = _sparse(rng) if sparse else _dense(rng)
    loss, accuracy = 1.65 + rng.gauss(0, 0.05), 0.43 + rng.gauss(0, 0.03)
    load = _load(rng, num_layers=12, num_experts=8) if sparse else None
    body = arm.flops.body * (2 if label.startswith("gshard") else 1)
    return arm.model_copy(
        update={
            "label": label,
            "description": "upcycled to 8 experts, top-2" if sparse else "all weights tuned",
            "seeds": (0, 1, 2),
            "flops": arm.flops.model_copy(update={"body": body}),
            "before": _evaluation(rng, loss=1.912, accuracy=0.412),
            "after": _evaluation(rng, loss=loss, accuracy=accuracy),
            "curves": _curves(rng, steps=64, start=1.9 + rng.gauss(0, 0.1), flops=3 * body),
            "expert_load": load,
        }
    )


def _compared_with(rng: random.Random, label: str, reference: str) -> Iterator[Comparison]:
    kind = "tuning" if label == reference else "arms"
    metrics: tuple[tuple[ShownMetric, float], ...] = (("loss", 0.03), ("accuracy", 0.02))
    for metric, size in metrics:
        for seed in range(3):
            mean = rng.gauss(-size if kind == "tuning" else 0, size)
            yield Comparison(
                subject=label,
                reference=reference,
                kind=kind,
                seed=seed,
                metric=metric,
                mean=mean,
                standard_error=size / 2,
                low=mean - size,
                high=mean + size,
                num_examples=1_240,
            )


@pytest.fixture(scope="session")
def many_arms(
    two_arms: ReportData,
    six_claims: tuple[ClaimResult, ...],
    two_effect_tables: tuple[FactorialTable, ...],
) -> ReportData:
    """25 arms of three seeds with claims, factors, and every paired difference."""
    rng = random.Random(11)
    labels = [
        f"{router}-{general}-{setting}"
        for router in ("dense", "switch", "gshard", "expert-choice")
        for general in ("flan", "plain")
        for setting in ("direct", "finetune", "few-shot")
    ]
    arms = [_one_of_many(rng, label) for label in [*labels, "switch-flan-direct-32-experts"]]
    reference = "dense-flan-direct"
    between = [
        item
        for arm in arms
        if arm.label != reference
        for item in _compared_with(rng, arm.label, reference)
    ]
    tuned = [item for arm in arms for item in _compared_with(rng, arm.label, arm.label)]
    return two_arms.model_copy(
        update={
            "study": "single-gpu-factorial",
            "baseline": reference,
            "arms": tuple(arms),
            "claims": six_claims,
            "effects": two_effect_tables,
            "comparisons": (*between, *tuned),
            "notes": tuple(f"Task number {number} was skipped: no data." for number in range(11)),
        }
    )


@pytest.fixture(scope="session")
def two_arms_html(two_arms: ReportData) -> str:
    """The page of `two_arms`, drawn once for all tests that only read it."""
    return html_report(two_arms)


@pytest.fixture(scope="session")
def many_arms_files(many_arms: ReportData, tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    """The report of `many_arms`, drawn once."""
    return write_report(many_arms, tmp_path_factory.mktemp("many-arms"))


@pytest.fixture(scope="session")
def many_arms_html(many_arms_files: ReportFiles) -> str:
    """The page of `many_arms`."""
    return many_arms_files.html.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def many_arms_drawings(many_arms: ReportData) -> tuple[Drawing, ...]:
    """The figures of `many_arms`, drawn once."""
    return drawings(many_arms)


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
