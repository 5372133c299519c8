"""`template`: a wording of a family, drawn anew for each sample, alone or after exemplars.

What FLAN 2022 varies (arXiv 2301.13688): the words of a question, whether options are shown and in
which style, whether answers are shown before it, whether reasoning is asked for, and whether the
answer is given and the question asked for.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.renderers.base import Exchange, Occasion
from flanmoe.data.renderers.few_shot import PATTERNS, with_exemplars
from flanmoe.data.renderers.option_styles import StyleName, option_block
from flanmoe.data.templates.folder import load_family
from flanmoe.data.templates.template import Form, Template

AUTO_FAMILY = "auto"

# So many exemplars are tried before a question is given up; FLAN draws as many.
_CANDIDATES = 25


class NoExemplarError(DataError):
    """Not one exemplar fits before a question."""


class TemplateConfig(Config):
    """How the samples of a task are worded. Shares are probabilities, drawn for each sample.

    Attributes:
        family: the templates' family: one of ours (`entailment`), one of `folder`, or of FLAN's files
            there (`flan/rte`); `auto` for that of the data set in the catalogue.
        folder: a folder with more families.
        fields: names that templates use, and the fields of the records that hold them
            (`{text: sentence}`).
        few_shot_share: share of samples with exemplars before the question.
        max_exemplars: a few-shot sample shows between 1 and so many.
        prompt_tokens: tokens that a few-shot question and its exemplars may have together.
        exemplar_split: the split that exemplars come from.
        options_share: share of samples that show the options, where there are any.
        option_style: `letters`, or a `random` one for each sample.
        chain_of_thought_share: share of samples that show the reasoning, where there is one.
        inversion_share: share of samples that give the answer and ask for the question.
    """

    family: str = Field(default=AUTO_FAMILY, min_length=1)
    folder: Path | None = None
    fields: dict[str, str] = {}
    few_shot_share: float = Field(default=0.0, ge=0, le=1)
    max_exemplars: int = Field(default=5, ge=1)
    prompt_tokens: int = Field(default=1024, ge=1)
    exemplar_split: str = "train"
    options_share: float = Field(default=1.0, ge=0, le=1)
    option_style: StyleName = "letters"
    chain_of_thought_share: float = Field(default=0.0, ge=0, le=1)
    inversion_share: float = Field(default=0.0, ge=0, le=1)

    @field_validator("fields")
    @classmethod
    def _fields_are_named(cls, value: dict[str, str]) -> dict[str, str]:
        empty = [name for name, field in value.items() if not field]
        if empty:
            raise ValueError(f"must name a field for each, but `{empty[0]}` has none")
        return value


class TemplateRenderer:
    """Renders the examples of one task by the templates of a family.

    Args:
        config: which family, and the shares.
        task: the task's name, for messages, and in words for templates that name the task.
        pool: where exemplars are drawn from; the example itself is left out.

    Raises:
        DataError: if the family is not known, or lacks a form that has a share.
    """

    def __init__(self, config: TemplateConfig, task: str, pool: Sequence[Example]) -> None:
        self.config = config
        self._task = task
        self._task_in_words = _in_words(task)
        self._pool = pool
        self._templates = load_family(config.family, folder=config.folder)
        shares: dict[Form, float] = {
            "question": 1.0,
            "chain_of_thought": config.chain_of_thought_share,
            "inversion": config.inversion_share,
        }
        for form, share in shares.items():
            if share and not self._forms.get(form):
                raise DataError(
                    f"The family `{config.family}` has no template of the form `{form}`, which task "
                    f"`{task}` asks for. Set its share to 0, or choose another family."
                )

    def __call__(self, example: Example, occasion: Occasion) -> Exchange:
        """Return the sample that an example and an occasion give.

        Raises:
            NoExemplarError: if exemplars are drawn to be shown and not one fits.
            DataError: if the example lacks a field of the template.
        """
        seeds = occasion.seeds
        template = self._drawn(example, seeds)
        asked = self._filled(template, example, seeds, seeds.child("asked"))
        if seeds.child("few_shot").python().random() >= self.config.few_shot_share:
            return asked
        draw = seeds.child("pattern").python()
        shown = with_exemplars(
            asked,
            self._candidates(template, example, seeds),
            pattern=draw.choice(PATTERNS),
            number=draw.randint(1, self.config.max_exemplars),
            budget=self.config.prompt_tokens,
            count_tokens=occasion.count_tokens,
        )
        if shown is None:
            raise NoExemplarError(
                f"Example `{example.key}` of task `{self._task}` must be shown after at least 1 exemplar, "
                f"but none of {min(_CANDIDATES, len(self._pool) - 1)} fits within "
                f"{self.config.prompt_tokens} tokens with it. Raise `template.prompt_tokens`, or lower "
                "`template.few_shot_share`."
            )
        return shown

    @cached_property
    def _forms(self) -> dict[Form, list[Template]]:
        forms: dict[Form, list[Template]] = {}
        for template in self._templates:
            forms.setdefault(template.form, []).append(template)
        return forms

    def _drawn(self, example: Example, seeds: SeedTree) -> Template:
        draw = seeds.child("template").python()
        form: Form = "question"
        if draw.random() < self.config.inversion_share:
            form = "inversion"
        elif draw.random() < self.config.chain_of_thought_share and example.rationales:
            form = "chain_of_thought"
        return draw.choice(self._forms[form])

    def _filled(
        self, template: Template, example: Example, sample: SeedTree, own: SeedTree
    ) -> Exchange:
        """Fill in a template; exemplars share the options' style of their sample."""
        answer, options = example.target, ""
        shows_options = sample.child("options").python().random() < self.config.options_share
        if example.label is not None and shows_options and template.form != "inversion":
            block = option_block(example.choices, self.config.option_style, sample.child("style"))
            answer, options = block.answers[example.label], block.text
        given = {"answer": answer, "options": options, "rationale": _rationale(example, own)}
        return template.fill({**self._values(example), **given})

    def _values(self, example: Example) -> dict[str, Any]:
        given = {
            "task": self._task_in_words,
            "inputs": example.inputs,
            "target": example.target,
            "choices": list(example.choices),
        }
        known = {**example.fields, **given}
        named = {name: known[field] for name, field in self.config.fields.items() if field in known}
        return {**example.fields, **named, **given}

    def _candidates(
        self, template: Template, example: Example, seeds: SeedTree
    ) -> Iterator[Exchange]:
        """Exemplars in the words of the question, in drawn order, without the question itself."""
        draw = seeds.child("exemplars").python()
        rows = draw.sample(range(len(self._pool)), min(_CANDIDATES + 1, len(self._pool)))
        asked = example.content_hash()
        for row in rows:
            shown = self._pool[row]
            if shown.content_hash() == asked:
                continue
            if template.form == "chain_of_thought" and not shown.rationales:
                continue
            yield self._filled(template, shown, seeds, seeds.child("shown", row))


def _in_words(task: str) -> str:
    """Name a task as a text may: without split and renderer, `massive_en:test@intent` is `massive en`."""
    return re.split(r"[\[:@]", task, maxsplit=1)[0].replace("_", " ")


def _rationale(example: Example, seeds: SeedTree) -> str:
    chains = example.rationales
    return seeds.child("rationale").python().choice(chains) if chains else ""
