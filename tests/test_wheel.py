"""What is installed: the wheel, the source distribution and the editable checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxlib_methods

FOLDERS = ("jaxlib_methods", "models", "train", "infer", "pallas_kernels")

Python = Callable[..., subprocess.CompletedProcess[str]]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _copy(root: Path, to: Path) -> Path:
    """The checkout without what an earlier build has left in it."""
    to.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(root / folder, to / folder, symlinks=True, ignore=ignore)
    for file in root.iterdir():
        if file.is_file():
            shutil.copy(file, to / file.name)
    return to


def _build(kind: str, source: Path, out: Path) -> Path:
    """Runs setuptools as pip does, without the network; `kind` is `wheel` or `sdist`."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    _run(sys.executable, "-W", "ignore", "-c", code, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    return _build("wheel", _copy(root, folder / "checkout"), folder / "out")


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it and nothing else."""
    folder = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    _run(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_holds_every_module_and_nothing_else(
    wheel: Path, root: Path, modules: dict[str, Path]
) -> None:
    expected = {
        str(path.relative_to(root))
        if path.is_relative_to(root / "jaxlib_methods")
        else f"jaxlib_methods/{path.relative_to(root)}"
        for path in modules.values()
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected | {"jaxlib_methods/py.typed"}


def test_source_distribution_builds_the_same_wheel(wheel: Path, root: Path, tmp_path: Path) -> None:
    sdist = _build("sdist", _copy(root, tmp_path / "checkout"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # As an attribute, which Python 3.11.3 and older pass over, and 3.14 has as its default.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    again = _build("wheel", unpacked, tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_one_name_lands_in_site_packages(target: Path) -> None:
    version = jaxlib_methods.__version__
    names = {path.name for path in target.iterdir()}
    assert names == {"jaxlib_methods", f"jaxlib_methods-{version}.dist-info"}


_IMPORT_ALL = """
import importlib, sys
for name in {names!r}:
    file = importlib.import_module(name).__file__
    assert file.startswith({target!r}), f"{{name}} comes from {{file}}"
print("imported", len({names!r}))
"""


def test_installed_wheel_imports(python: Python, target: Path, modules: dict[str, Path]) -> None:
    code = _IMPORT_ALL.format(names=sorted(modules), target=str(target))
    result = python("-c", code, path=target)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"imported {len(modules)}"


def test_installed_losses_import(python: Python, target: Path) -> None:
    result = python("-c", "from jaxlib_methods import losses; print(losses.__file__)", path=target)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(target / "jaxlib_methods" / "losses.py")


@pytest.mark.parametrize("entry", ["train", "infer"])
def test_installed_entry_point_runs(python: Python, target: Path, entry: str) -> None:
    result = python("-m", f"jaxlib_methods.{entry}", "--help", path=target)
    assert result.returncode in (0, 1), result.stderr  # absl leaves with 1 after --help
    assert "--workdir" in result.stdout
    assert "Traceback" not in result.stderr


def test_installed_trainer_knows_its_presets(python: Python, target: Path) -> None:
    arguments = ("--preset=transformer_tiny", "--print_config")
    result = python("-m", "jaxlib_methods.train", *arguments, path=target)
    assert result.returncode == 0, result.stderr
    assert "--preset=transformer_tiny\n" in result.stdout


@pytest.mark.parametrize("name", ["models", "train", "infer", "pallas_kernels"])
def test_installed_wheel_has_no_bare_name(python: Python, target: Path, name: str) -> None:
    result = python("-c", f"import {name}", path=target)
    assert result.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named {name!r}"


def test_editable_install_imports(root: Path, tmp_path: Path, modules: dict[str, Path]) -> None:
    checkout = _copy(root, tmp_path / "checkout")
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    fresh = tmp_path / "venv" / "bin" / "python"
    find = "import site; print(site.getsitepackages()[0])"
    site = Path(_run(fresh, "-c", find, cwd=tmp_path).strip())
    _run(
        *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"),
        *("--python", fresh, "install", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--editable", checkout),
        cwd=tmp_path,
        PYTHONPATH=sysconfig.get_path("purelib"),
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    empty = tmp_path / "empty"
    empty.mkdir()
    code = _IMPORT_ALL.format(names=sorted(modules), target=str(checkout))
    output = _run(fresh, "-c", code, cwd=empty, PYTHONPATH="", JAX_PLATFORMS="cpu")
    assert output.strip() == f"imported {len(modules)}"
