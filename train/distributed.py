"""Starting `jax.distributed` where a run has more than one process, and stopping it together."""

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PORT = 8476
HOSTS = "JAXLIB_METHODS_HOSTS"  # plain ssh: the same comma-separated list on every host
HEARTBEAT = "JAXLIB_METHODS_HEARTBEAT_SECS"
INTERRUPTED = 128 + signal.SIGINT  # exit status, as a shell gives it
HEARTBEAT_SECS = 100  # a process that is silent for so long is dead, and ends the others
JOIN = "JAXLIB_METHODS_JOIN_SECS"
JOIN_SECS = 3600  # a host may tokenise its corpus first
_SAY_SECS = 60.0


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a run, before any device is touched; one process needs nothing.

    In this order: an address given (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID);
    a list of hosts (JAXLIB_METHODS_HOSTS=host0,host1, the first one coordinates); Slurm with more
    than one task; a machine with TPUs. The last two are found out by JAX itself.
    A process that dies ends the others, with its number in their logs, as soon as it has been
    silent for JAXLIB_METHODS_HEARTBEAT_SECS, 100 by default.
    Raises ValueError where the variables contradict each other, or where not all processes have
    come within JAXLIB_METHODS_JOIN_SECS, 3600 by default.
    """
    silence = _seconds(environment, HEARTBEAT, HEARTBEAT_SECS)
    patience = _seconds(environment, JOIN, JOIN_SECS)
    arguments = process_arguments(
        environment, hostname=socket.gethostname(), has_tpu=_has_tpu(environment)
    )
    if arguments is not None and not jax.distributed.is_initialized():
        _join(arguments | {"heartbeat_timeout_seconds": silence}, patience)


def _seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value} must be a number of seconds, at least 1")
    return int(value)


def _join(arguments: Mapping[str, Any], patience: int) -> None:
    """Calls `jax.distributed.initialize` and says every minute that it waits.

    In a thread of its own: where its own time is over it aborts the process with a stack trace.
    """
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=patience + 60)
        except Exception as error:  # raised below
            failed.append(error)

    who = "all processes of the run"
    if "num_processes" in arguments:
        who = f"{arguments['num_processes']} processes at {arguments['coordinator_address']}"
    thread = threading.Thread(target=connect, name="join", daemon=True)
    begun = time.monotonic()
    thread.start()
    while thread.is_alive():
        waited = time.monotonic() - begun
        if waited >= patience:
            raise ValueError(
                f"waited {patience} s for {who}, and not all have come; look why in the others' "
                f"logs, or set {JOIN} to more seconds"
            )
        print(f"waiting for {who}, {waited:.0f} s so far", file=sys.stderr, flush=True)
        thread.join(min(_SAY_SECS, patience - waited))
    if failed:
        raise failed[0]


def _has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will find TPUs here: the driver's devices and the library that uses them."""
    devices = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    return bool(devices) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def process_arguments(
    environment: Mapping[str, str], *, hostname: str, has_tpu: bool = False
) -> dict | None:
    """Arguments of `jax.distributed.initialize`, or None for a run of one process.

    has_tpu: TPUs are here; a pod's processes do not show in the environment on every platform.
    """
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return _from_address(environment)
    if environment.get(HOSTS):
        return _from_hosts(environment[HOSTS], hostname)
    slurm = int(environment.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in environment
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tpu_pod = len(workers) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return {} if slurm or tpu_pod or has_tpu else None


def _from_address(environment: Mapping[str, str]) -> dict:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not environment.get(name, "").isdigit()]
    if missing:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={environment['JAX_COORDINATOR_ADDRESS']} also needs "
            f"{' and '.join(missing)} as a number"
        )
    count, index = (int(environment[name]) for name in names)
    if not index < count:
        raise ValueError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}")
    return {
        "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
        "num_processes": count,
        "process_id": index,
    }


def _from_hosts(listed: str, hostname: str) -> dict:
    hosts = [host.strip() for host in listed.split(",")]
    short = [host.split(".")[0] for host in hosts]
    mine = hostname.split(".")[0]
    if short.count(mine) != 1:
        raise ValueError(
            f"{HOSTS}={listed} must name this host, {hostname}, exactly once; use "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID instead"
        )
    return {
        "coordinator_address": f"{hosts[0]}:{PORT}",
        "num_processes": len(hosts),
        "process_id": short.index(mine),
    }


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C ends the process at once.

    Entered after `initialize`, whose handler it takes the place of. What ends with status 0 after
    Ctrl-C ends with 130 instead, so that a shell's `&&` does not go on.

    JAX's own notice is not used: Orbax asks for it too, from a thread and with other numbers, and
    a process that had passed the number agreed upon would never hear of it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        interrupted.set()
        stop.set()

    handlers = {signal.SIGTERM: lambda *_: stop.set(), signal.SIGINT: interrupt}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    except SystemExit as end:
        if interrupted.is_set() and not end.code:
            raise SystemExit(INTERRUPTED) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class StopVote:
    """Whether any process wants to stop, with the same answer at the same step on all of them.

    The flags are summed on the devices and the sum is read one call later, so that no process
    waits for the step under way.
    """

    def __init__(self, mesh: Mesh, stop: threading.Event) -> None:
        self._stop, self._pending = stop, None
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count = len(self._flags.addressable_devices)
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Called once a step by every process."""
        if jax.process_count() == 1:
            return self._stop.is_set()
        flags = np.full(self._count, self._stop.is_set(), np.int32)
        before = self._pending
        self._pending = self._sum(jax.make_array_from_process_local_data(self._flags, flags))
        return before is not None and int(before) > 0
