"""The arithmetic of the architecture tables: sums of integers, names and looked-up values. No `eval`.

    expression = term (("+" | "-") term)*
    term       = INTEGER | [INTEGER] NAME ("[" expression "]")*

`3b+l+1` is 3·b + l + 1, `8c` is 8·c, `widths[b-1]` an element of a list. That covers every index and every
size in the code bases that name modules; there is deliberately no product of two names and no call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Union

# The values of a TOML file that a row may refer to; lists may nest.
Value = Union[int, str, "list[Value]"]
Scope = Mapping[str, Value]
# The signed coefficient, the name (None: a plain number), the expressions in its subscripts.
Term = tuple[int, str | None, tuple["Expression", ...]]
Expression = tuple[Term, ...]

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][A-Za-z_0-9]*)|([-+\[\]]))")
_FIELD = re.compile(r"\{([^{}]*)\}")


def evaluate(text: str, scope: Scope) -> Value:
    """The value of `text`: an integer, or, where `text` is a single name, whatever that name stands for.

    Raises ValueError for a malformed expression, an unknown name, an index out of range, or a sum with
    something that is not an integer.
    """
    terms = _parse(text)
    if len(terms) == 1 and terms[0][0] == 1:
        return _look_up(terms[0], scope, text)
    return _total(terms, scope, text)


def evaluate_integer(value: Value, scope: Scope) -> int:
    """`value` itself when it is an integer, else the integer that the expression `value` stands for."""
    if isinstance(value, int):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is neither an integer nor an expression")
    return _integer(evaluate(value, scope), value)


def fill(template: str, scope: Scope) -> str:
    """`template` with every `{expression}` replaced by its value."""
    if "{" not in template:
        return template
    return _FIELD.sub(lambda match: str(evaluate(match[1], scope)), template)


def _total(expression: Expression, scope: Scope, text: str) -> int:
    return sum(term[0] * _integer(_look_up(term, scope, text), text) for term in expression)


def _look_up(term: Term, scope: Scope, text: str) -> Value:
    """What the coefficient of `term` multiplies: 1 for a plain number."""
    _, name, subscripts = term
    if name is None:
        return 1
    if name not in scope:
        raise ValueError(f"unknown name {name!r} in {text!r}; known: {', '.join(sorted(scope))}")
    value = scope[name]
    for subscript in subscripts:
        index = _total(subscript, scope, text)
        # Python's negative indices would turn a wrong table into a plausible one.
        if not isinstance(value, list) or not 0 <= index < len(value):
            raise ValueError(f"index {index} of {name!r} in {text!r} is out of range")
        value = value[index]
    return value


def _integer(value: Value, text: str) -> int:
    if isinstance(value, int):
        return value
    raise ValueError(f"{text!r} needs an integer, not {value!r}")


@lru_cache(maxsize=1024)
def _parse(text: str) -> Expression:
    tokens: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"malformed expression {text!r} at {text[position:]!r}")
        tokens.append(match[0].strip())
        position = match.end()
    expression, rest = _parse_sum(tokens, text)
    if rest:
        raise ValueError(f"malformed expression {text!r} at {rest[0]!r}")
    return expression


def _parse_sum(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    terms: list[Term] = []
    sign = 1
    while True:
        term, tokens = _parse_term(tokens, text, sign)
        terms.append(term)
        if not tokens or tokens[0] not in ("+", "-"):
            return tuple(terms), tokens
        sign = 1 if tokens[0] == "+" else -1
        tokens = tokens[1:]


def _parse_term(tokens: list[str], text: str, sign: int) -> tuple[Term, list[str]]:
    coefficient = sign
    number = bool(tokens) and tokens[0].isdigit()
    if number:
        coefficient *= int(tokens[0])
        tokens = tokens[1:]
    if not tokens or not tokens[0].isidentifier():
        if number:
            return (coefficient, None, ()), tokens
        raise ValueError(f"malformed expression {text!r}: a number or a name is missing")
    name, tokens = tokens[0], tokens[1:]
    subscripts: list[Expression] = []
    while tokens and tokens[0] == "[":
        subscript, tokens = _parse_sum(tokens[1:], text)
        if not tokens or tokens[0] != "]":
            raise ValueError(f"malformed expression {text!r}: ']' is missing")
        subscripts.append(subscript)
        tokens = tokens[1:]
    return (coefficient, name, tuple(subscripts)), tokens
