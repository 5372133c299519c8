"""`chain_of_thought`: the question, and the reasoning that leads to the answer."""

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example
from flanmoe.data.renderers.base import (
    Exchange,
    Occasion,
    answer_text,
    fill,
    question_text,
    renderers,
)

_USER = """\
{{ question }}

Reason step by step, then give the answer.
"""

_RESPONSE = """\
{{ rationale }}
The answer is {{ answer }}{{ "" if answer[-1] in ".!?" else "." }}
"""


@renderers.register("chain_of_thought.v1")
def render_chain_of_thought(example: Example, _occasion: Occasion) -> Exchange:
    """Question and options -> first rationale, then "The answer is X.".

    Raises:
        DataError: if the example has no rationale.
    """
    if not example.rationales:
        raise DataError(
            f"The renderer `chain_of_thought` needs a rationale, but example `{example.key}` has "
            "none. Set `renderer: auto` for the task, which falls back to `direct` or "
            "`instruction`."
        )
    user = fill(_USER, question=question_text(example))
    response = fill(_RESPONSE, rationale=example.rationales[0], answer=answer_text(example))
    return Exchange(user=user, response=response)
