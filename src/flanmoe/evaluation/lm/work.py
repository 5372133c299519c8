"""What a language model has computed so far, in tokens, and what an evaluation has spent."""

from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """Tokens that went through a model, and those that did not have to.

    Attributes:
        real_tokens: tokens read, each counted once however many requests it serves.
        padding_tokens: padding that went through with them.
        shared_tokens: tokens of requests that were not computed again, because another request begins
            with them too.
        generated_tokens: tokens written.
    """

    real_tokens: int = 0
    padding_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Spent:
    """What an evaluation has cost up to some moment, or one leg of it.

    Attributes:
        seconds: wall-clock seconds.
        real_tokens, padding_tokens, generated_tokens: as in `Work`.
    """

    seconds: float = 0.0
    real_tokens: int = 0
    padding_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def of(cls, work: Work, seconds: float) -> "Spent":
        """Return what some work and the time for it are together."""
        return cls(seconds, work.real_tokens, work.padding_tokens, work.generated_tokens)

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            seconds=self.seconds + other.seconds,
            real_tokens=self.real_tokens + other.real_tokens,
            padding_tokens=self.padding_tokens + other.padding_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
        )
