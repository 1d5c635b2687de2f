"""What the user says of a config, and what of it was used."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from typing import Any


class Given(Mapping[str, Any]):
    """The fields of `--set`, which remember what took them; a look at their names, or at `items()` to check them, is none.

    A source with a config of its own takes all of them: they stand in that config, whether the tensors need them or not.
    """

    def __init__(self, fields: Mapping[str, Any] | None = None) -> None:
        self._fields = dict(fields or {})
        self._taken: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self._taken[name] = None
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def items(self) -> ItemsView[str, Any]:
        return self._fields.items()

    @property
    def taken(self) -> tuple[str, ...]:
        """The names of those whose values were asked for."""
        return tuple(self._taken)
