"""`SuiteConfig`: which tasks or which suite a model is scored on, and how."""

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.data.renderers.template import TemplateConfig
from flanmoe.data.tasks import TaskConfig, worded
from flanmoe.evaluation.suites.named import HELD_OUT, SUITE_NAMES, check_suite_name
from flanmoe.evaluation.tasks.harness import HARNESS_PREFIX
from flanmoe.models.precision import ChosenPrecision


class SuiteTask(TaskConfig):
    """A task to score on: one of ours, or one of lm-eval's as `lm-eval/NAME`.

    Attributes:
        optional: leave the task out, and say so in the result, where its folder or file is not there
            at all. Any other mistake, such as an unknown split or exemplar task, stays an error.
    """

    optional: bool = False

    @property
    def of_harness(self) -> bool:
        """Whether lm-eval defines the task."""
        return self.name.startswith(HARNESS_PREFIX)

    @model_validator(mode="after")
    def _harness_tasks_say_the_rest_themselves(self) -> "SuiteTask":
        given = self.model_fields_set - {"name"}
        changed = [name for name in sorted(given) if getattr(self, name) != _DEFAULTS[name].default]
        if self.of_harness and changed:
            raise ValueError(
                f"a task of lm-eval brings its own settings, but {listing(changed)} is set for `{self.name}`; "
                "take it out"
            )
        return self


_DEFAULTS = SuiteTask.model_fields


class SuiteConfig(Config):
    """Which tasks a model is scored on, and how.

    Attributes:
        tasks: the tasks; each a mapping, or just its name. `family/*` stands for all tasks of
            a family, `lm-eval/NAME` for a task or a group of lm-eval.
        template: wordings of every task in `tasks` that has neither a template nor a renderer of its own.
        suite: in place of `tasks`, a suite by name: `flan`, `held-out`, `smoke`.
        limit: most examples in all, the same share of every task; a task that has fewer leaves the
            rest to the others. In a suite of groups, most examples of each group. Which ones is drawn from
            the seed, the same in every prompt format, and a larger limit keeps those of a smaller one.
            Without it every example is used.
        batch_size: most texts in one forward pass; None for as many as fit into memory.
        precision: `float32` computes in the type of the weights, `bfloat16` under autocast; `auto` stands for
            the one that this machine has instructions for.
        capacity_drops: let experts drop tokens above their capacity, as in training; without it they take all.
        max_new_tokens: most tokens of a chain of thought; None for 128 on a CPU and 512 on an accelerator.
        lm_eval_tasks: folder with lm-eval tasks of your own (YAML), beside those that it ships.
    """

    # Before `tasks`, which are checked with it in hand.
    template: TemplateConfig | None = None
    tasks: tuple[SuiteTask, ...] = ()
    suite: str | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=8, ge=1)
    precision: ChosenPrecision = "float32"
    capacity_drops: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    lm_eval_tasks: str | None = None

    @field_validator("tasks")
    @classmethod
    def _tasks_have_the_template(
        cls, value: tuple[SuiteTask, ...], info: ValidationInfo
    ) -> tuple[SuiteTask, ...]:
        return tuple(
            task if task.of_harness else worded(task, info.data.get("template")) for task in value
        )

    @field_validator("suite")
    @classmethod
    def _known_suite(cls, value: str | None) -> str | None:
        if value is not None and value not in SUITE_NAMES:
            raise ValueError(
                f"must be one of {listing(SUITE_NAMES)}, but is `{value}`."
                f"{nearest_name_hint(value, SUITE_NAMES)}"
            )
        return value

    @model_validator(mode="after")
    def _tasks_or_a_suite(self) -> "SuiteConfig":
        if bool(self.tasks) == bool(self.suite):
            found = "both" if self.suite else "neither"
            raise ValueError(
                f"an evaluation needs either `tasks` or a `suite`, but found {found}; set one of them"
            )
        return self

    @property
    def listed(self) -> tuple[SuiteTask, ...]:
        """The tasks, also where the suite is a plain list of them; empty for a suite of groups."""
        return self.tasks if self.suite is None else named_suite(self.suite)


def named_suite(name: str) -> tuple[SuiteTask, ...]:
    """Return the tasks of a suite that flanmoe knows by name; none where it is made of few-shot groups.

    Raises:
        ConfigError: if no suite is called that; names the nearest one.
    """
    check_suite_name(name)
    return tuple(SuiteTask(name=task) for task in HELD_OUT) if name == "held-out" else ()
