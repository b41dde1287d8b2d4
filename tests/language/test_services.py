"""What a service or task block may say, and what comes of it (rules 2, 4, 5, 7, 8, 11, 12)."""

from __future__ import annotations

import pytest

from reconciler.language.spec import (
    AddressRef,
    EnvVar,
    FileBlock,
    Health,
    Listen,
    Manifest,
    Route,
    SecretRef,
    ServiceSpec,
    TaskSpec,
    Text,
    Volume,
)
from tests.language.manifests import SEED, place, problem, read, service, task, wrong


def test_the_first_deploy_reads_as_written():
    reading = read(SEED)
    assert reading.problems == ()
    assert reading.manifest == Manifest((
        ServiceSpec(
            name="api", image="registry.example.com/api:v1", port=8080, cpu_milli=1000,
            memory_bytes=1_000_000_000,
            env=(EnvVar("DATABASE_URL", (SecretRef("db.url"),)),),
            health=Health(kind="http", path="/healthz", interval_ms=10_000),
        ),
        ServiceSpec(
            name="web", image="registry.example.com/web:v1", port=3000, replicas=2,
            cpu_milli=500, memory_bytes=512_000_000,
            health=Health(kind="http", path="/health", interval_ms=5_000),
            routes=(Route(host="app.example.com", path="/"),),
        ),
    ))


def test_every_attribute_of_a_service_reaches_its_spec():
    reading = read("""
service "api" { image = "a"; port = 80 }
service "web" {
  image = "reg:5000/web@sha256:%s"; port = 3000; replicas = 1; cpu = 0.01; memory = "1.5Gi"
  command = ["serve", ""]; entrypoint = ["/bin/web"]; user = "1000:1000"; workdir = "/srv/"
  read_only = true; tmpfs = ["/var/tmp", "/tmp"]; depends_on = ["api"]; strategy = "surge"
  max_parallel = 3; singleton = true; bake = "1m30s"; stop_timeout = "1ms"; pull = "always"
  registry_auth = "ghcr"
  env { PEER = "http://${service.api.address}/x" }
  file "/etc/web.toml" { content = "k=${ secret( web.key ) }\\n"; mode = "440" }
  health { command = ["check"]; timeout = "1s"; deadline = "5s"; healthy = 2; unhealthy = 4 }
  route "B.example.com" { path = "/api/"; websocket = true; strip_prefix = true; tls = true }
  route "*" { }
  listen "udp" { port = 53 }
  listen "tcp" { port = 5432 }
  volume "scratch" { path = "/scratch"; ephemeral = true }
}
""" % ("0" * 64))
    assert reading.problems == ()
    assert reading.manifest.services[1] == ServiceSpec(
        name="web", image="reg:5000/web@sha256:" + "0" * 64, port=3000, cpu_milli=10,
        memory_bytes=1_610_612_736, command=("serve", ""), entrypoint=("/bin/web",),
        user="1000:1000", workdir="/srv", read_only=True, tmpfs=("/tmp", "/var/tmp"),
        depends_on=("api",), strategy="surge", max_parallel=3, singleton=True, bake_ms=90_000,
        stop_timeout_ms=1, pull="always", registry_auth="ghcr",
        env=(EnvVar("PEER", (Text("http://"), AddressRef("api"), Text("/x"))),),
        files=(FileBlock("/etc/web.toml", (Text("k="), SecretRef("web.key"), Text("\n")), "0440"),),
        health=Health(kind="command", command=("check",), timeout_ms=1_000, deadline_ms=5_000,
                      healthy=2, unhealthy=4),
        routes=(Route(host="*"), Route(host="b.example.com", path="/api", websocket=True,
                                       strip_prefix=True, tls=True)),
        listens=(Listen(protocol="tcp", port=5432), Listen(protocol="udp", port=53)),
        volumes=(Volume(name="scratch", path="/scratch", ephemeral=True),),
    )


