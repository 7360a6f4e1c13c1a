"""What the source may contain: supported APIs, small files, documented and annotated names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70
MAX_KERNEL_LINES = 130

# Deprecated or removed in a supported JAX, unsafe on files from strangers, or a second API for
# something that has one here.
BANNED = (
    "jax.experimental.maps",
    "jax.experimental.pallas.triton",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "jax.sharding.use_mesh",
    "jax.tree_map",
    "grain.python",
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
)
BANNED_CALLS = ("eval", "exec", "compile", "__import__")
ORBAX = "orbax.checkpoint"
ORBAX_ALLOWED = "orbax.checkpoint.v1"


def _imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> the dotted name it stands for, wherever the import is."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, names)
        return base and f"{base}.{node.attr}"
    return None


def _uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import and every attribute chain that starts at one."""
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := _dotted(node, names)):
            yield node.lineno, name


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def banned(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that is not used here."""
    for line, name in _uses(tree):
        if any(_within(name, parent) for parent in BANNED):
            yield line, name
        if _within(name, ORBAX) and not _within(name, ORBAX_ALLOWED):
            yield line, f"{name}, use `from orbax.checkpoint import v1`"
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                text = ast.unparse(item.context_expr)
                if re.fullmatch(r"[\w.]*mesh", text):
                    yield node.lineno, f"with {text}:, use jax.set_mesh"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                yield node.lineno, f"{node.func.id}()"
            if any(word.arg == "allow_pickle" for word in node.keywords):
                yield node.lineno, "allow_pickle="


@pytest.mark.parametrize(
    "code",
    [
        "from jax.experimental.pjit import pjit",
        "from jax.experimental import pjit",
        "import jax\njax.experimental.pjit.pjit(f)",
        "import jax as j\nj.tree_map(f, x)",
        "from jax import tree_map",
        "from jax.experimental.shard_map import shard_map",
        "import pickle",
        "def f():\n  from pickle import loads",
        "import orbax.checkpoint as ocp",
        "from orbax.checkpoint import CheckpointManager",
        "import grain.python as grain",
        "from grain import python",
        "with mesh:\n  pass",
        "with self.mesh:\n  pass",
        "eval(text)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_banned_api_is_found_in_every_spelling(code: str) -> None:
    assert list(banned(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import jax\njax.tree.map(f, x)",
        "from orbax.checkpoint import v1 as ocp\nocp.save_pytree(path, x)",
        "import grain\ngrain.MapDataset.source(x)",
        "import jax\nwith jax.set_mesh(mesh):\n  pass",
        "import re\nre.compile('x')",
        "model.eval()",
    ],
)
def test_supported_api_is_not_banned(code: str) -> None:
    assert not list(banned(ast.parse(code)))


def test_no_banned_api(root: Path, trees: dict[str, ast.Module]) -> None:
    tests = {
        str(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8"))
        for path in (root / "tests").rglob("*.py")
    }
    found = [
        f"{name}:{line}: {what}"
        for name, tree in (trees | tests).items()
        for line, what in banned(tree)
        if name in trees or not what.endswith("()")  # a test may run code
    ]
    assert not found


def test_nothing_is_left_to_do(root: Path, modules: dict[str, Path]) -> None:
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in (*modules.values(), *(root / "tests").rglob("*.py"), *root.glob("*.md"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marker.search(line)
    ]
    assert not found


def test_files_are_short(modules: dict[str, Path]) -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules.items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short(trees: dict[str, ast.Module]) -> None:
    long = []
    for name, tree in trees.items():
        kernels = name.startswith("jaxlib_methods.pallas_kernels")
        limit = MAX_KERNEL_LINES if kernels else MAX_FUNCTION_LINES
        for node in _functions(tree):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                long.append(f"{name}.{node.name} has {length} lines")
    assert not long


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node


def test_every_public_name_is_documented(trees: dict[str, ast.Module]) -> None:
    silent = [name for name, tree in trees.items() if not ast.get_docstring(tree)]
    silent += [
        f"{name}.{node.name}"
        for name, tree in trees.items()
        for node in _public(tree)
        if not ast.get_docstring(node)
    ]
    assert not silent


def test_every_argument_is_annotated(trees: dict[str, ast.Module]) -> None:
    bare = []
    for name, tree in trees.items():
        for node in _functions(tree):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            stars = [star for star in (node.args.vararg, node.args.kwarg) if star]
            missing = [
                argument.arg
                for argument in (*named, *stars)
                if argument.annotation is None and argument.arg not in ("self", "cls")
            ]
            if node.returns is None:
                missing.append("return")
            bare += [f"{name}:{node.lineno} {node.name}({word})" for word in missing]
    assert not bare


def test_every_loss_states_its_shapes(trees: dict[str, ast.Module]) -> None:
    losses = [
        node
        for node in _public(trees["jaxlib_methods.losses"])
        if isinstance(node, ast.FunctionDef)
    ]
    assert losses
    shape = re.compile(r"\[[\w., ]*\]|scalar")  # [B, L], [..., V]
    assert not [node.name for node in losses if not shape.search(ast.get_docstring(node) or "")]
