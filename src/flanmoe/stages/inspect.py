"""Looking at a sparse model: who goes to which expert, how far tasks lie apart, which experts a task needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from flanmoe.core.config import Config
from flanmoe.core.console import say, show_table, warn
from flanmoe.core.errors import ConfigError, ModelError, RunError
from flanmoe.core.files import require_new_folder
from flanmoe.core.names import listing
from flanmoe.data.sources.finding import DEFAULT_SPLIT
from flanmoe.data.tasks import Task, load_tasks
from flanmoe.evaluation.lm.limits import longest_text
from flanmoe.evaluation.routing.files import write_lists_on_lines
from flanmoe.models.loading import load_config
from flanmoe.models.meta import meta_model
from flanmoe.models.packing import takes_segments
from flanmoe.models.plan import count_parameters
from flanmoe.stages.expert_batches import DrawnExamples, ExpertBatches, named_twice
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.inspect_alerts import inspect_alerts
from flanmoe.stages.inspect_pictures import write_pictures
from flanmoe.stages.inspect_report import DEFINITIONS, InspectReport, side_reports
from flanmoe.stages.inspect_tables import legend, tables
from flanmoe.stages.task_names import named_tasks
from flanmoe.statistics import ExpertStatistics, StatisticsParts, collect
from flanmoe.statistics.readable import readable_blocks

REPORT_FILE = "inspect.json"
STATISTICS_FILE = "statistics.safetensors"


class InspectConfig(Config):
    """How a model is inspected.

    Attributes:
        limit: examples of each task, drawn at random; all where a task has no more.
        length: tokens of a row, and the most that is read of an example; of an encoder-decoder on each side.
        share: of a task's gate mass that the experts it needs are to hold.
        coactivation: whether pairs of experts are counted.
    """

    limit: int = Field(default=32, ge=1)
    length: int = Field(default=1024, ge=2)
    share: float = Field(default=0.9, gt=0, le=1)
    coactivation: bool = False


def inspect_reference(
    reference: str,
    names: Sequence[str],
    config: InspectConfig,
    *,
    split: str | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Send examples of each task through a sparse model, and print what its experts did; `flanmoe inspect`.

    Args:
        reference: a known name, a folder or a hub id.
        names: tasks by name.
        config: how.
        split: of the tasks; None takes `train` where a task has splits.
        data_dir: data folder, None where none was named.
        out: folder for pictures, `inspect.json` and the statistics; None for none.

    Raises:
        ModelError: if the model is dense, or an encoder-decoder that cannot be read.
        ConfigError: if a task is named twice, or `split` has no effect.
        DataError: if a task is not known or has no examples.
        RunError: if `out` is a file or holds files.
        DiskError: if `out` cannot be written.
    """
    _require_folder(out)
    tasks = _tasks(names, split=split, data_dir=data_dir)
    drawn = [DrawnExamples.of(task, config.limit) for task in tasks]
    _require_readable(reference)
    held = HeldModel(reference)
    length = min(config.length, longest_text(held.model().config, held.tokenizer()))
    batches = ExpertBatches(held, drawn, length=length)
    _announce(batches, tasks, config)
    statistics = _collected(held, batches, config, everything=out is not None)
    _warn_of_cuts(batches, length)
    alerts, judged = inspect_alerts(statistics)
    report = InspectReport(
        model=reference,
        parameters=count_parameters(held.model()),
        length=length,
        shares_rows=batches.shares_rows,
        examples=batches.read,
        model_hash=statistics.model_hash,
        data_hash=statistics.data_hash,
        alerts=alerts,
        judged=judged,
        definitions=DEFINITIONS,
        sides=side_reports(statistics, [task.name for task in tasks], share=config.share),
    )
    _show(report)
    _write(report, statistics, out)
    return report.to_mapping()


def _tasks(names: Sequence[str], *, split: str | None, data_dir: Path | None) -> list[Task]:
    configs = named_tasks(names, split=split, default_split=DEFAULT_SPLIT)
    tasks = load_tasks(configs, data_dir=data_dir)
    if twice := named_twice(tasks):
        raise ConfigError(
            f"Every task must be named once, since tasks are compared with each other, but {twice} is named "
            "several times. Leave the others out."
        )
    return tasks


def _require_folder(out: Path | None) -> None:
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise RunError(
            f"The output folder {out} must be a folder, but is a file. Choose another with `--out`."
        )
    require_new_folder(out, way_out="Name another one with `--out`")


def _require_readable(reference: str) -> None:
    """Refuse a model whose experts cannot be read before its weights are, which may take minutes."""
    model = meta_model(load_config(reference))
    is_foreign = model.config.is_encoder_decoder and not takes_segments(model)
    if is_foreign and getattr(model.config, "num_experts", 0):
        raise ModelError(
            f"Of sparse encoder-decoders FlanMoeT5 can be inspected, but {reference} is a "
            f"{type(model).__name__}: transformers keeps each of its experts in a module of its own, and its "
            "routers count padding. The weights of a Switch become a FlanMoeT5 with "
            "`flanmoe.models.flan_moe_t5.switch.load_switch`; for others there is no way yet."
        )
    readable_blocks(model, outputs=False)


def _announce(batches: ExpertBatches, tasks: Sequence[Task], config: InspectConfig) -> None:
    small = [f"{task.name} ({task.size})" for task in tasks if task.size < config.limit]
    if small:
        say(
            f"All examples are read of tasks that have fewer than {config.limit}: {listing(small, limit=6)}."
        )
    if not batches.shares_rows:
        say("One example in a row: packed together, this model's examples would see each other.")


def _collected(
    held: HeldModel, batches: ExpertBatches, config: InspectConfig, *, everything: bool
) -> ExpertStatistics:
    # What others read out of the file costs memory and a little time, so only where there will be one.
    parts = StatisticsParts(coactivation=config.coactivation)
    if not everything:
        parts = StatisticsParts(coactivation=config.coactivation, outputs=False, logit_sample=0)
    return collect(
        held.model(), batches, groups=batches.groups, data_hash=batches.data_hash, parts=parts
    )


def _warn_of_cuts(batches: ExpertBatches, length: int) -> None:
    read = batches.read.values()
    for what, count in (
        ("cut at their end", sum(one.truncated for one in read)),
        (
            "left out, since their answer would have been cut off",
            sum(one.left_out for one in read),
        ),
    ):
        if count:
            warn(
                f"{count} examples are longer than {length} tokens and were {what}. See `--length`."
            )


def _show(report: InspectReport) -> None:
    for title, table in tables(report):
        say(f"\n{title}")
        show_table(table)
    say("")
    for line in legend(report):
        say(line)
    if any(side.coactivation == () for side in report.sides):
        say("Layers whose tokens have one expert each have no pairs of experts.")
    for alert in report.alerts:
        warn(alert.words)
    if not report.judged:
        say("Too few tokens to look for collapse, unused experts and drops: raise `--limit`.")
    elif not report.alerts:
        say(
            "No alert: no collapse, no unused expert, no drops beyond the limits, nothing hidden by pooling."
        )


def _write(report: InspectReport, statistics: ExpertStatistics, out: Path | None) -> None:
    if out is None:
        say("For pictures, all layers as JSON and the statistics add `--out DIR`.")
        return
    statistics.save(out / STATISTICS_FILE)
    pictures = write_pictures(report, statistics, out)
    # Last, so that it never stands there without its pictures.
    write_lists_on_lines(out / REPORT_FILE, report.to_mapping())
    say(f"Written to {out}: {', '.join((*pictures, REPORT_FILE, STATISTICS_FILE))}.")
