"""Model cards as texts: the front matter, read within bounds."""

from __future__ import annotations

from typing import Any

TEMPLATE = "[More Information Needed]"
"""What the template of huggingface_hub has where something is to be filled in."""
_MARK = "---"
_LONGEST = 100_000
"""Characters of a front matter.  Those of real cards, results of benchmarks included, have a tenth."""


def front_matter(text: str) -> dict[str, Any] | str | None:
    """The front matter of a card: its fields, every scalar as text; None where there is none; else what is wrong with it."""
    lines = text.removeprefix("\ufeff").split("\n")
    first = next((at for at, line in enumerate(lines) if line.strip()), None)
    if first is None or lines[first].rstrip() != _MARK:
        return None
    end = next((at for at in range(first + 1, len(lines)) if lines[at].rstrip() == _MARK), None)
    if end is None:
        return "the --- that ends it is missing"
    content = "\n".join(lines[first + 1 : end])
    if len(content) > _LONGEST:
        return f"it has {len(content):,} characters"
    return _parsed(content)


def _parsed(content: str) -> dict[str, Any] | str | None:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """Texts, lists and mappings; without aliases, by which a few lines stand for any number of nodes."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "an alias (*name) is not taken", mark)
            return super().compose_node(parent, index)

    loader = None
    try:
        loader = Loader(content)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 2})" if error.problem_mark is not None else ""
        return f"{error.problem or error.context}{line}"[:300]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return " ".join(str(error).split())[:300] or "nested too deeply"
    finally:
        if loader is not None:
            loader.dispose()
    if value is None or value == "":
        return None
    return value if isinstance(value, dict) else "it is no list of fields with values"