def test_every_attribute_of_a_task_reaches_its_spec():
    found = task('cpu = 2; memory = 4000000; timeout = "30d"; schedule = "*/5 0-3 1,15 JAN mon"\n'
                 'timezone = "Europe/Berlin"; overlap = "queue"; run = "after"\n'
                 'volume "v" { path = "/v"; size = "5Gi" }')
    assert found == TaskSpec(
        name="t", image="a", cpu_milli=2000, memory_bytes=4_000_000, timeout_ms=2_592_000_000,
        schedule="*/5 0-3 1,15 jan mon", timezone="Europe/Berlin", overlap="queue", run="after",
        volumes=(Volume(name="v", path="/v", size_bytes=5 * 1024**3),),
    )


def test_without_a_health_block_a_port_means_tcp_and_no_port_means_running():
    assert service("port = 80").health == Health(kind="tcp")
    assert service().health == Health(kind="running")
    assert service('port = 80; health { interval = "1s" }').health == Health(
        kind="tcp", interval_ms=1000)
    assert service("port = 80; health { tcp = true }").health == Health(kind="tcp")


@pytest.mark.parametrize(("written", "bytes_"), [
    ('"512M"', 512_000_000), ('"512000000"', 512_000_000), ("512000000", 512_000_000),
    ('"4M"', 4_000_000), ('"16T"', 16 * 10**12), ('"5000K"', 5_000_000), ('"8Mi"', 8 * 1024**2),
    ('"8192Ki"', 8 * 1024**2), ('"1Ti"', 1024**4), ('"0.5G"', 500_000_000),
])
def test_sizes_are_powers_of_1000_or_with_i_of_1024(written, bytes_):
    assert service(f"memory = {written}").memory_bytes == bytes_


@pytest.mark.parametrize(("body", "message", "hint"), [
    ('memory = "512MB"', 'must be a size such as "512M" or "1Gi", not `512MB`',
     'did you mean "512M"?'),
    ('memory = "1 GiB"', "must be a size", 'did you mean "1Gi"?'),
    ('memory = "3999999"', "must be from 4M to 16T", ""),
    ('memory = "16Ti"', "must be from 4M to 16T", ""),
    ('memory = "0.3Ki"', "must be from 4M", ""),
    ('memory = "4000000.5"', "whole number of bytes", ""),
    ("cpu = 0.009", "must be from 0.01 to 1024 cores", ""),
    ("cpu = 1024.001", "must be from 0.01 to 1024 cores", ""),
    ("cpu = 0.1234", "more than three decimals", ""),
    ('cpu = "1"', "not a string", "without quotes"),
    ("cpu = 1 + 1", "not an expression", "literals"),
    ("port = 0", "whole number from 1 to 65535", ""),
    ("port = 65536", "whole number from 1 to 65535", ""),
    ("port = 80.5", "whole number", ""),
    ("port = -1", "whole number", ""),
    ("replicas = 1001", "whole number from 0 to 1000", ""),
    ("replicas = true", "not a bool", ""),
    ("read_only = 1", "must be true or false", ""),
    ('read_only = "true"', "must be true or false", "without quotes"),
    ("read_only = null", "not `null`", "leave the attribute out"),
    ('command = "serve"', "must be a list of strings", 'write ["serve"]'),
    ('command = [1]', "must be a string, not a number", 'write it in quotes: "1"'),
    ('command = ["a", "b" == "c"]', "must be a string, not an expression", ""),
    ('command = [for x in y : x]', "not a `for` expression", ""),
    ('user = "a b"', "must be a user", ""),
    ('workdir = "srv"', "must begin with `/`", ""),
    ('workdir = "/a/../b"', "must not hold `..`", ""),
    ('tmpfs = ["/"]', "must not be the root", ""),
    ('tmpfs = ["/a", "/a/"]', "names `/a` twice", ""),
    ('strategy = "surg"', 'must be "auto", "surge", "rolling" or "recreate"',
     "did you mean `surge`?"),
    ('pull = "never"', 'must be "missing" or "always"', ""),
    ('bake = "30"', "must be a duration", 'write the unit: "30s"'),
    ("bake = 30", "must be a duration", 'write the unit: "30s"'),
    ('bake = "0s"', "must be from 1ms to 30d", ""),
    ('bake = "31d"', "must be from 1ms to 30d", ""),
    ('bake = "1.5h"', "must be a duration", "units"),
    ('bake = ""', "must be a duration", "units"),
    ('registry_auth = "-x"', "must be the name of a secret", ""),
    ("bake = secret(x)", "not a function call", 'write it in a string: "${secret(x)}"'),
    ("bake = five", "not a bare word", 'write it in quotes: "five"'),
    ("bake = {}", "not an object", "write a block"),
])
def test_a_value_that_does_not_fit_is_told_with_its_name_place_and_a_hint(body, message, hint):
    found = wrong(body)
    name = body.split(" ")[0]
    assert found.message.startswith(f"`{name}` ")
    assert message in found.message
    assert hint in found.hint
    assert found.hint
    assert (found.file, found.line) == ("a.mill", 3)
    assert found.column > len(name) + 3


