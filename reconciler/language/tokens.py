"""One pass over the text before the grammar: strings, comments, `;`, and the bounds on nesting.

The grammar of python-hcl2 then sees structure alone. In a masked text of the same length each
string or heredoc is one name made of `_` (its text is decoded here in the house, by offset), a
comment is blank, a `;` between statements is a new line and a run of new lines is one. So every
offset stays true, no secret or literal can turn up in a parser's error, and what is slow or lax
in the grammar (heredocs, escapes, `$${`, long runs of blank lines) never reaches it.
"""

from __future__ import annotations

import re
from typing import NoReturn

import msgspec

from reconciler.language.problems import Flaw, quoted
from reconciler.language.source import Source

MAX_NESTING = 16
MAX_TOKENS = 60_000  # a file: 256 KiB of ordinary services has 40,000

# At each place one alternative alone can match, so that a string without an end is found out in one
# pass. (A possessive `*+` would do, but it is broken in Python 3.11.2, Debian 12's own.)
_INSIDE = r'(?:[^"\\\n$%]|\\[^\n]|\$\$\{|%%\{|\$\{[^{}"\n]*\}|\$(?!\$?\{)|%(?!%?\{))*'
_TOKEN = re.compile(
    r"""
    (?P<blank>[ \t\n]+)
  | (?P<word>[A-Za-z0-9_.\-]+)
  | (?P<string>\"""" + _INSIDE + r"""\")
  | (?P<semicolon>;)
  | (?P<open>[{(\[])
  | (?P<close>[})\]])
  | (?P<comment>\#[^\n]*|//[^\n]*|/\*(?s:.*?)\*/)
  | (?P<heredoc><<-?(?P<tag>[A-Za-z][A-Za-z0-9._-]*)[ \t]*\n)
  | (?P<other>.)
    """,
    re.X,
)
_STRING_BEGIN = re.compile(f'"{_INSIDE}')
_NUMBER = re.compile(r"-?[0-9]{1,32}(?:\.[0-9]{1,32})?(?:[eE][+-]?[0-9]{1,3})?")
_LIKE_NUMBER = re.compile(r"-?\.?[0-9]")
_BLANK_RUN = re.compile(r"\n[ \t\n]*\n[ \t\n]*")
_CLOSES = {")": "(", "]": "[", "}": "{"}
_PAIRS = {opened: closed for closed, opened in _CLOSES.items()}
# A `{` after one of these opens an object, not a block.
_BEFORE_OBJECT = frozenset("=:,?([+-*/%!&|<>")


class Scan(msgspec.Struct, frozen=True):
    """`masked` for the grammar; `strings` from a mask's first `_` to the token's (start, end)."""

    source: Source
    masked: str
    strings: dict[int, tuple[int, int]]
    comments: tuple[tuple[int, int], ...]
    tokens: int


def scan(source: Source) -> Scan:
    """Read the tokens of one file; raises `Flaw` at the first that cannot stand."""
    scanner = _Scanner(source.text)
    scanner.run()
    masked = _BLANK_RUN.sub(lambda run: "\n" + " " * (len(run[0]) - 1), "".join(scanner.pieces))
    return Scan(source, masked, scanner.strings, tuple(scanner.comments), scanner.tokens)


