"""Trains many runs, each in its folder and each once, one process per core."""

import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Sequence
from typing import Any


def _worker(core: int, jobs: Any, cache: str, may_diverge: bool) -> None:
    os.sched_setaffinity(0, {core})  # before XLA starts its threads
    import jax

    from jaxlib_methods.train import loop, metrics
    from jaxlib_methods.train.prepare import prepare

    jax.config.update("jax_compilation_cache_dir", cache)
    while (config := jobs.get()) is not None:
        try:
            loop.train(prepare(config), stop=threading.Event(), started=time.perf_counter())
        except metrics.NonFiniteError as error:
            if not may_diverge:
                raise
            print(f"{config.workdir}: {error}", flush=True)
        print(f"finished {config.workdir}", flush=True)


def train_all(
    configs: Sequence[Any], root: pathlib.Path, *, workers: int, may_diverge: bool = False
) -> None:
    """Trains the `RunConfig`s that are not finished yet. Raises SystemExit where one fails.

    may_diverge: whether a loss that is not finite is a result, not a failure.
    """
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    cores = sorted(os.sched_getaffinity(0))[:workers]
    unique = list({config.workdir: config for config in configs}.values())
    for config in [*unique, *[None] * len(cores)]:
        queue.put(config)
    cache = str(root / "compilation_cache")
    processes = [
        context.Process(target=_worker, args=(core, queue, cache, may_diverge)) for core in cores
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a run failed; its error is above")
