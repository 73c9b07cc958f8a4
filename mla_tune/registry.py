"""The sockets of mla-tune: tables from a name to what implements it, filled in when a name is first asked for.

A built-in entry is given as `"module:attribute"`, so that listing the names (`--help`, recipe errors) imports nothing.
`docs/extending.md` walks through adding one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Generic, TypeVar

from mla_tune.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations by name; `what` says in an error what a name stands for ("adapter method")."""

    def __init__(self, what: str, built_in: Mapping[str, str]) -> None:
        self.what = what
        self._entries: dict[str, str | T] = dict(built_in)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first, in the order in which they were registered."""
        return tuple(self._entries)

    def get(self, name: str) -> T:
        """The implementation of this name.  Raises `InputError` with the names there are."""
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise InputError(f"unknown {self.what} '{name}'{hint or ';'} known: {', '.join(self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(import_module(module), attribute)
        return entry  # type: ignore[return-value]

    def values(self) -> list[T]:
        """All implementations, in the order of `names`; imports those that were not asked for yet."""
        return [self.get(name) for name in self._entries]

    def register(self, name: str, implementation: T) -> None:
        """Add an implementation.  Raises `ValueError` where the name is taken."""
        if name in self._entries:
            raise ValueError(f"there is an {self.what} '{name}' already")
        self._entries[name] = implementation

    @contextmanager
    def registered(self, name: str, implementation: T) -> Iterator[None]:
        """`register` for the time of a block: what tests and notebooks want."""
        self.register(name, implementation)
        try:
            yield
        finally:
            del self._entries[name]
