"""A router as a field of a configuration: read by its `kind`, every problem under its own dotted path."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.moe.routers import RouterConfig, parse_router, routers

# What pydantic takes back of a problem that it has reported.
_PARTS = ("type", "loc", "input", "ctx")


def _read(value: Any) -> Any:
    if value is None or isinstance(value, RouterConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"must be the settings of a router, such as {{kind: top_k, num_experts: 8}}, but is {value!r}"
        )
    settings = cast("Mapping[str, Any]", value)
    try:
        return parse_router(settings, origin="a router")
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise ValueError(f"found no router: {error}") from error
        kind = routers.get(str(settings["kind"]))
        problems = [_told(problem, kind) for problem in error.__cause__.errors()]
        raise ValidationError.from_exception_data("router", problems) from error


def _told(problem: ErrorDetails, kind: type[RouterConfig]) -> InitErrorDetails:
    """Return a problem as the configuration around the router is to report it.

    Only this place knows which options a router of this kind has.
    """
    location = problem["loc"]
    if problem["type"] != "extra_forbidden":
        return cast(InitErrorDetails, {k: v for k, v in problem.items() if k in _PARTS})
    name, known = str(location[-1]), _options(kind, location[:-1])
    sentence = (
        f"found no option `{name}` of the router `{kind.model_fields['kind'].default}`."
        f"{nearest_name_hint(name, known)} Known: {listing(known)}."
    )
    return InitErrorDetails(
        type=PydanticCustomError("no_option", cast(Any, "{sentence}"), {"sentence": sentence}),
        loc=location,
        input=problem["input"],
    )


def _options(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        kind = cast("type[BaseModel]", kind.model_fields[str(part)].annotation)
    return list(kind.model_fields)


ChosenRouter = Annotated[SerializeAsAny[RouterConfig] | None, BeforeValidator(_read)]
