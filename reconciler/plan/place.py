"""Where replicas go: a pure function of nodes, what they hold, and what is asked for.

Replicas of one service are spread over nodes first; then the node with the most free of its
scarcer resource is taken, then one that has the image, then the first by name. Nodes wait in one
heap by free share, so that a replica costs O(log nodes), not a look at every node.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from reconciler.fsm.records import ENDED, Allocation, Node, Slot
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec
from reconciler.plan.fields import about, cores

NODE_ADDRESSES = 253
"""Allocations that a node's /24 has addresses for (.2 to .254)."""

MAX_SHORTAGES = 50
"""Services named as too large; a full look at every node for each of 1,000 helps nobody."""

_SHARE = 10**12
"""Free shares are integers of this whole, so that all nodes of a cluster compare alike."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a node's allocations hold."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    allocations: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """An allocation that a service may keep. One that is not `fit` is dropped first."""

    alloc: str
    node: str
    slot: int
    fit: bool = True


@dataclass(frozen=True, slots=True)
class Demand:
    """A service to place: so many replicas of so much, keeping what already stands."""

    service: str
    cpu_milli: int
    memory_bytes: int
    replicas: int
    digest: str = ""
    standing: tuple[Standing, ...] = ()


@dataclass(frozen=True, slots=True)
class Shortage:
    """A service that does not fit; `missing` of its `replicas`, and the node that came nearest."""

    service: str
    missing: int
    replicas: int
    text: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The slots of each service in order, or what is short. Never both for one service."""

    slots: dict[str, tuple[Slot, ...]]
    shortages: tuple[Shortage, ...] = ()


@dataclass(slots=True)
class _Room:
    """A node while it is being filled. `key` is smaller where more is free."""

    name: str
    cpu_total: int
    memory_total: int
    cpu: int
    memory: int
    addresses: int
    key: int = field(default=0)

    def fits(self, demand: Demand) -> bool:
        return (self.cpu >= demand.cpu_milli and self.memory >= demand.memory_bytes
                and self.addresses > 0)

    def take(self, demand: Demand, sign: int = 1) -> None:
        self.cpu -= sign * demand.cpu_milli
        self.memory -= sign * demand.memory_bytes
        self.addresses -= sign
        self.rekey()

    def rekey(self) -> None:
        cpu = self.cpu * _SHARE // max(self.cpu_total, 1)
        memory = self.memory * _SHARE // max(self.memory_total, 1)
        self.key = -min(cpu, memory)


def reserved(state: State) -> dict[str, Reserved]:
    """What each node's allocations hold, all that have not ended, and what the running deploy
    has yet to place there: healing must not take it. One pass over the state."""
    cpu: Counter[str] = Counter()
    memory: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for alloc in state.allocations.values():
        if alloc.status not in ENDED:
            cpu[alloc.node] += alloc.cpu_milli
            memory[alloc.node] += alloc.memory_bytes
            count[alloc.node] += 1
    for node, spec in _promised(state):
        cpu[node] += spec.cpu_milli
        memory[node] += spec.memory_bytes
        count[node] += 1
    return {node: Reserved(cpu[node], memory[node], count[node]) for node in count}


def _promised(state: State) -> Iterator[tuple[str, ServiceSpec]]:
    """The slots of the running deploy that no allocation was scheduled for yet."""
    deploy = state.running_deploy()
    if deploy is None or deploy.committed or deploy.outcome != "running":
        return
    scheduled = {(alloc.service, alloc.slot) for alloc in state.allocations.values()
                 if alloc.deploy == deploy.id}
    for change in deploy.changes:
        spec = state.specs.get(change.spec_hash)
        for number, slot in enumerate(change.slots if spec else ()):
            if spec and not slot.keep and (change.service, number) not in scheduled:
                yield slot.node, spec


def images(state: State) -> dict[str, frozenset[str]]:
    """The nodes that have each digest, as far as kept allocations tell."""
    nodes: dict[str, set[str]] = {}
    for alloc in state.allocations.values():
        if alloc.digest and alloc.started_ms:
            nodes.setdefault(alloc.digest, set()).add(alloc.node)
    return {digest: frozenset(names) for digest, names in nodes.items()}


