"""What well-known data sets are: kind of task, wording, labels in words, place in FLAN 2022.

`catalogue.yaml` holds an entry for each folder name. A task configuration takes from it what it leaves
out itself.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from flanmoe.core.config import Config

Submixture = Literal["muffin", "t0_sf", "niv2", "cot", "dialog"]


class KnownSet(Config):
    """One entry of the catalogue.

    Attributes:
        cluster: kind of task, under which results are grouped and held out.
        family: templates that word it.
        fields: names that the family uses, and the fields of the records that hold them.
        labels: its labels in words, in the order in which they are offered.
        tasks_field: field of its records whose values are tasks of their own, None where it is one task.
        flan2022: splits to train on, and the sub-mixture of FLAN 2022 that each belongs to.
    """

    cluster: str
    family: str
    fields: dict[str, str] = {}
    labels: dict[str, str] | None = None
    tasks_field: str | None = None
    flan2022: dict[str, Submixture] = {}


class _Catalogue(Config):
    sets: dict[str, KnownSet]


@cache
def known_sets() -> Mapping[str, KnownSet]:
    """Return the catalogue by folder name."""
    text = files("flanmoe.data").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    entries: dict[str, Any] = yaml.safe_load(text)
    return _Catalogue.parse({"sets": entries}, origin="catalogue.yaml").sets


def known_set(name: str) -> KnownSet | None:
    """Return the entry of a data set by the last part of its name (`owner/gsm8k`), None without one."""
    return known_sets().get(name.rpartition("/")[2])
