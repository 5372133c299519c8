"""Examples as one model family writes a conversation."""

from collections.abc import Sequence

from jinja2 import TemplateError

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example, Rendered
from flanmoe.data.renderers.base import Occasion, Renderer
from flanmoe.data.tokenizer import Tokenizer, num_tokens

# Some templates write today's date into the system turn. A run that is resumed tomorrow must see
# the same text, so the date is fixed.
_TEMPLATE_DATE = "26 Jul 2024"


def fixed_seeds(task: str, key: str) -> SeedTree:
    """Return the seeds of an example that is not drawn but looked up: in evaluation, in a preview.

    A question is then put in the same words every time, whatever model answers it.
    """
    return SeedTree(0).child("fixed").child(task).child(key)


def render_chat(
    example: Example,
    renderer: Renderer,
    tokenizer: Tokenizer,
    task: str,
    *,
    seeds: SeedTree | None = None,
) -> Rendered:
    """Render an example through the tokenizer's chat template.

    The prompt holds everything up to and with the generation prompt: the turns of the example's
    history, and the question. The response is the model's last turn to its end-of-turn token; the
    line break that templates put behind that token is left out, since nobody waits for the model to
    write it. Earlier turns of the model stand in the prompt and take no loss.

    A tokenizer without a chat template gets a plain form: the text of every turn and the user's, each
    with a line break, the response, and the end-of-text token; before it the beginning-of-text token
    where the tokenizer adds one by itself.

    Args:
        example: what to render.
        renderer: makes the two texts.
        tokenizer: the model's tokenizer.
        task: name of the task, kept with the result.
        seeds: the branch of the seed tree that belongs to this sample; without it `fixed_seeds`.

    Raises:
        DataError: if the template refuses the turns or does not keep the model's turn apart, or
            there is no end-of-text token.
    """
    occasion = Occasion(
        seeds=fixed_seeds(task, example.key) if seeds is None else seeds,
        count_tokens=lambda text: num_tokens(tokenizer, text),
    )
    user, answer = renderer(example, occasion)
    asked = [*example.history, ("user", user)]
    if tokenizer.chat_template:
        try:
            prompt, response = _templated(asked, answer.strip(), tokenizer)
        except TemplateError as error:
            reason = str(error).rstrip(".")
            raise DataError(
                f"The chat template of the tokenizer must take the turns of example `{example.key}` of "
                f"task `{task}` ({listing(role for role, _ in asked)}), but refuses them: {reason}. Take "
                "such turns out of the records, or use a tokenizer whose template takes them."
            ) from error
    else:
        prompt, response = _plain(asked, answer.strip(), tokenizer)
    return Rendered.of(example, prompt=prompt, response=response, task=task)


def chat_prompt(text: str, tokenizer: Tokenizer, *, task: str) -> str:
    """Return a text as one turn of the user, up to where the model's turn begins.

    A tokenizer without a chat template gets the text as it is, so that the model goes on writing it;
    before it the beginning-of-text token where the tokenizer adds one by itself.

    Raises:
        DataError: if the chat template refuses the turn.
    """
    if not tokenizer.chat_template:
        return _begin_of_text(tokenizer) + text
    try:
        turn = {"role": "user", "content": text}
        return _written([turn], tokenizer, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            "The chat template of the tokenizer must take a single turn of the user, but refuses that of "
            f"task `{task}`: {str(error).rstrip('.')}. Use a tokenizer whose template takes it."
        ) from error


def _templated(
    asked: Sequence[tuple[str, str]], answer: str, tokenizer: Tokenizer
) -> tuple[str, str]:
    question = [{"role": role, "content": text} for role, text in asked]
    answered = [*question, {"role": "assistant", "content": answer}]
    prompt = _written(question, tokenizer, add_generation_prompt=True)
    whole = _written(answered, tokenizer, add_generation_prompt=False)
    response = whole[len(prompt) :].rstrip()
    if not whole.startswith(prompt) or answer not in response:
        raise DataError(
            "The chat template of the tokenizer does not keep the model's turn apart from the "
            "prompt, so the loss cannot be placed on it. Use a tokenizer whose template writes a "
            "conversation turn by turn."
        )
    if response.endswith(answer):
        response += _end_of_text(tokenizer)
    return prompt, response


def _written(
    messages: list[dict[str, str]], tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_TEMPLATE_DATE,
        )
    )


def _plain(asked: Sequence[tuple[str, str]], answer: str, tokenizer: Tokenizer) -> tuple[str, str]:
    lines = "".join(f"{text}\n" for _, text in asked)
    return _begin_of_text(tokenizer) + lines, answer + _end_of_text(tokenizer)


def _begin_of_text(tokenizer: Tokenizer) -> str:
    added = list(tokenizer("")["input_ids"])
    if added and tokenizer.bos_token is not None and added[0] == tokenizer.bos_token_id:
        return str(tokenizer.bos_token)
    return ""


def _end_of_text(tokenizer: Tokenizer) -> str:
    if tokenizer.eos_token is None:
        raise DataError(
            "A tokenizer needs an end-of-text token (`eos_token`), but this one has none, so a "
            "model could not learn to stop. Set it in the tokenizer's configuration."
        )
    return str(tokenizer.eos_token)
