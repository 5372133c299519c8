"""`flanmoe eval`: score a model on tasks, or compare two results."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flanmoe.cli.options import AsJson, DataDir, Resume, refuse_without_effect, split_option
from flanmoe.cli.output import machine_output
from flanmoe.core.errors import ConfigError

Model = Annotated[str | None, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")]
Suite = Annotated[
    str | None,
    typer.Option(
        help="flan: MMLU, BIG-bench Hard, reasoning and QA as FLAN-MoE asks them. held-out: losses and "
        "letters on worked examples of BIG-bench Hard. smoke: does it work, in a minute."
    ),
]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        help="A task by name: exemplars/bbh/*, arc_easy of the data folder, lm-eval/NAME. Repeatable."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Questions of each group of a suite, or of all tasks together, the same share of every "
        "task; 0 for every question.",
        show_default="100 a group for flan and smoke on a CPU, otherwise every question",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most tokens of a chain of thought.",
        show_default="128 on a CPU, 512 on an accelerator",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most texts in one forward pass; changes speed and memory.",
        show_default="as many as fit",
    ),
]
ChosenPrecision = Annotated[
    Literal["float32", "bfloat16", "auto"],
    typer.Option(
        help="bfloat16 is faster on machines with instructions for it, which auto looks up; compare only "
        "results of one precision."
    ),
]
OwnTasks = Annotated[
    Path | None,
    typer.Option(help="Folder with lm-eval tasks of your own (YAML), for --task lm-eval/NAME."),
]
ResultDir = Annotated[
    Path | None,
    typer.Option(help="Folder for the result and every example; new, or with --resume."),
]
Routing = Annotated[
    bool,
    typer.Option(
        "--routing",
        help="Record which experts each task uses, as routing.json and routing.svg in --out.",
    ),
]
CapacityDrops = Annotated[
    bool,
    typer.Option(
        "--capacity-drops",
        help="Let experts drop tokens above their capacity, as in training; scores then depend on the batch.",
    ),
]
Compared = Annotated[
    tuple[Path, Path] | None,
    typer.Option(metavar="A B", help="Compare two result folders of the same questions."),
]


def evaluate(
    context: typer.Context,
    model: Model = None,
    suite: Suite = None,
    task: TaskNames = None,
    split: Annotated[str | None, split_option("test")] = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None,
    precision: ChosenPrecision = "float32",
    data_dir: DataDir = None,
    lm_eval_tasks: OwnTasks = None,
    out: ResultDir = None,
    resume: Resume = False,
    routing: Routing = False,
    capacity_drops: CapacityDrops = False,
    compare: Compared = None,
    as_json: AsJson = False,
) -> None:
    """Score a model with standard errors, or compare two results by question.

    --suite flan asks few-shot questions as the papers do: the likeliest letter
    counts, or what is written. --task scores the loss on reference answers, and
    letters where there are choices. What is asked, and its time, is printed first.
    What the data folder lacks is left out by name, and averages over it are marked
    partial. Questions that flanmoe trained the model on are marked and left out of
    the headline numbers. A stopped evaluation with --out goes on with --resume.

    Example: flanmoe eval smollm2-135m-instruct --suite flan --limit 60 --data-dir DATA --out results/before
    """
    from flanmoe.stages.evaluate import compare_folders, evaluate_reference

    with machine_output(as_json) as emit:
        if compare is not None:
            beside = "`--compare A B`, which reads two results"
            refuse_without_effect(context, used=("compare", "as_json"), beside=beside)
            emit(compare_folders(*compare))
            return
        if model is None:
            raise ConfigError("An evaluation needs a MODEL or `--compare A B`, but has neither.")
        settings = {
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "precision": precision,
            "capacity_drops": capacity_drops,
            "lm_eval_tasks": None if lm_eval_tasks is None else str(lm_eval_tasks),
        }
        found = evaluate_reference(
            model,
            list(task or []),
            suite=suite,
            split=split,
            settings=settings,
            data_dir=data_dir,
            out=out,
            resume=resume,
            routing=routing,
        )
        emit(found)
