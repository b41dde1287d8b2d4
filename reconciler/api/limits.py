"""How many wrong tokens one address may send: a token bucket each (429 past it).

It keeps guessers from filling the log and the loop. It never stands in the way of a right token:
those have 192 bits and more, so that slowing down guesses is not what protects them.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from reconciler.clock import Clock
from reconciler.errors import MillError

BURST = 30
"""So many at once: a team behind one address with a token that was just revoked."""
PER_S = 1.0
MAX_ADDRESSES = 4_096
"""The one that was wrong longest ago is forgotten first."""
_IPV6_SITE = 64


class TooManyRequests(MillError):
    """Too many wrong tokens from this address: 429. `retry_after_s` is whole seconds."""

    status = 429

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many wrong tokens from this address",
                         hint=f"try again in {retry_after_s} s with one that is right")
        self.retry_after_s = retry_after_s


@dataclass
class _Bucket:
    left: float
    at_s: float


class Failures:
    """The buckets of all addresses, within a bound."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def exhausted(self, host: str) -> TooManyRequests | None:
        """What to answer instead of looking at another wrong token, or None."""
        bucket = self._buckets.get(_site(host))
        if bucket is None:
            return None
        left = self._left(bucket)
        return None if left >= 1 else TooManyRequests(max(1, round((1 - left) / PER_S)))

    def count(self, host: str) -> None:
        """One more wrong token came from there."""
        site = _site(host)
        bucket = self._buckets.pop(site, _Bucket(float(BURST), self._clock.monotonic()))
        left = max(0.0, self._left(bucket) - 1)
        self._buckets[site] = _Bucket(left, self._clock.monotonic())
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)

    def _left(self, bucket: _Bucket) -> float:
        passed_s = self._clock.monotonic() - bucket.at_s
        return min(float(BURST), bucket.left + passed_s * PER_S)


def _site(host: str) -> str:
    """The address; of IPv6 the /64, all of which one machine may have."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((address, _IPV6_SITE), strict=False))
