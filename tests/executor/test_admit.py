"""Admission: what a request becomes, and what refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reconciler.errors import Conflict, NotFound, Unprocessable
from reconciler.executor.admit import Admitted, DeployRunning, Repeated
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.codec import MAX_COMMAND_BYTES, Entry, encode_entry
from reconciler.fsm.records import Origin, SecretPin, Source
from reconciler.plan.diff import RouteTaken
from reconciler.plan.plan import DoesNotFit
from tests.executor.admit_desk import Desk, desk, one, reader, registry
from tests.plan.cluster import GIB

__all__ = ["desk", "reader", "registry"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

APP = """\
service "web" {{
  image = "{host}/web:v1"
  port = 3000; replicas = 2; cpu = 0.5; memory = "512M"
  health {{ path = "/health"; interval = "5s" }}
  route "app.example.com" {{ path = "/" }}
}}

service "api" {{
  image = "{host}/api:v1"
  port = 8080; cpu = 1; memory = "1G"
  env {{ DATABASE_URL = "${{secret(db.url)}}" }}
  health {{ path = "/healthz"; interval = "10s" }}
}}
"""


async def test_the_first_deploy_is_pinned_placed_and_then_known(desk: Desk):
    web, api = desk.push("web", "web"), desk.push("api", "api")
    desk.secret("db.url", "postgres://")
    text = APP.format(host=desk.host)
    admitted = await desk.deploy(text)
    changes = {change.service: change for change in admitted.start.changes}
    assert (changes["web"].digest, changes["api"].digest) == (web, api)
    assert [slot.node for slot in changes["api"].slots] == ["node-1"]
    assert [slot.node for slot in changes["web"].slots] == ["node-2", "node-3"]
    assert changes["api"].secrets == (SecretPin("db.url", 1),)
    assert [(i.node, i.image) for i in admitted.images] == [
        ("node-1", f"{desk.host}/api:v1"), ("node-2", f"{desk.host}/web:v1"),
        ("node-3", f"{desk.host}/web:v1"),
    ]
    desk.asked.clear()
    again = await desk.admit(text)
    assert isinstance(again, Admitted)
    assert again.start.changes == ()
    assert again.stores == ()
    assert desk.asked == []


async def test_every_unknown_secret_is_listed_at_its_place(desk: Desk):
    text = one("web", more='  registry_auth = "ghcr"\n'
                           '  env {\n    A = "${secret(one)}"\n    B = "x${secret(two)}"\n  }')
    found = await desk.refused(text)
    assert [message for _, _, message in found] == [
        "no secret `ghcr` for service web", "no secret `one` for service web",
        "no secret `two` for service web",
    ]
    assert [line for line, _, _ in found] == [5, 7, 8]


async def test_a_service_of_another_manifest_must_be_live(desk: Desk):
    text = one("web", more='  env { PEER = "http://${service.api.address}" }')
    [(line, _, message)] = await desk.refused(text)
    assert line == 5
    assert message == "service web names the address of `api`, which does not exist"
    await desk.deploy(one("api"))
    assert isinstance(await desk.admit(text), Admitted)


async def test_what_is_not_built_yet_is_refused_at_its_place(desk: Desk):
    text = one("web", more='  strategy = "rolling"') + 'task "t" {\n  image = "a/b"\n}\n'
    assert await desk.refused(text) == [
        (5, 3, "not built yet: the strategy rolling"), (7, 1, "not built yet: tasks"),
    ]
    with pytest.raises(Unprocessable, match="strategy recreate is not built yet"):
        await desk.admit(one(), strategy="recreate")


async def test_mistakes_of_the_text_come_first_and_all_at_once(desk: Desk):
    found = await desk.refused(one("web", more="  cpus = 1\n  replicas = -1"))
    assert len(found) == 2


async def test_a_source_may_claim_only_what_it_was_given(desk: Desk):
    desk.cluster.do(c.PutSource(Source(name="repo", url="/x", services=("web-*",),
                                       hosts=("*.example.com",))))
    text = one("web-1", more='  route "a.example.com" {}\n  route "evil.org" {}') + one("api")
    found = await desk.refused(text, owner="repo", origin=Origin(kind="git", source="repo"))
    assert [message for _, _, message in found] == [
        "source repo may not claim the host evil.org", "source repo may not claim service api",
    ]
    assert [line for line, _, _ in found] == [6, 8]
    assert isinstance(await desk.admit(text), Admitted)


async def test_a_running_deploy_refuses_another_but_not_a_plan(desk: Desk):
    admitted = await desk.admit(one("web"))
    assert isinstance(admitted, Admitted)
    for store in admitted.stores:
        desk.cluster.do(store)
    desk.cluster.do(admitted.start)
    running = desk.cluster.state.active_deploy
    with pytest.raises(DeployRunning, match=f"deploy {running} is running") as caught:
        await desk.admit(one("api"))
    assert caught.value.status == 409
    with pytest.raises(DeployRunning):
        await desk.admission.restart("web", Origin())
    request = DeployRequest(files={"a.mill": one("api").encode()})
    assert [s.name for s in (await desk.admission.plan(request)).services] == ["api"]


async def test_a_key_that_was_used_answers_with_its_deploy(desk: Desk):
    admitted = await desk.admit(one("web"), key="k-1")
    made = desk.carry_out(admitted)
    assert await desk.admit(one("web", more="not even valid"), key="k-1") == Repeated(made)
    assert isinstance(await desk.admit(one("web"), key="k-2"), Admitted)


async def test_what_does_not_fit_is_a_conflict(desk: Desk):
    with pytest.raises(DoesNotFit) as caught:
        await desk.admit(one("web", more='  replicas = 13\n  memory = "2Gi"'))
    assert caught.value.status == 409
    assert "1 of 13 replicas of web do not fit" in caught.value.what


async def test_scaling_keeps_digest_and_containers_and_asks_nobody(desk: Desk):
    desk.push("scaled", "x")
    await desk.deploy(one("web", f"{desk.host}/scaled:v1"))
    before = desk.cluster.running("web")
    desk.push("scaled", "y")
    desk.asked.clear()
    desk.carry_out(await desk.admission.scale("web", 3, Origin(kind="scale")))
    assert desk.asked == []
    assert before.items() <= desk.cluster.running("web").items()
    assert len(desk.cluster.running("web")) == 3
    desk.carry_out(await desk.admission.scale("web", 0, Origin(kind="scale")))
    assert desk.cluster.running("web") == {}
    same = await desk.admission.scale("web", 0, Origin(kind="scale"))
    assert isinstance(same, Admitted)
    assert same.start.changes == ()
    with pytest.raises(Unprocessable):
        await desk.admission.scale("web", 1001, Origin())


async def test_a_restart_takes_the_newest_secrets_in_new_containers(desk: Desk):
    desk.secret("key", "old")
    await desk.deploy(one("web", more='  env { K = "${secret(key)}" }'))
    before = desk.cluster.running("web")
    desk.secret("key", "new")
    admitted = await desk.admission.restart("web", Origin(kind="restart"))
    assert isinstance(admitted, Admitted)
    [change] = admitted.start.changes
    assert (change.generation, change.secrets) == (1, (SecretPin("key", 2),))
    assert [(f.field, f.old, f.new) for f in admitted.view.services[0].changes] == [
        ("secret.key", "version 1", "version 2"),
    ]
    desk.carry_out(admitted)
    assert before.keys().isdisjoint(desk.cluster.running("web"))


async def test_a_rollback_brings_back_spec_image_and_secrets_without_a_registry(desk: Desk):
    desk.secret("key", "old")
    first = desk.push("rolled", "first")
    env = '  env { K = "${secret(key)}" }'
    await desk.deploy(one("web", f"{desk.host}/rolled:v1", env))
    desk.secret("key", "new")
    desk.push("rolled", "second")
    await desk.deploy(one("web", f"{desk.host}/rolled:v1", env + '\nuser = "2"'))
    desk.asked.clear()
    admitted = await desk.admission.rollback("web", None, Origin(kind="rollback"))
    assert isinstance(admitted, Admitted)
    [change] = admitted.start.changes
    assert change.digest == first
    assert change.secrets == (SecretPin("key", 1),)
    assert (change.from_revision, change.to_revision) == (2, 3)
    assert admitted.stores == ()
    assert desk.asked == []
    desk.carry_out(admitted)
    live = desk.cluster.state.live_spec("web")
    assert live is not None
    assert live.user == ""


async def test_a_rollback_of_a_restart_goes_back_to_the_older_secret(desk: Desk):
    desk.secret("key", "old")
    await desk.deploy(one("web", more='  env { K = "${secret(key)}" }'))
    desk.secret("key", "new")
    desk.carry_out(await desk.admission.restart("web", Origin(kind="restart")))
    before = desk.cluster.running("web")
    admitted = await desk.admission.rollback("web", None, Origin(kind="rollback"))
    assert isinstance(admitted, Admitted)
    assert admitted.start.changes[0].secrets == (SecretPin("key", 1),)
    desk.carry_out(admitted)
    assert before.keys().isdisjoint(desk.cluster.running("web"))


async def test_a_rollback_to_what_is_not_kept_names_what_is(desk: Desk):
    await desk.deploy(one("web"))
    with pytest.raises(Conflict, match="no revision before 1"):
        await desk.admission.rollback("web", None, Origin())
    for user in range(6):
        await desk.deploy(one("web", more=f'  user = "{user}"'))
    with pytest.raises(NotFound, match="no revision 1") as caught:
        await desk.admission.rollback("web", 1, Origin())
    assert caught.value.hint == "kept revisions: 3, 4, 5, 6, 7; 7 is live"
    with pytest.raises(Conflict, match="runs revision 7 already"):
        await desk.admission.rollback("web", 7, Origin())


async def test_an_unknown_service_is_not_found(desk: Desk):
    admission = desk.admission
    for asked in (
        admission.scale("ghost", 1, Origin()),
        admission.restart("ghost", Origin()),
        admission.rollback("ghost", None, Origin()),
    ):
        with pytest.raises(NotFound, match="no service ghost"):
            await asked


async def test_a_rollback_does_not_take_a_route_that_others_have_now(desk: Desk):
    await desk.deploy(one("web", more='  route "a.example.com" {}'))
    await desk.deploy(one("web"))
    await desk.deploy(one("api", more='  route "a.example.com" {}'))
    with pytest.raises(RouteTaken, match="claimed by api"):
        await desk.admission.rollback("web", None, Origin())


async def test_a_rollback_whose_secret_version_is_gone_says_so(desk: Desk):
    desk.secret("key", "old")
    await desk.deploy(one("web", more='  env { K = "${secret(key)}" }'))
    await desk.deploy(one("web"))
    desk.cluster.do(c.DeleteSecret("key"))
    with pytest.raises(Conflict, match="version 1 of secret key, which is gone"):
        await desk.admission.rollback("web", None, Origin())


async def test_a_scaled_service_of_a_source_is_diverged(desk: Desk):
    await desk.deploy(one("web"), owner="repo", origin=Origin(kind="git", source="repo"))
    desk.carry_out(await desk.admission.scale("web", 2, Origin(kind="scale")))
    record = desk.cluster.state.services["web"]
    assert (record.owner, record.diverged) == ("repo", True)


async def test_a_large_spec_enters_the_log_in_pieces_that_the_state_puts_together(desk: Desk):
    lines = "\n".join(f'    V{n} = "{"x" * 3900}"' for n in range(64))
    admitted = await desk.deploy(one("web", more=f"  env {{\n{lines}\n  }}"))
    assert len(admitted.stores) == 2
    assert all(len(store.data) < 256 * 1024 for store in admitted.stores)
    live = desk.cluster.state.live_spec("web")
    assert live is not None
    assert len(live.env) == 64


async def test_a_thousand_services_are_one_log_entry_and_too_many_slots_are_refused(desk: Desk):
    for number in range(4, 125):
        desk.cluster.node(f"node-{number}", number, cpu_milli=256_000, memory_bytes=999 * GIB)
    def text(replicas: int) -> dict[str, bytes]:
        services = [one(f"service-{n:04}", more=f"  replicas = {replicas}\n  memory = 4000000")
                    for n in range(1000)]
        return {f"{part}.mill": "".join(services[part::4]).encode() for part in range(4)}

    admitted = await desk.admission.admit(DeployRequest(files=text(10)))
    assert isinstance(admitted, Admitted)
    assert len(encode_entry(Entry(0, admitted.start))) < MAX_COMMAND_BYTES
    with pytest.raises(Unprocessable, match="too large for the log"):
        await desk.admission.admit(DeployRequest(files=text(29)))


async def test_a_route_taken_while_a_registry_was_slow_is_refused(desk: Desk):
    """Another deploy came and went between the first look at the state and the plan."""
    desk.push("slow", "slow")
    first = await desk.admit(one("web", more='  route "a.example.com" {}'))
    admission = desk.admission

    async def slow(name: str, auth: str | None) -> str:
        if "web" not in desk.cluster.state.services:
            desk.carry_out(first)
        return await admission.resolve(name, auth)

    late = replace(admission, resolve=slow)
    text = one("api", f"{desk.host}/slow:v1", more='  route "a.example.com" {}')
    with pytest.raises(RouteTaken):
        await late.admit(DeployRequest(files={"app.mill": text.encode()}))
