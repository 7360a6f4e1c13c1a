"""What a compiled program moves: its text (HLO) read, loops multiplied by their trip counts.

XLA's own cost analysis counts the body of a loop once, whatever its length, and no collectives.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Bits of an element; others are named by their bits: f32, s8, bf16.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
# They move nothing, or what they call is counted instead.
_FREE = {
    "parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "while", "conditional", "call", "async-start", "async-update",
    "opt-barrier", "domain", "recv",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")
_VMEM = re.compile(r"S\([1-9]\d*\)")  # a layout's memory space that is not the main one
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
SLICES = "slices"  # the mesh axis that crosses the data-centre network
_ALL_REDUCE_SCATTER = "all-reduce-scatter"  # of a TPU: the fusion of an all-reduce with a slice


class Moved(NamedTuple):
    """count: collectives of one kind in a step. num_bytes: their payload, per device.

    The payload is the whole array that a group shares: the result of an all-gather, the operand
    of the others.
    """

    count: float
    num_bytes: float


Collectives = dict[tuple[str, str], Moved]  # (kind, mesh axes joined by +) -> how often, how much


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step of one device moves.

    memory_bytes: read from and written to the main memory by every instruction on its own, an
    upper bound. unknown_loops: loops without a known number of trips, see `read`.
    """

    collectives: Collectives = dataclasses.field(default_factory=dict)
    memory_bytes: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        merged = dict(self.collectives)
        for key, (count, num_bytes) in other.collectives.items():
            before = merged.get(key, Moved(0, 0))
            merged[key] = Moved(before.count + count, before.num_bytes + num_bytes)
        return Cost(
            merged,
            self.memory_bytes + other.memory_bytes,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, trips: float) -> "Cost":
        """The cost of a loop of so many trips."""
        scaled = {
            key: Moved(trips * count, trips * num_bytes)
            for key, (count, num_bytes) in self.collectives.items()
        }
        return Cost(scaled, trips * self.memory_bytes, self.unknown_loops)

    @property
    def collective_bytes(self) -> float:
        """Payload of all collectives."""
        return sum(moved.num_bytes for moved in self.collectives.values())


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool


_Known = Mapping[str, _Instruction]  # a computation's, by name


def read(text: str, axes: Mapping[str, int], *, unknown_trips: float = 1.0) -> Cost:
    """The cost of a program, from `compiled.as_text()`.

    axes: the mesh's axes and their sizes in the order of its devices. unknown_trips: what counts
    for a loop whose number of trips the program computes. A conditional counts as its branch that
    moves the most.
    """
    return _Reader(text, axes, unknown_trips).cost()


