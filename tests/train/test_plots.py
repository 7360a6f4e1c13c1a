"""The picture of the curves."""

import json
import sys

import pytest

from jaxlib_methods.train import plots


def write_run(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run(tmp_path):
    return write_run(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "train/loss": 4.0, "train/alignment": 0.1, "train/teacher_loss": 2.0},
            {"step": 20, "train/loss": None, "train/alignment": 0.3},
            {"step": 20, "validation/loss": 3.0},
            {"step": 30, "train/loss": 2.0},
        ],
    )


def test_curves_leave_nulls_out(run):
    assert plots.read_curves(run) == {
        "train/loss": ([10, 30], [4.0, 2.0]),
        "train/alignment": ([10, 20], [0.1, 0.3]),
        "train/teacher_loss": ([10], [2.0]),
        "validation/loss": ([20], [3.0]),
    }


def test_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib", reason="extra `plot` is not installed")
    output = tmp_path / "curves.png"
    plain = write_run(tmp_path / "plain.jsonl", [{"step": 10, "train/loss": 4.0}])
    runs = {"plain": plain, "late to early": run}
    assert plots.draw_curves(runs, output, stop_steps={"late to early": 20})
    with_alignment = output.read_bytes()
    assert with_alignment.startswith(b"\x89PNG\r\n")
    assert plots.draw_curves({"plain": plain}, output)
    # Bytes 20 to 24 of a PNG are its height: one panel is lower than two.
    assert output.read_bytes()[20:24] < with_alignment[20:24]


def test_without_matplotlib_nothing_is_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "curves.png"
    assert not plots.draw_curves({"run": run}, output)
    assert not output.exists()
    assert "pip install jaxlib-methods[plot]" in capsys.readouterr().out
