"""Rollouts of a transformer: one pass gives the same log-probabilities; padding, keys, meshes."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import linear_losses
from jaxlib_methods import rollouts as rl
from jaxlib_methods.models import decoding, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params

V = 7
PAD, CLOSE, END, THINK = 0, 1, 2, 3
IDS = rl.Tokens(close=CLOSE, end=END, pad=PAD)
ROTARY = TransformerConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=10,
    max_length=32,
    compute_dtype="float32",
)
# The one scores by logits, the other without them.
LEARNED = dataclasses.replace(
    ROTARY, positions="learned", learned_position_offset=2, loss_implementation="xla"
)
CONFIGS = {"rotary": ROTARY, "learned": LEARNED}
PROMPTS = [[4, 5, 6, 6, THINK], [THINK], [6, 4, THINK]]
N, G, P = 3, 4, 6
THOUGHT, ANSWER = 4, 3
R = THOUGHT + 1 + ANSWER


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))

    def fill(path: Any, leaf: Any) -> jax.Array:
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        return jnp.asarray(np.random.default_rng(seed).normal(size=leaf.shape) / 2, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, partitioning.unbox(shapes))


def padded(prompts: list[list[int]] = PROMPTS, width: int = P, junk: int = 5) -> Any:
    rows = [[junk] * (width - len(p)) + p for p in prompts]
    return jnp.array(rows, jnp.int32), jnp.array([len(p) for p in prompts], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(
    cfg: TransformerConfig, params: Any, prompts: jax.Array, lengths: jax.Array, settings: Any
) -> rl.Rollouts:
    cache = decoding.init_cache(cfg, batch_size=len(prompts), length=prompts.shape[1])
    sizes: dict[str, Any] = {"num_rollouts": G, "max_thought": THOUGHT, "max_answer": ANSWER}
    apply = functools.partial(forward, cfg)
    return rl.roll_out(
        apply, params, prompts, lengths, cache=cache, force_close=True, **sizes, **settings
    )


def settings_of(temperature: float = 1.3, key: int = 0) -> dict[str, Any]:
    return {"temperature": temperature, "tokens": IDS, "key": jax.random.key(key)}


@functools.partial(jax.jit, static_argnums=0)
def score(cfg: TransformerConfig, params: Any, *args: Any, **settings: Any) -> jax.Array:
    settings |= {"nll": functools.partial(linear_losses.token_nll, cfg)}
    return rl.response_log_probs(functools.partial(forward, cfg), params, *args, **settings)


@functools.partial(jax.jit, static_argnums=0)
def score_prefixes(cfg: TransformerConfig, params: Any, *args: Any) -> jax.Array:
    nll = functools.partial(linear_losses.token_nll, cfg)
    return rl.prefix_log_probs(functools.partial(forward, cfg), params, *args, nll=nll)


@functools.partial(jax.jit, static_argnums=0)
def score_targets(cfg: TransformerConfig, params: Any, *args: Any) -> jax.Array:
    nll = functools.partial(linear_losses.token_nll, cfg)
    apply = functools.partial(forward, cfg)
    return rl.target_log_probs(apply, params, *args, tokens=IDS, nll=nll)


def columns(rows: list[list[int]]) -> jax.Array:
    """Rows of tokens from column 0 on, int32 `[row, column]`."""
    return jnp.array([row + [PAD] * (P + R + 1 - len(row)) for row in rows])


@functools.partial(jax.jit, static_argnums=0)
def bare_log_probs(cfg: TransformerConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities `[row, column, V]` by the bare model."""
    return jax.nn.log_softmax(forward(cfg, params, tokens).logits[..., :V])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.5])
def test_log_probs_are_those_of_one_pass(name: str, temperature: float):
    cfg = CONFIGS[name]
    got = run(cfg, params_of(cfg), *padded(), settings_of(temperature))
    again = score(cfg, params_of(cfg), *padded(), got, temperature=temperature)
    np.testing.assert_allclose(again, got.log_probs, atol=1e-5)
    assert bool((again[got.where] < -1e-3).any())
    assert not again[~got.where].any()
    if temperature:
        assert set(got.closed.ravel().tolist()) == {True, False}
        assert len({tuple(row) for row in got.tokens[0].tolist()}) == G  # each has its own key
    else:
        assert jnp.array_equal(got.tokens, jnp.repeat(got.tokens[:, :1], G, axis=1))


def test_log_probs_and_their_gradient_are_those_of_the_bare_model():
    params, (prompts, lengths) = params_of(ROTARY), padded()
    got = run(ROTARY, params, prompts, lengths, settings_of())
    weights = jax.random.normal(jax.random.key(3), (N, G, R))
    rows = columns([PROMPTS[n] + got.tokens[n, g].tolist() for n, g in np.ndindex(N, G)])
    begin = np.repeat([len(prompt) - 1 for prompt in PROMPTS], G)[:, None] + np.arange(R)[None]

    def ours(params: Any, **form: Any) -> jax.Array:
        apply = functools.partial(forward, ROTARY)
        scores = rl.response_log_probs(
            apply, params, prompts, lengths, got, temperature=1.3, **form
        )  # fmt: skip
        return (weights * scores).sum()

    def bare(params: Any) -> jax.Array:
        logits = forward(ROTARY, params, rows).logits[..., :V] / 1.3
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), begin[..., None], axis=1)
        labels = got.tokens.reshape(N * G, R, 1)
        picked = jnp.take_along_axis(log_probs, labels, axis=-1).reshape(N, G, R)
        return jnp.where(got.where, weights * picked, 0).sum()

    cfg = dataclasses.replace(ROTARY, loss_implementation="xla")
    without_logits = functools.partial(ours, nll=functools.partial(linear_losses.token_nll, cfg))
    results = [jax.jit(jax.value_and_grad(f))(params) for f in (ours, without_logits, bare)]
    for result in results[:2]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), result, results[2]
        )
    assert float(jnp.abs(results[0][1]["final_norm"]["scale"]).max()) > 0.1


