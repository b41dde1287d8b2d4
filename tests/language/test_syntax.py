"""Text that is not HCL, `;`, strings, and everything hostile (rules 3, 4, 5, 6, 8)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hcl2
import pytest

from reconciler.language.problems import Problem, render, render_all
from reconciler.language.read import read_manifest
from reconciler.language.source import MAX_FILE_BYTES
from tests.language.manifests import place, problem, read, service

ROOM = MAX_FILE_BYTES - 40


@pytest.mark.parametrize(("text", "column", "message", "hint"), [
    ("a =", 4, "unexpected end of the file", "a value is"),
    ("a = ;", 5, "unexpected `;`", "a value is"),
    ("a =\n1", 4, "unexpected end of the line", "a value is"),
    ("a", 2, "unexpected end of the file", "NAME = VALUE"),
    ("a : 1", 3, "unexpected `:`", "NAME = VALUE"),
    ("a = 'x'", 5, "unexpected `'`", "double quotes"),
    ('a = "x', 5, "the string is not closed", "<<EOT"),
    ('a = "x\n"', 5, "the string is not closed", "<<EOT"),
    ('a = "${secret("x")}"', 6, "`${` is not closed, or holds quotes", "${secret(NAME)}"),
    ('a = "%{ if x }"', 6, "template directives", "%%{"),
    ("a = <<E\nx\n", 5, "the heredoc `E` has no closing line", "alone on a line"),
    ("a = <<E\nx\nE x\n", 5, "the heredoc `E` has no closing line", "alone on a line"),
    ("/* a", 1, "the comment is never closed", "*/"),
    ("a {", 3, "`{` is never closed", ""),
    ("a = [\n1", 5, "`[` is never closed", ""),
    ("}", 1, "unexpected `}`: nothing is open", ""),
    ("a = [1}", 7, "unexpected `}`", "`[`"),
    ("a = [1; 2]", 7, "unexpected `;` inside a value", "lists take `,`"),
    ("a = { x = 1; y = 2 }", 12, "unexpected `;` inside a value", ""),
    ("a = [1 2]", 8, "unexpected `2`", "`,`"),
    ("a = .5", 5, "`.5` is not a number", "decimal"),
    ("a = 5.", 5, "`5.` is not a number", "decimal"),
    ("a = 0x10", 5, "`0x10` is not a number", "decimal"),
    ("a = 1_000", 5, "`1_000` is not a number", "decimal"),
    ("a = 5m", 5, "`5m` is not a number", '"5m"'),
    ("a = " + "9" * 33, 5, "is not a number", ""),
    ("é = 1", 1, "unexpected `é`", "ASCII"),
    ('a = [\n"b" "c"]', 5, "unexpected string", "`,`"),
    ("web\nimage = 1", 4, "unexpected end of the line", "NAME = VALUE"),
    ("a b {} }", 8, "unexpected `}`", ""),
    ('a = "b" c = "d"', 9, "`c` needs a new line or `;` before it", ""),
    ('a { } b { }', 7, "`b` needs a new line or `;` before it", ""),
    ('"a" = 1', 1, "a name is written without quotes", ""),
    ('service "a"\n{ image = "a" }', 1, "`{` must stand on the line of its block", ""),
    ("a = 1\rb = 2", 6, "a carriage return without a line feed", "CRLF"),
    ("a = \"\0\"", 6, "the character U+0000 is refused", "uXXXX"),
    ("a = \"\u202e\"", 6, "the character U+202E is refused", "uXXXX"),
    ("a = 1\ufeff", 6, "the character U+FEFF is refused", ""),
    ("a = \"\x1b[31m\"", 6, "the character U+001B is refused", ""),
])
def test_an_error_of_form_is_told_where_it_is(text, column, message, hint):
    found = [one for one in read(text).problems if message in one.message]
    assert len(found) == 1, read(text).problems
    assert hint in found[0].hint
    assert found[0].column == column


def test_bytes_that_are_not_utf8_are_told_with_their_place():
    found = read_manifest({"a.mill": "é\n\tx".encode() + b"\xff"}).problems[0]
    assert found.message == "the file is not valid UTF-8"
    assert place(found) == ("a.mill", 2, 3)


@pytest.mark.parametrize(("written", "said"), [
    (r"a\n\r\t\"\\b", 'a\n\r\t"\\b'), (r"\u00e9\U0001F600", "é\U0001F600"), ("é😀", "é😀"),
    ("$${x}", "${x}"), ("$$${x}", "$${x}"), ("%%{x}", "%{x}"), ("$x $ % %x", "$x $ % %x"),
    ("$${", "${"), ("a$", "a$"), ("{}[];#//", "{}[];#//"), ("/* x */", "/* x */"),
    ("$${a} ${var.v} b", "${a} V b"), (";", ";"),
])
def test_what_a_string_says(written, said):
    text = f'service "s" {{ image = "a"; command = ["{written}"] }}'
    reading = read('variables { v = "V" }\n' + text)
    assert reading.problems == ()
    assert reading.manifest.services[0].command == (said,)


@pytest.mark.parametrize(("written", "column"), [
    (r"ab\q", 17), (r"\u12", 15), (r"\u0000", 15), (r"\ud800", 15), (r"\U00110000", 15),
])
def test_an_escape_that_says_nothing_is_told_where_it_is(written, column):
    found = problem(f'service "s" {{ image = "a"\ncommand   = ["{written}"] }}')
    assert (found.line, found.column) == (2, column)


@pytest.mark.parametrize(("written", "said"), [
    ("<<E\nE", ""), ("<<E\n  a\n b\nE", "  a\n b\n"), ("<<E\na\n  E", "a\n"),
    ("<<-E\n    a\n\n      b\n    E", "a\n\n  b\n"),
    ("<<E\n\"x\" \\n ; # no\nE", '"x" \\n ; # no\n'),
    ("<<E\n$${x} %%{y}\nE", "${x} %{y}\n"), ("<<E\nEE\n E E\nE", "EE\n E E\n"),
])
def test_what_a_heredoc_says(written, said):
    assert service(f"command = [{written}\n]").command == (said,)


def test_a_heredoc_holds_references():
    found = service('file "/f" {\ncontent = <<-E\n    key=${secret(a.b)}\n    E\n}')
    assert [type(part).__name__ for part in found.files[0].content] == ["Text", "SecretRef", "Text"]


@pytest.mark.parametrize("body", ["${ x", "%{ if }", "${secret(a)", "${nothing}"])
def test_a_heredoc_with_a_broken_reference_is_told_at_it(body):
    file = f'file "/f" {{ content = <<E\nok\n ok {body}\nE\n}}'
    found = problem(f'service "s" {{ image = "a"\n{file} }}')
    assert place(found) == ("a.mill", 4, 5)


def test_semicolons_end_statements_as_new_lines_do():
    lines = service("cpu = 1\nreplicas = 2\nport = 3")
    assert service("cpu = 1; replicas = 2;; ; port = 3;") == lines
    assert service('env { A = "x;y" };') == service('env { A = "x;y" }')


HOSTILE = {
    "ten megabytes": (b'a = "' + b"x" * 10_000_000 + b'"', "bytes, over 256 KiB"),
    "brackets": (b"a = " + b"[" * 100_000, "nested more than 16 levels deep"),
    "blocks": (b"a {" * 50_000, "nested more than 16 levels deep"),
    "numbers": (b"a = [" + b"1," * (ROOM // 2) + b"]", "more than 60000 words and signs"),
    "sums": (b"a = 1" + b"+1" * (ROOM // 2), "more than 60000 words and signs"),
    "short sum": (b"a = 1" + b"+1" * 20_000, "stands outside any block"),
    "indices": (b"a = a" + b"[0]" * 15_000, "stands outside any block"),
    "negations": (b"a = " + b"!" * 50_000 + b"1", "unexpected `!`"),
    "heredoc": (b"a = <<E\n" + b"x\n" * (ROOM // 2), "has no closing line"),
    "heredocs": (b"".join(b"a = <<T%d\nT%d\n" % (n, n) for n in range(9000)), "outside any block"),
    "semicolons": (b";" * ROOM, "more than 60000 words and signs"),
    "an open string": (b'a = "' + b"x" * ROOM, "the string is not closed"),
    "an open comment": (b"/*" + b"x" * ROOM, "the comment is never closed"),
    "dollars": (b'a = "' + b"${" * (ROOM // 2), "`${` is not closed"),
    "backslashes": (b'a = "' + b"\\" * (ROOM - 1), "the string is not closed"),
    "digits": (b"a = " + b"9" * ROOM, "is not a number"),
    "exponent": (b'service "a" { image = "a"; port = 1e999 }', "whole number from 1 to 65535"),
    "attributes": (b"a=1\n" * 15_000, "stands outside any block"),
    "services": (b'service "a" {}\n' * 9_000, "a service needs `image`"),
    "brackets in a name": (b'service "' + b"(" * 200_000 + b'" { image = "a" }', "is not a name"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_gets_a_clear_error(name):
    text, message = HOSTILE[name]
    reading = read_manifest({"h.mill": text})
    assert message in reading.problems[0].message
    assert all(len(found.message) < 300 and found.message.isprintable()
               for found in reading.problems)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [
    b"\n" * ROOM, b"\r\n" * (ROOM // 2), b" " * ROOM, b"#\n" * (ROOM // 2), b"/**/" * (ROOM // 4),
    b";" * 50_000, b"/" * ROOM,
], ids=["new lines", "crlf", "blanks", "comments", "inline comments", "semicolons", "slashes"])
def test_a_great_deal_of_nothing_is_an_empty_manifest(text):
    assert read_manifest({"h.mill": text}).problems == ()


def test_too_much_together_is_told_before_any_of_it_is_read():
    many = read_manifest({f"{n}.mill": b"" for n in range(1001)})
    assert "1001 files" in many.problems[0].message
    much = read_manifest({f"{n}.mill": b"#" * MAX_FILE_BYTES for n in range(9)})
    assert "over 2 MiB" in much.problems[0].message


def test_too_many_words_in_the_files_together_are_told():
    reading = read_manifest({f"{n}.mill": b";" * 59_000 for n in range(6)})
    assert [(found.file, found.message) for found in reading.problems] == [
        ("4.mill", "more than 240000 words and signs in the files together")]


def test_no_message_repeats_a_literal_that_the_parser_choked_on():
    reading = read('service "a" { image = "a" "hunter2-hunter2" }', 'x = "hunter2" + "hunter2" y')
    assert reading.problems
    assert all("hunter2" not in found.message + found.hint for found in reading.problems)


def test_a_problem_is_rendered_with_its_line_and_a_caret():
    text = 'service "web" {\n  image = "a"\n\treplica = 2\n}\n'
    assert render(problem(text), text) == (
        "error: unknown attribute `replica`\n"
        "  at a.mill:3:2\n"
        "  3 |  replica = 2\n"
        "    |  ^\n"
        "hint: did you mean `replicas`?"
    )


def test_a_long_line_is_cut_around_its_caret_and_nothing_unprintable_is_shown():
    text = "x" * 500 + "\x1b" + "y" * 500
    shown = render(Problem("a.mill", 1, 501, "m\x07", ""), text).split("\n")
    assert shown[0] == "error: m\\x07"
    assert len(shown[2]) < 130
    assert shown[2][shown[3].index("^") + 1] == "y"


def test_a_place_outside_the_text_has_no_caret():
    assert render(Problem("a.mill", 9, 1, "m"), "one line") == "error: m\n  at a.mill:9:1"


def test_the_rest_is_counted():
    found = Problem("a", 1, 1, "m")
    assert render_all([found, found], 3, {"a": "x = 1"}).endswith("\n\nand 3 more")


def test_importing_the_language_does_not_import_the_grammar():
    code = ("import sys, reconciler.language.read, reconciler.language.format\n"
            "sys.exit(any(name in sys.modules for name in ('hcl2', 'lark')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_warming_leaves_the_grammar_cached():
    assert subprocess.run([sys.executable, "-m", "reconciler.language.warm"],
                          check=False).returncode == 0
    assert (Path(hcl2.__file__).parent / ".lark_cache.bin").stat().st_size > 100_000
