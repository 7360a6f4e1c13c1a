"""Attention in tiles is attention with all scores: losses, gradients, meshes, FLOPs, refusals."""

import dataclasses
import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import flops, next_token
from jaxlib_methods.method import Batch
from jaxlib_methods.models import language_model, partitioning, self_attention
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.self_attention import sight
from jaxlib_methods.models.transformer import forward
from jaxlib_methods.pallas_kernels import attention, dispatch
from jaxlib_methods.pallas_kernels.attention import Places

PLAIN = TransformerConfig(
    vocab_size=61,
    num_layers=1,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    max_length=24,
    compute_dtype="float32",
    attention_implementation="plain",
)
RECURRENT = dataclasses.replace(PLAIN, num_layers=3, recurrence=2)
B, L, TILE = 4, 22, 8


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CPU_TILE", (TILE, TILE))


def in_tiles(cfg: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(cfg, attention_implementation="xla")


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    init = functools.partial(language_model.init_params, cfg)
    return jax.jit(lambda key: partitioning.unbox(init(key)))(jax.random.key(0))


def make_batch() -> Batch:
    """Two documents a row, of 9 and 10 tokens, and three of padding."""
    tokens = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (B, L + 1))
    index = np.arange(L)
    segments = np.where(index < 19, 1 + index // 9 - index // 18, 0)
    positions = np.where(index < 9, index, index - 9)
    positions, segments = (np.tile(x, (B, 1)) for x in (positions, segments))
    inputs, targets, positions, segments = (
        jnp.asarray(x, jnp.int32) for x in (tokens[:, :-1], tokens[:, 1:], positions, segments)
    )
    return Batch(inputs, targets, positions, segments, segments != 0)


def slope(cfg: TransformerConfig) -> Any:
    loss = next_token.make_loss(cfg)
    return jax.value_and_grad(
        functools.partial(loss, step=jnp.int32(0), key=jax.random.key(1)), has_aux=True
    )


def compiled(cfg: TransformerConfig, params: Any, batch: Batch) -> Any:
    return jax.jit(slope(cfg)).lower(params, (), batch).compile()


@functools.cache
def plainly(cfg: TransformerConfig) -> Any:
    """`compiled` with all scores."""
    arguments = params_of(cfg), make_batch()
    return compiled(cfg, *arguments)(arguments[0], (), arguments[1])


def assert_close(found: Any, expected: Any) -> None:
    def compare(path: Any, x: Any, y: Any) -> None:
        error = float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-3))
        assert error < 1e-5, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(compare, found, expected)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_losses_and_gradients_are_those_of_all_scores(remat: Any):
    params, batch = params_of(PLAIN), make_batch()
    program = compiled(dataclasses.replace(in_tiles(PLAIN), remat=remat), params, batch)
    assert_close(program(params, (), batch), plainly(PLAIN))
    # Of 22 x 22 scores only tiles of 8 x 8 exist.
    assert not re.search(rf"f32\[[\d,]*\b{L},{L}\]", program.as_text())
    assert re.search(rf"f32\[[\d,]*\b{TILE},{TILE}\]", program.as_text())


def test_a_recurrent_model_attends_in_tiles_too():
    cfg, batch = in_tiles(RECURRENT), make_batch()

    def run(params: Any) -> jax.Array:
        return language_model.forward(cfg, params, batch.inputs, key=jax.random.key(0)).logits

    program = str(jax.make_jaxpr(run)(jax.eval_shape(lambda: params_of(RECURRENT))))
    # In the prelude, the coda and the core, whose iterations with gradient are a second loop.
    assert len(re.findall(r"= attention\[", program)) == 4
    assert f"{L},{L}]" not in program


@pytest.mark.parametrize(
    ("axes", "num_kv_heads", "tile"),
    [
        # What a device computes at once: of 4 rows, of key heads or copies of them, of 22 queries
        # those of a tile; of the keys all, in tiles of 8.
        ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, 2, "2,1,6,8"),
        ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, 1, "2,1,6,8"),  # two copies
        ({"data": 2, "tensor": 4}, 2, "2,1,8,8"),  # two copies of each
        ({"data": 2, "fsdp": 2, "sequence": 2}, 2, "1,2,6,8"),  # whole heads
        ({"data": 1, "fsdp": 8}, 2, "4,2,8,8"),  # 4 rows on 8 devices: each has all
        ({"data": 1, "tensor": 8}, 2, "4,2,8,8"),  # 4 heads on 8 devices: likewise
    ],
)
def test_one_device_and_eight_agree(axes: dict[str, Any], num_kv_heads: int, tile: str):
    cfg = dataclasses.replace(PLAIN, num_kv_heads=num_kv_heads)
    params, batch, expected = params_of(cfg), make_batch(), jax.device_get(plainly(cfg))
    mesh = partitioning.make_mesh(**axes)
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: language_model.init_params(cfg, jax.random.key(0)))
        placed = partitioning.param_shardings(boxed, mesh, indivisible="whole")
        arguments = jax.device_put((params, batch), (placed, partitioning.replicated(mesh)))
        program = compiled(in_tiles(cfg), *arguments)
        found = jax.device_get(program(arguments[0], (), arguments[1]))
    assert_close(found, expected)
    assert f"f32[{tile}]" in program.as_text()


def test_a_step_has_the_analytic_flops_and_scores_once_more():
    """At a length that tiles divide: padding is counted too."""
    length = 2 * TILE
    cfg = in_tiles(PLAIN)
    batch = jax.tree.map(lambda x: x[:, :length], make_batch())
    counted = flops.count_dot_flops(slope(cfg), params_of(PLAIN), (), batch) / (B * length)
    again = cfg.num_layers * 2 * cfg.num_heads * cfg.head_size * length
    assert counted == flops.train_flops(cfg, length) + again


def test_auto_says_once_what_it_chose_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    dispatch.log_once.cache_clear()
    monkeypatch.setattr(self_attention, "NO_SLOWER", {"cpu": 16})
    auto, places = dataclasses.replace(PLAIN, attention_implementation="auto"), make_batch()
    short, long = ((places.positions[:, :n], places.segments[:, :n]) for n in (15, 16))
    with caplog.at_level(logging.INFO):
        seen = [sight(auto, *each) for each in (short, long, long)]
        with dispatch.lowering_for("tpu"):
            seen.append(sight(auto, *long))
    assert [isinstance(each, Places) for each in seen] == [False, True, True, False]
    said = [record.message for record in caplog.records]
    assert said == [
        "self-attention runs as plain: tiles are known to be no slower on cpu from 16 tokens on, "
        "this is 15",
        "self-attention runs as tiles: tiles are known to be no slower on cpu from 16 tokens on, "
        "this is 16",
        "self-attention runs as plain: tiles are known to be no slower on tpu nowhere, this is 16",
    ]


def test_other_names_and_kernels_that_do_not_run_here_are_refused():
    with pytest.raises(ValueError, match=r"attention_implementation 'flash' is unknown; choose"):
        dataclasses.replace(PLAIN, attention_implementation="flash")
    kernels = dataclasses.replace(PLAIN, attention_implementation="pallas")
    with pytest.raises(ValueError, match="pallas was asked for, but no kernel is written for cpu"):
        jax.eval_shape(lambda: forward(kernels, params_of(PLAIN), make_batch().inputs))
