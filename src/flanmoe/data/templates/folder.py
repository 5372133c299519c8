"""Families of templates as YAML files: ours in `library`, a user's in a folder of the same form.

A file is called after its family (`entailment.yaml`), or after family and version where a folder keeps
several (`entailment.v1.yaml`). A family of a user's folder that has the name of one of ours must have a
higher version and then replaces it: the plain name means the newest version, and ours can still be had by
its full name. `flan/<data set>` leads to FLAN's own file (`flan.py`).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from jinja2 import TemplateSyntaxError, meta
from pydantic import AfterValidator, Field, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.renderers.base import STRICT
from flanmoe.data.templates.flan import FLAN_PREFIX, flan_family
from flanmoe.data.templates.template import ALWAYS_GIVEN, Form, Template

_LIBRARY = Path(__file__).with_name("library")
_SUFFIXES = (".yaml", ".yml")
_NAME = r"^[a-z0-9]+([_-][a-z0-9]+)*$"
# What a prompt that asks for the answer must not show.
_ANSWERS = frozenset({"answer", "target", "rationale"})


class Wording(Config):
    """One template as a file holds it.

    Attributes:
        name: unique in the file.
        form: what is asked for (`Template`).
        prompt: what the user says, as jinja2 text.
        response: what the model is to say, as jinja2 text.
    """

    name: str = Field(pattern=_NAME)
    form: Form
    prompt: str = Field(min_length=1)
    response: str = Field(min_length=1)

    @field_validator("prompt", "response")
    @classmethod
    def _valid_jinja(cls, text: str) -> str:
        try:
            # Compiled, not only parsed: a filter that does not exist is found here, too.
            STRICT.from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"must be valid jinja2, but is not: {error.message} (line {error.lineno})."
            ) from error
        return text

    @model_validator(mode="after")
    def _keeps_the_answer(self) -> "Wording":
        given_away = sorted(_variables(self.prompt) & _ANSWERS)
        if self.form != "inversion" and given_away:
            raise ValueError(
                f"a prompt of the form `{self.form}` must not show the answer; found "
                f"{listing(given_away)} in it. Take it out, or make the form `inversion`."
            )
        return self

    @property
    def variables(self) -> frozenset[str]:
        """Names that the two texts use."""
        return _variables(self.prompt) | _variables(self.response)


def _variables(text: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(STRICT.parse(text)))


# pydantic's `ValidationInfo` is a protocol that cannot be checked while a program runs, hence `Any`.
def _names_listed_fields(wording: Wording, info: Any) -> Wording:
    listed: tuple[str, ...] | None = info.data.get("needs")
    if listed is None:  # it has a problem of its own, which is reported
        return wording
    unlisted = sorted(wording.variables - ALWAYS_GIVEN - set(listed))
    if unlisted:
        raise ValueError(
            f"may name the fields in `needs` ({listing(listed) or 'none'}) and those that are always "
            f"given; found {listing(unlisted)}."
            f"{nearest_name_hint(unlisted[0], [*listed, *sorted(ALWAYS_GIVEN)])}"
        )
    return wording


class FamilyFile(Config):
    """What a file of templates holds.

    Attributes:
        family: the kind of task that its templates word.
        version: a change of words is a new version.
        needs: fields that the templates use, beside what every rendering gives.
        templates: the wordings.
    """

    family: str = Field(pattern=_NAME)
    version: int = Field(ge=1)
    needs: tuple[str, ...]
    templates: tuple[Annotated[Wording, AfterValidator(_names_listed_fields)], ...] = Field(
        min_length=1
    )

    @field_validator("needs")
    @classmethod
    def _fields_of_records(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        given = sorted(ALWAYS_GIVEN & set(value))
        if given:
            raise ValueError(f"must leave out what is always given; found {listing(given)}.")
        return _without_repetition(value)

    @field_validator("templates")
    @classmethod
    def _names_differ_and_needs_are_used(
        cls, value: tuple[Wording, ...], info: Any
    ) -> tuple[Wording, ...]:
        _without_repetition(tuple(wording.name for wording in value))
        used = frozenset[str]().union(*(wording.variables for wording in value))
        unused = [name for name in info.data.get("needs", ()) if name not in used]
        if unused:
            raise ValueError(
                f"must use every field in `needs`; found none that uses {listing(unused)}."
            )
        return value

    def build(self) -> tuple[Template, ...]:
        """Return the templates, in the order of the file."""
        return tuple(
            Template(
                name=wording.name,
                family=self.family,
                version=self.version,
                form=wording.form,
                prompt=wording.prompt,
                response=wording.response,
            )
            for wording in self.templates
        )


def _without_repetition(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"must have different names; found {listing(repeated)} more than once.")
    return names


def families(folder: Path | None = None) -> tuple[str, ...]:
    """Return the names of all families of YAML files, sorted: ours, and those of a folder.

    Raises:
        DataError: if there is no such folder.
    """
    own = _files(_LIBRARY)
    added = {} if folder is None else _files(folder)
    return tuple(sorted({*own, *added}))


def load_family(name: str, *, folder: Path | None = None) -> tuple[Template, ...]:
    """Return the templates of a family, in the order of its file.

    Args:
        name: a family (`entailment`), which means its newest version, or one version of it
            (`entailment.v1`); `flan/<data set>` for FLAN's own patterns.
        folder: a user's folder of YAML files, or, for `flan/...`, the folder of FLAN's file.

    Raises:
        DataError: if there is no such folder, family or version; names the nearest one.
        ConfigError: if a file of this family is not valid, or one in `folder` has no higher version than
            ours of the same name.
    """
    family, version = _name_and_version(name)
    if family.startswith(FLAN_PREFIX):
        return flan_family(family.removeprefix(FLAN_PREFIX), version=version, folder=folder)
    found = _versions(family, folder)
    if not found:
        raise DataError(_unknown(family, folder))
    if version is not None and version not in found:
        known = listing(f"{family}.v{number}" for number in sorted(found))
        raise DataError(f"The template family `{family}` has no version {version}, only {known}.")
    return found[max(found) if version is None else version]


def _name_and_version(name: str) -> tuple[str, int | None]:
    base, separator, version = name.rpartition(".v")
    return (base, int(version)) if separator and version.isdecimal() else (name, None)


def _unknown(family: str, folder: Path | None) -> str:
    known = families(folder)
    return (
        f"The template family `{family}` is not known.{nearest_name_hint(family, known)} Known: "
        f"{listing(known, limit=len(known))}, and `{FLAN_PREFIX}<data set>`."
    )


def _versions(family: str, folder: Path | None) -> Mapping[int, tuple[Template, ...]]:
    own = _versions_in(_LIBRARY, family)
    added = {} if folder is None else _versions_in(folder, family)
    if own and added and min(added) <= max(own):
        raise ConfigError(
            f"A family that replaces one of ours must have a version above {max(own)}, but `{family}` in "
            f"{folder} has version {min(added)}. Raise `version`, or choose another name."
        )
    return {**own, **added}


def _versions_in(folder: Path, family: str) -> dict[int, tuple[Template, ...]]:
    found: dict[int, tuple[Template, ...]] = {}
    for file in _files(folder).get(family, []):
        templates = _read(file, file.stat().st_mtime_ns)
        version = templates[0].version
        if version in found:
            raise ConfigError(
                f"The versions of a family must differ, but {folder} holds `{family}.v{version}` more than "
                "once. Remove all but one."
            )
        found[version] = templates
    return found


def _files(folder: Path) -> dict[str, list[Path]]:
    """The YAML files of a folder by the families that they are called after."""
    if not folder.is_dir():
        raise DataError(f"The folder of templates {folder} does not exist. Check the path.")
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES:
            found.setdefault(_name_and_version(file.stem)[0], []).append(file)
    return found


@cache
def _read(file: Path, _changed: int) -> tuple[Template, ...]:
    """The templates of one file, compiled once; `_changed` makes a file that was changed another one."""
    content = FamilyFile.from_yaml(file)
    family, version = _name_and_version(file.stem)
    if family != content.family or version not in (None, content.version):
        raise ConfigError(
            f"{file} must be called after what it holds, but holds version {content.version} of "
            f"`{content.family}`. Call it `{content.family}.yaml` or "
            f"`{content.family}.v{content.version}.yaml`."
        )
    return content.build()
