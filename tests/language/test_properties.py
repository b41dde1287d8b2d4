"""Laws over random documents: `;` is a new line, layout keeps the meaning, nothing ever raises."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reconciler.language.format import format_text
from reconciler.language.problems import InvalidManifest
from reconciler.language.read import read_manifest
from reconciler.language.spec import spec_hash
from tests.language.manifests import SEED, read

BOUNDED = settings(max_examples=150, deadline=None,
                   suppress_health_check=[HealthCheck.too_slow])

# Pieces of a string: as written between quotes, and what they say.
_PIECES = st.lists(st.sampled_from([
    *((sign, sign) for sign in ("a", ";", "{", "}", "[", "#", "/", "/*", "=", ",", " ", "é", "😀",
                                "$ ", "% ", "'", "<<E")),
    ('\\"', '"'), ("\\\\", "\\"), ("\\n", "\n"), ("\\u0041", "A"), ("$${", "${"), ("%%{", "%{"),
]), max_size=8)
_QUOTED = _PIECES.map(lambda pieces: f'"{"".join(written for written, _ in pieces)}"')
_COMMENTS = st.sampled_from(["", "", "", " # why; not { ", " // x", " /* a; } */"])
_GAPS = st.sampled_from(["\n", "\n", " # why; not {\n", " /* a; } */; ", "\n\n", "\n\n\n",
                         "\n# own line\n", "\n/* two\n  lines */\n", "; ", ";", " ; ; ",
                         "; /* between */ "])


@st.composite
def attributes(draw) -> list[str]:
    """Attributes of a service, each at most once, spaced in any way."""
    strings = st.lists(_QUOTED, max_size=3)
    choices = {
        "cpu": st.sampled_from(["1", "0.5", "2e0"]), "memory": st.just('"64M"'),
        "replicas": st.integers(0, 9).map(str), "read_only": st.sampled_from(["true", "false"]),
        "command": strings.map(lambda items: f"[{', '.join(items)}]")
        | strings.map(lambda items: "[ # list\n" + ",\n".join(items) + "\n]")
        | st.just("[<<E\n x ; y\nE\n]"),
        "user": st.just('"me"'), "bake": st.just('"1m30s"'),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), unique=True))
    space = st.sampled_from(["", " ", "  ", "\t"])
    return [f"{name}{draw(space)}={draw(space)}{draw(choices[name])}" for name in names]


@st.composite
def bodies(draw) -> list[str]:
    """Statements of a service: attributes and blocks in any order."""
    statements = [*draw(attributes()), 'image = "a"', "port=80"]
    if draw(st.booleans()):
        keys = draw(st.lists(st.sampled_from("ABC"), unique=True))
        inner = [f"{key} = {draw(_QUOTED)}" for key in keys]
        statements.append("env {" + draw(st.sampled_from([" ", "\n", " # in\n"]))
                          + draw(st.sampled_from(["; ", "\n"])).join(inner) + " }")
    if draw(st.booleans()):
        statements.append('route "a.b" { path = "/x" }')
    if draw(st.booleans()):
        statements.append('file "/f" { content = <<-T\n      text ; # no\n    T\n}')
    return draw(st.permutations(statements))


@st.composite
def documents(draw) -> str:
    parts = []
    for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3)):
        body = draw(bodies())
        inner = "".join(one.replace('"a.b"', f'"{name}.b"') + draw(_GAPS) for one in body)
        head = draw(st.sampled_from(["", "# head\n", "/* head */ "]))
        parts.append(f'{head}service  "{name}"{{{draw(st.sampled_from([" ", chr(10)]))}{inner}}}'
                     + draw(_COMMENTS))
    return "\n".join(parts)


@BOUNDED
@given(bodies())
def test_semicolons_and_new_lines_read_the_same(body):
    lines = read('service "s" {\n' + "\n".join(body) + "\n}")
    signs = read('service "s" { ' + "; ".join(body) + " }")
    assert lines.problems == signs.problems == ()
    assert lines.manifest == signs.manifest


@BOUNDED
@given(bodies(), st.randoms(use_true_random=False))
def test_the_order_of_statements_never_changes_the_hash(body, random):
    shuffled = list(body)
    random.shuffle(shuffled)
    first, second = (read('service "s" {\n' + "\n".join(lines) + "\n}").manifest.services[0]
                     for lines in (body, shuffled))
    assert spec_hash(first) == spec_hash(second)


@BOUNDED
@given(documents())
def test_layout_is_stable_and_keeps_the_meaning(text):
    before = read(text)
    assert before.problems == ()
    formatted = format_text(text)
    assert format_text(formatted) == formatted
    assert read(formatted).manifest == before.manifest
    for comment in ("# head", "/* between */", "# own line", "/* two\n  lines */"):
        assert formatted.count(comment) == text.count(comment)


@BOUNDED
@given(_PIECES)
def test_a_string_is_decoded_as_its_escapes_say(pieces):
    written, said = ("".join(side) for side in zip(*pieces, strict=True)) if pieces else ("", "")
    reading = read(f'service "s" {{ image = "a"; command = ["{written}"] }}')
    assert reading.manifest.services[0].command == (said,)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_text_only_ever_gives_problems(data):
    text = data.draw(st.just(SEED) | documents())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        stop = min(len(text), at + data.draw(st.integers(0, 6)))
        piece = data.draw(st.text(max_size=4) | st.sampled_from(
            ["{", "}", '"', "${", "%{", "<<E\n", ";", "[", "]", "(", "=", "#", "/*", "*/", "\\",
             "1", "null", ",", "\r", "\0", "for", "?", ":", "=>", "...", '""', "-", "."]))
        text = text[:at] + piece + text[stop:]
    reading = read_manifest({"a.mill": text.encode("utf-8", "surrogatepass")})
    lines = text.removeprefix("\ufeff").split("\n")
    for found in reading.problems:
        assert 1 <= found.line <= len(lines)
        assert 1 <= found.column <= len(lines[found.line - 1]) + 1
        assert found.message
        assert found.hint
    try:
        formatted = format_text(text)
    except InvalidManifest:
        return
    assert format_text(formatted) == formatted
    assert read(formatted).manifest == reading.manifest


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode(
    "utf-8", "surrogatepass")))
def test_any_bytes_give_a_reading(data):
    reading = read_manifest({"a.mill": data})
    assert reading.problems or reading.manifest.services == ()
