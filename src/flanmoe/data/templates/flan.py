"""FLAN's own patterns (google-research/FLAN), read from a file and made into templates.

The file holds one pattern a line: `file`, `group`, `dataset`, `index`, `input_pattern`, `target_pattern`.
`{name}` marks a field, `{options_}` the block of options. Patterns of `flan/templates.py` (FLAN 2021) are
version 1 of a data set's family, those of `flan/v2/templates.py` (FLAN 2022) version 2.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.sources.base import Locator, Row
from flanmoe.data.sources.finding import DATA_VARIABLE, resolve_data_dir
from flanmoe.data.sources.json_lines import JsonLines
from flanmoe.data.templates.template import ALWAYS_GIVEN, Form, Template

FLAN_PREFIX = "flan/"
FILE_NAME = "templates.jsonl.gz"
FOLDER_NAME = "flan_templates"

_VERSIONS = {"flan/templates.py": 1, "flan/v2/templates.py": 2}
_ZERO_SHOT = "PATTERNS"
# Groups whose patterns hold exemplars, or are pieces that only exemplars join.
_FEW_SHOT = frozenset({"INLINE_FS_PATTERNS", "FEWSHOT_PATTERNS", "FEWSHOT_PATTERNS_NO_OPTIONS"})

# FLAN's names of what every rendering gives.
_OURS = {
    "options_": "options",
    "options_str": "options",
    "chain_of_thought": "rationale",
    "cot": "rationale",
}
# FLAN hides options by deleting their mark with up to two line ends before it.
_MARK = re.compile(r"(?P<space>\n{0,2})\{(?P<options>options_|options_str)\}|\{(?P<name>\w+)\}|\{")


@dataclass(frozen=True, slots=True)
class Unconverted:
    """A pattern that cannot be made into a template.

    Attributes:
        locator: file and line.
        reason: why.
    """

    locator: str
    reason: str


@dataclass(frozen=True, slots=True)
class FlanTemplates:
    """What a file of FLAN's patterns holds.

    Attributes:
        templates: templates by data set and version, in the order of the file.
        num_few_shot: patterns left out because they are made of exemplars, which are drawn here.
        unconverted: patterns that cannot be made into templates.
    """

    templates: Mapping[tuple[str, int], tuple[Template, ...]]
    num_few_shot: int
    unconverted: tuple[Unconverted, ...]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One line of the file."""

    locator: Locator
    dataset: str
    version: int
    index: int
    prompt: str
    response: str


class _CannotConvertError(Exception):
    """Why one pattern cannot be made into a template."""


def flan_family(
    dataset: str, *, version: int | None = None, folder: Path | None = None
) -> tuple[Template, ...]:
    """Return FLAN's templates for one of its data sets.

    Args:
        dataset: the name that FLAN's file gives it (`rte`).
        version: 1 for FLAN 2021, 2 for FLAN 2022; None for the newest.
        folder: where the file lies, or `flan_templates` with it; None for the data folder.

    Raises:
        DataError: if there is no such file, data set or version, or one of its patterns cannot be made
            into a template.
    """
    file = flan_file(folder)
    rows = list(JsonLines(file).rows())
    named = [row for row in rows if row[1].get("dataset") == dataset]
    found = _converted(named)
    if found.unconverted:
        first = found.unconverted[0]
        raise DataError(
            f"Every pattern of `{FLAN_PREFIX}{dataset}` must become a template, but "
            f"{len(found.unconverted)} of {len(named)} cannot; the first, {first.locator}: {first.reason}. "
            "Mend the file."
        )
    versions = sorted(number for _, number in found.templates)
    if not versions:
        raise DataError(_unknown(dataset, file, rows))
    if version is not None and version not in versions:
        known = listing(f"{FLAN_PREFIX}{dataset}.v{number}" for number in versions)
        raise DataError(f"`{FLAN_PREFIX}{dataset}` has no version {version}, only {known}.")
    return found.templates[dataset, versions[-1] if version is None else version]


def flan_file(folder: Path | None = None) -> Path:
    """Return where FLAN's patterns lie.

    Raises:
        DataError: if the file is neither in `folder` nor in the data folder.
    """
    data = resolve_data_dir(None)
    folders = [] if folder is None else [folder, folder / FOLDER_NAME]
    folders += [] if data is None else [data / FOLDER_NAME]
    for candidate in folders:
        if (candidate / FILE_NAME).is_file():
            return candidate / FILE_NAME
    looked = " and ".join(str(candidate) for candidate in folders) or "no folder, for none is named"
    raise DataError(
        f"Templates of FLAN are read from a file {FILE_NAME}, but it was looked for in {looked}. Give its "
        f"folder (`folder` of the template), or a data folder with {FOLDER_NAME}/{FILE_NAME} "
        f"({DATA_VARIABLE})."
    )


def read_flan(file: Path) -> FlanTemplates:
    """Return all that a file of FLAN's patterns holds, with what was left out and what cannot be read.

    Raises:
        DataError: if the file cannot be read.
    """
    return _converted(JsonLines(file).rows())


