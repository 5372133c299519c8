"""What a study records and reports is what happened: questions, sizes, examples, what was left out."""

import json
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.packing import PackingReport
from flanmoe.models.loading import load_config
from flanmoe.models.plan import count_parameters
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import TuneStage
from flanmoe.stages.tune import training_stream
from flanmoe.study.collect import collect
from flanmoe.study.outcome import rebuild_report
from flanmoe.study.plan import plan_study
from flanmoe.study.report import markdown_report
from flanmoe.study.report_data import Hardware, ReportData
from flanmoe.study.study import Study
from flanmoe.study.study_file import study_from_mapping

_STEPS = 4
_ROWS_PER_STEP = 2


class _Killed(BaseException):
    """Stands for a kill."""


def evaluate(label: str) -> dict[str, Any]:
    """Five questions of two tasks, of which there are many more; one may never be trained on."""
    tasks = ["exemplars/mmlu_cot/anatomy", "exemplars/bbh/navigate"]
    return {"stage": "evaluate", "label": label, "tasks": tasks, "limit": 5}


def tune(sums_file: Path) -> dict[str, Any]:
    """Few rows of a window that holds more."""
    train = {
        "length": 64,
        "steps": _STEPS,
        "rows_per_step": _ROWS_PER_STEP,
        "checkpoint_every_steps": 2,
    }
    return {
        "stage": "tune",
        "data": {"tasks": [{"name": str(sums_file), "on_bad_record": "skip"}]},
        "packing": {"length": 64, "window": 24},
        "train": train,
    }


@pytest.fixture(scope="module")
def untuned(
    base: Path, run_here: Callable[..., RunDir], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, RunDir, ReportData]:
    """Two seeds of a dense model and of one that is upcycled, each only evaluated."""
    upcycle = {"stage": "upcycle", "num_experts": 4, "mode": "granular", "granularity": 2}
    values = {
        "name": "untuned",
        "model": str(base),
        "seeds": [0, 1],
        "arms": {
            "dense": {"stages": [evaluate("score")]},
            "sparse": {"stages": [upcycle, evaluate("score")]},
        },
    }
    study = study_from_mapping(values)
    folder = run_here(study, tmp_path_factory.mktemp("untuned") / "out")
    return study, folder, collect(study, folder)


