"""Examples as one model family writes a conversation."""

from flanmoe.core.errors import DataError
from flanmoe.data.example import Example, Rendered
from flanmoe.data.renderers.base import Exchange, Renderer
from flanmoe.data.tokenizer import Tokenizer

# Some templates write today's date into the system turn. A run that is resumed tomorrow must see
# the same text, so the date is fixed.
_TEMPLATE_DATE = "26 Jul 2024"


def render_chat(example: Example, renderer: Renderer, tokenizer: Tokenizer, task: str) -> Rendered:
    """Render an example through the tokenizer's chat template.

    The prompt holds everything up to and with the generation prompt. The response is the model's
    turn to its end-of-turn token; the line break that templates put behind that token is left out,
    since nobody waits for the model to write it.

    A tokenizer without a chat template gets a plain form: the user's text, a line break, the
    response, and the end-of-text token; before it the beginning-of-text token where the tokenizer
    adds one by itself.

    Args:
        example: what to render.
        renderer: makes the two texts.
        tokenizer: the model's tokenizer.
        task: name of the task, kept with the result.

    Raises:
        DataError: if the template does not keep the model's turn apart, or there is no
            end-of-text token.
    """
    user, answer = renderer(example)
    exchange = Exchange(user=user, response=answer.strip())
    if tokenizer.chat_template:
        prompt, response = _templated(exchange, tokenizer)
    else:
        prompt, response = _plain(exchange, tokenizer)
    return Rendered(
        prompt=prompt,
        response=response,
        task=task,
        key=example.key,
        content_hash=example.content_hash(),
    )


def _templated(exchange: Exchange, tokenizer: Tokenizer) -> tuple[str, str]:
    question = [{"role": "user", "content": exchange.user}]
    answered = [*question, {"role": "assistant", "content": exchange.response}]
    prompt = _written(question, tokenizer, add_generation_prompt=True)
    whole = _written(answered, tokenizer, add_generation_prompt=False)
    response = whole[len(prompt) :].rstrip()
    if not whole.startswith(prompt) or exchange.response not in response:
        raise DataError(
            "The chat template of the tokenizer does not keep the model's turn apart from the "
            "prompt, so the loss cannot be placed on it. Use a tokenizer whose template writes a "
            "conversation turn by turn."
        )
    if response.endswith(exchange.response):
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


def _plain(exchange: Exchange, tokenizer: Tokenizer) -> tuple[str, str]:
    prompt = f"{_begin_of_text(tokenizer)}{exchange.user}\n"
    return prompt, exchange.response + _end_of_text(tokenizer)


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
