"""Numbers, lists and tables as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def bytes_text(count: int) -> str:
    """1234567 as `1.2 MB`."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def plural(count: int, word: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def listing(items: Sequence[str], shown: int | None, more: str) -> str:
    """The first `shown` items (all for None) and how many follow."""
    if shown is None or len(items) <= shown:
        return ", ".join(items)
    return f"{', '.join(items[:shown])} … {len(items)} in all ({more})"


def spread(counts: Mapping[object, int]) -> str:
    """{16: 120, 8: 4} as `16 (120), 8 (4)`; a single value stands alone."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    shown = [f"{value} ({count})" for value, count in list(counts.items())[:6]]
    return ", ".join(shown) + (f", … {len(counts)} values" if len(counts) > 6 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns under a ruled head.

    Plain text by hand: importing a table library would cost `inspect` a third of its time.
    """
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]
