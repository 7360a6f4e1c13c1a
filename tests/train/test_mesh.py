"""A mesh changes speed, not numbers: three steps on one device and on eight.

After a wanted change of a sharding, write the golden texts again and read the difference:

    UPDATE_GOLDEN=1 pytest tests/train/test_mesh.py
"""

import collections
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlib_methods import late_to_early, next_token, registry
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Batch, Context, Method, Pretrained
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.train import checkpoint, presets, run_record
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import make_train_step
from jaxlib_methods.train.tokenizer import ByteTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "shardings"
GOLDEN_MESH = AbstractMesh((2, 4, 2, 1), partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
# 55 heads can be cut into 5 or 11 parts, and 65536 tokens cannot.
GOLDEN_MESHES = {"depth_recurrence_3p5b": GOLDEN_MESH.update(axis_sizes=(2, 4, 1, 1))}

# Grouped keys, a padded vocabulary, and a teacher of another width.
STUDENT = TransformerConfig(
    vocab_size=250,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    max_length=16,
    compute_dtype="float32",
)
TEACHER = dataclasses.replace(STUDENT, num_layers=1, embed_dim=16, mlp_dim=40)
NUM_STEPS, BATCH, LENGTH = 3, 16, 16

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=4, tensor=2),
    "fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=1, sequence=8),
    "fsdp_tensor_sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}
# Adam divides by |g| + epsilon; an epsilon above rounding keeps it from enlarging that.
OPTIMIZERS = {
    "next_token": OptimizerConfig(
        name="adamw", learning_rate=0.01, warmup_fraction=0, epsilon=1e-4
    ),
    "late_to_early": OptimizerConfig(name="muon", learning_rate=0.01, warmup_fraction=0),
}
# Muon's orthogonalisation enlarges small singular values, and with them rounding.
RTOL = {"next_token": 2e-5, "late_to_early": 2e-4}


class Run(NamedTuple):
    """Three steps: state and metrics after each, the program, and what its compilation said."""

    states: list[Any]
    metrics: list[Any]
    extra: Any
    program: str
    log: str


def packed_batch() -> Batch:
    """Documents of random lengths, padding of another length in each row, one row empty."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 250, (BATCH, LENGTH + 1)).astype(np.int32)
    segments, positions = np.zeros((2, BATCH, LENGTH), np.int32)
    for row in range(1, BATCH):
        at, segment = 0, 0
        while at < LENGTH - row % 5:
            end = min(at + int(rng.integers(2, 8)), LENGTH - row % 5)
            segment += 1
            segments[row, at:end], positions[row, at:end] = segment, np.arange(end - at)
            at = end
    same = np.roll(segments, -1, axis=1) == segments
    same[:, -1] = False
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, same & (segments > 0))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The workdir of a finished run: a teacher as a user has one."""
    workdir = tmp_path_factory.mktemp("teacher")
    config = RunConfig(model=TEACHER, data=DataConfig(sequence_length=LENGTH))
    record = run_record.Record(config, "bytes", "corpus")
    method = next_token.make(next_token.NextTokenConfig(), context_of(TEACHER, None))
    mesh = one_device()
    optimizer = make_optimizer(config.optimizer, 1)
    abstract = train_state.abstract_state(method, optimizer, mesh)
    run_record.write_config(workdir, record)
    with checkpoint.Checkpoints(workdir, keep=1, record=record) as checkpoints:
        checkpoints.save(train_state.create_state(method, optimizer, abstract, jax.random.key(5)))
    return str(workdir)


def context_of(model: TransformerConfig, mesh: Mesh | None) -> Context:
    return Context(
        model=model,
        num_steps=NUM_STEPS,
        sequence_length=LENGTH,
        batch_size=4,
        tokenizer="bytes",
        load_pretrained=functools.partial(checkpoint.load_pretrained, mesh=mesh),
    )


def build(kind: str, teacher: str, mesh: Mesh) -> Method:
    """LET, or plain training with remat."""
    model = STUDENT if kind == "late_to_early" else dataclasses.replace(STUDENT, remat="dots")
    cfg: Any = next_token.NextTokenConfig()
    if kind == "late_to_early":
        cfg = late_to_early.LateToEarlyConfig(teacher=teacher, weight=1.0, stop_fraction=1.0)
    return registry.build(kind, cfg, context_of(model, mesh))


@functools.cache
def first_state(kind: str, teacher: str) -> Any:
    mesh, optimizer = one_device(), make_optimizer(OPTIMIZERS[kind], NUM_STEPS)
    method = build(kind, teacher, mesh)
    abstract = train_state.abstract_state(method, optimizer, mesh)
    return jax.device_get(train_state.create_state(method, optimizer, abstract, jax.random.key(0)))


