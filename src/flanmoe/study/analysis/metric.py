"""What a score is: its name, which way is better, and how its differences are shown."""

from flanmoe.core.config import Config
from flanmoe.study.number_text import difference_scale, difference_unit, signed


class Metric(Config):
    """A number that every example of a task gets.

    Attributes:
        name: as claims name it.
        higher_is_better: which way is better; None where neither is (an entropy, a share).
        unit: of differences as they are shown.
        scale: turns a difference of values into that unit.
        digits: decimals that are shown.
    """

    name: str
    higher_is_better: bool | None
    unit: str
    scale: float = 1.0
    digits: int = 4

    def text(self, value: float, *, sign: bool = True) -> str:
        """Format a difference without its unit."""
        shown = signed(value * self.scale, self.digits)
        return shown if sign else shown.lstrip("+")


LOSS = Metric(
    name="loss",
    higher_is_better=False,
    unit=difference_unit("loss"),
    scale=difference_scale("loss"),
)
ACCURACY = Metric(
    name="accuracy",
    higher_is_better=True,
    unit=difference_unit("accuracy"),
    scale=difference_scale("accuracy"),
    digits=1,
)
# Percent of the way from chance to perfect (`evaluation.metrics.chance_normalised`), example by example.
NORMALISED_ACCURACY = Metric(
    name="normalised_accuracy", higher_is_better=True, unit="normalised points", digits=1
)
METRICS = (LOSS, ACCURACY, NORMALISED_ACCURACY)
