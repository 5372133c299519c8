"""Few-shot exemplars that ship inside the installed `lm_eval` package, as small tasks.

Evaluation harnesses carry the worked examples of published prompts as literal YAML. They are real,
they need no download, and most have a chain of thought. The package is found, never imported, and
`!function` tags in its files are passed over.

Exemplars that come again in another file (GSM8K's eight stand in six) are left out by content hash;
the first file in the order below keeps them.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.rationales import take_apart
from flanmoe.data.rows import example_from_row
from flanmoe.data.sources.base import Locator, Row, as_list, as_mapping

PREFIX = "exemplars/"


@dataclass(frozen=True, slots=True)
class Family:
    """One group of exemplar files.

    Attributes:
        name: second part of the task names.
        pattern: the files, relative to the package's tasks.
        read: one file to the rows of one task; the second argument is the file.
        task_name: the file's content and path to the last part of the task name; "" where the
            family is one task.
        evaluation_only: True where nothing may be trained on it.
    """

    name: str
    pattern: str
    read: Callable[[Mapping[str, Any], Path], list[Row]]
    task_name: Callable[[Mapping[str, Any], Path], str]
    evaluation_only: bool = False


@dataclass(frozen=True, slots=True)
class Exemplars:
    """The rows of one exemplar task."""

    name: str
    file: Path
    kept: tuple[tuple[int, Row], ...]
    evaluation_only: bool

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        """Yield the exemplars; the locator counts within the file."""
        for number, row in self.kept:
            yield Locator(str(self.file), number), row

    def size(self) -> int:
        """Return the number of exemplars."""
        return len(self.kept)


@dataclass(frozen=True, slots=True)
class ExemplarIndex:
    """All exemplar tasks of the installed package.

    Attributes:
        tasks: tasks by full name (`exemplars/family/task`).
        repeated: for tasks that hold nothing new, the task that holds the same exemplars.
        num_repeated: exemplars left out because an earlier file has them.
    """

    tasks: Mapping[str, Exemplars]
    repeated: Mapping[str, str]
    num_repeated: int


def exemplar_source(name: str) -> Exemplars:
    """Return the exemplar task of this full name.

    Raises:
        DataError: if there is none; names the nearest one.
    """
    index = exemplar_index()
    if name in index.tasks:
        return index.tasks[name]
    if name in index.repeated:
        raise DataError(
            f"The exemplars of `{name}` are the same as those of `{index.repeated[name]}` and "
            f"count once. Use `{index.repeated[name]}`."
        )
    raise DataError(
        f"There is no exemplar task `{name}`.{nearest_name_hint(name, index.tasks)} Families: "
        f"{listing(exemplar_families())}."
    )


def exemplar_families() -> list[str]:
    """Return `exemplars/family/*` for families of several tasks, the plain name for others."""
    parts = [name.split("/") for name in exemplar_index().tasks]
    return sorted({f"{PREFIX}{part[1]}" + ("/*" if len(part) > 2 else "") for part in parts})


@cache
def exemplar_index() -> ExemplarIndex:
    """Read all exemplars of the installed `lm_eval` package, once a process.

    Raises:
        DataError: if the package is absent or its files do not look as expected.
    """
    return index_of(_tasks_folder())


def index_of(folder: Path) -> ExemplarIndex:
    """Read all exemplars below a folder that is laid out like `lm_eval/tasks`."""
    tasks: dict[str, Exemplars] = {}
    repeated: dict[str, str] = {}
    owners: dict[str, str] = {}
    num_repeated = 0
    for family in FAMILIES:
        for file in sorted(folder.glob(family.pattern)):
            content = read_task_file(file)
            if not _samples(content):
                continue
            last = family.task_name(content, file)
            name = f"{PREFIX}{family.name}/{last}" if last else f"{PREFIX}{family.name}"
            rows = family.read(content, file)
            kept = _new_rows(rows, file, name, owners)
            num_repeated += len(rows) - len(kept)
            if kept:
                tasks[name] = Exemplars(name, file, kept, family.evaluation_only)
            elif name not in tasks:
                repeated[name] = owners[_hash(rows[0], Locator(str(file), 1))]
    return ExemplarIndex(tasks=tasks, repeated=repeated, num_repeated=num_repeated)


def read_task_file(file: Path) -> dict[str, Any]:
    """Read one YAML task file; values under a `!function` tag become None.

    Raises:
        DataError: if the file is not valid YAML.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"The exemplar file {file} cannot be read: {error}. Reinstall `lm-eval`."
        ) from error
    return as_mapping(content) or {}


