"""Depth recurrence in the trainer: meshes, resuming, its own data, its command line."""

import dataclasses
import json
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlib_methods import depth_monitor, registry
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.late_to_early import LateToEarlyConfig
from jaxlib_methods.method import Batch, Context
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.next_token import NextTokenConfig
from jaxlib_methods.train import data, flags, loop, prepare, presets
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import make_eval_step, make_train_step

SPEC = partitioning.batch_spec()
ROWS = 16
QUESTIONS = DepthRecurrenceConfig(
    task="reachability",
    objective="intermediate",
    step_weight=0.5,
    min_steps=1,
    max_steps=3,
    most_steps=3,
    dropout=0.0,
    hardest=2,
    eval_difficulties=(1, 3),
    num_train=0,
    per_bucket=4,
    max_nodes=8,
    fewest_nodes=5,
    most_nodes=8,
    test_most_nodes=8,
)
CONFIGS = {"language": DepthRecurrenceConfig(), "questions": QUESTIONS}
MODELS = {
    "language": TransformerConfig(
        vocab_size=128,
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        mlp_dim=48,
        max_length=16,
        block="sandwich",
        recurrence=3,
        backprop_steps=2,
        compute_dtype="float32",
    ),
    "questions": TransformerConfig(embed_dim=32, num_heads=4, mlp_dim=512, compute_dtype="float32"),
}
MESHES: dict[str, dict[str, int]] = {
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"data": 4, "sequence": 2},
}
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_fraction=0, epsilon=1e-4)


class Run(NamedTuple):
    """Two training steps and a validation, and what the compiler said."""

    first: Any
    states: list[Any]
    metrics: list[Any]
    log: str