def standing(allocs: Iterable[Allocation], nodes: Mapping[str, Node]) -> tuple[Standing, ...]:
    """The live allocations of a service that may be kept: what is lost with its node is not, nor
    what is to replace one of them on a draining node, but does not serve yet."""
    live = [alloc for alloc in allocs
            if alloc.live and alloc.status not in ENDED and alloc.status != "stopping"
            and alloc.node in nodes and nodes[alloc.node].status != "down"]
    names = {alloc.id for alloc in live}
    return tuple(
        Standing(
            alloc.id, alloc.node, alloc.slot,
            fit=alloc.status == "healthy" and nodes[alloc.node].status == "ready",
        )
        for alloc in live
        if alloc.status == "healthy" or alloc.replaces not in names
    )


def kept(demand: Demand) -> tuple[Standing, ...]:
    """What stays of a service's standing allocations, by id.

    Where there are too many, those that do not serve go first, then those of the node that has
    most of the service, then the highest id.
    """
    staying = sorted(demand.standing, key=lambda s: s.alloc)
    crowd = Counter(s.node for s in staying)
    while len(staying) > demand.replicas:
        worst = max(staying, key=lambda s: (not s.fit, crowd[s.node], s.alloc))
        crowd[worst.node] -= 1
        staying.remove(worst)
    return tuple(staying)


def place(
    demands: Iterable[Demand],
    nodes: Iterable[Node],
    held: Mapping[str, Reserved],
    present: Mapping[str, frozenset[str]],
) -> Placement:
    """Slots for every service, or what is short for those that do not fit (the first 50).

    `held` is what is taken already, kept allocations included; `present` the nodes that have a
    digest. The largest services are placed first, because they have the fewest places to go.
    A service that does not fit takes nothing from those after it.
    """
    floor = _Floor(nodes, held)
    slots: dict[str, tuple[Slot, ...]] = {}
    shortages: list[Shortage] = []
    for demand in sorted(demands, key=floor.largest_first):
        stays = kept(demand)
        missing = demand.replicas - len(stays)
        found = floor.fill(demand, missing, Counter(s.node for s in stays),
                           present.get(demand.digest, frozenset()))
        if isinstance(found, Shortage):
            shortages.append(found)
        else:
            slots[demand.service] = _slots(demand.replicas, stays, found)
        if len(shortages) == MAX_SHORTAGES:
            break
    return Placement(slots, tuple(sorted(shortages, key=lambda s: s.service)))


