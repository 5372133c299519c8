"""Few-shot prompts in the form in which MMLU, BIG-bench Hard and the reasoning suites are published.

    The following are multiple choice questions (with answers) about anatomy.

    Q: The pleura
    (A) have no sensory innervation. (B) are separated by a 2 mm space. ...
    A: Let's think step by step. ... The answer is (C).

    Q: ...
    A: Let's think step by step.

Everything before the last question is the same for all questions of a task, character by character, so that
a language model has to read it once.

Sources: Hendrycks et al. (arXiv 2009.03300) for the direct form, Chung et al. (arXiv 2210.11416, with the
prompts in jasonwei20/flan-2) and Suzgun et al. (arXiv 2210.09261) for the chains of thought.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.data.options import letter
from flanmoe.data.renderers import answer_text

Mode = Literal["direct", "chain_of_thought"]
OptionStyle = Literal["inline", "listed", "dashed", "hidden"]


class PromptStyle(Config):
    """How one family of prompts writes questions and answers.

    Attributes:
        options: `inline` puts "(A) ... (B) ..." on one line, `listed` one a line below "Options:", `dashed`
            the same with dashes in place of letters, `hidden` leaves them out because the question names
            them. Answers are letters in the first two, words in the others.
        opening: what stands between "A:" and a chain of thought.
        closing: what stands between a chain of thought and its answer.
    """

    options: OptionStyle = "inline"
    opening: str = " Let's think step by step. "
    closing: str = "The answer is"

    @property
    def lettered(self) -> bool:
        """Whether answers are letters."""
        return self.options in ("inline", "listed")


@dataclass(frozen=True, slots=True)
class FewShot:
    """The part of a prompt that all questions of a task share.

    Attributes:
        shared: description and worked examples, up to the last blank line.
        style: how the question is written behind it.
        mode: whether the answer or a chain of thought is asked for.
        num_shots: worked examples in it.
    """

    shared: str
    style: PromptStyle
    mode: Mode
    num_shots: int

    def asking(self, example: Example) -> str:
        """Return the whole prompt of a question."""
        return (self.shared + _question(example, self.style) + _start(self)).rstrip()


def few_shot(
    exemplars: Sequence[Example], *, description: str, style: PromptStyle, mode: Mode
) -> FewShot:
    """Put worked examples below a description.

    Args:
        exemplars: the examples in their order, none for a zero-shot prompt.
        description: what the questions are about; "" for nothing.
        style: how they are written.
        mode: whether they show answers alone or chains of thought.

    Raises:
        DataError: if a chain of thought is to be shown and an example has none.
    """
    bare = FewShot("", style, mode, len(exemplars))
    worked = "".join(_question(one, style) + _answered(one, bare) + "\n\n" for one in exemplars)
    opening = f"{description.strip()}\n\n" if description.strip() else ""
    return FewShot(opening + worked, style, mode, len(exemplars))


def short_answer(example: Example, style: PromptStyle) -> str:
    """Return the answer as prompts of a style write it: "(B)", or the words."""
    return answer_text(example) if style.lettered else example.target


def _question(example: Example, style: PromptStyle) -> str:
    return f"Q: {example.inputs}{_options(example.choices, style)}\nA:"


def _options(choices: Sequence[str], style: PromptStyle) -> str:
    if not choices or style.options == "hidden":
        return ""
    lettered = [f"({letter(index)}) {text}" for index, text in enumerate(choices)]
    match style.options:
        case "inline":
            return "\n" + " ".join(lettered)
        case "listed":
            return "\nOptions:\n" + "\n".join(lettered)
        case _:
            return "\nOptions:\n" + "\n".join(f"- {text}" for text in choices)


def _start(shown: FewShot) -> str:
    return shown.style.opening if shown.mode == "chain_of_thought" else ""


def _answered(example: Example, shown: FewShot) -> str:
    answer = short_answer(example, shown.style)
    if shown.mode == "direct":
        return f" {answer}"
    if not example.rationales:
        raise DataError(
            f"A worked example must have a chain of thought to be shown with one, but `{example.key}` has "
            "none. Take exemplars with rationales, or ask for direct answers."
        )
    stop = "" if answer[-1:] in ".!?" else "."
    return f"{_start(shown)}{example.rationales[0]} {shown.style.closing} {answer}{stop}"
