"""What an evaluation is going to do, before it does it."""

from flanmoe.core.config import Config
from flanmoe.evaluation.suites.choice import Chosen
from flanmoe.evaluation.suites.loading import Loaded


class PlannedGroup(Config):
    """One row of the plan.

    Attributes:
        group: name of the group; `tasks` for plain tasks.
        tasks: tasks with data.
        num_defined: tasks that belong to the group; parts count by themselves.
        questions: questions that are asked.
        shots: worked examples before each question (the fewest and the most of any task); None where lm-eval
            decides.
        new_tokens: most tokens that the model writes; None where lm-eval decides.
    """

    group: str
    tasks: int
    num_defined: int
    questions: int
    shots: tuple[int, int] | None
    new_tokens: int | None


class EvaluationPlan(Config):
    """All groups, and how long they will take.

    Attributes:
        groups: one row each.
        limit: as in `SuiteConfig`.
        max_new_tokens: most tokens of one chain of thought.
        seconds: expected time, at most: answers that end early save some.
    """

    groups: tuple[PlannedGroup, ...]
    limit: int | None
    max_new_tokens: int
    seconds: float

    @property
    def questions(self) -> int:
        """Questions of all groups."""
        return sum(group.questions for group in self.groups)


def planned_groups(
    loaded: Loaded, chosen: Chosen, new_tokens: dict[str, int]
) -> tuple[PlannedGroup, ...]:
    """Return the rows of a plan.

    Args:
        loaded: what there is.
        chosen: what is asked of it.
        new_tokens: most tokens that the model writes for the questions of each task, by its name.
    """
    rows: list[PlannedGroup] = []
    if chosen.reference:
        number = len(chosen.reference)
        rows.append(
            PlannedGroup(
                group="tasks",
                tasks=number,
                num_defined=number,
                questions=sum(len(examples) for _, examples in chosen.reference),
                shots=(0, 0),
                new_tokens=0,
            )
        )
    for one in chosen.prompted:
        shots = [questions.shown.num_shots for questions, _ in one.tasks]
        rows.append(
            PlannedGroup(
                group=one.group.config.name,
                tasks=len(one.tasks),
                num_defined=len(one.group.config.tasks),
                questions=sum(len(examples) for _, examples in one.tasks),
                shots=(min(shots), max(shots)),
                new_tokens=sum(new_tokens[questions.identity] for questions, _ in one.tasks),
            )
        )
    for group in loaded.harness:
        rows.append(
            PlannedGroup(
                group=group.name,
                tasks=len(group.tasks),
                num_defined=len(group.tasks) + len(group.skipped),
                questions=sum(len(chosen.harness[name]) for name in group.tasks),
                shots=None,
                new_tokens=None,
            )
        )
    return tuple(rows)
