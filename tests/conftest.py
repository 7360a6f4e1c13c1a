"""Shared by all tests: eight CPU devices, set before jax starts, and strict rank promotion.

`JAX_PLATFORMS=cuda pytest tests/pallas_kernels` runs that folder on a GPU instead.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

# In the order of imports: a folder imports from itself and from those before it.
FOLDERS = ("pallas_kernels", "models", "jaxlib_methods", "train", "infer")

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The tests' time is that of compiling, a third of which is for optimisations; see `optimised`.
jax.config.update("jax_disable_most_optimizations", True)

# Marker -> the extra that installs what its tests need, and what that is.
_NEEDS = {"oracle": ("oracle", ("torch", "transformers")), "libtpu": ("tpu", ("libtpu",))}
_MISSING = {
    marker: missing
    for marker, (_, names) in _NEEDS.items()
    if (missing := [name for name in names if importlib.util.find_spec(name) is None])
}


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Drops a file's compiled programs: they hold memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compiles as users do: for tests of what a compiler makes of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_report_header() -> list[str]:
    """One line of versions, and the reasons why marked tests do not run."""
    return [f"jax {jax.__version__}"] + [
        f"{marker} tests deselected: {' and '.join(missing)} not installed; "
        f'pip install -e ".[{_NEEDS[marker][0]}]"'
        for marker, missing in _MISSING.items()
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the marked tests whose packages are missing."""
    without = [item for item in items if any(map(item.get_closest_marker, _MISSING))]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def modules(root: Path) -> dict[str, Path]:
    """Every module of the library, `jaxlib_methods.models.layers` -> its file."""
    found = {}
    for folder in FOLDERS:
        prefix = "jaxlib_methods" if folder == "jaxlib_methods" else f"jaxlib_methods.{folder}"
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if folder == "jaxlib_methods" and parts[0] in FOLDERS:
                continue  # a link to another folder; newer Pythons follow it
            name = ".".join((prefix, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


@pytest.fixture(scope="session")
def trees(modules: dict[str, Path]) -> dict[str, ast.Module]:
    """The syntax tree of every module of the library."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}


@pytest.fixture
def python(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a fresh interpreter in an empty folder: `python("-c", code, path=folder_to_import)`."""

    def run(*arguments: str, path: Path = root) -> subprocess.CompletedProcess[str]:
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
