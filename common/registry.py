"""Named implementations of one kind of thing: routers, corpora, optimizers and so on. Plugins add to them."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from common.errors import ConfigError, require

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to implementations, one for each configuration key that chooses by name.

    Args:
        key: the configuration key, e.g. `router.kind`. Error messages start with its last part, because the section is
            added where a dataclass is built from the configuration.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds what it decorates under `name`.

        Raises:
            ValueError: another implementation has the name.
        """

        def add(entry: T) -> T:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: T) -> None:
        """Add `entry` under `name`.

        Raises:
            ValueError: another implementation has the name.
        """
        if name in self._entries:
            raise ValueError(f"{self.key}={name}: this name is registered already")
        self._entries[name] = entry

    def check(self, name: object, key: str | None = None) -> None:
        """Raise ConfigError, which lists the known names, unless `name` is registered.

        Args:
            key: the start of the message; by default the last part of the configuration key.
        """
        require(
            name in self,
            ConfigError,
            f"{key or self.key.rpartition('.')[2]}={name}: expected one of {', '.join(self._entries)}, or a name that "
            "a module in plugins=[...] registers",
        )

    def __getitem__(self, name: str) -> T:
        """The implementation of `name`.

        Raises:
            ConfigError: the name is not registered; starts with the whole configuration key, and lists the names.
        """
        self.check(name, self.key)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
