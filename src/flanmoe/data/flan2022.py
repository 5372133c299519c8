"""FLAN 2022: its sub-mixtures at their published rates, over whatever of their tasks is there.

Rates and caps are those of the released code (github.com/google-research/FLAN), or of Chung et al.
(arXiv 2210.11416, table 23) for their final models and ablations. Inside a sub-mixture tasks are drawn by
min(cap, number of examples). Half of the samples are few-shot; in Muffin and T0-SF half show the options;
chains of thought have inverted companions at 0.3 to 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.data.catalogue import KnownSet, Submixture, known_sets
from flanmoe.data.renderers.template import TemplateConfig
from flanmoe.data.sources.finding import resolve_data_dir, splits_of
from flanmoe.data.tasks import TaskConfig

RateSet = Literal["released", "final", "ablation"]

# Dialog stands inside Muffin in the published weights of Chung et al.
RATES: Mapping[RateSet, Mapping[Submixture, float]] = {
    "released": {"muffin": 0.40, "t0_sf": 0.32, "niv2": 0.20, "cot": 0.05, "dialog": 0.03},
    "final": {"muffin": 0.460, "t0_sf": 0.279, "niv2": 0.242, "cot": 0.018, "dialog": 0.0},
    "ablation": {"muffin": 0.52, "t0_sf": 0.15, "niv2": 0.30, "cot": 0.03, "dialog": 0.0},
}
CAPS: Mapping[Submixture, int] = {
    "muffin": 30_000,
    "t0_sf": 20_000,
    "niv2": 5_000,
    "cot": 100_000,
    "dialog": 200_000,
}
_FEW_SHOT_SHARE = 0.5
_OPTIONS_SHARE: Mapping[Submixture, float] = {"muffin": 0.5, "t0_sf": 0.5}
# Inverted companions are drawn at 0.3 relative to 1.
_INVERSION_SHARE: Mapping[Submixture, float] = {"cot": 0.3 / 1.3}


class Flan2022(Config):
    """The mixture.

    Attributes:
        rates: the published set of sub-mixture rates.
        prompt_tokens: budget of a few-shot prompt. FLAN's own is 1,920 of 2,048 tokens.
        on_bad_record: what records that cannot be read do; see `TaskConfig`.
    """

    rates: RateSet = "released"
    prompt_tokens: int = 768
    on_bad_record: Literal["error", "skip"] = "skip"


@dataclass(frozen=True, slots=True)
class FoundTasks:
    """What of the mixture a data folder holds.

    Attributes:
        tasks: the tasks, with rates, caps and templates.
        absent: sub-mixtures that have a rate but no task here; the others share it.
    """

    tasks: tuple[TaskConfig, ...]
    absent: tuple[Submixture, ...]


def flan2022_tasks(config: Flan2022, data_dir: Path | None) -> FoundTasks:
    """Return the tasks of FLAN 2022 that the data folder holds.

    Raises:
        DataError: if no data folder is named, or it holds none of them.
    """
    folder = resolve_data_dir(data_dir)
    if folder is None:
        raise DataError(
            "The mixture `flan2022` needs a data folder, but none is set. Give one with `--data-dir` or "
            "FLANMOE_DATA."
        )
    found: dict[Submixture, list[TaskConfig]] = {}
    for name, entry in known_sets().items():
        splits = set(splits_of(folder / name)) if (folder / name).is_dir() else set[str]()
        for split, submixture in entry.flan2022.items():
            if split in splits and RATES[config.rates][submixture]:
                task = _task(config, name, split, entry, submixture)
                found.setdefault(submixture, []).append(task)
    if not found:
        raise DataError(
            f"The data folder {folder} must hold tasks of FLAN 2022, but has none of "
            f"{listing(name for name, entry in known_sets().items() if entry.flan2022)}."
        )
    rates = RATES[config.rates]
    return FoundTasks(
        tasks=tuple(task for tasks in found.values() for task in tasks),
        absent=tuple(name for name, rate in rates.items() if rate and name not in found),
    )


def _task(
    config: Flan2022, name: str, split: str, entry: KnownSet, submixture: Submixture
) -> TaskConfig:
    template = TemplateConfig(
        family=entry.family,
        fields=entry.fields,
        few_shot_share=_FEW_SHOT_SHARE,
        prompt_tokens=config.prompt_tokens,
        exemplar_split=split,
        options_share=_OPTIONS_SHARE.get(submixture, 1.0),
        option_style="random",
        chain_of_thought_share=1.0 if submixture == "cot" else 0.0,
        inversion_share=_INVERSION_SHARE.get(submixture, 0.0),
    )
    return TaskConfig(
        name=name,
        split=split,
        template=template,
        group=submixture,
        rate=RATES[config.rates][submixture],
        cap=CAPS[submixture],
        cap_by=entry.tasks_field,
        on_bad_record=config.on_bad_record,
    )