@pytest.mark.parametrize(("body", "message"), [
    ("health {\n  path = \"/\"\n}", "`path` needs a service with a `port`"),
    ("health { tcp = true }", "`tcp` needs a service with a `port`"),
    ('port = 1; health { path = "/"; tcp = true }', "one of `path`, `tcp` and `command`"),
    ("port = 1; health { tcp = false }", "must be true where it is written"),
    ('port = 1; health { path = "health" }', "must begin with `/`"),
    ('port = 1; health { healthy = 0 }', "whole number from 1 to 100"),
    ("health { command = [] }", "is empty"),
    ('route "a.b" { }', "`route` needs a service with a `port`"),
    ('port = 1; route "http://a" { }', "is not a host of a route"),
    ('port = 1; route "a.b:80" { }', "is not a host of a route"),
    ('port = 1; route "a..b" { }', "is not a host of a route"),
    ('port = 1; route "a.*.b" { }', "is not a host of a route"),
    ('port = 1; route "a.b" { path = "api" }', "must begin with `/`"),
    ('port = 1; route "a.b" { path = "/api/*" }', "must not hold `*`"),
    ('port = 1; route "a.b" { path = "/a?b" }', "must be a plain path"),
    ('port = 1; route "a.b" { path = "/a/../b" }', "must not hold `//`, `.` or `..`"),
    ('port = 1; route a { }', "must stand in quotes"),
    ('port = 1; route { }', "`route` takes one name, not 0"),
    ('port = 1; route "a" "b" { }', "`route` takes one name, not 2"),
    ('env "x" { }', "`env` takes no name, not 1"),
    ('listen "tcp" { port = 1 }', "`listen` needs a service with a `port`"),
    ('port = 1; listen "http" { port = 1 }', '`listen` takes "tcp" or "udp"'),
    ('port = 1; listen "tcp" { }', "`listen` needs `port`"),
    ("env { A = 1 }", "`A` must be a string, not a number"),
    ("env { A-B { } }", "`env` holds no blocks"),
    ('env { A = "1"; A = "2" }', "`A` is already set at line 3"),
    ('env { MILL_NODE = "x" }', "is set by mill itself"),
    ('env { }\nenv { }', "`env` is already set at line 3"),
    ('env = { A = "b" }', "`env` is a block, not an attribute"),
    ('image { }', "`image` is an attribute, not a block"),
    ('file "etc" { content = "" }', "must begin with `/`"),
    ('file "/etc/" { content = "" }', "names a folder"),
    ('file "/etc" { }', "`file` needs `content`"),
    ('file "/etc" { content = ""; mode = "0999" }', "three octal digits"),
    ('volume "v" { path = "/v" }', "`volume` needs `size` or `ephemeral = true`"),
    ('volume "v" { path = "/v"; ephemeral = false }', "needs `size`"),
    ('volume "v" { path = "/v"; ephemeral = true; size = "1G" }', "takes no `size`"),
    ('volume "v" { size = "1G" }', "`volume` needs `path`"),
    ('volume "V" { path = "/v"; ephemeral = true }', "is not a name of a volume"),
    ('volume "v" { path = "/v"; size = "1G" }\nreplicas = 2', "runs one replica"),
    ('volume "v" { path = "/v"; size = "1G" }\nper_node = true', "runs one replica"),
    ('volume "v" { path = "/v"; size = "1G" }\nstrategy = "surge"', "replaced by `recreate`"),
    ('volume "v" { path = "/v"; size = "1G" }\nvolume "v" { path = "/w"; size = "1G" }',
     "written twice"),
    ('volume "v" { path = "/v"; size = "1G" }\ntmpfs = ["/v"]', "mounted twice"),
    ("replicas = 2; per_node = true", "exclude each other"),
    ("replicas = 2; singleton = true", "a singleton runs one replica"),
    ('schedule = "* * * * *"', "unknown attribute `schedule`"),
    ("replica = 2", "unknown attribute `replica`"),
    ("rout { }", "unknown block `rout`"),
    ("cpu = 1\ncpu = 1", "`cpu` is already set at line 3"),
])
def test_a_body_that_contradicts_the_language_has_one_problem(body, message):
    found = wrong(body)
    assert message in found.message
    assert found.hint
    assert found.line in {3, 4}


