"""The depth-recurrent transformer: one step by hand, loops, and what sees what."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import depth_recurrent as dr
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig

B, L, S, D = 2, 5, 4, 8
MODEL = TransformerConfig(embed_dim=D, num_heads=2, mlp_dim=12, compute_dtype="float32")
SIZES: dict[str, Any] = {"vocab_size": 9, "max_steps": S}
GRAPH = dr.DepthRecurrentConfig.of(MODEL, activation="relu", roles=True, **SIZES)
SEQUENCE = dr.DepthRecurrentConfig.of(
    MODEL, activation="gelu", positions="rotary", readout="first", layer_scale=0.5, **SIZES
)
SMALL_SCALE = dataclasses.replace(GRAPH, layer_scale=1e-4)
ENDS = jnp.array([[0, 3], [2, 1]])
TOKENS = jnp.array([[1, 2, 3, 4, 5], [3, 8, 5, 0, 0]])
EDGES = np.zeros((B, L, L), bool)  # [source, target]: a path 0 1 2 3 4, and 2 -> 0 -> 1
EDGES[0, range(4), range(1, 5)] = True
EDGES[1, [2, 0], [0, 1]] = True
SEES = jnp.asarray(EDGES.transpose(0, 2, 1) | np.eye(L, dtype=bool))

forward = jax.jit(dr.forward, static_argnums=0)
step = jax.jit(dr.step, static_argnums=0)
embed = jax.jit(dr.embed, static_argnums=0)
readout = jax.jit(dr.readout, static_argnums=0)
iterate = jax.jit(dr.iterate, static_argnums=0)


@functools.cache
def new_params(cfg: dr.DepthRecurrentConfig) -> dict:
    init = jax.jit(lambda key: partitioning.unbox(dr.init_params(cfg, key)))
    return init(jax.random.key(0))


@functools.cache
def moved_params(cfg: dr.DepthRecurrentConfig) -> dict:
    """Parameters of which none is where it starts."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(dr.init_params, cfg), jax.random.key(0))

    def draw(x: Any) -> jax.Array:
        return jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype)

    return jax.tree.map(draw, partitioning.unbox(shapes))


def with_fields(cfg: dr.DepthRecurrentConfig, **fields: Any) -> dr.DepthRecurrentConfig:
    """The configuration with other fields, of the trunk where they are the trunk's."""
    own = {name: fields.pop(name) for name in list(fields) if hasattr(cfg, name)}
    return dataclasses.replace(cfg, trunk=dataclasses.replace(cfg.trunk, **fields), **own)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


def states(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, L, D))


# One step.


def step_by_hand(cfg: dr.DepthRecurrentConfig, params: Any, h: np.ndarray, t: int) -> Any:
    """The equations of the paper in numpy, without rotation; ReLU."""
    block = params["block"]
    scale = {name: block.get(f"{name}_scale", 1.0) for name in ("attention", "mlp")}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * block[name]["scale"] + block[name]["bias"]

    def attention(x: np.ndarray) -> np.ndarray:
        parts = block["attention"]
        q, k, v = (
            np.einsum("bld,dhc->blhc", x, parts[name]["kernel"]) + parts[name]["bias"]
            for name in ("query", "key", "value")
        )
        scores = np.einsum("blhc,bmhc->bhlm", q, k) / math.sqrt(D // 2)
        weights = np.where(np.asarray(SEES)[:, None], np.exp(scores), 0)
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhlm,bmhc->blhc", weights, v)
        return (
            np.einsum("blhc,hcd->bld", mixed, parts["output"]["kernel"]) + parts["output"]["bias"]
        )

    def mlp(x: np.ndarray) -> np.ndarray:
        up, down = block["mlp"]["up"], block["mlp"]["down"]
        return np.maximum(x @ up["kernel"] + up["bias"], 0) @ down["kernel"] + down["bias"]

    u = h + (params["depth_embedding"]["table"][t] if "depth_embedding" in params else 0)
    if cfg.norm_placement == "pre":
        a = u + scale["attention"] * attention(norm("attention_norm", u))
        n = a + scale["mlp"] * mlp(norm("mlp_norm", a))
    else:
        a = norm("attention_norm", u + scale["attention"] * attention(u))
        n = norm("mlp_norm", a + scale["mlp"] * mlp(a))
    if not cfg.gate:
        return n, np.ones_like(n)
    pair = np.concatenate([n, h], axis=-1)
    z = 1 / (1 + np.exp(-(pair @ block["gate"]["kernel"] + block["gate"]["bias"])))
    return z * n + (1 - z) * h, z


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_scale": 0.5},
        {"gate": False, "norm_placement": "post", "depth_embedding": "none"},
    ],
)
def test_a_step_by_hand(fields: dict[str, Any]):
    cfg = dataclasses.replace(GRAPH, **fields)
    params = moved_params(cfg)
    want = step_by_hand(cfg, jax.tree.map(np.asarray, params), np.asarray(states()), 2)
    assert_close(step(cfg, params, states(), 2, SEES), want, 2e-5)


