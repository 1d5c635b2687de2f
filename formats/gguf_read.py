"""From a GGUF adapter's tensors to transformers' modules, rows and parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterops_formats import gguf_table as table
from adapterops_formats.gguf_entries import EXPERTS, HEADS, INVOCATION, number_of, tokens_of
from adapterops_formats.gguf_experts import joined
from adapterops_formats.gguf_rows import of_unknown_rows, with_rows

from adapterops.plugin import Group, LazyTensor, Request, Source, errors


class Names:
    """The modules that a file's tensors are for, in transformers' names, their rows in transformers' order."""

    def __init__(self, source: Source, request: Request) -> None:
        self._source, self._request = source, request
        self._told = source.metadata.get("general.architecture", "")
        self._rows = table.insist_known(self._told, source.path)
        base = request.architecture
        self._component = next(iter(base.components.values()), None) if base is not None else None
        self._class = self._component.class_name.rpartition(".")[2] if self._component is not None else ""
        own = table.of_class(self._component)
        if own is not None and own.name != self._told:
            raise errors.Conflict(
                f"{source.path}: is for llama.cpp's architecture {self._told!r}, and the base that was given, {self._class}, is "
                f"{own.name!r}; give the --base that the adapter was trained on"
            )
        self._given = own
        self._tokens = tokens_of(source)
        self.widened: dict[str, int] = {}
        """How many times its stacks' rank a parameter's is, where that is not once."""
        self.notes: list[str] = []

    def settle(self, groups: list[Group]) -> list[Group]:
        """The groups under the names, and with the tensors, that transformers has."""
        row = self._given or self._row(groups)
        back = {spelled: module for module, spelled in table.names(row).items()}
        heads = self._heads(row, back, groups)
        out: list[Group] = []
        stacks: dict[str, dict[str, Group]] = {}
        for entry in groups:
            spelled, layer = table.pattern(entry.name)
            known = back.get(spelled) if "{" not in entry.name else None
            if known is None:
                self._request.wrong(self._unknown(entry, row, back), (t.key for t in entry.tensors.values()))
                continue
            module = table.as_base(row, self._class, known.format(layer))
            if ".experts." in module:
                stacks.setdefault(module.rpartition(".")[0], {})[module] = entry
                continue
            tensors = dict(entry.tensors)
            options: dict[str, Any] = {}
            try:
                if spelled == "token_embd":
                    options["kind"] = "embedding"
                    tensors |= _embedding(tensors)
                elif row.order(module) is not None and "B" in tensors:
                    tensors["B"] = self._ordered(tensors["B"], row, module, heads)
            except errors.AdapterOpsError as error:
                self._request.wrong(error, (t.key for t in entry.tensors.values()))
                continue
            if self._tokens is not None:
                options[INVOCATION] = self._tokens
            method = "lora" if self._tokens is None else "alora"
            out.append(entry._replace(name=module, method=method, tensors=tensors, options=options))
        for module, parts in stacks.items():
            out += self._parameters(module, parts, row)
        return out

    def _row(self, groups: Sequence[Group]) -> table.Row:
        """The first row of the file's architecture that has all of its names; else the one that has most."""
        names = {table.pattern(entry.name)[0] for entry in groups}
        return max(self._rows, key=lambda row: len(names & set(table.names(row).values())))

    def _unknown(self, entry: Group, row: table.Row, back: Mapping[str, str]) -> errors.AdapterOpsError:
        import difflib  # only ever needed for a message

        near = difflib.get_close_matches(table.pattern(entry.name)[0], back, n=2, cutoff=0.5)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        return errors.UnknownModule(
            f"{next(iter(entry.tensors.values())).where}: llama.cpp applies no adapter to a tensor {entry.name!r} of "
            f"{row.name}{hint}"
        )

    def _heads(self, row: table.Row, back: Mapping[str, str], groups: Sequence[Group]) -> table.Heads | None:
        """By the base, or else by the header.  Raises `Conflict` where they disagree."""
        own = table.heads_of(row, self._component) if self._component is not None and row.orders else None
        said = [
            number_of(self._source, f"{row.name}{end}") for end in HEADS if f"{row.name}{end}" in self._source.metadata
        ]
        counts = [n for n in said if type(n) is int and 0 < n < 1 << 20]
        stated = table.Heads(*counts) if len(counts) == len(HEADS) else None
        if own is not None and stated is not None and own != stated:
            raise errors.Conflict(
                f"{self._source.path}: its header says {stated.queries} heads and {stated.keys} of keys, and the base has "
                f"{own.queries} and {own.keys}; give the --base that the adapter was trained on"
            )
        if own is None and stated is not None:
            try:
                self._insist_on_heads(row, stated, back, groups)
            except errors.BrokenAdapter as error:
                self._request.wrong(error, error.keys)
                return None
            self.notes.append(
                "the rows of projections that llama.cpp orders by heads are put back by the header's word: "
                f"{stated.queries} heads, {stated.keys} of keys"
            )
        return own or stated

    def _insist_on_heads(
        self, row: table.Row, heads: table.Heads, back: Mapping[str, str], groups: Sequence[Group]
    ) -> None:
        """Raise `BrokenAdapter` where queries and keys do not have heads of one size, by the numbers in the header."""
        sizes: dict[float, LazyTensor] = {}
        for entry in groups:
            order, b = row.order(back.get(table.pattern(entry.name)[0], "")), entry.tensors.get("B")
            if order in (table.queries, table.keys) and b is not None and b.shape:
                sizes.setdefault(b.shape[0] / (heads.queries if order is table.queries else heads.keys), b)
        if len(sizes) > 1:
            one, two = list(sizes.values())[:2]
            raise errors.BrokenAdapter(
                f"{two.where}: {two.shape[0]} rows, and {one.key!r} has {one.shape[0]}: with {heads.queries} heads and "
                f"{heads.keys} of keys, as the header says, theirs are not of one size; take these numbers out of the header, "
                "and give the base's config with --base CONFIG",
                fault="other-shape",
                keys=(one.key, two.key),
            )

    def _ordered(self, b: LazyTensor, row: table.Row, module: str, heads: table.Heads | None) -> LazyTensor:
        """The second factor with its rows as transformers has them.  Raises `BrokenAdapter` for rows that are no heads."""
        if heads is None:
            if self._request.tell is not None:
                return b  # to be looked at: no rule asks in which order rows stand
            return of_unknown_rows(
                b,
                f"{b.where}: the rows of {module} stand in llama.cpp's order, which depends on the numbers of heads, and nothing "
                "in the file says them; give the base's config with --base CONFIG",
            )
        if len(b.shape) != 2:
            return b  # no factor, as the method's own check says
        try:
            return with_rows(b, row.order(module)(b.shape[0], heads), back=True)
        except ValueError as error:
            raise errors.BrokenAdapter(f"{b.where}: {error}, as {module} has them", fault="other-shape") from error

    def _parameters(self, module: str, parts: Mapping[str, Group], row: table.Row) -> list[Group]:
        """The groups on a module's parameters, from the innermost of peft's nesting to the last."""
        found: list[tuple[str, list[Group | None], list[str]]] = []
        for parameter, ends in row.experts.items():
            names = [f"{module}.{end.rpartition('.')[2]}" for end in ends]
            if any(name in parts for name in names):
                found.append((parameter.rpartition(".")[2], [parts.get(name) for name in names], names))
        out = []
        for at, (parameter, stacks, _) in enumerate(found):
            present = [entry for entry in stacks if entry is not None]
            keys = tuple(t.key for entry in present for t in entry.tensors.values())
            try:
                tensors = joined(
                    [entry.tensors if entry is not None else None for entry in stacks], f"{module}.{parameter}"
                )
            except errors.AdapterOpsError as error:
                self._request.wrong(error, keys)
                continue
            self.widened[f"{module}.{parameter}"] = tensors["A"].numel // present[0].tensors["A"].numel
            if self._component is None and self._request.tell is None:
                sentence = (
                    f"{tensors['A'].where}: the experts of a layer are parameters of one module in transformers, and only the "
                    "base tells which; give its config with --base CONFIG"
                )
                tensors = {role: of_unknown_rows(tensor, sentence) for role, tensor in tensors.items()}
            count = present[0].tensors["A"].shape[0]
            options = {
                "nesting": len(found) - 1 - at,
                "parameter_name": parameter,
                "num_experts": count,
                "is_transposed": False,
            }
            name = f"{module}.{parameter}"
            out.append(present[0]._replace(name=name, method=EXPERTS, tensors=tensors, options=options))
        return out


def _embedding(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The factors of an embedding as peft has them: A (r, tokens)."""
    a = tensors.get("A")
    return {"A": a.transposed()} if a is not None and len(a.shape) == 2 else {}
