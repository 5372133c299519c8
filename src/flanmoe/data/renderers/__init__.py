"""Renderers: an example as what a user asks and what the model is to answer.

To add one, write a file like its neighbours, and name it here.
"""

from flanmoe.data.example import Example
from flanmoe.data.renderers.base import Exchange as Exchange
from flanmoe.data.renderers.base import Occasion as Occasion
from flanmoe.data.renderers.base import Renderer as Renderer
from flanmoe.data.renderers.base import answer_text as answer_text
from flanmoe.data.renderers.base import answer_texts as answer_texts
from flanmoe.data.renderers.base import renderers as renderers
from flanmoe.data.renderers.chain_of_thought import render_chain_of_thought
from flanmoe.data.renderers.direct import render_direct
from flanmoe.data.renderers.instruction import render_instruction

AUTO = "auto"


def renderer_named(name: str) -> Renderer:
    """Return a renderer by name; `auto` chooses for each example.

    `auto` takes the chain of thought where the example has a rationale, the direct answer where it
    has options, and the instruction form otherwise.

    Raises:
        ConfigError: if no such renderer is registered; names the nearest one.
    """
    if name == AUTO:
        return _render_auto
    return renderers.get(name)


def _render_auto(example: Example, occasion: Occasion) -> Exchange:
    if example.rationales:
        return render_chain_of_thought(example, occasion)
    if example.choices:
        return render_direct(example, occasion)
    return render_instruction(example, occasion)
