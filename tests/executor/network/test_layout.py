"""Names and addresses of a node's network."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.executor.containerd import network
from reconciler.executor.containerd.network import Layout, Vxlan

TAGS = st.text("0123456789abcdef", min_size=8, max_size=8) | st.just("mill")
ALLOCS = st.from_regex(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?-[a-z0-9]{6}", fullmatch=True)


@settings(deadline=None)
@given(tag=TAGS, number=st.integers(1, 253), alloc=ALLOCS.filter(lambda name: "--" not in name))
def test_interface_names_carry_the_tag_and_fit(tag: str, number: int, alloc: str) -> None:
    layout = Layout(tag, f"node-{number}", number)
    for name in (layout.bridge, layout.hub_link, layout.uplink, layout.container_link(alloc)):
        assert tag in name
        assert len(name) <= 15
    for name in (layout.hub_name, layout.node_name, layout.container_name(alloc)):
        assert name.startswith(f"mill-{tag}-")
        assert len(name) < 255


@settings(deadline=None)
@given(st.lists(st.integers(0, 36**6 - 1), min_size=2, max_size=253, unique=True))
def test_the_links_of_a_full_node_differ(numbers: list[int]) -> None:
    layout = Layout("0123abcd", "node-1", 1)
    links = {layout.container_link(f"web-{number:06}") for number in numbers}
    assert len(links) == len(numbers)


@pytest.mark.parametrize("tag", ["", "*", "../x", "UPPER", "123456789", "a-b"])
def test_a_tag_that_would_match_more_than_itself_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="tag"):
        Layout(tag, "node-1", 1)


@pytest.mark.parametrize("number", [0, 254, -1])
def test_a_number_that_is_no_address_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="node number"):
        Layout("0123abcd", "node-1", number)


@pytest.mark.parametrize("address", ["", "machine.example", "fd00::1", "10.0.0.0/8", "10.0.0.256"])
def test_a_machine_without_an_ipv4_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"[Ee]xpected|[Oo]ctet|empty|permitted"):
        Vxlan(address)


@pytest.mark.parametrize("alloc", ["", "../etc", "a/b", "-x", "a b"])
def test_an_allocation_that_is_no_file_name_is_refused(alloc: str) -> None:
    with pytest.raises(ValueError, match="allocation"):
        Layout("0123abcd", "node-1", 1).container_path(alloc)


@pytest.mark.parametrize("address", ["10.77.2.5", "10.78.1.5", "::1"])
async def test_an_address_of_another_node_is_refused_before_anything_is_made(address: str) -> None:
    with pytest.raises(ValueError, match=r"10\.77\.1\.0/24"):
        await network.ensure_container(Layout("0123abcd", "node-1", 1), "web-aaaaaa", address)
    assert await network.list_containers(Layout("0123abcd", "node-1", 1)) == []
