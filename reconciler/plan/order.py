"""The order in which services start: those that others depend on come first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from reconciler.language.spec import ServiceSpec

Depends = Mapping[str, Iterable[str]]
"""Each service's `depends_on`. Names that are no key are met already, and ignored."""


def depends(specs: Iterable[ServiceSpec]) -> dict[str, tuple[str, ...]]:
    """Each service's `depends_on`, by name."""
    return {spec.name: spec.depends_on for spec in specs}


def waves(needs: Depends) -> tuple[tuple[str, ...], ...]:
    """Services in levels, each sorted: a level needs only what stands in those before it.

    Kahn's topological sort, level by level. What is on a cycle or behind one is left out, so
    check `cycle` first.
    """
    waiting = {name: {n for n in on if n in needs and n != name} for name, on in needs.items()}
    dependents: dict[str, list[str]] = {}
    for name, on in waiting.items():
        for before in on:
            dependents.setdefault(before, []).append(name)
    level = sorted(name for name, on in waiting.items() if not on)
    levels: list[tuple[str, ...]] = []
    while level:
        levels.append(tuple(level))
        free: list[str] = []
        for done in level:
            for name in dependents.get(done, ()):
                waiting[name].discard(done)
                if not waiting[name]:
                    free.append(name)
        level = sorted(free)
    return tuple(levels)


def cycle(needs: Depends) -> tuple[str, ...]:
    """The first dependency cycle by name, `("a", "b", "a")`; empty where there is none."""
    edges = {name: sorted(n for n in on if n in needs) for name, on in needs.items()}
    done: set[str] = set()
    for start in sorted(edges):
        path: list[str] = []
        at: dict[str, int] = {}
        stack: list[tuple[str, int]] = [(start, 0)]
        # An explicit stack: a chain of 1,000 services is legal and deeper than Python recurses.
        while stack:
            name, depth = stack.pop()
            done.update(path[depth:])
            del path[depth:]
            if name in done:
                continue
            if name in at:
                return (*path[at[name]:], name)
            at[name] = len(path)
            path.append(name)
            stack.extend((n, len(path)) for n in reversed(edges[name]))
        done.update(path)
    return ()


def longest_ms(needs: Depends, weight_ms: Callable[[str], int]) -> int:
    """The heaviest chain of dependencies, in milliseconds: each service's `weight_ms` summed."""
    finish: dict[str, int] = {}
    for level in waves(needs):
        for name in level:
            before = max((finish[n] for n in needs[name] if n in finish), default=0)
            finish[name] = before + weight_ms(name)
    return max(finish.values(), default=0)
