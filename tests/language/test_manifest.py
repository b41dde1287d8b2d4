"""What only shows over all files together (rules 1, 6, 9, 10, 14), and places for later stages."""

from __future__ import annotations

import pytest

from reconciler.language.problems import InvalidManifest
from reconciler.language.read import Position, read_manifest
from reconciler.language.spec import run_hash, spec_hash
from reconciler.language.unbuilt import unbuilt
from tests.language.manifests import SEED, place, problem, read


def one(name: str, body: str = "") -> str:
    return f'service "{name}" {{ image = "a"; {body} }}\n'


def test_all_files_are_one_manifest_in_any_order():
    first, second = one("a", 'depends_on = ["b"]').encode(), one("b").encode()
    forward = read_manifest({"1.mill": first, "2.mill": second})
    backward = read_manifest({"2.mill": second, "1.mill": first})
    assert forward.problems == ()
    assert forward == backward
    assert [service.name for service in forward.manifest.services] == ["a", "b"]


def test_a_name_is_taken_once_by_a_service_or_task_of_any_file():
    found = problem(one("a"), 'task "a" { image = "a" }')
    assert found.message == "the name `a` is already taken by a service at a.mill:1"
    assert place(found) == ("b.mill", 1, 6)


def test_everything_wrong_in_all_files_is_told_at_once_in_order():
    reading = read("service \"x\" {\n  port = 0\n  cpu = 0\n}\n", "a = ", one("y", "ports = 1"))
    assert [(place(found), found.message) for found in reading.problems] == [
        (("a.mill", 1, 1), "a service needs `image`"),
        (("a.mill", 2, 10), "`port` must be a whole number from 1 to 65535"),
        (("a.mill", 3, 9), "`cpu` must be from 0.01 to 1024 cores"),
        (("b.mill", 1, 4), "unexpected end of the file"),
        (("c.mill", 1, 28), "unknown attribute `ports`"),
    ]


def test_a_file_that_cannot_be_parsed_does_not_make_names_missing_elsewhere():
    found = problem(one("a", 'depends_on = ["b"]; command = ["${var.x}", "${service.b.address}"]'),
                    'service "b" { image = }')
    assert found.file == "b.mill"


def test_at_most_fifty_problems_are_told_and_then_counted():
    reading = read("\n".join(f"a{n} = 1" for n in range(73)))
    assert (len(reading.problems), reading.omitted) == (50, 23)
    with pytest.raises(InvalidManifest) as caught:
        reading.valid()
    assert caught.value.status == 422
    assert caught.value.what.startswith("the manifest has 73 problems; the first: ")
    assert caught.value.at == "a.mill:1:1"
    assert caught.value.problems == reading.problems


def test_a_cycle_is_printed_once():
    found = problem(one("a", 'depends_on = ["b"]') + one("b", 'depends_on = ["c"]')
                    + one("c", 'depends_on = ["a"]') + one("d", 'depends_on = ["a"]'))
    assert found.message == "dependencies in a cycle: a → b → c → a"
    assert (found.line, found.column) == (3, 42)


def test_a_service_that_depends_on_itself_is_a_cycle():
    assert problem(one("a", 'depends_on = ["a"]')).message.endswith(": a → a")


def test_a_chain_of_a_thousand_services_is_no_cycle():
    text = "".join(one(f"s{n}", f'depends_on = ["s{n + 1}"]') for n in range(999))
    assert read(text + one("s999")).problems == ()