def one_device() -> Mesh:
    return partitioning.make_mesh(data=1, devices=jax.devices()[:1])


def mesh_of(name: str) -> Mesh:
    return partitioning.make_mesh(**dataclasses.asdict(MESHES[name]))


def three_steps(kind: str, teacher: str, mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> Run:
    config = OPTIMIZERS[kind]
    optimizer = make_optimizer(config, NUM_STEPS)
    first = first_state(kind, teacher)
    with jax.set_mesh(mesh):
        method = build(kind, teacher, mesh)
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = jax.device_put(first, train_state.shardings_of(abstract))
        extra = method.init(jax.random.key(1))
        step: Any = make_train_step(
            method.loss,
            optimizer,
            make_schedule(config, NUM_STEPS),
            abstract,
            num_microbatches=2,
        )
        placed = NamedSharding(mesh, partitioning.batch_spec())
        arguments = extra, jax.device_put(packed_batch(), placed), jax.random.key(2)
        capfd.readouterr()
        program = step.lower(state, *arguments).compile()
        log = capfd.readouterr().err
        states, metrics = [], []
        for _ in range(NUM_STEPS):
            state, found = program(state, *arguments)
            states.append(jax.device_get(state))
            metrics.append({name: np.divide(*pair) for name, pair in jax.device_get(found).items()})
    return Run(states, metrics, extra, program.as_text(), log)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Run]:
    """The runs of this module, each made by the first test that asks for it."""
    return {}


@pytest.fixture
def run_on(runs: dict[tuple[str, str], Run], teacher: str, capfd: pytest.CaptureFixture[str]):
    def run(kind: str, name: str) -> Run:
        if (kind, name) not in runs:
            mesh = one_device() if name == "one" else mesh_of(name)
            runs[kind, name] = three_steps(kind, teacher, mesh, capfd)
        return runs[kind, name]

    return run


on_every_mesh = pytest.mark.parametrize("mesh", MESHES)
by_both_methods = pytest.mark.parametrize("kind", OPTIMIZERS)


def assert_close(found: Any, expected: Any, *, rtol: float, what: str) -> None:
    """Every leaf, to `rtol` of its largest element."""

    def compare(path: Any, x: Any, y: Any) -> None:
        name = f"{what} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max(), err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, expected)


@on_every_mesh
@by_both_methods
def test_one_device_and_eight_train_alike(run_on: Any, kind: str, mesh: str):
    one, eight = run_on(kind, "one"), run_on(kind, mesh)
    assert {"loss", "gradient_norm"} <= set(one.metrics[0])
    assert one.metrics[2]["loss"] < one.metrics[0]["loss"] - 0.1  # it learns: the steps are real
    assert_close(eight.metrics, one.metrics, rtol=RTOL[kind], what="metrics")
    # After the first step the first moments are the gradients, up to a common factor.
    assert_close(eight.states[0].opt_state, one.states[0].opt_state, rtol=1e-5, what="gradient")
    assert_close(eight.states[2], one.states[2], rtol=RTOL[kind], what="state")


ENERGY = {
    "system_1": EnergyConfig(update_rms=5.0),
    "system_2": EnergyConfig(
        max_steps=3, loss_steps="last", num_landscapes=0, learn_step_size=False, noise=1.0,
        random_step_size=2.0, replay_size=16, update_rms=0.5,
    ),
}  # fmt: skip
# A descent enlarges the rounding of its noisy steps: ten times smaller steps, 20 times less of it.
GRADIENT = {"system_1": 1e-5, "system_2": 2e-4}


@functools.cache
def energy_step(kind: str, name: str) -> Any:
    """State and metrics of a train step of two micro-batches, and what its compilation said."""
    mesh = one_device() if name == "one" else mesh_of(name)
    context = context_of(STUDENT, mesh)
    # A micro-batch of 16 on 8 devices: two rows on each, and one that is replayed.
    context = dataclasses.replace(context, batch_size=16)
    method = registry.build("energy", ENERGY[kind], context)
    config = OPTIMIZERS["next_token"]
    optimizer = make_optimizer(config, NUM_STEPS, rate_factors=method.rate_factors)
    batch = Batch(*(np.concatenate([x, x]) for x in packed_batch()))  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        if name == "one":
            state = train_state.create_state(method, optimizer, abstract, jax.random.key(0))
        else:
            state = jax.device_put(energy_step(kind, "one")[0], train_state.shardings_of(abstract))
        first = jax.device_get(state)
        step: Any = make_train_step(
            method.loss, optimizer, make_schedule(config, NUM_STEPS), abstract, num_microbatches=2
        )
        placed = NamedSharding(mesh, partitioning.batch_spec())
        arguments = (), jax.device_put(batch, placed), jax.random.key(2)
        program = step.lower(state, *arguments).compile()
        state, metrics = program(state, *arguments)
        places = train_state.shardings_of(state)
    return first, jax.device_get((state, metrics)), places


