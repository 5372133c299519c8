"""`direct`: the question, and the answer without a word more."""

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

{% if has_options %}
Reply with the letter of the right option only.
{% else %}
Reply with the answer only.
{% endif %}
"""


@renderers.register("direct.v1")
def render_direct(example: Example, _occasion: Occasion) -> Exchange:
    """Question and options -> "(B)", or the target where there are no options."""
    user = fill(_USER, question=question_text(example), has_options=bool(example.choices))
    return Exchange(user=user, response=answer_text(example))