@pytest.mark.parametrize("image", [
    "web", "web:v1", "library/web", "localhost:5000/web:v1", "127.0.0.1:41234/a/b_c:x.y",
    "ghcr.io/org/web@sha256:" + "a" * 64, "REG.example.com/web", "[::1]:5000/web",
])
def test_an_image_is_a_reference(image):
    assert service(head=f'image = "{image}"').image == image


@pytest.mark.parametrize(("image", "hint"), [
    ("", "NAME:TAG"), ("Web", "lower case"), ("https://ghcr.io/web", "scheme"), ("web:", ""),
    ("a b", ""), ("web@sha256:12", ""), ("web:v1:v2", ""), ("a" * 600, ""), ("/web", ""),
])
def test_what_is_no_image_reference_is_refused(image, hint):
    found = wrong("", head=f'image = "{image}"')
    assert "must be an image reference" in found.message
    assert hint in found.hint
    assert place(found) == ("a.mill", 2, 9)


@pytest.mark.parametrize("name", ["a", "web", "a1", "a-b-c", "x" * 40])
def test_a_name_is_a_dns_label(name):
    assert read(f'service "{name}" {{ image = "a" }}').manifest.services[0].name == name


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a-", "a--b", "a_b", "a.b", "x" * 41, "é",
                                  "We b/../"])
def test_any_other_name_is_refused_at_its_label(name):
    found = problem(f'service "{name}" {{ image = "a" }}')
    assert "is not a name of a service" in found.message
    assert place(found) == ("a.mill", 1, 9)


@pytest.mark.parametrize("cron", ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *",
                                  "* * * 13 *", "* * * * 8", "*/0 * * * *", "5-1 * * * *",
                                  "a * * * *", "@daily", "1,,2 * * * *", "1--2 * * * *"])
def test_a_schedule_that_never_was_cron_is_refused(cron):
    found = problem(f'task "t" {{ image = "a"; schedule = "{cron}" }}')
    assert found.message.startswith("`schedule` ")


@pytest.mark.parametrize("body", ['timezone = "UTC"', 'overlap = "skip"'])
def test_what_speaks_of_a_schedule_needs_one(body):
    found = problem(f'task "t" {{ image = "a"; {body} }}')
    assert "says nothing without `schedule`" in found.message


def test_a_missing_attribute_is_told_at_the_header_of_its_block():
    found = problem('\n  service "web" {\n    port = 80\n  }\n')
    assert (found.message, place(found)) == ("a service needs `image`", ("a.mill", 2, 3))


def test_a_misspelt_attribute_is_told_with_the_name_that_was_meant():
    found = wrong("  replica = 2")
    assert found.hint == "did you mean `replicas`?"
    assert place(found) == ("a.mill", 3, 3)
