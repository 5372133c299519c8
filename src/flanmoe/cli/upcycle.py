"""`flanmoe upcycle`: a dense model becomes a sparse one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flanmoe.cli.options import AsJson, refuse_without_effect
from flanmoe.cli.output import machine_output

_NUM_EXPERTS = 8

_Mode = Annotated[
    Literal["granular", "sliced", "copy", "noise", "drop"] | None,
    typer.Option(
        help="granular: experts are slices of the FFN (equal FLOPs, exact). sliced: slices for any router (not "
        "exact). copy: every expert is the whole FFN (exact). noise, drop: copies made different at once.",
        show_default="granular; copy for a T5",
    ),
]
_EncoderRouter = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="T5: expert_choice, switch, gshard, st_moe or top_k. Without it the encoder stays dense.",
    ),
]
_DecoderRouter = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="T5: switch, gshard, st_moe or top_k. Without it the decoder stays dense.",
    ),
]
_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One more setting, e.g. noise_std=0.2, encoder_router.capacity_factor=1 or "
        "extra_dense_ffn=true. Repeatable.",
    ),
]


def _count(meaning: str, default: str) -> Any:
    return typer.Option(help=meaning, show_default=default)


def upcycle(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the sparse model.")],
    num_experts: Annotated[
        int | None, _count("Experts per sparse layer.", str(_NUM_EXPERTS))
    ] = None,
    top_k: Annotated[int | None, _count("Decoder: experts that each token visits.", "2")] = None,
    mode: _Mode = None,
    granularity: Annotated[
        int | None, _count("Slices of the FFN, in modes granular and sliced.", "2")
    ] = None,
    every: Annotated[int | None, _count("Make every n-th layer sparse.", "1; 2 for a T5")] = None,
    encoder_router: _EncoderRouter = None,
    decoder_router: _DecoderRouter = None,
    overrides: _Overrides = None,
    seed: Annotated[int, typer.Option(help="Seed of the routers' first weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn a dense model into a sparse one: a decoder in a native transformers class, a T5 in FlanMoeT5.

    Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 becomes Qwen3-MoE. T5, T5.1.1 and
    FLAN-T5 become FlanMoeT5 with the routers that are named. The new model is compared with the dense one
    before it is written: in the exact modes it must give the same logits (a T5 where its routers' gates sum
    to 1, as those of top_k do), otherwise the difference is printed.

    Example: flanmoe upcycle smollm2-135m-instruct models/smol-moe --num-experts 8 --top-k 2

    Example: flanmoe upcycle google/flan-t5-small models/flan-moe --encoder-router expert_choice
    --decoder-router top_k --num-experts 8
    """
    from flanmoe.stages.upcycle import upcycle_folder

    values = {"mode": mode, "granularity": granularity}
    routers = {"encoder": encoder_router, "decoder": decoder_router}
    chosen = {side: kind for side, kind in routers.items() if kind is not None}
    if chosen:
        _refuse_top_k(context)
        count = _NUM_EXPERTS if num_experts is None else num_experts
        values |= _sides(chosen, num_experts=count, every=every)
    else:
        values |= {"num_experts": num_experts, "top_k": top_k, "every": every}
    given = {name: value for name, value in values.items() if value is not None}
    with machine_output(as_json) as emit:
        emit(upcycle_folder(base, out, given, overrides=overrides or [], seed=seed))


def _sides(kinds: Mapping[str, str], *, num_experts: int, every: int | None) -> dict[str, Any]:
    routers = {
        f"{side}_router": {"kind": kind, "num_experts": num_experts} for side, kind in kinds.items()
    }
    return routers | {f"{side}_every": every for side in kinds}


def _refuse_top_k(context: typer.Context) -> None:
    refuse_without_effect(
        context,
        used={parameter.name or "" for parameter in context.command.params} - {"top_k"},
        beside="`--encoder-router` and `--decoder-router`, whose routers have one of their own "
        "(`--set decoder_router.top_k=2`)",
    )