def test_the_first_state_and_the_readout_by_hand():
    params = jax.tree.map(np.asarray, moved_params(GRAPH))

    def norm(x: np.ndarray, part: dict) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * part["scale"] + part["bias"]

    x = params["embedding"]["table"][TOKENS]
    for row in range(B):
        x[row, ENDS[row]] += params["roles"]["table"]
    state = embed(GRAPH, params, TOKENS, ENDS)
    assert_close(state, norm(x, params["embedding_norm"]), 1e-5)
    ends = np.stack([np.concatenate([state[row, i] for i in ENDS[row]]) for row in range(B)])
    hidden, last = params["readout_hidden"], params["readout_logit"]
    y = norm(ends, params["readout_norm"]) @ hidden["kernel"] + hidden["bias"]
    y = y * np.array([[0.5 * (1 + math.erf(v / math.sqrt(2))) for v in row] for row in y])
    want = (y @ last["kernel"] + last["bias"])[:, 0]
    assert_close(readout(GRAPH, params, state, ENDS), want, 1e-5)


def test_the_first_token_is_read_alone():
    params, state = moved_params(SEQUENCE), states()
    before = readout(SEQUENCE, params, state)
    np.testing.assert_array_equal(readout(SEQUENCE, params, state.at[:, 1:].add(1.0)), before)
    assert bool((readout(SEQUENCE, params, state.at[:, 0, 0].add(1.0)) != before).all())


# What a new model is.


def test_a_closed_gate_is_the_identity():
    params = new_params(SMALL_SCALE)
    gate = params["block"]["gate"] | {"bias": jnp.full(D, -20.0)}
    params = params | {"block": params["block"] | {"gate": gate}}
    assert_close(
        iterate(SMALL_SCALE, params, states(), SEES, num_steps=jnp.int32(S)), states(), 1e-6
    )


def test_a_small_layer_scale_leaves_the_depth_embedding_alone():
    params, state = new_params(SMALL_SCALE), states()
    depth = params["depth_embedding"]["table"][3][None, None]
    new, gate = step(SMALL_SCALE, params, state, 3, SEES)
    assert_close(new, state + gate * depth, 1e-3)
    assert 0.10 < float(gate.mean()) < 0.16
    candidate, _ = step(dataclasses.replace(SMALL_SCALE, gate=False), params, state, 3, SEES)
    assert_close(candidate, state + depth, 1e-3)
    assert not np.allclose(new, candidate, atol=0.1)


# Loops.


