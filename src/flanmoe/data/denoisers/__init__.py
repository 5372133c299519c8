"""Denoisers: a piece of text as what an encoder reads and what a decoder is to restore.

To add one, write a file like its neighbour, and name it here.
"""

from typing import Any

from flanmoe.data.denoisers.base import Denoised as Denoised
from flanmoe.data.denoisers.base import DenoisedLengths as DenoisedLengths
from flanmoe.data.denoisers.base import Denoiser as Denoiser
from flanmoe.data.denoisers.base import denoisers as denoisers
from flanmoe.data.denoisers.base import sentinel_ids as sentinel_ids
from flanmoe.data.denoisers.base import sentinel_token as sentinel_token
from flanmoe.data.denoisers.span_corruption import SpanCorruption as SpanCorruption


def denoiser_named(name: str, **options: Any) -> Denoiser:
    """Return a denoiser by name, with its options.

    Raises:
        ConfigError: if no such denoiser is registered, naming the nearest one, or an option is not valid.
    """
    return denoisers.get(name).parse(options, origin=f"The denoiser `{name}`")
