"""How long a step may take: its FLOPs and bytes over the rates of a chip."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxlib_methods.train.hlo import SLICES, Collectives

GIB = 2.0**30


class Chip(NamedTuple):
    """A chip, or a device's share of it.

    flops: dense bfloat16 FLOP/s. memory: bytes that a program can have. bandwidth: bytes/s of that
    memory. links: bytes/s sent over all links to other chips of the slice, half of what is printed
    as bidirectional. network: bytes/s to other slices.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float

    def share(self, num_devices: int) -> "Chip":
        """What each device has of a chip that JAX shows as several."""
        return Chip(*(rate / num_devices for rate in self))


# Rates: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x. v5e's network: its pod's 6.4 Tbps.
# Memory: what libtpu 0.0.42 names when it refuses a program.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12, 189.5 * GIB, 7380e9, 600e9, 12.5e9),
}


class Roofline(NamedTuple):
    """Seconds of a step by what it does, each alone and at the chip's full rate.

    Compute and links are lower bounds. Memory counts what every fusion reads and writes, some of
    which a TPU keeps in VMEM.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def overlapped(self) -> float:
        """All of it at the same time: the longest term."""
        return max(self)

    @property
    def one_by_one(self) -> float:
        """One after another."""
        return sum(self)

    @property
    def limit(self) -> str:
        """The name of the longest term."""
        return max(self._asdict().items(), key=lambda term: term[1])[0]


def estimate(
    chip: Chip,
    *,
    flops: float,
    memory_bytes: float,
    collectives: Collectives,
    axes: Mapping[str, int],
) -> Roofline:
    """The roofline of a device's share of a step.

    A group of n sends of a payload of P bytes, as a ring does: P (n - 1) / n for an all-gather, a
    reduce-scatter and an all-to-all, twice that for an all-reduce, P for a permute. Over slices
    each device sends its part of the payload alone.
    """
    links = network = 0.0
    for (kind, names), (_, payload) in collectives.items():
        inside = math.prod(axes[name] for name in names.split("+") if name != SLICES)
        links += sent(kind, payload, inside)
        if SLICES in names.split("+"):
            network += sent(kind, payload / inside, axes[SLICES])
    return Roofline(
        compute=flops / chip.flops,
        memory=memory_bytes / chip.bandwidth,
        links=links / chip.links,
        network=network / chip.network,
    )


def sent(kind: str, payload: float, size: int) -> float:
    """Bytes that a device of a group of `size` sends for one collective; see `estimate`."""
    if kind == "collective-permute":
        return payload if size > 1 else 0.0
    return payload * (size - 1) / size * (2 if kind == "all-reduce" else 1)