def test_padding_changes_nothing():
    params, (prompts, lengths) = params_of(LEARNED), padded()
    target = jnp.array([4, 5, 6])
    got = run(LEARNED, params, prompts, lengths, settings_of())
    want = score(LEARNED, params, prompts, lengths, got, temperature=1.3)
    wanted = score_targets(LEARNED, params, prompts, lengths, got, target)
    behind = jnp.arange(R)[None, None] >= got.lengths[..., None]
    assert bool(behind.any())
    junk = got._replace(tokens=jnp.where(behind, 6, got.tokens))
    for width in (P, P + 3):
        left, _ = padded(width=width, junk=2)
        again = run(LEARNED, params, left, lengths, settings_of())
        assert jnp.array_equal(again.tokens, got.tokens)
        np.testing.assert_allclose(again.log_probs, got.log_probs, atol=1e-5)
        scores = score(LEARNED, params, left, lengths, junk, temperature=1.3)
        np.testing.assert_allclose(scores, want, atol=1e-5)
        scores = score_targets(LEARNED, params, left, lengths, junk, target)
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
    more = [(0, 0), (0, 0), (0, 2)]
    longer = junk._replace(tokens=jnp.pad(junk.tokens, more), where=jnp.pad(junk.where, more))
    scores = score(LEARNED, params, prompts, lengths, longer, temperature=1.3)
    np.testing.assert_allclose(scores[..., :R], want, atol=1e-5)
    # The opposite: a token of a prompt matters.
    other = run(LEARNED, params, prompts.at[:, -1].set(4), lengths, settings_of())
    assert not jnp.allclose(other.log_probs[..., 0], got.log_probs[..., 0], atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_target_log_probs_are_those_of_the_bare_model(name: str):
    cfg, target = CONFIGS[name], jnp.array([4, 5, 6])
    params = params_of(cfg)
    got = run(cfg, params, *padded(), settings_of(key=1))
    scores = score_targets(cfg, params, *padded(), got, target)
    # As if no thought was closed and none answered: close is appended.
    behind = jnp.arange(R)[None, None] >= got.thought_lengths[..., None]
    cut = got._replace(tokens=jnp.where(behind, PAD, got.tokens))
    again = score_targets(cfg, params, *padded(), cut, target)
    rows = [
        [*PROMPTS[n], *got.tokens[n, g, : got.thought_lengths[n, g]].tolist(), CLOSE]
        for n, g in np.ndindex(N, G)
    ]
    log_probs = np.asarray(bare_log_probs(cfg, params, columns([*rows, *PROMPTS])))
    for row, (n, g) in enumerate(np.ndindex(N, G)):
        want = log_probs[row, len(rows[row]) - 1, target[n]]
        np.testing.assert_allclose(scores[n, g], want, atol=1e-5)
        np.testing.assert_allclose(again[n, g], want, atol=1e-5)
    assert len({len(row) for row in rows}) > 3
    bare = score_prefixes(cfg, params, *padded(), target)
    for n in range(N):
        want = log_probs[N * G + n, len(PROMPTS[n]) - 1, target[n]]
        np.testing.assert_allclose(bare[n], want, atol=1e-5)


def test_one_compilation_for_all_settings():
    first = run(ROTARY, params_of(ROTARY), *padded(), settings_of())
    before = run._cache_size()  # type: ignore[attr-defined]
    settings = settings_of(0.3, key=1) | {"tokens": rl.Tokens(close=5, end=-1, pad=3)}
    second = run(ROTARY, params_of(ROTARY), *padded([[4], [5, 6], [4] * 6]), settings)
    assert run._cache_size() == before  # type: ignore[attr-defined]
    assert not jnp.array_equal(first.tokens, second.tokens)


def test_a_mesh_changes_no_rollout():
    # Whose sequence axis does not divide the 11 columns of a prompt and its thought.
    mesh = partitioning.make_mesh(data=1, fsdp=2, tensor=2, sequence=2)
    prompts = [*PROMPTS, [6, 6]]
    params, args = params_of(ROTARY), padded(prompts)
    alone = run(ROTARY, params, *args, settings_of())
    target = jnp.array([4, 5, 6, 6])
    scores = score(ROTARY, params, *args, alone, temperature=1.3)
    targets = score_targets(ROTARY, params, *args, alone, target)
    boxed = jax.eval_shape(lambda: init_params(ROTARY, jax.random.key(0)))
    params = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
    args = jax.device_put(args, jax.NamedSharding(mesh, partitioning.logical_spec(["batch"])))
    with jax.set_mesh(mesh):
        together = run(ROTARY, params, *args, settings_of())
        without_logits = dataclasses.replace(ROTARY, loss_implementation="xla")
        again = score(without_logits, params, *args, together, temperature=1.3)
        retargeted = score_targets(without_logits, params, *args, together, target)
        scoring = score_targets.trace(without_logits, params, *args, together, target).jaxpr
    for name, x, y in zip(alone._fields, alone, together, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(again, scores, atol=1e-5)
    np.testing.assert_allclose(retargeted, targets, atol=1e-5)
    assert again.addressable_shards[0].data.shape[0] == 2
    assert "(('data', 'fsdp'), 'sequence')" in str(scoring)  # tokens, after padding
