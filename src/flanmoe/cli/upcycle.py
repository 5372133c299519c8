"""`flanmoe upcycle`: a dense model becomes a sparse one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flanmoe.cli.options import AsJson
from flanmoe.cli.output import machine_output


def upcycle(
    base: Annotated[str, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the sparse model.")],
    num_experts: Annotated[int, typer.Option(help="Experts per sparse layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token visits.")] = 2,
    mode: Annotated[
        Literal["granular", "copy", "noise", "drop"],
        typer.Option(
            help="granular: experts are slices of the FFN (equal FLOPs, exact). copy: every expert is the "
            "whole FFN (exact). noise, drop: copies made different at once (not exact)."
        ),
    ] = "granular",
    granularity: Annotated[int, typer.Option(help="Slices of the FFN, in mode granular.")] = 2,
    every: Annotated[int, typer.Option(help="Make every n-th layer sparse.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the routers' first weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn a dense model into a sparse one in a native transformers class.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE. In the exact modes
    the new model is checked to give the dense model's logits before it is written.

    Example: flanmoe upcycle smollm2-135m-instruct models/smol-moe --num-experts 8 --top-k 2
    """
    from flanmoe.stages.upcycle import upcycle_folder

    values = {
        "num_experts": num_experts,
        "top_k": top_k,
        "mode": mode,
        "granularity": granularity,
        "every": every,
    }
    with machine_output(as_json) as emit:
        emit(upcycle_folder(base, out, values, seed=seed))