@pytest.mark.parametrize(("texts", "message", "hint"), [
    ([one("api") + one("b", 'depends_on = ["apo"]')], "which no service of this manifest", "`api`"),
    (['task "t" { image = "a" }', one("b", 'depends_on = ["t"]')], "which is a task", "run ="),
    ([one("w") + one("b", 'env { A = "${service.w.address}" }')], "has no `port`", "port = N"),
    ([one("b", 'command = ["${service.w.address}"]')], "no service `w` in this manifest", "env"),
    ([one("b", 'env { A = "${service.B.address}" }')], "is not a name of a service", ""),
    ([one("b", 'env { A = "${var.tag}" }')], "unknown variable `tag`", "declare it"),
    (['variables { tag = "1" }', one("b", 'user = "${var.tga}"')], "unknown variable", "`tag`"),
    ([one("b", 'user = "${secret(x)}"')], "env values and file content only", "logs"),
    ([one("b", 'env { A = "${secret(-x)}" }')], "is not a name of a secret", "letters"),
    ([one("b", 'env { A = "${other.x}" }')], "unknown reference `${other.x}`", "$${"),
    ([one("a", 'port = 1; route "x" { }'), one("b", 'port = 1; route "X" { path = "/" }')],
     "the route x/ is already taken by service `a` at a.mill:1", ""),
    ([one("a", 'port = 1; route "x" { path = "/a" }; route "x" { path = "/a/" }')],
     "the route x/a is already taken", ""),
    ([one("a", 'port = 1; listen "tcp" { port = 9 }'),
      one("b", 'port = 1; listen "tcp" { port = 9 }')],
     "the edge port tcp 9 is already taken by service `a` at a.mill:1", ""),
    ([one("a", 'volume "v" { path = "/v"; size = "1G" }'),
      one("b", 'volume "v" { path = "/v"; size = "2G" }')], "has another size in `a`", "same"),
    (["image = \"x\""], "stands outside any block", "inside service"),
    (["servce \"x\" { }"], "unknown block `servce`", "`service`"),
    (["env { }"], "unknown block `env`", "inside a service"),
    (["service { image = \"a\" }"], "`service` takes one name, not 0", ""),
    (["service web { image = \"a\" }"], "must stand in quotes", '"web"'),
    (["variables \"x\" { }"], "`variables` takes no name", ""),
    (["variables { a = 1 }"], "`a` must be a string, not a number", ""),
    (["variables { a = \"${var.b}\"; b = \"\" }"], "must be plain text", ""),
    (["variables { a = \"1\" }", "variables { a = \"1\" }"], "already declared at a.mill:1", ""),
])
def test_what_the_manifest_alone_shows_to_be_wrong(texts, message, hint):
    found = problem(*texts)
    assert message in found.message
    assert hint in found.hint


def test_what_only_the_cluster_knows_is_listed_with_its_place():
    reading = read(one(
        "b", 'registry_auth = "ghcr"; env { A = "${secret(k)}${service.far.address}" }'))
    assert reading.problems == ()
    assert [(one.kind, one.owner, one.name, one.field, one.position)
            for one in reading.references] == [
        ("secret", "b", "ghcr", "registry_auth", Position("a.mill", 1, 44)),
        ("secret", "b", "k", "env.A", Position("a.mill", 1, 63)),
        ("service", "b", "far", "env.A", Position("a.mill", 1, 75)),
    ]


def test_an_address_outside_env_and_files_is_filled_in_from_the_manifest():
    reading = read(one("db", "port = 5432"), one("b", 'command = ["-x", "${service.db.address}"]'))
    assert reading.manifest.services[0].command == ("-x", "db.mill:5432")


def test_variables_are_filled_in_and_may_be_overridden():
    text = 'variables { tag = "v1"; host = "a.b" }\nservice "s" {\n image = "i:${var.tag}"\n' \
           'port = 1; route "${var.host}" { } }'
    assert read(text).manifest.services[0].image == "i:v1"
    changed = read(text, tag="v2", host="c.d").manifest.services[0]
    assert (changed.image, changed.routes[0].host) == ("i:v2", "c.d")


def test_an_override_that_no_file_declares_is_an_error_at_the_block():
    found = problem("# x\nvariables { tag = \"1\" }\n", tga="2")
    assert found.message == "the variable `tga` is given, but no file declares it"
    assert (found.hint, place(found)) == ("did you mean `tag`?", ("a.mill", 2, 1))


def test_what_a_variable_holds_is_text_and_not_read_again():
    text = 'variables { v = "x" }\n' + one("s", 'env { A = "${var.v}" }')
    reading = read(text, v="${secret(db)}")
    assert reading.references == ()
    assert reading.manifest.services[0].env[0].value[0].text == "${secret(db)}"


def test_variables_cannot_make_a_manifest_larger_than_2_mib():
    env = ";".join(f'A{n} = "{"${var.v}" * 10}"' for n in range(60))
    reading = read('variables { v = "%s" }\n' % ("x" * 4000) + one("s", f"env {{ {env} }}"))
    assert "over 2 MiB" in reading.problems[0].message


