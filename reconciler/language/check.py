"""What only the whole manifest shows: names that are missing, cycles, claims that clash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reconciler.language.ledger import Claim, Ledger, Use
from reconciler.language.problems import quoted


def check(ledger: Ledger) -> None:
    """Write down every flaw between services, in any order."""
    _check_depends(ledger)
    _check_cycles(ledger)
    _check_addresses(ledger)
    _check_claims(ledger, ledger.routes, "the route {0}{1}")
    _check_claims(ledger, ledger.listens, "the edge port {0} {1}")
    _check_volumes(ledger)


def _check_depends(ledger: Ledger) -> None:
    services = [name for name, header in ledger.headers.items() if header.kind == "service"]
    for use in ledger.depends:
        header = ledger.headers.get(use.name)
        if header is None:
            if not ledger.unread:
                ledger.flaw(use.place, f"`depends_on` names {quoted(use.name)}, which no service "
                            "of this manifest is called", ledger.near(use.name, services))
        elif header.kind == "task":
            ledger.flaw(use.place, f"`depends_on` names {quoted(use.name)}, which is a task",
                        'a task that must come first says run = "before"')


def _check_cycles(ledger: Ledger) -> None:
    """Each cycle once, at the dependency that closes it, as `a → b → a`."""
    edges: dict[str, list[Use]] = {}
    for use in ledger.depends:
        edges.setdefault(use.owner, []).append(use)
    done: set[str] = set()
    for start in edges:
        _walk(ledger, edges, start, done)


def _walk(ledger: Ledger, edges: Mapping[str, list[Use]], start: str, done: set[str]) -> None:
    """Depth first without recursion: a chain may be 1,000 long."""
    if start in done:
        return
    trail, ahead = [start], [iter(edges.get(start, ()))]
    on_trail = {start}
    while trail:
        use = next(ahead[-1], None)
        if use is None:
            ahead.pop()
            on_trail.discard(trail[-1])
            done.add(trail.pop())
        elif use.name in on_trail:
            cycle = [*trail[trail.index(use.name) :], use.name]
            ledger.flaw(use.place, "dependencies in a cycle: " + _spoken(cycle),
                        "none of them could start first; take one dependency out")
        elif use.name not in done:
            trail.append(use.name)
            on_trail.add(use.name)
            ahead.append(iter(edges.get(use.name, ())))


def _spoken(cycle: list[str]) -> str:
    if len(cycle) > 12:
        cycle = [*cycle[:6], f"({len(cycle) - 11} more)", *cycle[-5:]]
    return " → ".join(cycle)


def _check_addresses(ledger: Ledger) -> None:
    """A service of another manifest may be meant; the plan sees whether there is one."""
    for use in ledger.addresses:
        header = ledger.headers.get(use.name)
        if header is None:
            continue
        if header.kind == "task":
            ledger.flaw(use.place, f"{quoted(use.name)} is a task; it has no address of its own",
                        "only services have one")
        elif header.port is None:
            ledger.flaw(use.place, f"the service {quoted(use.name)} has no `port`, so no address",
                        f"add port = N to service {quoted(use.name)}")


def _check_claims(ledger: Ledger, claims: Iterable[Claim], spoken: str) -> None:
    first: dict[tuple[str, ...], Claim] = {}
    for claim in sorted(claims, key=lambda one: one.place):
        held = first.setdefault(claim.what, claim)
        if held is not claim:
            ledger.flaw(claim.place, f"{spoken.format(*claim.what)} is already taken by service "
                        f"`{held.owner}` at {ledger.where(held.place)}",
                        "one of the two must give it up")


def _check_volumes(ledger: Ledger) -> None:
    """One volume may be shared, but it has one size."""
    first: dict[str, Claim] = {}
    for claim in sorted(ledger.volumes, key=lambda one: one.place):
        name, size = claim.what
        held = first.setdefault(name, claim)
        if held.what[1] != size:
            ledger.flaw(claim.place, f"the volume `{name}` has another size in `{held.owner}` "
                        f"at {ledger.where(held.place)}", "write the same size in both")
