"""The end of a run: summary, steps to the baseline's loss, table."""

import json
import math

import pytest

from jaxlib_methods.train import plots, report


def write_run(folder, losses, **more):
    """A run with an evaluation every 10 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, loss in enumerate(losses, start=1):
        record = {"step": 10 * i, "validation/loss": loss, "train/elapsed_secs": 1.5 * i}
        lines.append(json.dumps(record | {name: values[i - 1] for name, values in more.items()}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def summarise(folder, **fields):
    return report.summarise(
        folder, **{"num_params": 1234, "bytes_per_token": 2.0, "stop_step": None, **fields}
    )


def test_summary_by_hand(tmp_path):
    run = write_run(tmp_path, [5.0, 4.0], **{"validation/alignment": [0.25, None]})
    got = summarise(run, stop_step=15)
    bits = 4.0 / math.log(2) / 2.0
    assert got.bits_per_byte == pytest.approx(bits)
    assert got._replace(bits_per_byte=bits) == report.Summary(
        workdir=str(run),
        num_params=1234,
        num_steps=20,
        validation_loss=4.0,
        bits_per_byte=bits,
        alignment=0.25,
        seconds=3.0,
        stop_step=15,
    )
    assert report.seconds_so_far(run) == 3.0
    assert report.seconds_so_far(tmp_path / "none") == 0.0


def test_a_run_without_evaluation_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no validation/loss"):
        summarise(tmp_path)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (5.0, 10.0),  # at the first evaluation
        (6.0, 10.0),
        (4.5, 15.0),  # half way between steps 10 and 20
        (3.75, 22.5),  # a quarter of the way from step 20 to 30; the rise behind it does not count
        (3.0, 30.0),  # reached exactly
        (2.9, None),
    ],
)
def test_steps_to_reach_by_hand(tmp_path, loss, expected):
    run = write_run(tmp_path, [5.0, 4.0, 3.0, 3.5])
    assert report.steps_to_reach(run, loss) == expected


def test_comparison_in_words(tmp_path):
    baseline = summarise(write_run(tmp_path / "b", [5.0, 4.5, 4.2, 4.0]))
    fast = summarise(write_run(tmp_path / "f", [4.5, 3.5, 3.0, 2.9]))
    slow = summarise(write_run(tmp_path / "s", [5.0, 4.8, 4.6, 4.4]))
    assert report.compare("let", fast, baseline) == (
        "let reached the baseline's final validation loss of 4.0000 nats per token after "
        "15 of the baseline's 40 steps (2.67x)"
    )
    assert report.compare("let", slow, baseline) == (
        "let did not reach the baseline's final validation loss of 4.0000 nats per token within "
        "40 steps; it ended at 4.4000"
    )


def test_finish_prints_table_comparison_and_picture(tmp_path, capsys, monkeypatch):
    drawn = {}

    def draw_curves(paths, output, *, stop_steps, unit):
        drawn.update(paths=paths, output=output, stop_steps=stop_steps, unit=unit)
        return True

    monkeypatch.setattr(plots, "draw_curves", draw_curves)
    aligned = {"validation/alignment": [0.5, 0.75]}
    runs = {
        "teacher": summarise(write_run(tmp_path / "teacher", [5.0, 4.5])),
        "let": summarise(write_run(tmp_path, [4.5, 3.5], **aligned), stop_step=10),
        "baseline": summarise(write_run(tmp_path / "baseline", [5.0, 4.0]), stop_step=21),
    }
    report.finish(runs, tmp_path)
    assert capsys.readouterr().out == (
        "run       parameters  steps  nats per token  bits per byte  alignment cosine  time\n"
        "teacher        1,234     20             4.5          3.246                 -   3 s\n"
        "let            1,234     20             3.5          2.525              0.75   3 s\n"
        "baseline       1,234     20               4          2.885                 -   3 s\n"
        "let reached the baseline's final validation loss of 4.0000 nats per token after 15 of "
        "the baseline's 20 steps (1.33x)\n"
        f"curves: {tmp_path / 'curves.png'}\n"
    )
    assert drawn["stop_steps"] == {"let": 10}
    assert drawn["unit"] == "nats per token"
    assert [str(path.parent) for path in drawn["paths"].values()] == [
        str(tmp_path / name) for name in ("teacher", "", "baseline")
    ]
