"""`instruction`: the instruction with its input as it stands, and the output."""

from flanmoe.data.example import Example
from flanmoe.data.renderers.base import Exchange, Occasion, answer_text, question_text, renderers


@renderers.register("instruction.v1")
def render_instruction(example: Example, _occasion: Occasion) -> Exchange:
    """Instruction and input -> output. Nothing is added; options become lines."""
    return Exchange(user=question_text(example), response=answer_text(example))
