"""`Config`: all problems at once, with paths that can be typed back as overrides."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from flanmoe.core.config import Config, apply_overrides, read_yaml, set_values
from flanmoe.core.errors import ConfigError


class _Optimizer(Config):
    learning_rate: float = 1e-3
    weight_decay: float = Field(default=0.0, ge=0)


class _Grow(Config):
    stage: Literal["grow"]
    num_experts: int = 8


class _Tune(Config):
    stage: Literal["tune"]
    learning_rate: float = 1e-3
    optimizer: _Optimizer = _Optimizer()
    resume_from: _Optimizer | None = None

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"must be above 0, but is {value}")
        return value


_Stage = Annotated[_Grow | _Tune, Field(discriminator="stage")]


class _Chain(Config):
    stages: tuple[_Stage, ...] = Field(min_length=1)


class _Plan(Config):
    name: str
    steps: int = 10
    arms: dict[str, tuple[_Stage, ...]] = {}
    optimizers: list[_Optimizer] = []
    chains: list[_Chain] = []


def _problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        _Plan.parse(values, origin="plan.yaml")
    return str(raised.value).split("\n")


def test_lists_every_problem_with_its_dotted_path() -> None:
    values = {
        "steps": "many",
        "nmae": "first",
        "arms": {
            "sparse": [{"stage": "grow"}, {"stage": "tune", "optimizer": {"weight_decay": -1}}]
        },
    }
    assert _problems(values) == [
        "plan.yaml has 4 problems:",
        "  name: is required, but missing.",
        "  steps: Input should be a valid integer, unable to parse string as an integer, but is 'many'.",
        "  arms.sparse.1.tune.optimizer.weight_decay: Input should be greater than or equal to 0, but is -1.",
        "  nmae: unknown key `nmae`. Did you mean `name`? Known: `name`, `steps`, `arms`, `optimizers`, "
        "`chains`.",
    ]


def test_hints_at_the_key_of_the_stage_that_was_named() -> None:
    stages = [{"stage": "grow"}, {"stage": "tune", "learning_rat": 1}]
    head, line = _problems({"name": "x", "arms": {"sparse": stages}})
    assert head == "plan.yaml has 1 problem:"
    assert line.startswith(
        "  arms.sparse.1.tune.learning_rat: unknown key `learning_rat`. Did you mean `learning_rate`? Known: "
    )
    assert "num_experts" not in line


def test_hints_inside_lists_and_optional_parts() -> None:
    in_list = _problems({"name": "x", "optimizers": [{}, {"weight_decai": 0}]})[1]
    assert in_list.startswith(
        "  optimizers.1.weight_decai: unknown key `weight_decai`. Did you mean"
    )
    stage = {"stage": "tune", "resume_from": {"weight_decai": 0}}
    optional = _problems({"name": "x", "arms": {"a": [stage]}})[1]
    assert optional.startswith("  arms.a.0.tune.resume_from.weight_decai: unknown key")
    assert "Did you mean `weight_decay`?" in optional


def test_a_list_is_not_too_short_because_of_what_is_wrong_inside() -> None:
    chains = [{"stages": []}, {"stages": [{"stage": "grow", "num_experts": "many"}]}]
    _, short, wrong = _problems({"name": "x", "chains": chains})
    assert short.startswith("  chains.0.stages: Tuple should have at least 1 item")
    assert wrong.startswith("  chains.1.stages.0.grow.num_experts: ")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"stage": "tnue"}, "'tnue'"),
        ({"num_experts": 4}, "'stage'"),
        ("tune", "'tune'"),
    ],
)
def test_names_a_stage_that_is_none(stage: Any, message: str) -> None:
    (_, line) = _problems({"name": "x", "arms": {"a": [stage]}})
    assert line.startswith("  arms.a.0: ")
    assert message in line


def test_keeps_a_sentence_that_says_the_value_already() -> None:
    (_, line) = _problems({"name": "x", "arms": {"a": [{"stage": "tune", "learning_rate": -1}]}})
    assert line == "  arms.a.0.tune.learning_rate: must be above 0, but is -1.0"


def test_a_long_value_is_cut() -> None:
    (_, line) = _problems({"name": "x", "steps": list(range(1000))})
    assert line.endswith("...."), line
    assert len(line) < 160


def test_overrides_fill_an_empty_place() -> None:
    assert apply_overrides({"arms": None}, ["arms.a=1"]) == {"arms": {"a": 1}}


def test_a_key_that_is_no_text_is_a_problem_too() -> None:
    (_, line) = _problems({"name": "x", 3: 4})
    assert line.startswith("  3: ")


def test_is_frozen() -> None:
    config = _Optimizer()
    with pytest.raises(ValidationError):
        config.learning_rate = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    assert config.learning_rate == 1e-3


def test_yaml_round_trip(tmp_path: Path) -> None:
    plan = _Plan.parse(
        {
            "name": "größe",
            "arms": {"a": [{"stage": "tune", "learning_rate": 2e-5}]},
            "optimizers": [{}],
        }
    )
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert _Plan.from_yaml(path) == plan
    assert "größe" in plan.to_yaml()


def test_yaml_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.yaml"
    path.write_text("learning_rate: 1e-4\n", encoding="utf-8")
    assert _Optimizer.from_yaml(path).learning_rate == 1e-4


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: x\nsteps: 3\narms: {a: [{stage: grow}, {stage: tune}]}\n", encoding="utf-8"
    )
    plan = _Plan.from_yaml(path, ["steps=7", "arms.a.1.optimizer.learning_rate=1e-4", "name=y"])
    assert (plan.steps, plan.name) == (7, "y")
    stage = plan.arms["a"][1]
    assert isinstance(stage, _Tune)
    assert stage.optimizer.learning_rate == 1e-4


def test_an_override_of_an_unknown_key_is_named_like_one_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("name: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stpes: unknown key `stpes`\. Did you mean `steps`\?"):
        _Plan.from_yaml(path, ["stpes=7"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("3", 3),
        ("-0.5", -0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("word", "word"),
        ("'1e-4x'", "1e-4x"),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
    ],
)
def test_override_values_are_yaml_scalars(text: str, value: Any) -> None:
    found = apply_overrides({}, [f"key={text}"])["key"]
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_lists_and_nested_mappings() -> None:
    values = {"a": {"b": [1, {"c": 2}]}, "other": 5}
    changed = apply_overrides(values, ["a.b.1.c=3", "a.b.0=4", "a.new.deep=5"])
    assert changed == {"a": {"b": [4, {"c": 3}], "new": {"deep": 5}}, "other": 5}
    assert values == {"a": {"b": [1, {"c": 2}]}, "other": 5}


@given(
    keys=st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=4),
    number=st.integers(),
)
def test_an_override_is_found_at_its_path(keys: list[str], number: int) -> None:
    node: Any = apply_overrides({}, [f"{'.'.join(keys)}={number}"])
    for key in keys:
        node = node[key]
    assert node == number


@pytest.mark.parametrize("value", ["2024", "nan", "yes", "1e-4", "", None, 3, [1], {"b": "5"}])
def test_a_value_that_is_set_stays_as_it_is(value: Any) -> None:
    found = set_values({"list": [{"a": 1}]}, {"list.0.a": value})["list"][0]["a"]
    assert found == value
    assert type(found) is type(value)


def test_what_is_set_is_copied_and_later_keys_win() -> None:
    values, changes = {"a": {"b": 1}}, {"a": {"b": 2, "c": [3]}, "a.c.0": 4}
    assert set_values(values, changes) == {"a": {"b": 2, "c": [4]}}
    assert (values, changes["a"]) == ({"a": {"b": 1}}, {"b": 2, "c": [3]})


def test_a_key_that_cannot_be_set_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        set_values({"list": [1, 2]}, {"list.7": 1})
    assert str(raised.value) == "The override `list.7` needs an index below 2 at `7`."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "An override must read `dotted.key=value`, but is `steps`."),
        ("=3", "An override must read `dotted.key=value`, but is `=3`."),
        ("list.7=1", "The override `list.7=1` needs an index below 2 at `7`."),
        ("list.last=1", "The override `list.last=1` needs an index below 2 at `last`."),
        ("scalar.deep=1", "The override `scalar.deep=1` runs through a value at `deep`."),
        ("list.0.deep=1", "The override `list.0.deep=1` runs through a value at `deep`."),
    ],
)
def test_override_mistakes(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides({"list": [1, 2], "scalar": 5}, [override])
    assert str(raised.value) == message


def test_an_override_that_is_no_yaml_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides({}, ["key=[1, 2"])
    assert str(raised.value) == (
        "The value `[1, 2` of an override is not valid YAML: line 1, column 6: expected ',' or ']', but got "
        "'<stream end>'."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2\n", "is not valid YAML: line 2, column 1: expected ',' or ']', but got "),
        (b"a: 1\n b: 2\n", "is not valid YAML: line 2, column 3: mapping values are not allowed"),
        (b"a: \x00\n", "is not valid YAML: unacceptable character #x0000: special characters"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"", "must hold a mapping of keys to values, but holds nothing."),
        (b"- 1\n- 2\n", "must hold a mapping of keys to values, but holds list."),
        (
            b"steps: 1\nname: x\nsteps: 2\n",
            "is not valid YAML: line 3, column 1: found the key `steps` twice.",
        ),
        (b"deep: {a: 1, a: 2}\n", "found the key `a` twice"),
        (b"deep: {off: 1, false: 2}\n", "found the key `false` twice"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_yaml_merge_keys_still_work(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nover: {<<: *b, y: 3}\n", encoding="utf-8")
    assert read_yaml(path)["over"] == {"x": 1, "y": 3}


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist\. Check the path\."):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        read_yaml(tmp_path)