class _Scanner:
    """The pass itself: `pieces` become the masked text, `stack` holds what is open."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces: list[str] = []
        self.strings: dict[int, tuple[int, int]] = {}
        self.comments: list[tuple[int, int]] = []
        self.stack: list[tuple[str, int]] = []
        self.tokens = 0

    def run(self) -> None:
        text, size, match, pieces = self.text, len(self.text), _TOKEN.match, self.pieces
        at, before = 0, "\n"
        while at < size:
            found = match(text, at)
            assert found is not None
            kind, piece, end = found.lastgroup, found[0], found.end()
            if kind == "blank":
                pieces.append(piece)
            elif kind == "comment":
                self.comments.append((at, end))
                pieces.append(" " * len(piece))
            else:
                self.tokens += 1
                if self.tokens > MAX_TOKENS:
                    raise Flaw(at, f"more than {MAX_TOKENS} words and signs in one file",
                               "split the file")
                if kind == "heredoc":
                    end = _heredoc_end(text, at, end, found["tag"])
                    piece = text[at:end]
                pieces.append(self._token(kind, piece, at, before))
                before = piece[-1]
            at = end
        if self.stack:
            opened, where = self.stack[-1]
            sign = "{" if opened == "object" else opened
            raise Flaw(where, f"`{sign}` is never closed", f"add the closing `{_PAIRS[sign]}`")

    def _token(self, kind: str | None, piece: str, at: int, before: str) -> str:
        """What stands for the token in the masked text."""
        if kind in {"string", "heredoc"}:
            self.strings[at + 1] = (at, at + len(piece))
            return _mask(len(piece))
        if kind == "word":
            _check_word(piece, at)
        elif kind == "semicolon":
            _check_semicolon(self.stack, at)
            return "\n"
        elif kind == "open":
            opens = "object" if piece == "{" and before in _BEFORE_OBJECT else piece
            self.stack.append((opens, at))
            if len(self.stack) > MAX_NESTING:
                raise Flaw(at, f"nested more than {MAX_NESTING} levels deep",
                           "a manifest needs three: service, health, [ ]")
        elif kind == "close":
            _close(self.stack, piece, at)
        else:
            _check_other(self.text, at)
        return piece


def _mask(length: int) -> str:
    """A name that begins one after the string; a blank behind keeps the next word apart."""
    return " _" if length == 2 else " " + "_" * (length - 2) + " "


def mask_length(start: int, end: int) -> int:
    """How many `_` stand for the string token from `start` to `end`."""
    return max(1, end - start - 2)


def _heredoc_end(text: str, start: int, body: int, tag: str) -> int:
    """Where the heredoc ends: behind its closing tag, which stands alone on its line."""
    at = body
    while True:
        stop = text.find("\n", at)
        line = text[at:] if stop < 0 else text[at:stop]
        if line.lstrip(" \t") == tag:
            return at + len(line)
        if stop < 0:
            raise Flaw(start, f"the heredoc {quoted(tag)} has no closing line",
                       f"end it with {tag} alone on a line")
        at = stop + 1


def _check_semicolon(stack: list[tuple[str, int]], at: int) -> None:
    if stack and stack[-1][0] != "{":
        raise Flaw(at, "unexpected `;` inside a value",
                   "`;` separates attributes and blocks; lists take `,`")


def _close(stack: list[tuple[str, int]], sign: str, at: int) -> None:
    if not stack:
        raise Flaw(at, f"unexpected `{sign}`: nothing is open here", "take it out")
    opened = "{" if stack[-1][0] == "object" else stack[-1][0]
    if opened != _CLOSES[sign]:
        raise Flaw(at, f"unexpected `{sign}`", f"a `{opened}` before it is still open")
    stack.pop()


def _check_word(word: str, at: int) -> None:
    """What begins like a number must be one, as the language writes numbers."""
    if _LIKE_NUMBER.match(word) and not _NUMBER.fullmatch(word):
        plain = word[0].isdigit() and word[-1].isalpha() and "x" not in word
        raise Flaw(at, f"{quoted(word)} is not a number",
                   f'write it in quotes: "{word[:20]}"' if plain
                   else "numbers are decimal, such as 1000 or 0.5")


def _check_other(text: str, at: int) -> None:
    """Signs that only stand here because what they begin does not end."""
    sign = text[at]
    if sign == '"':
        _fail_string(text, at)
    if sign == "/" and text.startswith("/*", at):
        raise Flaw(at, "the comment is never closed", "end it with `*/`")
    if sign == "'":
        raise Flaw(at, "unexpected `'`", 'strings are written in double quotes: "..."')


def _fail_string(text: str, at: int) -> NoReturn:
    begun = _STRING_BEGIN.match(text, at)
    assert begun is not None
    stop = begun.end()
    if text.startswith("%{", stop):
        raise Flaw(stop, "template directives `%{...}` are not part of the language",
                   "write the text out; `%%{` is a literal `%{`")
    if text.startswith("${", stop):
        raise Flaw(stop, "`${` is not closed, or holds quotes or braces",
                   "write ${secret(NAME)}, ${service.NAME.address} or ${var.NAME}; "
                   "`$${` is a literal `${`")
    raise Flaw(at, "the string is not closed on its line",
               'add the closing `"`; text of several lines is a heredoc: <<EOT')
