"""The ledger: what a stage or a run has cost, in units that add up."""

from flanmoe.core.config import Config


class Ledger(Config):
    """Costs of one stage. `+` adds costs and keeps the larger peak.

    Attributes:
        sequences: packed rows that entered the model.
        real_tokens: tokens that belong to an example.
        padding_tokens: tokens that fill up a row.
        loss_tokens: tokens whose prediction enters the loss.
        steps: optimizer steps.
        flops: floating-point operations by the stated convention (`models.flops`).
        seconds: wall-clock seconds.
        peak_memory_bytes: largest resident set size seen (on a GPU: largest allocation).
    """

    sequences: int = 0
    real_tokens: int = 0
    padding_tokens: int = 0
    loss_tokens: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Real and padding tokens together: what the hardware had to work through."""
        return self.real_tokens + self.padding_tokens

    @property
    def padding_share(self) -> float:
        """Padding over all tokens; 0 where there are none."""
        return self.padding_tokens / self.tokens if self.tokens else 0.0

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(
            sequences=self.sequences + other.sequences,
            real_tokens=self.real_tokens + other.real_tokens,
            padding_tokens=self.padding_tokens + other.padding_tokens,
            loss_tokens=self.loss_tokens + other.loss_tokens,
            steps=self.steps + other.steps,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
        )
