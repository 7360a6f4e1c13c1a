"""What thoughts give to a run that has them, against rollouts by hand; budgets; refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.infer import (
    evaluate,
    evaluate_thoughts,
    generate_thoughts,
    reason_scores,
    reasoning,
    think,
    think_budget,
)
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.reason_scores import Row
from jaxlib_methods.infer.reasoning import Reasoner
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.decoding import Stream, stream_key
from jaxlib_methods.models.transformer import forward
from jaxlib_methods.tasks import parity
from jaxlib_methods.train import run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import CheckpointConfig, RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState

BUDGETS = (0, 1, 3, 6)
THINK, CLOSE = 2, 3


def run_of(restored: Restored) -> RunConfig:
    assert restored.config is not None
    return restored.config


def changed(restored: Restored, **fields: Any) -> Restored:
    """The run with other fields of its method's configuration."""
    run = run_of(restored)
    cfg = dataclasses.replace(run.method_config, **fields)
    return restored._replace(config=dataclasses.replace(run, method_config=cfg))


def reasoner_of(restored: Restored, times: int = 2, **asked: Any) -> Reasoner:
    data = evaluate.data_config(restored, {})
    return reasoning.make_reasoner(restored, ReasonConfig(**asked), data, times=times)


def measured(restored: Restored, reasoner: Reasoner, **asked: Any) -> dict[int, Row]:
    found = reason_scores.measure(
        restored, reasoner, evaluate.data_config(restored, {}), BUDGETS,
        **{"max_batches": 2} | asked,
    )  # fmt: skip
    return {budget: rows[-1] for budget, rows in found.budgets.items()}


@pytest.fixture(scope="module")
def reasoner(restored_thoughts: Restored) -> Reasoner:
    return reasoner_of(restored_thoughts)


@pytest.fixture(scope="module")
def rows(restored_thoughts: Restored, reasoner: Reasoner) -> dict[int, Row]:
    return measured(restored_thoughts, reasoner)


def questions() -> list[str]:
    """Those of two batches, evenly spread over the validation set."""
    numbers = np.arange(32) * 512 // 32
    return [parity.question(int(number), split="validation") for number in numbers]


def test_the_budget_of_a_run_is_that_of_its_checkpoint(restored_thoughts: Restored):
    """6 * 0.5 ** (step / 10); the last step that is taken is 9."""
    for step, budget in ((1, 5), (5, 4), (10, 3), (None, 3)):
        assert reasoning.usual_budget(restored_thoughts._replace(step=step)) == budget
    assert think_budget.budgets_of(reasoner_of(restored_thoughts)) == [0, 1, 3, 6]
    # 10 has more digits than the prompts of training.
    assert think_budget.budgets_of(reasoner_of(restored_thoughts, budget=5)) == [0, 1, 2, 5]


def test_prompts_show_the_budget_as_in_training(restored_thoughts: Restored):
    long = changed(restored_thoughts, budget=20, max_thought=20)
    setting = reasoner_of(long, times=1, budget=7).setting
    assert setting.frame.after[7].tolist() == [1, *b"07", THINK]
    assert (setting.cfg.max_thought, setting.cfg.force_close) == (7, True)


def read_by_hand(restored: Restored, texts: list[list[int]]) -> np.ndarray:
    """Log-probabilities after each sequence, `[N, V]`, from one pass of all of them."""
    longest = max(map(len, texts))
    ids = jnp.array([[*text, *[0] * (longest - len(text))] for text in texts])
    lengths = jnp.array([len(text) for text in texts])

    @jax.jit
    def read(params: Any) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(longest)[None], ids.shape)
        segments = (places < lengths[:, None]).astype(jnp.int32)
        logits = forward(restored.model, params, ids, positions=places, segments=segments).logits
        return jax.nn.log_softmax(logits[jnp.arange(len(texts)), lengths - 1])

    return np.asarray(read(restored.params))


def test_scores_are_those_of_single_passes(restored_thoughts: Restored, rows: dict[int, Row]):
    """Without a thought, and after an empty one, at all questions."""
    prompts = [[*f"{bits}=".encode()] for bits in questions()]
    empty = [[*prompt, 1, ord("0"), THINK, CLOSE] for prompt in prompts]
    truths = [ord(str(parity.answer(bits))) for bits in questions()]
    found = read_by_hand(restored_thoughts, prompts + empty).reshape(2, 32, -1)
    log_probs = found[:, np.arange(32), truths].mean(axis=1)
    right = (found.argmax(axis=-1) == truths).mean(axis=1)
    row = rows[0]
    assert row.places == 32
    assert 0 < row.accuracy < 1
    assert [row.plain_accuracy, row.accuracy] == right.tolist()
    np.testing.assert_allclose([row.plain_log_prob, row.log_prob], log_probs, rtol=1e-4)
    # All empty thoughts are the same.
    assert row.shuffled_accuracy == row.accuracy
    np.testing.assert_allclose(row.shuffled_log_prob, row.log_prob, rtol=1e-5)


