"""Which implementation of an operation runs, and the sentence that says why not the other."""

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import Any, Literal, get_args

import jax

Implementation = Literal["auto", "xla", "pallas"]

_log = logging.getLogger(__name__)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


def platform() -> str:
    """The platform that programs are lowered for: JAX's default, or that of `lowering_for`.

    Named as `jax.default_backend` names them: "cpu", "gpu" or "tpu".
    """
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Traces for another platform than JAX's default: compilation ahead of time."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Traces kernels that any platform interprets, slowly: for tests of their numbers."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpret() -> bool:
    """Whether kernels are traced to be interpreted, see `interpreted`."""
    return _interpreted.get()


def gpu_interpreter() -> Any:
    """What `plgpu.kernel` takes to be interpreted, races refused; None: JAX 0.10 cannot do it."""
    from jax.experimental.pallas import mosaic_gpu

    make = getattr(mosaic_gpu, "InterpretGPUParams", None)
    return make and make(detect_races=True)


def gpu_why_not() -> str | None:
    """Why kernels for Hopper do not run on what programs are lowered for, as a clause."""
    if interpret():
        missing = gpu_interpreter() is None
        return "JAX interprets kernels for GPUs from 0.11 on" if missing else None
    if jax.default_backend() != "gpu":  # ahead of time, for one that is not here
        return None
    device: Any = jax.local_devices()[0]
    found = device.compute_capability
    if found == "9.0":
        return None
    return (
        f"GPU kernels are for compute capability 9.0 (Hopper) and {device.device_kind} has {found}"
    )


def choose(
    op: str,
    implementation: Implementation,
    *,
    unsupported: str | None,
    wins_on: Collection[str] = (),
    kernels: Collection[str] = ("tpu",),
) -> Literal["xla", "pallas"]:
    """The implementation of `op` that runs.

    unsupported: why the kernel cannot take these arguments, as a clause; None where it can.
    wins_on: platforms where the kernel was measured to be faster. kernels: platforms it is
    written for. `auto` is the kernel on the former alone, and logs once what it chose and why;
    `pallas` is the kernel or a ValueError that says why not.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"{op}: unknown implementation {implementation!r}; choose one of "
            f"{', '.join(get_args(Implementation))}"
        )
    if implementation == "xla":
        return "xla"
    here = platform()
    missing = here not in kernels and not interpret()
    if implementation == "pallas":
        why_not = unsupported
        if why_not is None and missing:
            why_not = f"no kernel is written for {here}, only for {', '.join(sorted(kernels))}"
        if why_not is not None:
            raise ValueError(f"{op}: pallas was asked for, but {why_not}; choose auto or xla")
        return "pallas"
    if here not in wins_on:
        choice, reason = "xla", f"no kernel is known to be faster on {here}"
    elif unsupported is not None:
        choice, reason = "xla", unsupported
    else:
        choice, reason = "pallas", f"it is the faster one on {here}"
    log_once(op, choice, reason)
    return choice


def with_tangents_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, whose own derivatives are those of `plain`: the same function in plain JAX."""
    op = jax.custom_jvp(kernel)

    @op.defjvp
    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        return op(*primals), jax.jvp(plain, primals, tangents)[1]

    return op


@functools.cache
def log_once(op: str, choice: str, reason: str) -> None:
    """Says what `auto` chose and why, the first time that it did."""
    _log.info("%s runs as %s: %s", op, choice, reason)
