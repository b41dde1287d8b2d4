"""The canonical layout (rule 13), by example; `test_properties` has the laws."""

from __future__ import annotations

import pytest

from reconciler.language.format import format_text
from reconciler.language.problems import InvalidManifest
from tests.language.manifests import SEED, read


def test_the_whole_of_a_layout():
    assert format_text('''

# top
service   "web"   { # head
    image="a"   # c1
    port = 3000;replicas = 2 ;; cpu=0.5   # c2


    memory    = "512M" # c3
    command=["a","b"]
    entrypoint = [ # x
      "a", "b", # y
      /* z */ "c" ]

    // own
    health { path="/h";interval="5s" }
    env { C = <<EOT
hello
  EOT
  B = "x"; D = <<-X
    y
    X
}
    route "x" {path="/"} /* tail */
    env {
    }

} # end
''') == '''# top
service "web" { # head
  image = "a" # c1
  port = 3000; replicas = 2; cpu = 0.5 # c2

  memory  = "512M" # c3
  command = ["a", "b"]
  entrypoint = [
    # x
    "a",
    "b", # y
    /* z */
    "c",
  ]

  // own
  health { path = "/h"; interval = "5s" }
  env {
    C = <<EOT
hello
  EOT
    B = "x"
    D = <<-X
    y
    X
  }
  route "x" { path = "/" } /* tail */
  env {}
} # end
'''


def test_the_first_deploy_is_canonical_as_written():
    # Its lone `image` stands beside a `;` line, which takes no part in alignment.
    assert format_text(SEED) == SEED


def test_a_row_that_does_not_fit_comes_apart_and_is_aligned():
    wide = "x" * 36
    assert format_text(f'env {{ A = "{wide}"; LONG = "{wide}" # why\n}}') == (
        f'env {{\n  A = "{wide}"; LONG = "{wide}" # why\n}}\n')
    wide += wide
    assert format_text(f'env {{ A = "{wide}"; LONG = "{wide}" }} # why') == (
        f'env {{\n  A    = "{wide}"\n  LONG = "{wide}"\n}} # why\n')


@pytest.mark.parametrize(("columns", "rows"), [(100, 1), (101, 2)])
def test_a_row_may_take_a_hundred_columns(columns, rows):
    text = 'a = 1; b = "' + "x" * (columns - 13) + '"'
    assert len(text) == columns
    assert format_text(text).count("\n") == rows


def test_comments_are_aligned_with_their_neighbours_alone():
    assert format_text("a = 1 # x\nbb = 22 # y\nc = 3\nd = 4 # z\n\ne = 5 # e\n") == (
        "a  = 1  # x\nbb = 22 # y\nc  = 3\nd  = 4 # z\n\ne = 5 # e\n")


@pytest.mark.parametrize(("text", "formatted"), [
    ("", ""), ("\n\n", ""), (";", ""), ("# a", "# a\n"), ("a=1", "a = 1\n"),
    ("\ufeffa=1\r\nb=2\r\n", "a = 1\nb = 2\n"),
    ("a = - 1", "a = - 1\n"), ("a = [ ]", "a = []\n"), ("a = [\n]", "a = []\n"),
    ("a = [\n# x\n]", "a = [\n  # x\n]\n"), ("a = [1, /* x */ 2]", "a = [1, /* x */ 2]\n"),
    ("a /* x */ = 1", "a /* x */ = 1\n"), ("/* x */ a=1", "/* x */ a = 1\n"),
    ("a=1 /* x */; b=2", "a = 1 /* x */; b = 2\n"),
    ("a=1; /* x */ b=2", "a = 1; /* x */ b = 2\n"),
    ("a {}", "a {}\n"), ("a { # x\n}", "a { # x\n}\n"), ("a { /* x */ }", "a { /* x */ }\n"),
    ('a /* x */ "b" { }', 'a /* x */ "b" {}\n'), ("a=1;;", "a = 1\n"),
    ("a=1 # x\n;", "a = 1 # x\n"),
    ("a {\n\n\n  b=1\n\n\n\n  c=2\n\n}", "a {\n  b = 1\n\n  c = 2\n}\n"),
    ("a { b { c = 1 } }", "a { b { c = 1 } }\n"), ("a = x  +  1", "a = x  +  1\n"),
    ("a = {\n  b = 1\n}", "a = {\n  b = 1\n}\n"), ("a\t=\t1", "a = 1\n"),
    ("a = [\n<<E\nx\nE\n, 1]", "a = [\n<<E\nx\nE\n, 1]\n"),
    ("/* a\n  b */ c = 1", "/* a\n  b */\nc = 1\n"),
    ("a = 1; b = [\n1]; c = 2", "a = 1\nb = [\n  1,\n]\nc = 2\n"),
])
def test_small_layouts(text, formatted):
    assert format_text(text) == formatted
    assert format_text(formatted) == formatted


@pytest.mark.parametrize("text", ["a =", "a = 1 b = 2", "a {", '"', "\0", "service \"a\"\n{}",
                                  "\udc80"])
def test_what_does_not_parse_is_refused_with_its_place(text):
    with pytest.raises(InvalidManifest) as caught:
        format_text(text, "web.mill")
    assert caught.value.at.startswith("web.mill:")
    assert caught.value.problems[0].file == "web.mill"


def test_what_the_schema_refuses_is_formatted_all_the_same():
    assert format_text("nonsense=1") == "nonsense = 1\n"


def test_a_layout_keeps_the_meaning_of_the_seed():
    spaced = SEED.replace(" = ", "=").replace("\n", "\n\n\t")
    assert read(format_text(spaced)).manifest == read(SEED).manifest