def test_thoughts_are_those_of_the_rollouts(
    restored_thoughts: Restored, reasoner: Reasoner, rows: dict[int, Row]
):
    """Each thought again, read behind its own prompt and behind that of its neighbour."""
    budget, key = 3, stream_key(0, Stream.TOKENS)

    @jax.jit
    def again(params: Any, batch: Any, key: jax.Array) -> Any:
        return rmt.think(
            reasoner.setting, params, batch, batch.tier, jnp.ones(3) / 3, jnp.int32(budget),
            num_rollouts=1, temperature=0.9, thought_limit=budget, key=key,
        ).responses  # fmt: skip

    lengths, closed, read, truths = [], [], [], []
    for number in range(2):
        drawn = (16 * number + np.arange(16)) * 512 // 32
        batch = parity.ParityDataset("validation").rows(drawn)
        responses = again(restored_thoughts.params, batch, jax.random.fold_in(key, number))
        responses = jax.tree.map(np.asarray, responses)
        lengths += responses.thought_lengths[:, 0].tolist()
        closed += responses.closed[:, 0].tolist()
        truths += np.asarray(batch.targets)[:, -1].tolist()
        for row in range(16):
            prompt = [*np.asarray(batch.inputs)[row].tolist(), 1, ord("3"), THINK]
            for thinker in (row, row - 1):
                size = responses.thought_lengths[thinker, 0]
                read.append([*prompt, *responses.tokens[thinker, 0, :size].tolist(), CLOSE])
    log_probs = read_by_hand(restored_thoughts, read).reshape(32, 2, -1)
    own, other = log_probs[np.arange(32), :, truths].mean(axis=0)
    row = rows[budget]
    assert row.thought_length == np.mean(lengths) < budget
    assert row.closed == np.mean(closed) > 0
    np.testing.assert_allclose([row.log_prob, row.shuffled_log_prob], [own, other], rtol=1e-4)
    assert abs(own - other) > 1e-2
    right = (log_probs.argmax(axis=-1) == np.array(truths)[:, None]).mean(axis=0)
    assert [row.accuracy, row.shuffled_accuracy] == right.tolist()


def test_a_budget_cuts_thoughts_and_is_data(restored_thoughts: Restored):
    """Where no prompt shows it, a shorter budget is the beginning of a longer one."""
    restored = changed(restored_thoughts, prompt_after="<think>")
    reasoner = reasoner_of(restored)
    before = cast(Any, reason_scores._measure)._cache_size()
    found = measured(restored, reasoner)
    assert cast(Any, reason_scores._measure)._cache_size() == before + 1
    longest = thought_lengths(restored, reasoner)
    for budget, row in found.items():
        assert row.thought_length == np.minimum(longest, budget).mean()
        assert row.closed == (longest < budget).mean()
    assert found[1].plain_log_prob == found[6].plain_log_prob


def thought_lengths(restored: Restored, reasoner: Reasoner) -> np.ndarray:
    """Of the longest budget, one place at a time."""
    data, lengths = evaluate.data_config(restored, {}), []
    for number, batch in enumerate(reasoning.batches(restored, reasoner, data, 2)):
        key = jax.random.fold_in(stream_key(0, Stream.TOKENS), number)
        for row in range(16):
            alone = batch._replace(tier=jnp.where(jnp.arange(16)[:, None] == row, batch.tier, -1))
            sums = reason_scores._measure(
                reasoner, restored.params, (), alone, jnp.int32(BUDGETS[-1]), key
            )
            lengths.append(float(sums["thought_length"].sum()))
    return np.array(lengths)


