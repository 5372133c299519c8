"""The files in `studies/`: each loads with every profile, and one runs from end to end on made-up data."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from flanmoe.data.tasks import TaskConfig
from flanmoe.stages.recipe import TuneStage
from flanmoe.study.analysis.verdict import Verdict
from flanmoe.study.study_file import load_study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
WORDS = (
    "the",
    "red",
    "blue",
    "old",
    "new",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sees",
    "finds",
    "with",
)


def profiles(path: Path) -> list[str]:
    """The profiles of a file."""
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["profiles"])


@pytest.mark.parametrize(
    ("path", "profile"),
    [(path, profile) for path in STUDIES for profile in profiles(path)],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_every_study_loads_with_every_profile(path: Path, profile: str) -> None:
    study = load_study(path, profile=profile)
    assert study.name == path.stem
    assert len(study.seeds) >= 2
    assert study.claims
    assert study.max_parameters == 500_000_000


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_the_profiles(path: Path) -> None:
    assert {"smoke", "cpu", "gpu"} <= set(profiles(path))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_study_trains_on_many_tasks_that_it_asks(path: Path) -> None:
    study = load_study(path, profile="cpu")
    for arm in study.arms.values():
        asked = {task.name for stage in arm.stages[-1:] for task in stage.tasks}
        for stage in arm.stages:
            if isinstance(stage, TuneStage) and stage.label not in ("fine_tune", "few_shot"):
                trained = {task.name for task in stage.data.tasks}
                assert not trained & asked, (path.stem, stage.label)
                kept_apart = {task.name for task in stage.data.without_overlap_of}
                assert asked <= kept_apart, (path.stem, stage.label)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_study_trains_and_asks_one_task_in_different_forms(path: Path) -> None:
    study = load_study(path, profile="cpu")
    for name, arm in study.arms.items():
        (*_, scored) = arm.stages
        forms = {task.name: _form(task) for task in scored.tasks}
        for stage in arm.stages:
            if isinstance(stage, TuneStage):
                for task in stage.data.tasks:
                    assert forms.get(task.name, _form(task)) == _form(task), (name, stage.label)


def _form(task: TaskConfig) -> tuple[Any, ...]:
    """Whether options are shown, and the labels in words."""
    return (task.template and task.template.options_share, task.labels)


def text(draw: random.Random, number: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(number))


def records(draw: random.Random) -> dict[str, Callable[[int], dict[str, Any]]]:
    """For each data set of the study, how a record is made up."""

    def choice(number: int, size: int) -> dict[str, Any]:
        choices = [f"{text(draw, 2)} {place}" for place in range(size)]
        label = number % size
        return {"choices": choices, "label": label, "answer": choices[label]}

    intents = ["AddToPlaylist", "BookRestaurant", "GetWeather"]
    return {
        "web_text": lambda _: {
            "text": text(draw, 60) + " " + "".join(draw.choices("abcdefghij", k=40))
        },
        "wikitext2": lambda _: {"title": text(draw, 2), "text": text(draw, 60)},
        "tiny_shakespeare": lambda _: {"speaker": "All", "text": text(draw, 20)},
        "snips": lambda number: {"text": text(draw, 6), "intent": intents[number % 3]},
        "multiwoz": lambda number: {
            "text": text(draw, 6),
            "intent": ["find_hotel", "find_train"][number % 2],
        },
        "clinc150": lambda number: {"text": text(draw, 5), "intent": f"do_{number % 4}"},
        "massive_en": lambda number: {"text": text(draw, 5), "intent": f"say_{number % 4}"},
        "banking77": lambda number: {"text": text(draw, 5), "intent": f"pay_{number % 4}"},
        "mnli": lambda number: {
            "premise": text(draw, 5),
            "hypothesis": text(draw, 5),
            "label": ["neutral", "entailment", "contradiction"][number % 3],
        },
        "wic": lambda number: {
            "word": draw.choice(WORDS),
            "sentence1": text(draw, 5),
            "sentence2": text(draw, 5),
            "label": ["true", "false"][number % 2],
        },
        "copa": lambda number: {"context": text(draw, 5), "question": "Why?", **choice(number, 2)},
        "commonsense_qa": lambda number: {"question": text(draw, 5), **choice(number, 5)},
        "openbookqa": lambda number: {"question": text(draw, 5), **choice(number, 4)},
        "arc_easy": lambda number: {"question": text(draw, 5), **choice(number, 4)},
        "instruction_induction": lambda _: {
            "task": "copy",
            "input": text(draw, 3),
            "output": text(draw, 3),
        },
        "superni": lambda number: {
            "task": "task1",
            "definition": text(draw, 8),
            "input": text(draw, 6),
            "output": str(number),
        },
        "flan_cot": lambda number: {
            "question": f"{text(draw, 5)}?",
            "answer": ["yes", "no"][number % 2],
            "rationale": text(draw, 6),
        },
    }


SPLITS = {
    "web_text": ("wikipedia", "c4"),
    "wikitext2": ("validation", "test"),
    "snips": ("train", "test"),
    "multiwoz": ("train", "test"),
    "flan_cot": ("creak_train", "qasc_train", "sensemaking_train"),
}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with all data sets of the study, in made-up sentences."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name, make in records(draw).items():
        (folder / name).mkdir()
        for split in SPLITS.get(name, ("train",)):
            with gzip.open(folder / name / f"{split}.jsonl.gz", "wt", encoding="utf-8") as stream:
                for number in range(300 if "text" in make(0) else 60):
                    record = {"id": f"{name}-{split}-{number}", **make(number)}
                    stream.write(json.dumps(record) + "\n")
    return folder


@pytest.mark.slow
def test_three_setups_run_and_are_judged(made_up: Path, tmp_path: Path) -> None:
    (path,) = (path for path in STUDIES if path.stem == "three-setups")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flanmoe", "run", str(path), "--profile", "smoke", "--json"]
    cut = ["--set", "seeds=[0]", "--set", "grid.keep.model=[dense, moe-switch]"]
    # The tokenizer learns made-up words alone, so that wordings take many tokens.
    cut += ["--set", "defaults.evaluate.template.prompt_tokens=2000"]
    finished = subprocess.run(
        [*command, *cut, "--data-dir", str(made_up), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    assert [claim["name"] for claim in answer["claims"]] == [
        "direct",
        "zero-shot",
        "few-shot",
        "tuned-after-instructions",
        "larger-gain",
        "larger-gain-in-accuracy",
    ]
    assert {claim["verdict"] for claim in answer["claims"]} <= set(get_args(Verdict))
    # With one seed nothing can be decided.
    assert all(claim["verdict"] in ("underpowered", "not measured") for claim in answer["claims"])
    direct = answer["claims"][0]
    assert direct["measurement"]["num_examples"] == 16
    matches = {match["budget"]: match for match in direct["budgets"]}
    assert matches["flops_per_token"]["ratio"] == pytest.approx(1.0, abs=0.05)
    assert matches["tokens"]["ratio"] == pytest.approx(1.0, abs=0.05)
    report = (out / "report.md").read_text(encoding="utf-8")
    assert report.index("## Claims") < report.index("## Summary")
    assert "`tuned-after-instructions`" in report
    # What all arms begin with ran once.
    labels = [folder.name.split("-", 1)[1] for folder in (out / "stages").iterdir()]
    assert labels.count("pretrain") == 1
    assert labels.count("instructions") == 2