def test_places_of_fields_are_known_by_their_name_in_the_file_and_in_the_spec():
    reading = read(SEED)
    assert reading.at("web") == Position("a.mill", 1, 1)
    assert reading.at("web", "cpu") == reading.at("web", "cpu_milli") == Position("a.mill", 3, 30)
    assert reading.at("web", "health.path") == Position("a.mill", 4, 12)
    assert reading.at("web", "routes") == Position("a.mill", 5, 3)
    assert reading.at("web", "route.app.example.com/") == Position("a.mill", 5, 3)
    assert reading.at("api", "env.DATABASE_URL") == Position("a.mill", 11, 9)
    assert reading.at("api", "replicas") == reading.at("api") == Position("a.mill", 8, 1)


def test_specs_are_listed_in_the_order_of_the_files():
    assert [spec.name for spec in read(SEED).in_order()] == ["web", "api"]


def test_services_that_are_right_are_read_beside_one_that_is_wrong():
    reading = read(one("a"), one("b", "cpu = 0"), one("c"))
    assert [service.name for service in reading.manifest.services] == ["a", "c"]


@pytest.mark.parametrize(("left", "right"), [
    ('cpu = 1; memory = "512M"', "memory = 512000000\ncpu = 1.0"),
    ('env { A = "1"; B = "2" }', 'env {\n  B = "2" # two\n  A = "\\u0031"\n}'),
    ('env { A = "a\\nb\\n" }', "env { A = <<E\na\nb\nE\n}"),
    ('env { A = "a\\n b\\n" }', "env { A = <<-E\n    a\n     b\n  E\n}"),
    ('bake = "90s"', 'bake = "1m30s"'),
    ('port = 1; route "a" { }; route "b" { }', 'port = 1; route "B" { path = "/" }; route "a" { }'),
    ("port = 1", "port = 1; health { tcp = true }; replicas = 1"),
    ('tmpfs = ["/a", "/b"]', 'tmpfs = ["/b/", "/a"]'),
    ('file "/a" { content = ""; mode = "444" }', 'file "/a" { content = "" }'),
    ('env { A = "$${x}%%{y}" }', 'env { A = "\\u0024{x}\\u0025{y}" }'),
])
def test_texts_of_one_meaning_have_one_hash(left, right):
    first, second = (read(one("s", body)).manifest.services[0] for body in (left, right))
    assert spec_hash(first) == spec_hash(second)


def test_line_ends_and_a_byte_order_mark_do_not_change_the_hash():
    text = one("s", "env { A = <<E\nx\ny\nE\n}")
    plain, dos = read(text), read("\ufeff" + text.replace("\n", "\r\n"))
    assert spec_hash(plain.manifest.services[0]) == spec_hash(dos.manifest.services[0])
    assert plain.positions == dos.positions


def test_the_order_of_arguments_does_change_the_hash():
    first, second = (read(one("s", body)).manifest.services[0]
                     for body in ('command = ["a", "b"]', 'command = ["b", "a"]'))
    assert spec_hash(first) != spec_hash(second)
    assert run_hash(first) != run_hash(second)


def test_what_is_not_built_yet_is_named_with_its_field():
    reading = read(
        one("a", 'port = 1; listen "udp" { port = 53 }; per_node = true; strategy = "rolling"')
        + one("b", 'singleton = true; volume "v" { path = "/v"; ephemeral = true }; '
                   'file "/f" { content = "" }')
        + 'task "t" { image = "a"; schedule = "* * * * *"; run = "before" }')
    found = unbuilt(reading.manifest)
    assert [(one.name, one.field) for one in found] == [
        ("a", "per_node"), ("a", "strategy"), ("a", "listen.udp:53"), ("b", "singleton"),
        ("b", "file./f"), ("b", "volume.v"), ("t", ""), ("t", "schedule"), ("t", "run"),
    ]
    assert all(reading.at(one.name, one.field) != reading.at(one.name)
               for one in found if one.field)
    assert unbuilt(read(SEED).manifest) == []


def test_more_than_a_thousand_services_are_too_many():
    reading = read("".join(one(f"s{n}") for n in range(1001)))
    assert [found.message for found in reading.problems] == [
        "more than 1000 services in one manifest"]
    assert reading.problems[0].line == 1001


def test_the_largest_legal_manifest_reads():
    env = "; ".join(f'KEY_{n} = "{"x" * 30}"' for n in range(35))
    files = {f"{at:02}.mill": "".join(
        one(f"s{n}", f"port = 80; env {{ {env} }}") for n in range(at * 100, at * 100 + 100)
    ).encode() for at in range(10)}
    reading = read_manifest(files)
    assert reading.problems == ()
    assert len(reading.manifest.services) == 1000


def test_an_empty_manifest_is_valid():
    assert read().valid() == read("# nothing\n").valid()