def test_a_mesh_changes_no_score(restored_thoughts_on_eight: Restored, rows: dict[int, Row]):
    found = measured(restored_thoughts_on_eight, reasoner_of(restored_thoughts_on_eight))
    for budget, row in rows.items():
        np.testing.assert_allclose(row[1:], found[budget][1:], rtol=1e-4, atol=1e-4)
    mesh = partitioning.make_mesh(data=2, sequence=2, devices=jax.devices()[:4])
    cut = restored_thoughts_on_eight._replace(mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh.sequence=2 does not divide the 9 tokens"):
        measured(cut, reasoner_of(cut))


@pytest.fixture(scope="module")
def text(restored_thoughts: Restored, tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """RLP on text, begun with a model that is saved beside it."""
    folder = tmp_path_factory.mktemp("run")
    words = np.random.default_rng(0).choice(list("01.=<"), 6000)
    (folder / "a.txt").write_text("".join(words[:4000]))
    (folder / "b.txt").write_text("".join(words[4000:]))
    restored = changed(
        restored_thoughts, task="text", reward="information_gain", length_weight=0.0,
        quantiles=(0.1, 0.4, 0.7), positions="uniform",
    )  # fmt: skip
    config = run_of(restored)
    data = dataclasses.replace(
        config.data, source=str(folder / "a.txt"), validation_source=str(folder / "b.txt")
    )
    start = RunConfig(model=restored.model, data=config.data, workdir=str(folder / "start"))
    record = Record(start, "bytes", "corpus")
    Path(start.workdir).mkdir()
    run_record.write_config(start.workdir, record)
    with Checkpoints(start.workdir, keep=1, record=record) as checkpoints:
        params = jax.tree.map(lambda p: 0.5 * p, restored.params)
        checkpoints.save(TrainState(jnp.array(3), params, {"count": jnp.array(3)}))
    config = dataclasses.replace(
        config, data=data, workdir=str(folder),
        checkpoint=CheckpointConfig(init_from=start.workdir),
    )  # fmt: skip
    return restored._replace(config=config)


def test_tiers_of_text_are_those_of_the_first_model(text: Restored):
    reasoner, data = reasoner_of(text, places=2), evaluate.data_config(text, {})
    found = reason_scores.measure(text, reasoner, data, [3], max_batches=2)
    start = run_of(text).checkpoint.init_from
    assert found.tiers_by == start
    rows = {row.tier: row for row in found.budgets[3]}
    assert list(rows) == ["easy", "medium", "hard", "all"]
    assert rows["all"].places == sum(rows[name].places for name in rmt.curriculum.TIERS) == 64
    assert rows["all"].answers == pytest.approx(
        sum(rows[name].answers * rows[name].places for name in rmt.curriculum.TIERS) / 64
    )
    # Where that is gone, those of the run itself. One place has no thought of another prompt.
    gone = dataclasses.replace(run_of(text), checkpoint=CheckpointConfig(init_from="gone"))
    alone, data = text._replace(config=gone), dataclasses.replace(data, batch_size=1)
    other = reason_scores.measure(alone, reasoner_of(alone, places=1), data, [3], max_batches=3)
    assert other.tiers_by == gone.workdir
    row = other.budgets[3][-1]
    assert row.places == 3
    assert np.isnan([row.shuffled_accuracy, row.shuffled_log_prob]).all()
    assert np.isfinite(row.log_prob)


def test_what_is_evaluated_and_thought_about_is_written(
    text: Restored,
    restored_thoughts: Restored,
    rows: dict[int, Row],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    path = tmp_path / "out.json"
    asked: dict[str, Any] = {"workdir": str(tmp_path), "output": str(path), "eval_batches": 2}
    think.run(InferConfig(mode="think", **asked), restored_thoughts)
    values = json.loads(path.read_text())
    assert (values["budget"], values["temperature"], values["step"]) == (3, 0.9, 10)
    assert {one["budget"]: Row(**one["rows"][0]) for one in values["budgets"]} == rows
    shown = capsys.readouterr().out
    assert f"      3*{rows[3].thought_length:8.2f}{rows[3].closed:8.3f}" in shown
    assert path.with_suffix(".png").exists()

    evaluate_thoughts.run(InferConfig(mode="evaluate", **asked), text)
    values = json.loads(path.read_text())
    plain = evaluate.evaluate(text, evaluate.data_config(text, {}), max_batches=2)
    assert values["nats_per_token"] == plain.nats_per_token
    assert [row["tier"] for row in values["rows"]] == ["easy", "medium", "hard", "all"]
    shown, row = capsys.readouterr().out, Row(**values["rows"][-1])
    assert "thoughts of up to 3 tokens at temperature 0.9" in shown
    assert f"all     {row.places:8}{row.plain_accuracy:9.4f}{row.accuracy:9.4f}" in shown
    assert f"Tiers are by the entropy of {values['tiers_by']}" in shown


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        ({"budget": 10}, {}, "10 has more digits than the prompts .* at most 6; give at most 9"),
        ({"budget": 53}, {"prompt_after": "<think>"}, "10 tokens and an answer of 1 leave 52"),
        ({"places": 2}, {}, "--reason.places=2 is for text"),
    ],
)
def test_what_cannot_be_thought_is_refused(
    restored_thoughts: Restored, asked: dict[str, Any], changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        reasoner_of(changed(restored_thoughts, **changes), **asked)


@pytest.mark.parametrize("mode", ["generate", "evaluate", "think"])
def test_a_budget_is_checked_without_weights(restored_thoughts: Restored, mode: Any):
    modules = {"generate": generate_thoughts, "evaluate": evaluate_thoughts, "think": think}
    described = restored_thoughts._replace(params=None)
    modules[mode].check(InferConfig(workdir="a", mode=mode, reason={"budget": 4}), described)
    wrong = InferConfig(workdir="a", mode=mode, reason={"budget": 1000})
    with pytest.raises(ValueError, match=r"--reason.budget=1000 is too long"):
        modules[mode].check(wrong, described)


def test_questions_have_no_other_data(restored_thoughts: Restored):
    config = InferConfig(workdir="runs/a", mode="evaluate", data={"source": "x.txt"})
    with pytest.raises(ValueError, match=r"--data.source is for text; runs/a has its own"):
        evaluate_thoughts.run(config, restored_thoughts)


def test_a_sampled_budget_is_at_least_one():
    with pytest.raises(ValueError, match=r"reason.budget=0 must be at least 1"):
        ReasonConfig(budget=0)
    with pytest.raises(ValueError, match=r"reason.temperature=-1 must be finite and at least 0"):
        ReasonConfig(temperature=-1)