class _Floor:
    """All nodes that may take something, most free first."""

    def __init__(self, nodes: Iterable[Node], held: Mapping[str, Reserved]) -> None:
        self._rooms = {node.name: _room(node, held.get(node.name, Reserved()))
                       for node in nodes if node.status == "ready"}
        self._heap = [(room.key, room.name) for room in self._rooms.values()]
        heapq.heapify(self._heap)
        self._cpu = max(1, sum(room.cpu_total for room in self._rooms.values()))
        self._memory = max(1, sum(room.memory_total for room in self._rooms.values()))

    def largest_first(self, demand: Demand) -> tuple[int, str]:
        """A sort key: the share of the whole cluster that one replica asks, then the name."""
        share = max(demand.cpu_milli * _SHARE // self._cpu,
                    demand.memory_bytes * _SHARE // self._memory)
        return -share, demand.service

    def fill(
        self, demand: Demand, count: int, on_node: Counter[str], with_image: frozenset[str]
    ) -> list[str] | Shortage:
        """Take room for `count` replicas: their nodes in order; or no room, and what is short.

        `on_node` counts the service's kept replicas; `with_image` are the nodes that have it.
        """
        filling = _Filling(demand, on_node, with_image, self._rooms, self._heap)
        taken: list[str] = []
        while len(taken) < count and (room := filling.best()) is not None:
            filling.take(room)
            taken.append(room.name)
        short = self._explain(demand, count - len(taken)) if len(taken) < count else None
        for name in taken if short else ():
            self._rooms[name].take(demand, sign=-1)
        for name in sorted(filling.touched):
            heapq.heappush(self._heap, (self._rooms[name].key, name))
        return short or taken

    def _explain(self, demand: Demand, missing: int) -> Shortage:
        """What is short, and on which node it came nearest, as the nodes are filled now."""
        text = f"{missing} of {demand.replicas} replicas of {demand.service} do not fit: "
        if self._rooms:
            nearest = min(self._rooms.values(), key=lambda r: (_deficit(r, demand), r.name))
            text += (f"each needs {cores(demand.cpu_milli)} cores and "
                     f"{about(demand.memory_bytes)} of memory; nearest is {nearest.name}, "
                     f"which has {_lacks(nearest, demand)} free")
        else:
            text += "no node is ready"
        return Shortage(demand.service, missing, demand.replicas, text)


@dataclass(slots=True)
class _Filling:
    """One service on its way into the rooms. `heaps[n]` are the nodes with n of its replicas;
    heap 0 is shared by all services, so whatever leaves it is `touched`, and is put back later.

    An entry is stale, and dropped, once its node has been filled or has moved a level.
    """

    demand: Demand
    on_node: Counter[str]
    with_image: frozenset[str]
    rooms: dict[str, _Room]
    shared: list[tuple[int, str]]
    heaps: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    level: int = 0

    def __post_init__(self) -> None:
        self.heaps[0] = self.shared

    def best(self) -> _Room | None:
        """The next node by spread, free share, image, name; None where nothing fits."""
        while True:
            room = self._most_free()
            if room is not None:
                return self._with_image(room)
            later = [level for level in self.heaps if level > self.level]
            if not later:
                return None
            self.level = min(later)

    def take(self, room: _Room) -> None:
        """Put one replica there."""
        room.take(self.demand)
        self.on_node[room.name] += 1
        self.touched.add(room.name)
        self._push(room)

    def _push(self, room: _Room) -> None:
        heap = self.heaps.setdefault(self.on_node[room.name], [])
        heapq.heappush(heap, (room.key, room.name))

    def _most_free(self) -> _Room | None:
        heap = self.heaps[self.level]
        while heap:
            key, name = heap[0]
            room = self.rooms[name]
            current = key == room.key
            if current and self._serves(room):
                return room
            heapq.heappop(heap)
            if current and self.level == 0 and name not in self.touched:
                self.touched.add(name)
                if self.on_node[name]:
                    self._push(room)
        return None

    def _serves(self, room: _Room) -> bool:
        return self.on_node[room.name] == self.level and room.fits(self.demand)

    def _with_image(self, best: _Room) -> _Room:
        """Among equally free nodes of the level, one that has the image."""
        if not self.with_image or best.name in self.with_image:
            return best
        rooms = (self.rooms.get(name) for name in self.with_image)
        equal = [room.name for room in rooms
                 if room is not None and room.key == best.key and self._serves(room)]
        return self.rooms[min(equal)] if equal else best


def _room(node: Node, held: Reserved) -> _Room:
    room = _Room(
        node.name, node.cpu_milli, node.memory_bytes, node.cpu_milli - held.cpu_milli,
        node.memory_bytes - held.memory_bytes, NODE_ADDRESSES - held.allocations,
    )
    room.rekey()
    return room


def _slots(
    replicas: int, stays: Iterable[Standing], found: Iterable[str]
) -> tuple[Slot, ...]:
    """Kept allocations stand at their own number where they can; new ones fill the gaps."""
    slots: dict[int, Slot] = {}
    moved: list[Slot] = []
    for stay in sorted(stays, key=lambda s: (s.slot, s.alloc)):
        slot = Slot(stay.node, stay.alloc)
        if stay.slot < replicas and stay.slot not in slots:
            slots[stay.slot] = slot
        else:
            moved.append(slot)
    rest = iter([*moved, *(Slot(node) for node in found)])
    return tuple(slots[number] if number in slots else next(rest) for number in range(replicas))


def _deficit(room: _Room, demand: Demand) -> int:
    """How far a node is from fitting one replica: the larger missing share, out of `_SHARE`."""
    cpu = max(0, demand.cpu_milli - room.cpu) * _SHARE // max(demand.cpu_milli, 1)
    memory = max(0, demand.memory_bytes - room.memory) * _SHARE // max(demand.memory_bytes, 1)
    return max(cpu, memory, 0 if room.addresses > 0 else _SHARE)


def _lacks(room: _Room, demand: Demand) -> str:
    short: list[str] = []
    if room.cpu < demand.cpu_milli:
        short.append(f"{cores(max(0, room.cpu))} cores")
    if room.memory < demand.memory_bytes:
        short.append(f"{about(max(0, room.memory))} of memory")
    if room.addresses <= 0:
        short.append(f"none of its {NODE_ADDRESSES} addresses")
    return " and ".join(short)