def _tasks_folder() -> Path:
    # find_spec on the top package does not run it.
    found = importlib.util.find_spec("lm_eval")
    locations = found.submodule_search_locations if found else None
    if not locations:
        raise DataError(
            "Exemplar tasks need the package `lm-eval`, which is not installed. Run `pip install "
            "lm-eval`."
        )
    return Path(next(iter(locations))) / "tasks"


def _new_rows(
    rows: list[Row], file: Path, name: str, owners: dict[str, str]
) -> tuple[tuple[int, Row], ...]:
    kept: list[tuple[int, Row]] = []
    for number, row in enumerate(rows, start=1):
        identity = _hash(row, Locator(str(file), number))
        if identity not in owners:
            owners[identity] = name
            kept.append((number, {"id": f"{file.stem}-{number}", **row}))
    return tuple(kept)


def _hash(row: Row, locator: Locator) -> str:
    return example_from_row(row, locator).content_hash()


def _samples(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    config = as_mapping(content.get("fewshot_config")) or {}
    return as_list(config.get("samples")) or []


def _bbh(content: Mapping[str, Any], file: Path) -> list[Row]:
    """Rationales from the chain-of-thought file, short answers from the direct one beside it."""
    siblings = file.parents[1]
    short = {
        _squeezed(sample["input"]): str(sample["target"])
        for sample in _samples(read_task_file(siblings / "fewshot" / file.name))
    }
    words = _answer_words(file.parents[2] / "leaderboard" / "bbh_mc" / file.name)
    rows: list[Row] = []
    for number, sample in enumerate(_samples(content), start=1):
        reasoning = take_apart(str(sample["target"]))
        answer = short.get(_squeezed(sample["input"]))
        if answer is None or answer != reasoning.answer:
            raise DataError(
                f"{Locator(str(file), number)}: the chain of thought must end in the short answer "
                f"{answer!r} of the direct prompt, but ends in {reasoning.answer!r}."
            )
        row: Row = {
            "question": str(sample["input"]),
            "answer": answer,
            "rationale": reasoning.text,
            "instruction": str(content.get("description", "")).strip(),
        }
        rows.append(_with_words(row, words))
    return rows


def _answer_words(file: Path) -> tuple[str, ...]:
    """Return the answers that a multiple-choice file lists, where they are words."""
    listed = read_task_file(file).get("doc_to_choice") if file.exists() else None
    values = as_list(yaml.safe_load(listed) if isinstance(listed, str) else listed) or []
    words = tuple(str(value) for value in values)
    return words if all(word.isalpha() for word in words) else ()


def _with_words(row: Row, words: tuple[str, ...]) -> Row:
    if "\nOptions:" in row["question"] or row["answer"] not in words:
        return row
    return {**row, "choices": list(words), "label": words.index(row["answer"])}


def _worked(content: Mapping[str, Any], file: Path) -> list[Row]:
    """Samples whose target ends in the answer: `question`, `target`."""
    return [
        _worked_row(str(sample["question"]), str(sample["target"]), Locator(str(file), number))
        for number, sample in enumerate(_samples(content), start=1)
    ]


def _worked_row(question: str, text: str, locator: Locator) -> Row:
    reasoning = take_apart(text)
    if reasoning.answer is None:
        raise DataError(
            f"{locator}: the worked example names no answer at its end: {text[-60:]!r}."
        )
    return {"question": question, "answer": reasoning.answer, "rationale": reasoning.text}


def _planning(content: Mapping[str, Any], file: Path) -> list[Row]:
    """ACPBench: a state, a question about it, and reasoning or only the answer."""
    rows: list[Row] = []
    note = _closing_note(str(content.get("doc_to_text", "")))
    for number, sample in enumerate(_samples(content), start=1):
        question = " ".join(part for part in (str(sample["question"]).strip(), note) if part)
        if "_cot_" in file.parent.name:
            row = _worked_row(question, str(sample["answer"]), Locator(str(file), number))
        else:
            row = {"question": question, "answer": str(sample["answer"])}
        parts = [sample.get("PDDL_domain"), sample.get("PDDL_problem"), sample["context"]]
        context = "\n\n".join(str(part).strip() for part in parts if part)
        rows.append({**row, "context": context})
    return rows


def _closing_note(template: str) -> str:
    """Return the plain words between question and answer cue of a prompt template."""
    tail = template.rpartition("{{question}}")[2]
    return tail.partition("**")[0].strip()


def _facts(content: Mapping[str, Any], file: Path) -> list[Row]:
    """BABILong: facts, a question about them, a short answer."""
    instruction = str(content.get("description", "")).strip()
    return [
        {
            "context": str(sample["input"]),
            "question": str(sample["question"]),
            "answer": str(sample["target"]),
            "instruction": instruction,
        }
        for sample in _samples(content)
    ]


def _schemas(content: Mapping[str, Any], file: Path) -> list[Row]:
    """JSONSchemaBench: a schema, an object that fits it."""
    return [
        {
            "question": f"JSON schema:\n{str(sample['json_schema']).strip()}",
            "answer": str(sample["json_object"]),
            "instruction": str(content.get("description", "")).strip(),
        }
        for sample in _samples(content)
    ]


def _stem(content: Mapping[str, Any], file: Path) -> str:
    return file.stem.removeprefix("mmlu_").removeprefix("babilong_")


def _declared(content: Mapping[str, Any], file: Path) -> str:
    return str(content["task"]).removeprefix("acp_").removesuffix("_with_pddl")


def _single(content: Mapping[str, Any], file: Path) -> str:
    return ""


def _squeezed(text: Any) -> str:
    return " ".join(str(text).split())


FAMILIES = (
    Family("bbh", "bbh/cot_fewshot/[!_]*.yaml", _bbh, _stem, evaluation_only=True),
    Family("mmlu_cot", "mmlu/flan_cot_fewshot/mmlu_*.yaml", _worked, _stem),
    Family("gsm8k_cot", "gsm8k/gsm8k-cot.yaml", _worked, _single),
    Family("gsm8k_cot_llama", "gsm8k/gsm8k-cot-llama.yaml", _worked, _single),
    Family("gsm8k_platinum_cot", "gsm8k_platinum/gsm8k-platinum-cot.yaml", _worked, _single),
    Family("gsm8k_instruct", "llama3/instruct/gsm8k/gsm8k.yaml", _worked, _single),
    Family("asdiv_cot", "asdiv/asdiv-cot-llama.yaml", _worked, _single),
    Family("acpbench", "acpbench/*_2shot/[!_]*.yaml", _planning, _declared),
    # Apart from its family: with domain and problem in PDDL these take up to 3,000 tokens.
    Family("acpbench_pddl", "acpbench/gen_2shot_with_pddl/[!_]*.yaml", _planning, _declared),
    Family("babilong", "babilong/babilong_qa*.yaml", _facts, _stem),
    Family("jsonschema_bench", "jsonschema_bench/jsonschema_bench_easy.yaml", _schemas, _single),
)


class _TaskLoader(yaml.SafeLoader):
    """YAML without `!function`: those tags name Python code of the package, which is not run."""


def _nothing(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    return None


_TaskLoader.add_constructor("!function", _nothing)
