"""`flanmoe chat`: talk to a model in the terminal."""

from typing import Annotated

import typer

from flanmoe.cli.options import AsJson
from flanmoe.cli.output import machine_output


def chat(
    model: Annotated[str, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this once and stop, instead of a conversation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends the conversation.

    Example: flanmoe chat runs/quickstart/arms/sparse/seed-0/02-tune/model --prompt "What is 12 times 7?"
    """
    from flanmoe.stages.chat import converse

    with machine_output(as_json) as emit:
        emit(
            converse(
                model,
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
        )
