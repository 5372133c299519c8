"""Top-2 token choice with a second choice that may be given up: what GShard and ST-MoE share."""

from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from flanmoe.moe.routers.base import Router
from flanmoe.moe.routers.second_choice import SecondChoice, asked_for
from flanmoe.moe.routers.token_choice import TokenChoiceConfig, TokenChoiceRouter, renormalised


class TopTwoConfig(TokenChoiceConfig):
    """Top-2 token choice with capacity.

    Attributes:
        normalize: whether the two gates are divided by their sum. T5X's GShard-like models keep raw
            probabilities; both papers and Mesh-TF renormalise.
        second_choice: what becomes of second choices in training mode; see `second_choice`.
        evaluation_second_choice: the same in evaluation mode. Mesh-TF draws there too, which makes
            its scores random; that is `random` here.
        threshold: second choices with a share of at least this are always asked for under
            `random`; under `threshold`, those above it.
    """

    normalize: bool = True
    second_choice: SecondChoice = "random"
    evaluation_second_choice: SecondChoice = "all"
    threshold: float = Field(default=0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _there_are_two(self) -> "TopTwoConfig":
        if self.num_experts < 2:
            raise ValueError(
                f"`num_experts` must be at least 2, since each token asks for 2, but is "
                f"{self.num_experts}"
            )
        return self

    def _build(self, hidden_size: int) -> Router:
        return TopTwoRouter(self, hidden_size)


class TopTwoRouter(TokenChoiceRouter):
    """The router of `TopTwoConfig`."""

    def __init__(self, config: TopTwoConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size, capacity=config.capacity, order=config.order)
        self.normalize = config.normalize
        self.second_choice: SecondChoice = config.second_choice
        self.evaluation_second_choice: SecondChoice = config.evaluation_second_choice
        self.threshold = config.threshold

    @property
    def top_k(self) -> int:
        """Two."""
        return 2

    def gates(self, probabilities: Float[Tensor, "T k"]) -> Float[Tensor, "T k"]:
        """Return the probabilities, divided by their sum where the model does that.

        The first gate is not raised when the second choice is given up or does not fit.
        """
        return renormalised(probabilities) if self.normalize else probabilities

    def asked(self, probabilities: Float[Tensor, "T k"]) -> Bool[Tensor, "T k"]:
        """Give up second choices as the policy of the mode says."""
        policy = self.second_choice if self.training else self.evaluation_second_choice
        return asked_for(renormalised(probabilities), policy, threshold=self.threshold)
