"""Examples as an encoder-decoder model reads them: a text in, a text out, no turns and no markers."""

from collections.abc import Callable

from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import fixed_seeds
from flanmoe.data.example import Example, Rendered
from flanmoe.data.renderers.base import Occasion, Renderer


def render_text_to_text(
    example: Example,
    renderer: Renderer,
    task: str,
    *,
    count_tokens: Callable[[str], int],
    seeds: SeedTree | None = None,
) -> Rendered:
    """Render an example for an encoder-decoder: the prompt goes into the encoder, the response is decoded.

    Turns before the question stand before it, a line break between them. Both are plain texts; the
    end-of-text tokens are the tokenizer's to add, as T5's does to each. The same seeds give the same
    words as `render_chat` gives a decoder.

    Args:
        example: what to render.
        renderer: makes the two texts.
        task: name of the task, kept with the result.
        count_tokens: tokens of a text, for budgets of exemplars.
        seeds: the branch of the seed tree that belongs to this sample; without it `fixed_seeds`.
    """
    occasion = Occasion(
        seeds=fixed_seeds(task, example.key) if seeds is None else seeds, count_tokens=count_tokens
    )
    user, answer = renderer(example, occasion)
    prompt = "\n".join([*(text for _, text in example.history), user])
    return Rendered.of(example, prompt=prompt, response=answer.strip(), task=task)
