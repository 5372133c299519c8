"""Answers while they are written: what they hold so far, and when each is finished."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from flanmoe.evaluation.lm.requests import Generation


class Answers:
    """One answer for each of several requests.

    Args:
        requests: what is answered, with stops and most tokens of each.
        tokenizer: turns tokens into text.
        end_tokens: tokens that end every answer and are not part of it.

    Attributes:
        live: numbers of the requests whose answers go on, in order.
    """

    def __init__(
        self,
        requests: Sequence[Generation],
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: frozenset[int],
    ) -> None:
        self._requests = requests
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._tokens: list[list[int]] = [[] for _ in requests]
        self.live = list(range(len(requests)))

    def add(self, chosen: Mapping[int, int]) -> None:
        """Add one token to each live answer."""
        for number in self.live:
            self._tokens[number].append(chosen[number])
        self.live = [number for number in self.live if not self._is_finished(number)]

    def texts(self) -> list[str]:
        """Return the answers without what stopped them."""
        return [self._text(number) for number in range(len(self._requests))]

    def _is_finished(self, number: int) -> bool:
        request, tokens = self._requests[number], self._tokens[number]
        if tokens[-1] in self._end_tokens or len(tokens) >= request.max_new_tokens:
            return True
        if not request.stops:
            return False
        # The newest token may have completed a stop; a token holds at least one character of it, but for
        # the few that are bytes of one character.
        longest = max(map(len, request.stops))
        return any(stop in self._decoded(tokens[-longest - 4 :]) for stop in request.stops)

    def _text(self, number: int) -> str:
        tokens = self._tokens[number]
        if tokens and tokens[-1] in self._end_tokens:
            tokens = tokens[:-1]
        text = self._decoded(tokens)
        ends = [place for stop in self._requests[number].stops if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
