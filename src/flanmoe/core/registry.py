"""One registry class for everything that is chosen by name.

Names carry a version (`switch.v1`), so that a saved recipe keeps its meaning when a default changes. A
name without a version means the newest one.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint

T = TypeVar("T")


class Registry(Generic[T]):
    """Versioned names of one kind of thing.

    Args:
        noun: what is registered, for messages ("router", "renderer").
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Register under `base.vN`; usable as a decorator.

        Raises:
            ValueError: if the name has no version or is taken (a programmer's mistake).
        """
        base, separator, version = name.rpartition(".v")
        if not separator or not base or not version.isdigit():
            raise ValueError(f"A registered name must read `base.vN`, but is `{name}`.")
        if name in self._entries:
            raise ValueError(f"The {self._noun} `{name}` is already registered.")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def resolve(self, name: str) -> str:
        """Return the full versioned name for `name`.

        Raises:
            ConfigError: if no such name is registered; names the nearest one.
        """
        if name in self._entries:
            return name
        versions = [full for full in self._entries if full.rpartition(".v")[0] == name]
        if versions:
            return max(versions, key=lambda full: int(full.rpartition(".v")[2]))
        known = sorted({full.rpartition(".v")[0] for full in self._entries})
        raise ConfigError(
            f"The {self._noun} `{name}` is not known.{nearest_name_hint(name, known)} "
            f"Known: {listing(known)}."
        )

    def get(self, name: str) -> T:
        """Return the entry for a name, with or without its version."""
        return self._entries[self.resolve(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