@pytest.fixture(scope="module")
def broken_sums_file(sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sums, two of which have no answer, and one of which stands there twice."""
    lines = sums_file.read_text().splitlines()
    bad = [json.dumps({"question": f"{number}+0?"}) for number in (3, 4)]
    path = tmp_path_factory.mktemp("broken") / "sums.jsonl"
    path.write_text("\n".join([*lines, lines[0], *bad]) + "\n")
    return path


@pytest.fixture(scope="module")
def tuned(
    base: Path,
    broken_sums_file: Path,
    run_here: Callable[..., RunDir],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Study, RunDir, ReportData]:
    """One arm that is tuned on sums and evaluated on questions that are longer than its positions."""
    long = {"stage": "evaluate", "tasks": ["exemplars/bbh/snarks"]}
    values = {"name": "tuned", "model": str(base), "stages": [tune(broken_sums_file), long]}
    study = study_from_mapping(values)
    folder = run_here(study, tmp_path_factory.mktemp("tuned") / "out")
    return study, folder, collect(study, folder)


@pytest.fixture(scope="module")
def chained(
    base: Path,
    sums_file: Path,
    run_here: Callable[..., RunDir],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Study, RunDir, ReportData]:
    """Two seeds of an arm that is upcycled after tuning, and of one that is tuned on other data after that.

    The first stage runs on one machine, the others on another.
    """
    long_file = tmp_path_factory.mktemp("long") / "long.jsonl"
    long_rows = [
        {"question": f"{number}" * size, "answer": "0"} for number in (1, 2) for size in (1, 99)
    ]
    long_file.write_text("".join(json.dumps(row) + "\n" for row in long_rows))
    first, second = tune(sums_file), tune(long_file) | {"label": "second"}
    second |= {"packing": {"length": 48, "window": 8}, "train": {**second["train"], "length": 48}}
    upcycle = {"stage": "upcycle", "num_experts": 4, "mode": "granular", "granularity": 2}
    arms = {"late": {"stages": [first, upcycle]}, "twice": {"stages": [first, second]}}
    study = study_from_mapping({"name": "chain", "model": str(base), "seeds": [0, 1], "arms": arms})
    machines = chain([Hardware(cpu="One", num_cores=3)], repeat(Hardware(cpu="Two", num_cores=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flanmoe.study.runner.hardware", lambda: next(machines))
        folder = run_here(study, tmp_path_factory.mktemp("chained") / "out")
    return study, folder, collect(study, folder)


def questions(folder: Path) -> dict[str, list[str]]:
    """Hashes of the evaluated examples of each job."""
    return {
        str(path.relative_to(folder)): [
            json.loads(line)["content_hash"] for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.glob("arms/*/*/*-score/examples.jsonl"))
    }


def test_every_seed_and_arm_answers_the_same_questions(
    untuned: tuple[Study, RunDir, ReportData],
) -> None:
    found = questions(untuned[1].path)
    assert len(found) == 4
    first, *others = found.values()
    assert len(set(first)) == 5
    assert all(other == first for other in others)


def test_an_untuned_arm_has_the_size_of_its_model(
    untuned: tuple[Study, RunDir, ReportData], base: Path
) -> None:
    study, _, data = untuned
    planned = plan_study(study, None).arms
    dense = data.arms[0].parameters
    assert dense.total == count_parameters(load_config(str(base))).total > 0
    for arm in data.arms:
        assert arm.parameters.to_mapping() == planned[arm.label].parameters.to_mapping()
        assert arm.parameters.trainable == 0
        assert arm.flops.total == planned[arm.label].flops_per_token.total
        assert arm.flops.context_length == 1024
    assert data.arms[1].parameters.total > dense.total


def test_a_tuned_arm_has_the_size_of_the_model_that_it_ends_with(
    chained: tuple[Study, RunDir, ReportData], base: Path
) -> None:
    study, _, data = chained
    planned = plan_study(study, None).arms
    late, twice = data.arms
    for arm, context_length in ((late, 64), (twice, 48)):
        assert arm.parameters.to_mapping() == planned[arm.label].parameters.to_mapping()
        assert arm.flops.total == planned[arm.label].flops_per_token.total
        assert arm.flops.context_length == context_length
    dense = count_parameters(load_config(str(base)))
    assert late.parameters.total > late.parameters.trainable == dense.total
    assert twice.parameters.to_mapping() == dense.to_mapping()


def test_every_tuning_of_every_seed_is_counted(
    chained: tuple[Study, RunDir, ReportData],
) -> None:
    study, _, data = chained
    planned = plan_study(study, None).arms
    late, twice = data.arms
    for arm, tunings in ((late, 1), (twice, 2)):
        assert arm.ledger.steps == len(study.seeds) * tunings * _STEPS
        assert arm.ledger.tokens == len(study.seeds) * planned[arm.label].tokens
        for curve in arm.curves:
            tokens = [point.tokens for point in curve.points]
            assert len(tokens) == tunings * _STEPS
            assert tokens == sorted(set(tokens))
        assert sum(curve.points[-1].tokens for curve in arm.curves) == arm.ledger.real_tokens
    # The first tuning of both arms drew the same rows, which are counted once for each seed.
    assert data.data.num_tunings == 4
    assert data.data.padding_share == pytest.approx(twice.ledger.padding_share)
    assert f"| different examples trained on, most of 4 tunings | {data.data.num_seen} |" in (
        markdown_report(data)
    )


def test_each_mixture_stands_with_the_arms_that_were_tuned_on_it(
    chained: tuple[Study, RunDir, ReportData],
) -> None:
    _, folder, data = chained
    shared, second = data.data.mixtures
    assert (shared.arms, second.arms) == (("late", "twice"), ("twice",))
    for mixture, stage in ((shared, "late/seed-*/00-tune"), (second, "twice/seed-*/01-second")):
        paths = folder.path.glob(f"arms/{stage}/result.json")
        results = [json.loads(path.read_text())["details"]["packing"] for path in paths]
        (task,) = mixture.tasks
        # Both arms drew the rows of the first tuning, so they count once a seed.
        assert len(results) == 2
        assert task.num_draws == sum(one["tasks"][task.task]["examples"] for one in results)
        assert task.num_tokens == sum(one["real_tokens"] for one in results)
        assert (task.rate, task.share) == (1.0, 1.0)
    # The second file holds four examples, two of them short enough for a row.
    repeated = second.tasks[0]
    assert repeated.num_draws > repeated.num_examples == 4
    assert data.notes[-2] == (
        "1 of the 1 tasks that twice drew from hold fewer examples than they were drawn, so some were seen "
        f"again; most often those of {repeated.task} ({repeated.num_draws} draws of 4 examples)."
    )
    text = markdown_report(data)
    assert "Mixture of late and twice" in text
    assert "Mixture of twice" in text


def test_what_was_dropped_is_said_of_the_arm_that_it_happened_to(
    chained: tuple[Study, RunDir, ReportData],
) -> None:
    _, folder, data = chained
    paths = list(folder.path.glob("arms/*/*/01-second/result.json"))
    results = [json.loads(path.read_text())["details"]["packing"] for path in paths]
    dropped = sum(task["dropped"] for packing in results for task in packing["tasks"].values())
    assert len(results) == 2
    assert data.data.num_dropped == dropped > 0
    assert data.warnings == (
        f"{dropped:,} draws of twice were left out of training because they are longer than a row "
        "(`packing.length`).",
    )


def test_the_machine_is_the_one_that_the_study_ran_on(
    chained: tuple[Study, RunDir, ReportData],
) -> None:
    data = chained[2]
    assert data.hardware == Hardware(cpu="One", num_cores=3)
    assert data.notes[-1] == (
        "The study ran on 2 machines, so seconds do not compare: One, 3 cores; Two, 5 cores."
    )


def test_what_may_never_be_trained_on_is_not_merely_held_out(
    untuned: tuple[Study, RunDir, ReportData],
) -> None:
    assert untuned[2].data.held_out == ("exemplars/mmlu_cot/anatomy",)
    assert untuned[2].data.evaluation_only == ("exemplars/bbh/navigate",)


def test_the_report_of_an_untuned_study_is_silent_about_tuning(
    untuned: tuple[Study, RunDir, ReportData],
) -> None:
    text = markdown_report(untuned[2])
    assert "FLOPs at a context of 1,024 tokens." in text
    assert "nothing tuned, 2 seeds." in text
    for word in ("Tokens tuned on", "Time of tuning", "Parameters, trained", "Loss after"):
        assert word not in text
    assert "optimizer steps" not in text
    assert "before tuning" not in text.lower().replace("before tuning, no logit", "")


def test_the_report_counts_the_examples_of_the_rows_trained_on(
    tuned: tuple[Study, RunDir, ReportData], base: Path, tmp_path: Path
) -> None:
    study, _, data = tuned
    stage = study.arms["tuned"].stages[0]
    assert isinstance(stage, TuneStage)
    context = StageContext(RunDir(tmp_path), SeedTree(0), SeedTree(0), None)
    stream = training_stream(stage, HeldModel(str(base)), context)
    rows = [next(stream) for _ in range(_STEPS * _ROWS_PER_STEP)]
    (mixture,) = data.data.mixtures
    (task,) = mixture.tasks
    assert mixture.arms == ("tuned",)
    assert task.num_draws == PackingReport.of_rows(rows).num_examples
    assert data.data.num_seen == len(stream.row_hashes) <= task.num_draws
    # The rest of the window had been drawn, but stood in no row.
    assert data.data.num_seen < len(stream.seen_hashes)
    assert (task.num_examples, task.num_rejected, task.share) == (41, 2, 1.0)
    assert task.num_tokens == PackingReport.of_rows(rows).real_tokens
    text = markdown_report(data)
    row = f"| {task.task} | 41 | 2 | {task.num_draws} | {task.num_tokens} | 100.0 % | 100.0 % | 100.0 % |"
    assert row in text
    assert f"| different examples trained on | {data.data.num_seen} |" in text


def test_what_was_left_out_is_reported_and_printed(
    tuned: tuple[Study, RunDir, ReportData],
    broken_sums_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder, data = tuned
    left_out = (
        f"2 records of the task {broken_sums_file} could not be read and were left out "
        "(`on_bad_record: skip`)."
    )
    (cut,) = [sentence for sentence in data.warnings if "prompts that tuned answered" in sentence]
    assert cut.endswith("were cut on their left to fit into the model's positions.")
    assert data.warnings == (left_out, cut)
    after = data.arms[0].after
    assert after is not None
    assert sum(task.num_truncated for task in after.tasks) > 0
    rebuild_report(folder.path)
    printed = " ".join(capsys.readouterr().err.split())
    for sentence in (left_out, cut):
        assert f"Warning: {sentence}" in printed
        assert sentence in markdown_report(data)


def test_a_kill_after_tuning_loses_no_step(
    base: Path,
    sums_file: Path,
    run_here: Callable[..., RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"name": "killed", "model": str(base), "stages": [tune(sums_file)]}
    study = study_from_mapping(values)
    write = RunDir.write_json

    def killed(self: RunDir, name: str, value: Any) -> Path:
        if name == "result.json":
            raise _Killed
        return write(self, name, value)

    monkeypatch.setattr(RunDir, "write_json", killed)
    with pytest.raises(_Killed):
        run_here(study, tmp_path / "out")
    monkeypatch.undo()
    (stage,) = (tmp_path / "out").glob("arms/*/seed-0/00-tune")
    before = (stage / "model" / "model.safetensors").read_bytes()
    steps = (stage / "metrics.jsonl").read_text()
    assert (stage / "checkpoints" / f"checkpoint-{_STEPS}").is_dir()

    run_here(study, tmp_path / "out", resume=True)
    assert (stage / "metrics.jsonl").read_text() == steps
    assert (stage / "model" / "model.safetensors").read_bytes() == before
    assert (stage / "result.json").is_file()
    assert not (stage / "checkpoints").exists()
