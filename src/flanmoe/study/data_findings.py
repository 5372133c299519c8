"""Findings about data, counted and said in words."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flanmoe.core.console import say
from flanmoe.data.contamination import OverlapReport, PairOverlap

Kind = Literal[
    "missing",
    "unreadable",
    "rejected",
    "empty",
    "duplicates",
    "too_long",
    "not_rendered",
    "settings",
    "tuned_and_evaluated",
    "overlap",
]

# One of a kind, several of it.
_WORDS: Mapping[Kind, tuple[str, str]] = {
    "missing": ("task that cannot be found", "tasks that cannot be found"),
    "unreadable": ("file that cannot be read", "files that cannot be read"),
    "rejected": ("record that cannot be used", "records that cannot be used"),
    "empty": ("task without an example", "tasks without an example"),
    "duplicates": (
        "example that repeats one of its task",
        "examples that repeat one of their task",
    ),
    "too_long": ("example longer than a row", "examples longer than a row"),
    "not_rendered": ("example that cannot be rendered", "examples that cannot be rendered"),
    "settings": (
        "stage whose settings do not fit its tasks",
        "stages whose settings do not fit their tasks",
    ),
    "tuned_and_evaluated": (
        "task both tuned on and evaluated",
        "tasks both tuned on and evaluated",
    ),
    "overlap": (
        "tuned example that overlaps with an evaluated one",
        "tuned examples that overlap with evaluated ones",
    ),
}
MOST_DETAILS = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what.
        task: where; a mixture is named by its stages.
        number: how often.
        details: a sentence for each rejected record; of other kinds for the first five.
    """

    kind: Kind
    task: str
    number: int
    details: tuple[str, ...]


@dataclass(slots=True)
class DataCheck:
    """What was looked at, and what is wrong with it.

    Attributes:
        examples: usable examples of each task that could be read.
        notes: what is worth knowing and not wrong.
        findings: what is wrong.
        overlap: tuned against evaluated examples; None where there are not both.
    """

    examples: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])
    findings: list[Finding] = field(default_factory=list[Finding])
    overlap: OverlapReport | None = None

    @property
    def counts(self) -> dict[Kind, int]:
        """How much there is of each kind; kinds of which there is nothing are 0."""
        return {
            kind: sum(found.number for found in self.findings if found.kind == kind)
            for kind in _WORDS
        }

    @property
    def summary(self) -> str | None:
        """One sentence about all that is wrong; None where nothing is."""
        parts = [
            f"{number:,} {_WORDS[kind][number > 1]}"
            for kind, number in self.counts.items()
            if number
        ]
        if not parts:
            return None
        together = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        return f"The data must be clean, but has {together}. Each is listed above; `--json` lists it too."

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "clean": not self.findings,
            "counts": dict(self.counts),
            "examples": self.examples,
            "notes": self.notes,
            "findings": [asdict(found) for found in self.findings],
            "overlap": None if self.overlap is None else asdict(self.overlap),
        }


def show_check(check: DataCheck) -> None:
    """Print what was looked at, what is worth knowing, and every finding with its details."""
    for note in check.notes:
        say(note)
    for found in check.findings:
        say(f"{found.task}: {found.number:,} {_WORDS[found.kind][found.number > 1]}")
        for detail in found.details:
            say(f"  {detail}")
        if found.number > len(found.details) and found.kind != "overlap":
            say(f"  and {found.number - len(found.details):,} more")
    tasks = "1 task" if len(check.examples) == 1 else f"{len(check.examples):,} tasks"
    clean = "" if check.findings else ": nothing is wrong"
    say(f"{sum(check.examples.values()):,} examples of {tasks} were checked{clean}")


def overlap_sentences(pair: PairOverlap) -> list[str]:
    """Say what two tasks share, then a few of the examples."""
    evaluated = pair.evaluated
    sentences = [
        f"{pair.training.total:,} of {pair.training_task} with {evaluated.total:,} of {pair.evaluated_task}: "
        f"{evaluated.exact:,} exact, {evaluated.whole:,} whole, {evaluated.ngram:,} by 13 words in a row"
    ]
    for shown in pair.shown:
        keys = f"`{shown.training_key}` and `{shown.evaluated_key}`"
        sentences.append(f"{keys} ({shown.rule}): {shown.text}")
    return sentences
