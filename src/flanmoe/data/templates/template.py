"""A template: one wording of a question and its answer, with the names of what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateSyntaxError, meta

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing
from flanmoe.data.renderers.base import STRICT, Exchange

# What every rendering gives, empty where an example has none; the rest are fields of the record.
ALWAYS_GIVEN = frozenset({"inputs", "answer", "target", "options", "choices", "rationale", "task"})

Form = Literal["question", "chain_of_thought", "inversion"]


@dataclass(frozen=True)
class Template:
    """One wording.

    Attributes:
        name: unique within its family.
        family: the kind of task that it words (`entailment`).
        version: of the family's file; a change of words is a new version.
        form: what is asked for: the answer to a `question`, its `chain_of_thought`, or, as an
            `inversion`, the question to an answer.
        prompt: what the user says, as jinja2 text.
        response: what the model is to say, as jinja2 text.

    Raises:
        ConfigError: if a text is not valid jinja2.
    """

    name: str
    family: str
    version: int
    form: Form
    prompt: str
    response: str

    def __post_init__(self) -> None:
        for part, text in (("prompt", self.prompt), ("response", self.response)):
            try:
                STRICT.parse(text)
            except TemplateSyntaxError as error:
                raise ConfigError(
                    f"The {part} of template `{self.family}/{self.name}` must be valid jinja2, but: "
                    f"{error.message} (line {error.lineno})."
                ) from error

    @cached_property
    def needs(self) -> frozenset[str]:
        """Fields that an example must have, beside what every rendering gives."""
        texts = (self.prompt, self.response)
        named = (meta.find_undeclared_variables(STRICT.parse(text)) for text in texts)
        return frozenset[str]().union(*named) - ALWAYS_GIVEN

    def fill(self, values: Mapping[str, Any]) -> Exchange:
        """Return the two texts.

        Raises:
            DataError: if `values` lacks a field; names all that are missing.
        """
        missing = sorted(self.needs - values.keys())
        if missing:
            raise DataError(
                f"The template `{self.family}/{self.name}` needs {listing(missing)}, but the example has "
                f"only {listing(sorted(values.keys() - ALWAYS_GIVEN)) or 'no named fields'}. Map names with "
                "`template.fields`, or choose another family."
            )
        prompt, response = (part.render(values).strip() for part in self._compiled)
        return Exchange(user=prompt, response=response)

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        return STRICT.from_string(self.prompt), STRICT.from_string(self.response)
