"""Folders, import names and the order of imports."""

import ast
import graphlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Python = Callable[..., subprocess.CompletedProcess[str]]

# In the order of imports: a folder imports from itself and from those before it.
ORDER = ("pallas_kernels", "models", "jaxlib_methods", "train", "infer")
LINKED = tuple(folder for folder in ORDER if folder != "jaxlib_methods")

# What infer reads of the trainer: what a run was and what it left, never its loop.
READ_BY_INFER = {
    f"jaxlib_methods.train.{name}"
    for name in (
        "config",
        "flags",
        "tokenizer",
        "data",
        "checkpoint",
        "run_record",
        "entropies",
        "prepare",
        "plots",
    )
}

EXTRAS = (
    "safetensors",
    "tokenizers",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "tensorboardX",
    "torch",
    "transformers",
)


def folder_of(module: str) -> str:
    """The top-level folder that holds a module."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else "jaxlib_methods"


def _resolve(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join((*base, node.module) if node.module else base)


def imports(
    tree: ast.Module, module: str, known: set[str], *, is_package: bool = False
) -> Iterator[str]:
    """Modules of `known` that `module` imports, wherever in the file, or names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(node, module, is_package)
            wanted = [
                name if (name := f"{base}.{alias.name}") in known else base for alias in node.names
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            wanted = [node.value] if "." in node.value else []
        else:
            continue
        yield from (name for name in wanted if name in known)


@pytest.fixture(scope="module")
def graph(trees: dict[str, ast.Module], modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of the library that it imports."""
    return {
        module: set(
            imports(tree, module, set(trees), is_package=modules[module].name == "__init__.py")
        )
        for module, tree in trees.items()
    }


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from jaxlib_methods.models import layers", {"jaxlib_methods.models.layers"}),
        ("from jaxlib_methods.models.layers import attention", {"jaxlib_methods.models.layers"}),
        ("import jaxlib_methods.train.loop as l", {"jaxlib_methods.train.loop"}),
        ("from . import layers", {"jaxlib_methods.models.layers"}),
        ("from .layers import norm", {"jaxlib_methods.models.layers"}),
        ("from ..train import loop", {"jaxlib_methods.train.loop"}),
        ("def f():\n  import jaxlib_methods.train.loop", {"jaxlib_methods.train.loop"}),
        ("import_module('jaxlib_methods.train.loop')", {"jaxlib_methods.train.loop"}),
        ("import jax\nfrom jax import numpy", set()),
    ],
)
def test_imports_are_found_in_every_spelling(code: str, expected: set[str]) -> None:
    known = {"jaxlib_methods.models", "jaxlib_methods.models.layers", "jaxlib_methods.train.loop"}
    assert set(imports(ast.parse(code), "jaxlib_methods.models.config", known)) == expected


def test_folders_import_only_from_those_before_them(graph: dict[str, set[str]]) -> None:
    backwards = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if ORDER.index(folder_of(target)) > ORDER.index(folder_of(module))
    ]
    assert not backwards, f"order is {' < '.join(ORDER)}"


def test_modules_import_each_other_without_cycles(graph: dict[str, set[str]]) -> None:
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


def test_infer_reads_little_of_the_trainer(graph: dict[str, set[str]]) -> None:
    read = {
        target
        for module, targets in graph.items()
        for target in targets
        if folder_of(module) == "infer" and folder_of(target) == "train"
    }
    assert read <= READ_BY_INFER


def test_kernels_import_only_jax(trees: dict[str, ast.Module]) -> None:
    foreign = set()
    for module, tree in trees.items():
        if folder_of(module) != "pallas_kernels":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                foreign |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                foreign.add((node.module or "").split(".")[0])
    assert foreign - set(sys.stdlib_module_names) <= {"jax", "numpy", "jaxlib_methods"}


def test_every_package_is_in_the_wheel(root: Path, modules: dict[str, Path]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    folders = {path.parent for path in modules.values()}
    assert set(listed) == packages
    assert folders == {modules[name].parent for name in packages}, "a folder has no __init__.py"


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_relative(root: Path, folder: str) -> None:
    link = root / "jaxlib_methods" / folder
    assert link.is_symlink(), f"{link} is no link; git needs core.symlinks=true"
    assert link.readlink() == Path("..") / folder


@pytest.mark.parametrize("folder", LINKED)
def test_bare_name_says_what_to_import(python: Python, folder: str) -> None:
    result = python("-c", f"import {folder}")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last == f"ImportError: import jaxlib_methods.{folder} instead of {folder}"


def test_checkout_imports_without_installation(python: Python, root: Path) -> None:
    code = "import jaxlib_methods.models.config as m; print(m.__file__)"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == root / "models" / "config.py"


_LOADED = """
import json, sys
{imports}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""


def _loaded(python: Python, imports: str) -> set[str]:
    result = python("-c", _LOADED.format(imports=imports))
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


def test_losses_cost_only_jax(python: Python) -> None:
    loaded = _loaded(python, "from jaxlib_methods import losses")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "grain", "chex", "absl", *EXTRAS}


def test_kernels_cost_only_jax(python: Python, trees: dict[str, ast.Module]) -> None:
    kernels = [name for name in trees if folder_of(name) == "pallas_kernels"]
    loaded = _loaded(python, "\n".join(f"import {name}" for name in kernels))
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "grain", "chex", *EXTRAS}


_BLOCKED = """
import importlib, sys, warnings

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
warnings.simplefilter("error")
for name in {names!r}:
    importlib.import_module(name)
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & set({extras!r}))
print(len({names!r}), loaded)
"""


def test_everything_imports_without_the_extras(
    python: Python, trees: dict[str, ast.Module]
) -> None:
    names = sorted(trees)
    result = python("-c", _BLOCKED.format(extras=EXTRAS, names=names))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(len(names)), "[]"]