@pytest.mark.parametrize("mesh", ["fsdp", "tensor", "fsdp_tensor"])
@pytest.mark.parametrize("kind", ENERGY)
def test_energy_trains_alike_on_one_device_and_on_eight(
    kind: str, mesh: str, capfd: pytest.CaptureFixture[str]
):
    _, (one, metrics), _ = energy_step(kind, "one")
    capfd.readouterr()
    _, (eight, found), places = energy_step(kind, mesh)
    assert "rematerialization" not in capfd.readouterr().err
    assert_close(found, metrics, rtol=1e-4, what="metrics")
    # The first moments are the gradients, up to a common factor; Adam enlarges their rounding.
    assert_close(eight.opt_state, one.opt_state, rtol=GRADIENT[kind], what="gradient")
    assert_close(eight.method_state, one.method_state, rtol=2e-5, what="state of the method")
    if kind == "system_2":
        assert metrics["replayed"][0] > 0
        for place in jax.tree.leaves(places.method_state.records):
            assert place.spec[1] == ("data", "fsdp")


def test_a_learned_resize_has_the_same_gradient_on_eight_devices(teacher: str):
    cfg = late_to_early.LateToEarlyConfig(
        teacher=teacher, weight=1.0, stop_fraction=1.0, resize="learned_linear"
    )
    found = []
    for mesh in (one_device(), mesh_of("fsdp_tensor")):
        method = registry.build("late_to_early", cfg, context_of(STUDENT, mesh))
        optimizer = make_optimizer(OPTIMIZERS["late_to_early"], NUM_STEPS)
        abstract = train_state.abstract_state(method, optimizer, mesh)
        with jax.set_mesh(mesh):
            params = train_state.create_state(method, optimizer, abstract, jax.random.key(0)).params
            batch = jax.device_put(packed_batch(), NamedSharding(mesh, partitioning.batch_spec()))
            slope: Any = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
            extra, key = method.init(jax.random.key(1)), jax.random.key(2)
            found.append(
                jax.device_get(slope(params, extra, batch, step=jax.numpy.int32(0), key=key))
            )
    (one, _), one_slope = found[0]
    (eight, _), eight_slope = found[1]
    assert "alignment" in one_slope
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert_close(eight_slope, one_slope, rtol=1e-5, what="gradient")


@on_every_mesh
@by_both_methods
def test_no_program_is_rematerialised_against_its_shardings(run_on: Any, kind: str, mesh: str):
    assert "rematerialization" not in run_on(kind, mesh).log


def test_the_compiler_does_report_a_rematerialisation(capfd: pytest.CaptureFixture[str]):
    # The opposite: a change of layout for which there is no collective.
    mesh = mesh_of("fsdp_tensor")
    before = NamedSharding(mesh, PartitionSpec("data", None))
    after = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=before)
    jax.jit(jnp.sin, out_shardings=after).lower(x).compile()
    assert "rematerialization" in capfd.readouterr().err


# What the devices say to one another, and hold.


def collectives(program: str) -> collections.Counter[str]:
    kinds = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return collections.Counter(re.findall(kinds, program))


@by_both_methods
def test_one_device_has_nobody_to_talk_to(run_on: Any, kind: str):
    assert not collectives(run_on(kind, "one").program)


@by_both_methods
def test_replicas_only_add_up(run_on: Any, kind: str):
    found = collectives(run_on(kind, "data").program)
    assert set(found) == {"all-reduce"}


@by_both_methods
def test_fsdp_gathers_parameters_and_adds_gradients_up(run_on: Any, kind: str):
    found = collectives(run_on(kind, "fsdp").program)
    assert found["all-gather"] > 0
    assert found["all-reduce"] + found["reduce-scatter"] > 0


def test_tensor_parallel_blocks_add_up_and_gather_nothing(run_on: Any):
    found = collectives(run_on("next_token", "tensor").program)
    assert found["all-reduce"] > collectives(run_on("next_token", "data").program)["all-reduce"]
    assert not found["all-gather"]


def test_context_parallelism_gathers_keys_and_values(run_on: Any):
    # Eight rows of a micro-batch, all 16 tokens, 2 key heads of 8.
    gathered = re.findall(
        r"= (\S+?)\{\S* all-gather(?:-start)?\(", run_on("next_token", "sequence").program
    )
    assert gathered.count("f32[8,16,2,8]") >= 2
    assert not [shape for shape in gathered if shape.startswith("f32[8,16,32")]  # no activations


