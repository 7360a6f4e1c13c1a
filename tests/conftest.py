"""Shared by all tests: eight CPU devices, set before jax starts, and strict rank promotion.

`JAX_PLATFORMS=cuda pytest tests/pallas_kernels` compiles the kernels for the device instead.
"""

import importlib.util
import os

import jax
import pytest

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

_ORACLE_MISSING = [
    name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None
]


def pytest_report_header() -> list[str]:
    """One line of versions, and the reason why the oracle tests do not run."""
    lines = [f"jax {jax.__version__}"]
    if _ORACLE_MISSING:
        lines.append(
            f"oracle tests deselected: {' and '.join(_ORACLE_MISSING)} not installed; "
            'pip install -e ".[oracle]"'
        )
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `oracle` where torch or transformers is missing."""
    if not _ORACLE_MISSING:
        return
    oracle = [item for item in items if item.get_closest_marker("oracle")]
    if oracle:
        config.hook.pytest_deselected(items=oracle)
        items[:] = [item for item in items if not item.get_closest_marker("oracle")]