def documents() -> Batch:
    """Rows of two documents of several lengths and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (ROWS, 17)).astype(np.int32)
    at, row = np.arange(16)[None], np.arange(ROWS)[:, None]
    cut, end = 3 + row % 5, 10 + row % 7
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, at - cut, np.where(segments == 1, at, 0)).astype(np.int32)
    where = (segments > 0) & (at != cut - 1) & (at != end - 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, where)  # pyright: ignore[reportArgumentType]


def batch_on(kind: str, mesh: Mesh) -> Any:
    if kind == "language":
        return jax.device_put(documents(), NamedSharding(mesh, SPEC))
    dataset = CONFIGS[kind].resolved().dataset("train")
    return data.put_rows(dataset, np.arange(ROWS), mesh=mesh, spec=SPEC)


def two_steps(kind: str, name: str, capfd: pytest.CaptureFixture[str]) -> Run:
    if (kind, name) not in RUNS:
        RUNS[kind, name] = train_two_steps(kind, name, capfd)
    return RUNS[kind, name]


RUNS: dict[tuple[str, str], Run] = {}


def train_two_steps(kind: str, name: str, capfd: pytest.CaptureFixture[str]) -> Run:
    sizes: Any = MESHES.get(name, {"devices": jax.devices()[:1]})
    mesh = partitioning.make_mesh(**sizes)
    context = Context(
        model=MODELS[kind],
        num_steps=8,
        sequence_length=16,
        batch_size=ROWS // 2,
        tokenizer="bytes",
        load_pretrained=lambda *_, **__: pytest.fail("read a model"),
        num_microbatches=2,
    )
    method = registry.build("depth_recurrence", CONFIGS[kind], context)
    optimizer = make_optimizer(OPTIMIZER, 8)
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        if name == "one":
            state = train_state.create_state(method, optimizer, abstract, jax.random.key(0))
        else:
            shardings = train_state.shardings_of(abstract)
            state = jax.device_put(two_steps(kind, "one", capfd).first, shardings)
        first = jax.device_get(state)
        step: Any = make_train_step(
            method.loss, optimizer, make_schedule(OPTIMIZER, 8), abstract, num_microbatches=2
        )
        arguments = (), batch_on(kind, mesh), jax.random.key(2)
        capfd.readouterr()
        program = step.lower(state, *arguments).compile()
        log = capfd.readouterr().err
        states, found = [], []
        for _ in range(2):
            state, metrics = program(state, *arguments)
            states.append(jax.device_get(state))
            found.append(jax.device_get(metrics))
        judge: Any = make_eval_step(method)
        program = judge.lower(state, *arguments).compile()
        found.append(jax.device_get(program(state, *arguments)))
    return Run(first, states, [{n: t / c for n, (t, c) in m.items() if c} for m in found], log)


def assert_close(found: Any, expected: Any, *, rtol: float, what: str) -> None:
    """Every leaf, to `rtol` of its largest element."""

    def compare(path: Any, x: Any, y: Any) -> None:
        name = f"{what} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max() + 1e-7, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, expected)


@pytest.mark.parametrize(
    ("kind", "mesh"), [("questions", "tensor"), ("questions", "fsdp"), ("language", "sequence")]
)
def test_one_device_and_eight_train_alike(kind: str, mesh: str, capfd: pytest.CaptureFixture[str]):
    one, eight = two_steps(kind, "one", capfd), two_steps(kind, mesh, capfd)
    assert [m["iterations"] for m in eight.metrics[:2]] == [
        m["iterations"] for m in one.metrics[:2]
    ]
    assert_close(eight.metrics, one.metrics, rtol=1e-4, what="metrics")
    # After the first step the first moments are the gradients, up to a common factor.
    assert_close(eight.states[0].opt_state, one.states[0].opt_state, rtol=2e-5, what="gradient")
    assert_close(eight.states[1].params, one.states[1].params, rtol=1e-4, what="parameters")


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("questions", "tensor"),
        ("questions", "fsdp"),
        ("language", "sequence"),
    ],
)
def test_no_program_is_rematerialised_against_its_shardings(
    kind: str, mesh: str, capfd: pytest.CaptureFixture[str]
):
    assert "rematerialization" not in two_steps(kind, mesh, capfd).log


# Where the questions lie.


def test_the_fields_of_graphs_are_cut_by_rows_and_their_nodes_by_sequence_too():
    mesh = partitioning.make_mesh(data=2, fsdp=2, sequence=2)
    dataset = QUESTIONS.resolved().dataset("train")
    expected = dataset.rows(range(8, 16))
    got = data.put_rows(dataset, np.arange(8, 16), mesh=mesh, spec=SPEC)
    for name in expected._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    by_rows = PartitionSpec(("data", "fsdp"))
    specs = {name: array.sharding.spec for name, array in got._asdict().items()}
    rows = ("edges", "endpoints", "label", "difficulty", "where")
    assert specs == {"tokens": SPEC} | dict.fromkeys(rows, by_rows)


# Whole runs.


@pytest.fixture
def run_of(tiny: Any):
    """`run_of(kind, workdir, ...)`: a run of six steps that is saved after three."""

    def make(kind: str, workdir: Any, **fields: Any) -> Any:
        model = {"num_layers": 4} if kind == "questions" else {"num_layers": 3, "recurrence": 3}
        steps = {"num_steps": 6, "every": 3, "eval_every": 6, "batch_size": 4}
        method = {"method": "depth_recurrence", "method_config": CONFIGS[kind]}
        return tiny(workdir, **{**steps, **model, **method, **fields})

    return make


class AfterThree(threading.Event):
    """Is set when it has been asked three times."""

    left = 3

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("kind", ["language", "questions"])
@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_resumed_run_takes_the_depths_of_an_unbroken_one(
    kind: str, run_of: Any, tmp_path: Any, read_metrics: Any
):
    loop.train(prepare.prepare(run_of(kind, tmp_path / "a")), stop=threading.Event(), started=0.0)
    broken = prepare.prepare(run_of(kind, tmp_path / "b"))
    with pytest.raises(SystemExit):
        loop.train(broken, stop=AfterThree(), started=0.0)
    assert (tmp_path / "b" / "checkpoints" / "3").exists()
    loop.train(broken, stop=threading.Event(), started=0.0)
    lines = read_metrics(tmp_path / "b")
    assert lines == read_metrics(tmp_path / "a")
    depths = [line["train/iterations"] for line in lines if "train/iterations" in line]
    assert len(depths) == 6
    assert len(set(depths)) > 1
    judged = "accuracy_harder" if kind == "questions" else "depth_gain"
    assert f"validation/{judged}" in lines[-1]


COLLAPSED = "the states of all tokens are the same: their mean cosine is"


def watched_run(method: str, run_of: Any, tmp_path: Any, tiny: Any, **fields: Any) -> Any:
    """A run of a recurrent model by a method, that is said to have collapsed from the start."""
    if method != "late_to_early":
        return run_of("language", tmp_path / "run", method=method, method_config=None, **fields)
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        prepared = prepare.prepare(tiny(teacher, num_steps=1))
        loop.train(prepared, stop=threading.Event(), started=0.0)
    cfg = LateToEarlyConfig(teacher=str(teacher), stop_step=4)
    return run_of("language", tmp_path / "run", method=method, method_config=cfg, **fields)


@pytest.mark.parametrize("method", ["depth_recurrence", "next_token", "late_to_early"])
@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_failure_is_written_and_stops_a_run_that_asks_for_it(
    method: str, run_of: Any, tmp_path: Any, tiny: Any, read_metrics: Any, monkeypatch: Any,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(depth_monitor, "COLLAPSED", -1.0)
    asked = watched_run(method, run_of, tmp_path, tiny, on_failure="stop")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        loop.run(asked)
    assert stopped.value.code == 1
    said = [line for line in capfd.readouterr().err.splitlines() if COLLAPSED in line]
    assert len(said) == 1
    assert said[0].startswith(f"stopped at step 2, saved: {COLLAPSED} ")
    assert "above -1.0; begin anew with a lower" in said[0]
    assert said[0].endswith("; --train.on_failure=warn goes on as it is")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    lines = read_metrics(tmp_path / "run")
    assert [line.get("train/collapsed") for line in lines] == [1, 1]

    train = dataclasses.replace(asked.train, on_failure="warn")
    loop.run(dataclasses.replace(asked, train=train))
    said = [line for line in capfd.readouterr().err.splitlines() if COLLAPSED in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning at step 3: {COLLAPSED} ")
    lines = read_metrics(tmp_path / "run")
    assert [line["train/collapsed"] for line in lines if "train/loss" in line] == [1] * 6
    assert lines[-1]["step"] == 6
    assert lines[-1]["validation/depth_ignored"] in (0, 1)


@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_failure_seen_by_the_last_validation_stops_too(
    run_of: Any, tmp_path: Any, read_metrics: Any, monkeypatch: Any, capfd: Any
):
    monkeypatch.setattr(depth_monitor, "IGNORED", 9.0)
    with pytest.raises(SystemExit) as stopped:
        loop.run(run_of("language", tmp_path, on_failure="stop"))
    assert stopped.value.code == 1
    assert "stopped at step 6, saved: the state is ignored: 3 iterations" in capfd.readouterr().err
    assert read_metrics(tmp_path)[-1]["validation/depth_ignored"] == 1
    assert (tmp_path / "checkpoints" / "6").exists()


@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_run_in_which_nothing_goes_wrong_says_so(run_of: Any, tmp_path: Any, read_metrics: Any):
    loop.run(run_of("language", tmp_path, on_failure="stop", recurrence=1))
    lines = read_metrics(tmp_path)
    assert [line["train/collapsed"] for line in lines if "train/loss" in line] == [0] * 6
    assert "validation/depth_ignored" not in lines[-1]  # one iteration cannot ignore its state


def test_lengths_are_those_of_the_questions(run_of: Any, tmp_path: Any):
    config = run_of("questions", tmp_path, sequence=3, data=1, batch_size=4, sequence_length=16)
    mesh = partitioning.make_mesh(sequence=3, devices=jax.devices()[:3])
    prepared = prepare.prepare(config)  # 16 tokens of text would not be cut in three either
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "mesh_of", lambda _: mesh)
        with pytest.raises(ValueError, match=r"^depth_recurrence\.max_nodes=8 is not .* try 9$"):
            loop._place(prepared)
        logic = DepthRecurrenceConfig(task="logic", num_train=0, per_bucket=4)
        method = prepare.prepare(dataclasses.replace(config, method_config=logic))
        with pytest.raises(ValueError, match=r"^depth_recurrence\.max_length=128 is .* try 129$"):
            loop._place(method)


def test_what_a_run_is_compared_with(run_of: Any, tmp_path: Any):
    questions = prepare.plan(run_of("questions", tmp_path, compare=True))
    assert list(questions) == ["depth_recurrence", "baseline"]
    untied = QUESTIONS.untied()
    assert (untied.min_steps, untied.max_steps, untied.most_steps) == (None, 3, None)
    assert questions["baseline"].method_config == untied
    assert prepare.prepare(questions["baseline"]).method.flops_per_token > 0
    language = prepare.plan(run_of("language", tmp_path, compare=True))["baseline"]
    assert (language.method, language.method_config) == ("next_token", NextTokenConfig())
    assert (language.model.recurrence, language.model.recurrence_sampling) == (1, "fixed")
    assert prepare.prepare(language).method.flops_per_token > 0
    with pytest.raises(ValueError, match="the baseline depth_recurrence, which this run is itself"):
        prepare.plan(run_of("questions", tmp_path, compare=True, method_config=untied))


def test_a_run_of_questions_needs_no_text_and_no_plain_weights(run_of: Any, tmp_path: Any):
    prepared = prepare.prepare(run_of("questions", tmp_path, source="nowhere", vocab_size=7))
    assert prepared.dataset.sequence_length == 8
    assert prepared.record.corpus == prepared.dataset.fingerprint
    assert prepared.validation.num_examples == 8
    with pytest.raises(ValueError, match="depth_recurrence trains another model"):
        prepare.prepare(run_of("questions", tmp_path, init_from="somewhere"))
    with pytest.raises(ValueError, match=r"model\.recurrence=3 has no meaning"):
        prepare.prepare(run_of("questions", tmp_path, recurrence=3))


@pytest.mark.usefixtures("compile_once", "one_device")
def test_a_preset_trains_from_the_command_line(tmp_path: Any, capsys: Any):
    values = absl_flags.FlagValues()
    flags.define(values)
    arguments = [
        "--preset=depth_recurrence_reachability_tiny",
        f"--workdir={tmp_path / 'run'}",
        "--train.num_steps=2",
        "--train.eval_batches=1",
        "--data.batch_size=4",
        "--model.embed_dim=16",
        "--model.mlp_dim=16",
        "--depth_recurrence.max_steps=4",
        "--depth_recurrence.per_bucket=2",
        "--depth_recurrence.eval_difficulties=2,4",
    ]
    flags.parse(["train", *arguments], values)
    config = flags.run_config(values)
    loop.run(config)
    assert config.method_config.eval_difficulties == (2, 4)
    assert "depth_recurrence" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {3.0, 4.0} >= {line["train/iterations"] for line in lines if "train/iterations" in line}
    names = ("accuracy", "accuracy_harder", "accuracy_at_most_steps", "state_change", "gate")
    (last,) = [line for line in lines if line["step"] == 2 and "validation/accuracy" in line]
    assert set(last) >= {f"validation/{name}" for name in names}


# Presets.


def test_the_published_language_model():
    config = presets.get("depth_recurrence_3p5b")
    tokens = config.data.batch_size * config.data.sequence_length
    assert round(tokens / 1e6, 1) == 16.8
    assert round(tokens * config.train.num_steps / 1e9) == 789  # of the 795 to 800 published
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule) == (4e-5, "constant")
    assert round(optimizer.warmup_fraction * config.train.num_steps) == 4096
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.9, 0.95, 1.0)
    # The decay of a step, rate times decay, is 4e-5 at the peak.
    assert optimizer.learning_rate * optimizer.weight_decay == 4e-5
    model = config.model
    assert (model.recurrence, model.trained_steps, model.recurrence_sampling) == (
        32, 8, "lognormal_poisson",
    )  # fmt: skip
    assert (model.prelude_layers, model.core_layers, model.coda_layers) == (2, 4, 2)
    assert config.method_config.eval_steps == (1, 4, 8, 16, 64)
    assert config.data.batch_size // config.train.num_microbatches == 256  # a row a GPU


@pytest.mark.parametrize(
    ("name", "sizes", "batch", "steps"),
    [
        ("reachability", (128, 4, 256), 64, 7480),
        ("logic", (256, 8, 1024), 128, 15_000),
        ("kinship", (256, 8, 1024), 128, 18_720),
    ],
)
def test_the_published_classifiers(name: str, sizes: Any, batch: int, steps: int):
    config = presets.get(f"depth_recurrence_{name}")
    assert (config.model.embed_dim, config.model.num_heads, config.model.mlp_dim) == sizes
    assert (config.data.batch_size, config.train.num_steps) == (batch, steps)
    assert config.method_config == DepthRecurrenceConfig(task=name)  # pyright: ignore[reportArgumentType]
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (
        3e-4, 0.01, 1.0,
    )  # fmt: skip
    assert (optimizer.schedule, optimizer.final_fraction) == ("cosine", 0)
    assert (optimizer.warmup_fraction, optimizer.beta2) == (0, 0.999)