def _unknown(dataset: str, file: Path, rows: Sequence[tuple[Locator, Row]]) -> str:
    known = sorted({str(row.get("dataset")) for _, row in rows})
    return (
        f"FLAN's file {file} has no templates for `{dataset}`.{nearest_name_hint(dataset, known)} It has "
        f"{listing(known)}."
    )


def _converted(rows: Iterable[tuple[Locator, Row]]) -> FlanTemplates:
    families: dict[tuple[str, int], list[_Pattern]] = {}
    unconverted: list[Unconverted] = []
    num_few_shot = 0
    for locator, row in rows:
        if row.get("group") in _FEW_SHOT:
            num_few_shot += 1
            continue
        try:
            pattern = _pattern(locator, row)
        except _CannotConvertError as error:
            unconverted.append(Unconverted(str(locator), str(error)))
        else:
            families.setdefault((pattern.dataset, pattern.version), []).append(pattern)
    templates = {key: _templates(patterns, unconverted) for key, patterns in families.items()}
    return FlanTemplates(templates, num_few_shot, tuple(unconverted))


def _pattern(locator: Locator, row: Row) -> _Pattern:
    texts = [row.get(name) for name in ("dataset", "input_pattern", "target_pattern")]
    index, version = row.get("index"), _VERSIONS.get(str(row.get("file")))
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(index, int):
        raise _CannotConvertError(
            "it needs the texts `dataset`, `input_pattern` and `target_pattern` and the number `index`"
        )
    if row.get("group") != _ZERO_SHOT:
        raise _CannotConvertError(f"the group `{row.get('group')}` is not known")
    if version is None:
        raise _CannotConvertError(
            f"it must come from {listing(_VERSIONS)}, but `file` is `{row.get('file')}`"
        )
    dataset, prompt, response = map(str, texts)
    return _Pattern(locator, dataset, version, index, prompt, response)


def _templates(
    patterns: Sequence[_Pattern], unconverted: list[Unconverted]
) -> tuple[Template, ...]:
    """The templates of one data set; patterns that make none are added to `unconverted`."""
    answer = _answer_field(patterns)
    made: dict[int, Template] = {}
    for pattern in patterns:
        try:
            if pattern.index in made:
                raise _CannotConvertError(f"the index {pattern.index} stands there twice")
            made[pattern.index] = _template(pattern, answer)
        except _CannotConvertError as error:
            unconverted.append(Unconverted(str(pattern.locator), str(error)))
    return tuple(made.values())


def _template(pattern: _Pattern, answer: str) -> Template:
    try:
        template = Template(
            name=f"pattern-{pattern.index}",
            family=f"{FLAN_PREFIX}{pattern.dataset}",
            version=pattern.version,
            form=_form(pattern, answer),
            prompt=_jinja(pattern.prompt),
            response=_jinja(pattern.response),
        )
    except ConfigError as error:
        raise _CannotConvertError(str(error)) from error
    # jinja2 has words of its own ("{true}", "{loop}"), which are no variables.
    lost = _fields(pattern.prompt) | _fields(pattern.response)
    lost -= template.needs | ALWAYS_GIVEN
    if lost:
        raise _CannotConvertError(f"{listing(sorted(lost))} cannot be the name of a field")
    return template


def _fields(text: str) -> set[str]:
    names = (match["options"] or match["name"] for match in _MARK.finditer(text))
    return {_OURS.get(name, name) for name in names if name}


def _jinja(text: str) -> str:
    return _MARK.sub(_expression, text)


def _expression(mark: re.Match[str]) -> str:
    if mark["options"]:
        # An expression and not `{% if %}`, after which jinja2 would take line ends away.
        space = mark["space"].replace("\n", "\\n")
        return f'{{{{ "{space}" ~ options if options else "" }}}}' if space else "{{ options }}"
    name = mark["name"]
    return f"{{{{ {_OURS.get(name, name)} }}}}" if name else '{{ "{" }}'


def _answer_field(patterns: Sequence[_Pattern]) -> str:
    """What the data set asks for: `answer` where FLAN says so, else what most patterns respond with."""
    if any("answer" in _fields(pattern.prompt) | _fields(pattern.response) for pattern in patterns):
        return "answer"
    asked = [_fields(pattern.response) - {"rationale"} for pattern in patterns]
    alone = Counter(name for names in asked if len(names) == 1 for name in names)
    return alone.most_common(1)[0][0] if alone else "answer"


def _form(pattern: _Pattern, answer: str) -> Form:
    """FLAN does not say which of its patterns are inverted; what they show and ask for does."""
    shown, asked = _fields(pattern.prompt), _fields(pattern.response)
    if not shown & {answer, "rationale"}:
        if asked == {answer}:
            return "question"
        if asked == {answer, "rationale"}:
            return "chain_of_thought"
    return "inversion"