def loss(logits: jax.Array) -> jax.Array:
    return (jnp.logaddexp(0, logits) * jnp.array([1.0, -2.0] * (len(logits) // 2))).sum()


@functools.cache
def slope_of(cfg: dr.DepthRecurrentConfig) -> Any:
    """(params, tokens, sees, endpoints, depth) -> loss and its gradient; one program."""

    def of_params(params: Any, tokens: Any, sees: Any, ends: Any, depth: jax.Array) -> jax.Array:
        return loss(dr.forward(cfg, params, tokens, sees, ends, num_steps=depth))

    return jax.jit(jax.value_and_grad(of_params))


def test_any_depth_is_that_many_steps():
    def loop(params: Any, depth: int) -> jax.Array:
        state = embed(GRAPH, params, TOKENS, ENDS)
        for t in range(depth):
            state, _ = step(GRAPH, params, state, jnp.int32(t), SEES)
        return loss(readout(GRAPH, params, state, ENDS))

    params = moved_params(GRAPH)
    for depth in (0, 3):
        got = slope_of(GRAPH)(params, TOKENS, SEES, ENDS, jnp.int32(depth))
        assert_close(got, jax.value_and_grad(loop)(params, depth), 5e-5)


def test_one_program_serves_every_depth_and_clamps():
    traces, params, key = 0, moved_params(SEQUENCE), jax.random.key(3)

    @jax.jit
    def logits(depth: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        options: dict[str, Any] = {"num_steps": depth, "max_steps": 3, "key": key}
        return dr.forward(SEQUENCE, params, TOKENS, SEES, **options)

    key_embed, key_steps, key_readout = jax.random.split(key, 3)
    state = embed(SEQUENCE, params, TOKENS, key=key_embed)
    for t in range(4):
        want = readout(SEQUENCE, params, state, key=key_readout)
        assert_close(logits(jnp.int32(t)), want, 1e-5)
        state, _ = step(SEQUENCE, params, state, jnp.int32(t), SEES, key=key_steps)
    for depth, same in ((9, 3), (-1, 0)):
        np.testing.assert_array_equal(logits(jnp.int32(depth)), logits(jnp.int32(same)))
    assert traces == 1


def test_a_known_depth_is_a_program_of_that_many_steps():
    params = moved_params(GRAPH)

    def known(params: Any) -> jax.Array:
        return dr.forward(GRAPH, params, TOKENS, SEES, ENDS, num_steps=2)

    want = forward(GRAPH, params, TOKENS, SEES, ENDS, num_steps=jnp.int32(2))
    assert_close(jax.jit(known)(params), want, 1e-6)
    assert "cond[" not in str(jax.make_jaxpr(known)(params))


def test_the_gradient_of_a_tied_block_is_the_sum_over_its_uses():
    untied = dataclasses.replace(GRAPH, weights="untied")
    params = moved_params(GRAPH)
    copies = jax.tree.map(lambda x: jnp.tile(x[None], (S,) + (1,) * x.ndim), params["block"])
    arguments = (TOKENS, SEES, ENDS, jnp.int32(3))
    want, slope = slope_of(GRAPH)(params, *arguments)
    got, slopes = slope_of(untied)(params | {"block": copies}, *arguments)
    assert_close(got, want, 1e-6)
    assert_close(jax.tree.map(lambda x: x.sum(axis=0), slopes["block"]), slope["block"], 2e-5)
    output = slopes["block"]["mlp"]["down"]["kernel"]
    assert [bool(output[t].any()) for t in range(S)] == [True, True, True, False]
    assert float(jnp.abs(output[0] - output[1]).max()) > 1e-3
    shapes = jax.tree.map(lambda x: x.shape, slopes)
    assert shapes == jax.tree.map(lambda x: x.shape, moved_params(untied))


def test_a_trajectory_gives_every_depth():
    cfg, params, key = GRAPH, moved_params(GRAPH), jax.random.key(5)
    got = jax.jit(functools.partial(dr.trajectory, cfg))(
        params, TOKENS, SEES, ENDS, num_steps=jnp.int32(3), key=key
    )
    assert all(x.shape == (S, B) for x in got)
    assert not any(x[3].any() for x in got)  # not taken
    for t in range(3):
        want = forward(cfg, params, TOKENS, SEES, ENDS, num_steps=jnp.int32(t + 1), key=key)
        assert_close(got.logits[t], want, 1e-5)


def test_diagnostics_are_means_over_the_tokens():
    params = moved_params(GRAPH)
    got = dr.trajectory(GRAPH, params, TOKENS, SEES, ENDS, num_steps=1)
    old = embed(GRAPH, params, TOKENS, ENDS)
    new, gate = step(GRAPH, params, old, 0, SEES)
    row, real = 1, slice(3)  # the second example's padding counts nothing
    size = np.linalg.norm(new[row, real], axis=-1)
    change = np.linalg.norm(new[row, real] - old[row, real], axis=-1)
    assert got.norm[0, row] == pytest.approx(size.mean(), rel=1e-5)
    want = (change / np.linalg.norm(old[row, real], axis=-1)).mean()
    assert got.change[0, row] == pytest.approx(want, rel=1e-5)
    assert got.gate[0, row] == pytest.approx(float(gate[row, real].mean()), rel=1e-5)


def test_remat_changes_no_number():
    arguments = (moved_params(GRAPH), TOKENS, SEES, ENDS, jnp.int32(3))
    got = slope_of(with_fields(GRAPH, remat="full"))
    assert_close(got(*arguments), slope_of(GRAPH)(*arguments), 2e-5)
    assert "remat" in str(jax.make_jaxpr(got)(*arguments))


def test_more_steps_than_the_model_has_are_refused_or_clamped():
    params, state = moved_params(GRAPH), states()
    with pytest.raises(ValueError, match=r"num_steps 5 must be 0 to 4; .* larger"):
        dr.forward(GRAPH, params, TOKENS, SEES, ENDS, num_steps=5)
    with pytest.raises(ValueError, match="max_steps 5 must be 0 to 4"):
        dr.iterate(GRAPH, params, state, SEES, num_steps=jnp.int32(2), max_steps=5)
    with pytest.raises(ValueError, match="step 4 does not exist; choose 0 to 3"):
        dr.step(GRAPH, params, state, 4, SEES)
    last = step(GRAPH, params, state, S - 1, SEES)
    assert_close(step(GRAPH, params, state, jnp.int32(5), SEES), last, 0.0)


# What sees what.


def test_a_step_carries_news_one_edge_forward():
    # Example 0 is the path 0 1 2 3 4. Each node's first state is changed in turn.
    params, state = moved_params(GRAPH), states()
    run = jax.jit(lambda h, t: iterate(GRAPH, params, h, SEES, num_steps=t))
    for depth in range(S + 1):
        before = run(state, jnp.int32(depth))[0]
        for source in range(L):
            after = run(state.at[0, source, 0].add(1.0), jnp.int32(depth))[0]
            moved = (after != before).any(axis=-1)
            reached = [source <= node <= source + depth for node in range(L)]
            np.testing.assert_array_equal(moved, reached)


def test_nodes_have_no_order():
    params, order = moved_params(GRAPH), np.array([3, 0, 4, 1, 2])
    place = np.argsort(order)
    state = embed(GRAPH, params, TOKENS, ENDS)
    shuffled = embed(GRAPH, params, TOKENS[:, order], jnp.asarray(place)[ENDS])
    assert_close(shuffled, state[:, order], 1e-6)
    run = functools.partial(iterate, GRAPH, params, num_steps=jnp.int32(3))
    sees = SEES[:, order][:, :, order]
    assert_close(run(shuffled, sees=sees), run(state, sees=SEES)[:, order], 1e-5)


def test_the_words_of_a_sequence_have_an_order():
    params, state = moved_params(SEQUENCE), states()[:1]
    swapped = state[:, jnp.array([0, 2, 1, 3, 4])]
    sees = dr.sees_all(TOKENS[:1])

    def difference(cfg: dr.DepthRecurrentConfig) -> float:
        first, second = (step(cfg, params, x, 0, sees)[0][0, 0] for x in (state, swapped))
        return float(jnp.abs(first - second).max())

    assert difference(SEQUENCE) > 1e-3
    assert difference(dataclasses.replace(SEQUENCE, positions="none")) < 1e-6


def test_padding_does_not_exist():
    params = moved_params(SEQUENCE)

    def run(params: Any, x: jax.Array) -> jax.Array:
        return forward(SEQUENCE, params, x, dr.sees_all(x), num_steps=jnp.int32(3))

    short, tokens = TOKENS[1:, :3], TOKENS[1:]
    np.testing.assert_array_equal(dr.sees_all(tokens)[0], [[1, 1, 1, 0, 0]] * 5)
    assert_close(run(params, tokens), run(params, short), 1e-6)
    table = params["embedding"]["table"]
    other = params | {"embedding": {"table": table.at[0].add(5.0)}}
    np.testing.assert_array_equal(run(other, tokens), run(params, tokens))
    graph = moved_params(GRAPH)
    other = graph | {"embedding": {"table": graph["embedding"]["table"].at[0].add(5.0)}}
    got, want = (
        forward(GRAPH, p, TOKENS, SEES, ENDS, num_steps=jnp.int32(3)) for p in (other, graph)
    )
    np.testing.assert_array_equal(got, want)


# Dropout, precision, devices, refusals.


def test_dropout_by_key():
    ones = jnp.ones((200, 50))
    dropped = dr._dropout(ones, 0.2, jax.random.key(0))
    values = sorted(set(np.asarray(dropped).ravel().tolist()))
    assert values == [0.0, 1.25]
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    params, state = moved_params(GRAPH), states()
    level = params | {"depth_embedding": {"table": jnp.ones((S, D))}}  # steps differ by key alone
    take = functools.partial(step, GRAPH, level, state, sees=SEES)
    first, again = (take(t=0, key=jax.random.key(0))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for other in (take(t=1, key=jax.random.key(0)), take(t=0, key=jax.random.key(1)), take(t=0)):
        assert not np.allclose(other[0], first)
    dropped = embed(GRAPH, params, TOKENS, ENDS, key=jax.random.key(0)) == 0
    assert 0 < int(dropped.sum()) < dropped.size / 4
    heads = [readout(GRAPH, params, state, ENDS, key=k) for k in (None, jax.random.key(0))]
    assert not np.allclose(*heads)
    certain = dataclasses.replace(GRAPH, dropout=0.0)
    program = jax.make_jaxpr(lambda k: dr.step(certain, params, state, 0, SEES, key=k))
    assert "random_bits" not in str(program(jax.random.key(0)))


def test_half_precision_keeps_the_state_in_float32():
    cfg = with_fields(SMALL_SCALE, compute_dtype="bfloat16", gate=False)
    params = new_params(SMALL_SCALE)
    state = embed(cfg, params, TOKENS, ENDS)
    new, gate = step(cfg, params, state, 0, SEES)
    assert {x.dtype for x in (state, new, gate)} == {jnp.dtype("float32")}
    news = jnp.abs(new - (state + params["depth_embedding"]["table"][0][None, None]))
    assert 0 < float(news.max()) < 2e-3  # an update that bfloat16 sums would lose
    gated = dataclasses.replace(cfg, gate=True)
    got, want = (
        forward(cfg, params, TOKENS, SEES, ENDS, num_steps=jnp.int32(3))
        for cfg in (gated, SMALL_SCALE)
    )
    assert got.dtype == jnp.float32
    assert_close(got, want, 0.05)
    assert not np.allclose(got, want, atol=1e-6)


def test_a_mesh_changes_no_number():
    params = moved_params(GRAPH)
    boxed = jax.eval_shape(functools.partial(dr.init_params, GRAPH), jax.random.key(0))
    batch = tuple(np.concatenate([x] * 2) for x in (TOKENS, SEES, ENDS))
    want = forward(GRAPH, params, *batch, num_steps=jnp.int32(3))
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    rows = jax.sharding.NamedSharding(mesh, jax.P(partitioning.batch_spec()[0]))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, partitioning.param_shardings(boxed, mesh))
        got = forward(GRAPH, placed, *jax.device_put(batch, rows), num_steps=jnp.int32(3))
    assert len(got.sharding.device_set) == 8
    assert_close(jax.device_get(got), want, 2e-5)


def test_a_model_of_endpoints_needs_them():
    with pytest.raises(ValueError, match="give endpoints"):
        embed(GRAPH, moved_params(GRAPH), TOKENS)
