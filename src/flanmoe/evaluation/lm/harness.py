"""What lm-eval does beside evaluating: it logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Let lm-eval log errors only: what it would warn of, flanmoe counts and reports itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