@by_both_methods
def test_a_teacher_is_cut_like_the_student(run_on: Any, kind: str):
    extra = run_on(kind, "fsdp_tensor").extra
    if kind == "next_token":
        assert extra == ()
        return
    shardings = train_state.shardings_of(extra)
    for axis in ("fsdp", "tensor"):
        assert partitioning.sharded_fraction(extra, shardings, axes=[axis]) > 0.95


def test_a_state_is_born_the_same_on_every_mesh(teacher: str):
    mesh = mesh_of("fsdp_tensor")
    for kind, config in OPTIMIZERS.items():
        optimizer, method = make_optimizer(config, NUM_STEPS), build(kind, teacher, mesh)
        abstract = train_state.abstract_state(method, optimizer, mesh)
        born = train_state.create_state(method, optimizer, abstract, jax.random.key(0))
        assert train_state.shardings_of(born) == train_state.shardings_of(abstract)
        assert_close(jax.device_get(born), first_state(kind, teacher), rtol=1e-6, what="state")
        for tree in (abstract.params, abstract.opt_state):
            shardings = train_state.shardings_of(tree)
            for axis in ("fsdp", "tensor"):
                assert partitioning.sharded_fraction(tree, shardings, axes=[axis]) >= 0.95


# Golden texts.


def golden_method(config: RunConfig) -> Method:
    def load_pretrained(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        del source, dtype
        assert not weights, "shapes need no weights"
        return Pretrained(
            dataclasses.replace(PUBLISHED["smollm_135m"], vocab_size=config.model.vocab_size),
            None,
            None,
        )

    method_config = config.method_config
    if config.method == "late_to_early":
        method_config = dataclasses.replace(method_config, teacher="TEACHER")
    context = Context(
        model=config.model,
        num_steps=config.train.num_steps,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size // config.train.num_microbatches,
        tokenizer="bytes",
        load_pretrained=load_pretrained,
        tokens=ByteTokenizer(),
        init_from=config.checkpoint.init_from,
    )
    return registry.build(config.method, method_config, context)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_golden_shardings(name: str):
    config = presets.get(name)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    mesh: Any = GOLDEN_MESHES.get(name, GOLDEN_MESH)  # shapes and shardings need no devices
    abstract = train_state.abstract_state(golden_method(config), optimizer, mesh)
    text = f"mesh {dict(mesh.shape)}\n"
    text += partitioning.describe(abstract, train_state.shardings_of(abstract))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "a changed sharding: see this file's docstring"


def test_golden_folder_holds_nothing_else():
    assert {path.stem for path in GOLDEN.iterdir()} == set(presets.PRESETS)


# What cannot be.


def test_too_much_left_whole_is_refused():
    def init_params(key: jax.Array) -> Any:
        del key
        cut = nn.LogicallyPartitioned(jnp.zeros((8, 11)), ("embed", None))
        return {"cut": cut, "whole": jnp.zeros(12)}

    method = Method(init_params=init_params, init=lambda key: (), loss=None, flops_per_token=0)  # pyright: ignore[reportArgumentType]
    optimizer = make_optimizer(OptimizerConfig(), 1)
    message = r"only 88% of the parameters' bytes are cut along mesh axes \['fsdp'\], at least 95%"
    with pytest.raises(ValueError, match=message):
        train_state.abstract_state(method, optimizer, mesh_of("fsdp"))
    train_state.abstract_state(method, optimizer, mesh_of("data"))  # nothing to cut


def test_more_tensor_parts_than_key_heads_fail_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled something"))
    method = build("next_token", "", one_device())
    mesh = partitioning.make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"key/kernel .* may be 1 or 2$"):
        train_state.abstract_state(method, make_optimizer(OptimizerConfig(), 1), mesh)


def run_config(batch_size: int = 16, num_microbatches: int = 1, length: int = 16, **mesh: int):
    return RunConfig(
        model=STUDENT,
        data=DataConfig(batch_size=batch_size, sequence_length=length),
        train=TrainConfig(num_microbatches=num_microbatches),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 2, "fsdp": 3}, "micro-batch of 16 sequences .* multiple of mesh.data=2 x .*=3"),
        ({"data": 8, "num_microbatches": 4}, "micro-batch of 4 sequences .* mesh.data=8"),
        ({"fsdp": 3}, "micro-batch of 16 sequences .* mesh.fsdp=3"),
        ({"sequence": 5}, "data.sequence_length=16 is not a multiple of mesh.sequence=5"),
        ({"data": 4, "dcn_data": 3}, "mesh.dcn_data=3 does not divide mesh.data=4"),
    ],
)
def test_a_mesh_that_cannot_cut_the_batch_is_refused(values: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        run_config(**values)


def test_a_mesh_that_cuts_the_batch_is_taken():
    run_config(data=2, fsdp=2, sequence=4, num_microbatches=4)
    run_config(data=-1, fsdp=8, num_microbatches=2)
