"""Cron expressions: five fields, read to say at once what is wrong with them."""

from __future__ import annotations

import re

from reconciler.language.ledger import Cursor
from reconciler.language.problems import quoted
from reconciler.language.syntax import Value
from reconciler.language.values import Unfit, text

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# crontab(5): minute, hour, day of month, month, day of week (0 and 7 are Sunday).
_FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 7, _DAYS),
)
_TERM = re.compile(r"(\*|[a-z0-9]{1,3}(?:-[a-z0-9]{1,3})?)(?:/([0-9]{1,3}))?")
_EXAMPLE = 'write MINUTE HOUR DAY MONTH WEEKDAY, such as "0 3 * * *" for every day at 3'


def schedule(cursor: Cursor, value: Value) -> str:
    """A cron expression in lower case with single blanks."""
    written = text(cursor, value)
    fields = written.lower().split()
    if len(written) > 200 or len(fields) != len(_FIELDS):
        raise Unfit(value.start, f"must be five fields of cron, not {quoted(written)}", _EXAMPLE)
    for field, (name, low, high, words) in zip(fields, _FIELDS, strict=True):
        for term in field.split(","):
            if not _fits(term, low, high, words):
                raise Unfit(value.start, f"has no {name} {quoted(term)}",
                            f"{low} to {high}, `*`, ranges such as {low}-{low + 3}, steps such "
                            "as */5")
    return " ".join(fields)


def _fits(term: str, low: int, high: int, words: tuple[str, ...]) -> bool:
    found = _TERM.fullmatch(term)
    if not found or (found[2] and not 1 <= int(found[2]) <= high):
        return False
    if found[1] == "*":
        return True
    ends = [words.index(end) + low if end in words else int(end) if end.isdigit() else -1
            for end in found[1].split("-")]
    return low <= ends[0] <= ends[-1] <= high