class _Reader:
    def __init__(self, text: str, axes: Mapping[str, int], unknown_trips: float) -> None:
        self._axes, self._unknown_trips = axes, unknown_trips
        self._entry, self._computations = _parse(text)
        self._once = self._seldom()
        self._cost = functools.cache(self._cost_of)
        self._reads = functools.cache(self._reads_of)

    def cost(self) -> Cost:
        return self._cost(self._entry, in_fusion=False)

    def _cost_of(self, computation: str, *, in_fusion: bool) -> Cost:
        known = {found.name: found for found in self._computations[computation]}
        total = Cost()
        for found in known.values():
            total += self._cost_of_one(found, known, in_fusion)
        return total

    def _cost_of_one(self, found: _Instruction, known: _Known, in_fusion: bool) -> Cost:
        free = in_fusion or found.opcode in _FREE or found.opcode.endswith("-done")
        traffic = 0.0 if free else self._traffic(found, known)
        total = Cost(memory_bytes=traffic)
        kind = found.opcode.removesuffix("-start")
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', found.attributes)
        if kind == "send" and transfer:  # a slice's program names no device of another one
            name = transfer[1].lower().replace("_", "-")
            size = _num_bytes(known[found.operands[0]].shape)
            return total + Cost({(name, SLICES): Moved(1, size)})
        called = _called(found.attributes)
        if kind in COLLECTIVES:
            if in_fusion and self._once.get(_channel(found), found.name) != found.name:
                return total
            return total + self._collective(kind, found, known)
        if kind == "while":
            once = self._cost(called[0], in_fusion=in_fusion)
            once += self._cost(_condition(found), in_fusion=in_fusion)
            trips = self._trips(found, known)
            if trips is None:
                return once.times(self._unknown_trips) + Cost(unknown_loops=1)
            return once.times(trips)
        if kind == "conditional":
            branches = [self._cost(name, in_fusion=in_fusion) for name in called]
            return max(branches, key=lambda cost: (cost.collective_bytes, cost.memory_bytes))
        if kind in ("call", "async", "fusion"):
            inside = in_fusion or kind == "fusion"
            for name in called:
                total += self._cost(name, in_fusion=inside)
            if any(name.startswith(_ALL_REDUCE_SCATTER) for name in called):
                total = _as_reduce_scatter(total)
        return total

    def _seldom(self) -> dict[str, str]:
        """Of each channel the collective that runs least often.

        A TPU spreads one over several fusions, to overlap it; a part of it may lie in a loop.
        """
        runs = dict.fromkeys(self._computations, 0.0) | {self._entry: 1.0}
        least: dict[str, tuple[float, str]] = {}
        for computation in reversed(self._computations):  # a caller is written behind its callees
            known = {found.name: found for found in self._computations[computation]}
            for found in known.values():
                trips: float | None = 1.0
                if found.opcode == "while":
                    trips = self._trips(found, known)
                for name in _called(found.attributes):
                    times = self._unknown_trips if trips is None else trips
                    runs[name] += runs[computation] * times
        for computation, instructions in self._computations.items():
            for found in instructions:
                channel = _channel(found)
                if channel and found.opcode.removesuffix("-start") in COLLECTIVES:
                    here = (runs[computation], found.name)
                    if channel not in least or here[0] < least[channel][0]:
                        least[channel] = here
        return {channel: name for channel, (_, name) in least.items()}

    def _trips(self, loop: _Instruction, known: _Known) -> int | None:
        """How often a loop runs: as XLA has noted it, or by its condition `i < constant`.

        A loop that may end sooner, `i < constant and ...`, counts to its bound. XLA unrolls loops:
        the step may be above 1. What is no constant begins at 0 and steps by 1.
        """
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        bound = self._bound(_condition(loop))
        if bound is None:
            return None
        number, limit = bound
        body = {found.name: found for found in self._computations[_called(loop.attributes)[0]]}
        after = _field(_root(body), number, body)
        steps = [_constant(body[name]) for name in after.operands if after.opcode == "add"]
        step = next((step for step in steps if step), 1)
        start = _constant(_field(known[loop.operands[0]], number, known)) or 0
        return max(-(-(limit - start) // step), 0)

    def _bound(self, condition: str) -> tuple[int, int] | None:
        """The field of a loop's state that counts, and the constant that it stays below."""
        inside = {found.name: found for found in self._computations[condition]}
        root = _root(inside)
        for test in (root, *(inside[name] for name in root.operands if root.opcode == "and")):
            if test.opcode == "compare" and "direction=LT" in test.attributes:
                index, limit = (inside[name] for name in test.operands)
                place = re.search(r"index=(\d+)", index.attributes)
                if place and limit.opcode == "constant":
                    return int(place[1]), int(limit.operands[0])
        return None

    def _collective(self, kind: str, found: _Instruction, known: _Known) -> Cost:
        size = sum(_num_bytes(known[name].shape) for name in found.operands)
        total = math.prod(self._axes.values())
        if kind == "collective-permute":
            listed = found.attributes.split("source_target_pairs=")[1].split("}}")[0]
            pairs = re.findall(r"\{(\d+),(\d+)", listed)
            groups = np.array(pairs, np.int64).reshape(-1, 2)
        else:
            groups = replica_groups(found.attributes, total)
        name, width = axes_of(groups, self._axes), groups.shape[1]
        if width == 1 or not name:
            return Cost()
        payload = size * width if kind == "all-gather" else size
        return Cost({(kind, name): Moved(1, payload)})

    def _traffic(self, found: _Instruction, known: _Known) -> float:
        """Bytes that an instruction reads and writes; of a slice, what it takes or changes."""
        sizes = [_num_bytes(known[name].shape, main=True) for name in found.operands]
        result = _num_bytes(found.shape, main=True)
        if found.opcode == "slice-start":
            return 2 * max(_num_bytes(found.shape) - sum(sizes), 0)
        if found.opcode.endswith(("-start", "send")):  # the result names the operand too
            return 2 * sum(sizes)
        if found.opcode in _SLICES:
            return 2 * result
        if found.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if found.opcode != "fusion":
            return result + sum(sizes)
        name = _called(found.attributes)[0]
        if any(one.opcode in COLLECTIVES for one in self._computations[name]):
            # What it hands on it does not touch.
            passed = [int(n) for n in re.findall(r": \((\d+), \{\}\)", found.attributes)]
            handed = sum(sizes[number] for number in (*passed, *set(passed)))
            return max(result + sum(sizes) - handed, 0)
        reads = (min(pair) for pair in zip(sizes, self._reads(name), strict=True))
        return sum(reads) + max(result - self._kept(name), 0)

    def _reads_of(self, fusion: str) -> list[float]:
        """Bytes that a fusion reads of each operand: of one that it only slices the slices."""
        inner = self._computations[fusion]
        parameters = [found for found in inner if found.opcode == "parameter"]
        parameters.sort(key=lambda found: int(found.operands[0]))
        return [self._read(inner, found) for found in parameters]

    def _read(self, inner: list[_Instruction], value: _Instruction) -> float:
        total, whole = 0.0, _num_bytes(value.shape)
        if value.is_root:
            return whole
        for user in (one for one in inner if value.name in one.operands):
            at_first = value.name not in user.operands[1:]
            if user.opcode in _SLICES and at_first:
                total += _num_bytes(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(inner, user)
            elif user.opcode == "fusion":
                reads = zip(user.operands, self._reads(_called(user.attributes)[0]), strict=True)
                total += sum(read for name, read in reads if name == value.name)
            elif user.opcode != "dynamic-update-slice" or not at_first:  # that is in place
                return whole
        return min(total, whole)

    def _kept(self, fusion: str) -> float:
        """Bytes of the results that a fusion leaves as they are: it updates a part in place."""
        inner = self._computations[fusion]
        shapes = {found.name: found.shape for found in inner}
        total = 0.0
        for found in inner:
            if found.opcode == "dynamic-update-slice":
                total += _num_bytes(found.shape) - _num_bytes(shapes[found.operands[1]])
            elif found.opcode == "fusion":
                total += self._kept(_called(found.attributes)[0])
        return total


def _channel(found: _Instruction) -> str:
    written = re.search(r"channel_id=(\d+)", found.attributes)
    return written[1] if written else ""


def _condition(loop: _Instruction) -> str:
    found = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    assert found is not None
    return found[1]


def _root(known: _Known) -> _Instruction:
    return next(found for found in known.values() if found.is_root)


def _field(found: _Instruction, number: int, known: _Known) -> _Instruction:
    """The field of a tuple, seen through copies."""
    while found.opcode in ("copy", "bitcast", "tuple"):
        found = known[found.operands[number if found.opcode == "tuple" else 0]]
    return found


def _constant(found: _Instruction) -> int | None:
    return int(found.operands[0]) if found.opcode == "constant" else None


def _as_reduce_scatter(cost: Cost) -> Cost:
    renamed = {("reduce-scatter", axes): moved for (_, axes), moved in cost.collectives.items()}
    return dataclasses.replace(cost, collectives=renamed)


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            header = _COMPUTATION.match(line)
            current = header[2] if header and not line.startswith("HloModule") else ""
            if current:
                computations[current] = []
                entry = current if header and header[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(found[2], found[3], bool(found[1])))
    return entry, computations


def _instruction(name: str, rest: str, is_root: bool) -> _Instruction:
    """rest: `SHAPE opcode(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    opcode, inside = rest[:begin], rest[begin + 1 : end]
    literal = opcode in ("parameter", "constant")
    operands = [inside] if literal else re.findall(r"%([\w.\-]+)", inside)
    return _Instruction(name, shape, opcode, operands, rest[end + 1 :], is_root)


def _closing(text: str, begin: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[begin:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return begin + found.start()
    raise ValueError(f"the parenthesis at {begin} of the line {text[:80]!r} is not closed")


def _called(attributes: str) -> list[str]:
    found = [name for part in _CALLED.findall(attributes) for name in part.strip("{}").split(",")]
    return [name.strip().removeprefix("%") for name in found]


def _num_bytes(shape: str, *, main: bool = False) -> float:
    """Bytes of an array or a tuple of them; with `main` of those in the main memory alone."""
    total = 0.0
    for dtype, sizes, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not (main and _VMEM.search(layout)):
            total += _bits(dtype) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _bits(dtype: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits[1]) if digits else 0


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups of a collective, int `[groups, devices of one]`, from its attributes.

    Written as lists `{{0,1},{2,3}}`, as an iota `[2,4]<=[4,2]T(1,0)`, or by axes of a mesh
    `mesh['a'=2,'b'=4] {'b'}`; `{}` is all devices.
    """
    written = attributes.split("replica_groups=", 1)[1]
    if written.startswith("mesh"):
        return _mesh_groups(written)
    if written.startswith("["):
        found = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", written)
        assert found is not None
        return _iota(found[2]).reshape(_integers(found[1]))
    listed = re.match(r"\{(\{[^}]*\},?)*\}", written)
    rows = re.findall(r"\{([\d,]+)\}", listed[0]) if listed else []
    return np.array([_integers(row) for row in rows] or [range(num_devices)], np.int64)


def _mesh_groups(written: str) -> np.ndarray:
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", written + " {}")
    assert found is not None
    names = re.findall(r"'?([\w.\-]+)'?=(\d+)", found[1])
    sizes = [int(size) for _, size in names]
    ids = np.arange(math.prod(sizes))
    if found[2]:
        ids = _iota(found[2]) if found[2].startswith("[") else np.array(_integers(found[2]))
    # An axis may be named in part, 'b':(2)3 being the 3 behind the first 2 of it.
    cut: list[int] = []
    grouped: list[int] = []
    for (name, _), size in zip(names, sizes, strict=True):
        used = re.search(rf"'?\b{re.escape(name)}\b'?(?::\((\d+)\)(\d+))?", found[3])
        before, inner = (int(used[1]), int(used[2])) if used and used[1] else (1, size)
        grouped += [len(cut) + 1] if used else []
        cut += [before, inner, size // (before * inner)]
    others = [axis for axis in range(len(cut)) if axis not in grouped]
    width = math.prod(cut[axis] for axis in grouped)
    return ids.reshape(cut).transpose(*others, *grouped).reshape(-1, width)


def _iota(written: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 in this shape, transposed; flat."""
    shape, _, order = written.partition("T")
    sizes = _integers(shape.strip("[]"))
    found = np.arange(math.prod(sizes)).reshape(sizes)
    return (found.transpose(_integers(order.strip("()"))) if order else found).reshape(-1)


def _integers(written: str) -> list[int]:
    return [int(number) for number in written.split(",") if number]


def axes_of(groups: np.ndarray, axes: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by `+`."""
    places = np.stack(np.unravel_index(groups, tuple(axes.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(_chosen(axes, differ))


def _chosen(axes: Mapping[str, int], differ: np.ndarray) -> Iterator[str]:
    return (name for name, moves in zip(axes, differ, strict=True) if moves)
