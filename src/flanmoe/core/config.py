"""The base of every configuration: frozen, strict, and validated with all problems reported at once.

A config lives beside the class that it builds. This module holds only what all of them share: reading
YAML, dotted overrides (`--set tune.learning_rate=1e-4`), and one error that lists every problem with its
dotted path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint

_LONGEST_VALUE = 80
_YAML_MERGE = "tag:yaml.org,2002:merge"


class Config(BaseModel):
    """Base of all configs: frozen after validation, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, origin: str = "configuration") -> Self:
        """Validate `values`.

        Raises:
            ConfigError: lists every problem, one line each, with its dotted path. `origin` names where
                the values came from (a file name, usually).
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = _own_problems(error)
            lines = [f"  {_path(problem)}: {_sentence(problem, cls)}" for problem in problems]
            count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
            raise ConfigError(f"{origin} has {count}:\n" + "\n".join(lines)) from error

    @classmethod
    def from_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply dotted overrides, validate."""
        return cls.parse(apply_overrides(read_yaml(path), overrides), origin=str(path))

    def to_mapping(self) -> dict[str, Any]:
        """Return the resolved values as plain JSON types."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the resolved values as YAML; parsing it again gives an equal config."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, of which plain YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping from its node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _YAML_MERGE:
                continue
            # By value: `off` and `false` are one key.
            key: Any = self.construct_object(key_node)  # pyright: ignore
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"found the key `{key_node.value}` twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def several(value: Any) -> Any:
    """Return one value as a tuple of it, and several as they are; for fields that take either."""
    return value if isinstance(value, (list, tuple)) else (value,)  # pyright: ignore


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping from a file.

    Raises:
        ConfigError: if the file is missing, not UTF-8, not YAML, or not a mapping at the top.
    """
    try:
        values: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"The file {path} does not exist. Check the path.") from error
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file {path} cannot be read as UTF-8 text: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The file {path} is not valid YAML: {_yaml_problem(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"The file {path} must hold a mapping of keys to values, but holds "
            f"{'nothing' if values is None else type(values).__name__}. See recipes/quickstart.yaml."
        )
    return cast("dict[str, Any]", values)


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `values` with `a.b.0=c` overrides applied; values are read as YAML scalars.

    Digits in a path index a list. Missing mappings on the way are created; validation then says whether
    the key exists.

    Raises:
        ConfigError: if an override has no `=` or its path runs through a scalar or past the end of a list.
    """
    result = _copy(values)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"An override must read `dotted.key=value`, but is `{override}`.")
        _assign(result, path.strip(), _scalar(text), override)
    return result


def set_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` with each dotted key of `changes` set to its value, which stays as it is.

    Paths are those of `apply_overrides`.

    Raises:
        ConfigError: if a path runs through a scalar or past the end of a list.
    """
    result = _copy(values)
    for path, value in changes.items():
        _assign(result, path, _copy(value), path)
    return result


def merged(base: Any, over: Any) -> Any:
    """Merge mappings deeply; anything else in `over` replaces what is in `base`."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return _copy(over)
    below, above = cast("Mapping[Any, Any]", base), cast("Mapping[Any, Any]", over)
    return {
        key: merged(below[key], above[key])
        if key in below and key in above
        else _copy(above.get(key, below.get(key)))
        for key in {**below, **above}
    }


def _scalar(text: str) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as a string; people mean the number.
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The value `{text}` of an override is not valid YAML: {_yaml_problem(error)}."
        ) from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Say in one line what is wrong, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_copy(item) for item in cast("list[Any]", value)]
    return value


def _assign(root: dict[str, Any], path: str, value: Any, override: str) -> None:
    keys = path.split(".")
    node: Any = root
    for key in keys[:-1]:
        index = _index(node, key, override)
        if isinstance(node, dict) and cast("dict[Any, Any]", node).get(index) is None:
            node[index] = {}
        node = cast(Any, node[index])
    node[_index(node, keys[-1], override)] = value


def _index(node: Any, key: str, override: str) -> Any:
    """Return what `key` of a path means in `node`: a key of a mapping, or a place in a list."""
    if isinstance(node, dict):
        if key in node:
            return key
        # A key may be no text: `on`, `64`.
        value = _scalar(key)
        known = isinstance(value, bool | int | float) and value in node
        return value if known else key
    if not isinstance(node, list):
        raise ConfigError(f"The override `{override}` runs through a value at `{key}`.")
    size = len(cast("list[Any]", node))
    if not key.isdigit() or int(key) >= size:
        raise ConfigError(f"The override `{override}` needs an index below {size} at `{key}`.")
    return int(key)


def _own_problems(error: ValidationError) -> list[ErrorDetails]:
    """Return the problems without those that only follow from others.

    pydantic counts no entry that has a problem of its own, and then finds its list too short.
    """
    problems = error.errors()
    around = {problem["loc"][:end] for problem in problems for end in range(len(problem["loc"]))}
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short" or problem["loc"] not in around
    ]


def _path(problem: ErrorDetails) -> str:
    return ".".join(str(part) for part in problem["loc"]) or "(top level)"


def _sentence(problem: ErrorDetails, root: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], root)
        name = str(problem["loc"][-1])
        return f"unknown key `{name}`.{nearest_name_hint(name, known)} Known: {listing(known)}."
    if problem["type"] == "missing":
        return "is required, but missing."
    message = problem["msg"].removeprefix("Value error, ")
    if "found" in message or "but is" in message:
        return message
    return f"{message}, but is {_shortened(problem['input'])}."


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _known_keys(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """Walk the schema along an error location and return the field names known there."""
    schema = root.model_json_schema()
    nodes: list[Any] = [schema]
    for part in location:
        nodes = [child for node in nodes for child in _children(node, part, schema)]
    keys: dict[str, None] = {}
    for node in nodes:
        for resolved in _alternatives(node, schema):
            keys.update(dict.fromkeys(resolved.get("properties", {})))
    return list(keys)


def _alternatives(node: Any, schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    part = cast("dict[str, Any]", node)
    if "$ref" in part:
        return _alternatives(schema["$defs"][str(part["$ref"]).rpartition("/")[2]], schema)
    options: list[Any] = part.get("anyOf") or part.get("oneOf") or part.get("allOf") or []
    if options:
        return [found for option in options for found in _alternatives(option, schema)]
    return [part]


def _children(node: Any, part: int | str, schema: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for option in _alternatives(node, schema):
        if isinstance(part, int):
            found.append(option.get("items"))
        elif part in option.get("properties", {}):
            found.append(option["properties"][part])
        elif isinstance(option.get("additionalProperties"), dict):
            found.append(option["additionalProperties"])
        elif any(value.get("const") == part for value in option.get("properties", {}).values()):
            # pydantic puts the tag of a discriminated union into the location.
            found.append(option)
    return found
