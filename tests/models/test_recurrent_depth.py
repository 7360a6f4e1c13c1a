"""The recurrent-depth model: by hand, what sees what, its cache, devices and dtypes."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import partitioning, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.recurrent_depth import RecurrentCache, init_cache, state_at
from jaxlib_methods.models.recurrent_training import forward

B, L, V = 2, 7, 13
BASE = TransformerConfig(
    vocab_size=V,
    num_layers=4,  # one, two in the core, one
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=20,
    max_length=16,
    block="sandwich",
    qk_bias=True,
    kernel_init="takase",
    tie_embeddings=True,
    recurrence=8,
    backprop_steps=3,
    compute_dtype="float32",
)
TOKENS = np.random.default_rng(0).integers(0, V, size=(B, L), dtype=np.int32)
POSITIONS = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
ONES = np.ones((B, L), np.int32)
KEY = jax.random.key(0)
first_state = jax.jit(state_at, static_argnums=0)
STATE = np.asarray(first_state(BASE, POSITIONS, KEY))


def changed(**changes: Any) -> TransformerConfig:
    return dataclasses.replace(BASE, **changes)


@functools.cache
def boxed(cfg: TransformerConfig) -> Any:
    return jax.eval_shape(functools.partial(recurrent_depth.init_params, cfg), KEY)


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    """Parameters at which no scale is one and no bias zero."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = float(path[-1].key == "scale")
        return (mean + 0.25 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, partitioning.unbox(boxed(cfg)))


@functools.partial(jax.jit, static_argnums=0)
def program(cfg: TransformerConfig, params: Any, tokens: Any, num_steps: Any, places: Any) -> Any:
    """One program for every number of iterations."""
    return forward(cfg, params, tokens, key=KEY, num_steps=num_steps, **places)


def run(cfg: TransformerConfig, params: Any, tokens: Any, num_steps: int, **places: Any) -> Any:
    places = {"positions": POSITIONS, "segments": ONES, "state": STATE} | places
    return jax.device_get(program(cfg, params, tokens, np.int32(num_steps), places))


# The model by hand, in NumPy and float64, one row at a time.


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + BASE.norm_eps) * scale


def turn(x: np.ndarray) -> np.ndarray:
    """Rotary positions of `[L, heads, 4]`: features i and i + 2 are a pair."""
    angles = np.arange(len(x))[:, None, None] * 10_000.0 ** -(np.arange(2) / 2)
    cos, sin, first, second = np.cos(angles), np.sin(angles), x[..., :2], x[..., 2:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def feed(x: np.ndarray, p: Any) -> np.ndarray:
    gate = x @ p["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


class Row:
    """One sequence. kept: keys and values of each block at its tokens' deepest iteration."""

    def __init__(self, cfg: TransformerConfig, params: Any) -> None:
        self.cfg = cfg
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.kept: dict[tuple[str, int], np.ndarray] = {}

    def attend(self, x: np.ndarray, p: Any, name: tuple[str, int], moves: np.ndarray) -> np.ndarray:
        q, k, v = (np.einsum("ld,dhc->lhc", x, p[n]["kernel"]) for n in ("query", "key", "value"))
        q, k = q + p["query_bias"], k + p["key_bias"]
        if self.cfg.positions == "rotary":
            q, k = turn(q), turn(k)
        new = np.stack([k, v])
        new = np.where(moves[None, :, None, None], new, self.kept.get(name, new))
        self.kept[name] = new
        k, v = np.repeat(new, 2, axis=2)
        scores = np.einsum("qhc,khc->hqk", q, k) / 2
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return np.einsum("hqk,khc,hcd->qd", shares, v, p["output"]["kernel"])

    def blocks(self, part: str, x: np.ndarray, moves: np.ndarray) -> np.ndarray:
        count = getattr(self.cfg, f"{part}_layers")
        for i in range(count):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], self.params[part]["blocks"])
            attend = functools.partial(self.attend, p=p["attention"], name=(part, i), moves=moves)
            first, second = p["attention_norm"]["scale"], p["mlp_norm"]["scale"]
            if self.cfg.block == "pre_norm":
                x = x + attend(norm(x, first))
                x = x + feed(norm(x, second), p["mlp"])
            elif self.cfg.block == "post_norm":
                x = norm(x + attend(x), first)
                x = norm(x + feed(x, p["mlp"]), second)
            else:
                x = norm(x + attend(norm(x, first)), p["attention_post_norm"]["scale"])
                x = x + feed(norm(x, second), p["mlp"])
                x = norm(x, p["mlp_post_norm"]["scale"])
        return x

    def inject(self, s: np.ndarray, e: np.ndarray) -> np.ndarray:
        if self.cfg.injection == "linear":
            return np.concatenate([s, e], axis=1) @ self.params["adapter"]["kernel"]
        return {"add": s + e, "gate": s * e, "none": s}[self.cfg.injection]

    def __call__(self, tokens: Any, state: Any, stops: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits and states; token t takes `stops[t]` iterations."""
        params, every = self.params, np.ones(len(tokens), bool)
        table = params["embedding"]["table"]
        x = table[tokens] * 4  # sqrt(16)
        if self.cfg.positions == "learned":
            x = x + params["position_embedding"]["table"][: len(tokens)]
        e = self.blocks("prelude", x, every)
        s = e if self.cfg.injection == "none" else np.asarray(state, np.float64)
        for i in range(max(stops)):
            moves = np.asarray(stops) > i
            s = np.where(moves[:, None], self.blocks("core", self.inject(s, e), moves), s)
        scale = params["final_norm"]["scale"]
        x = norm(self.blocks("coda", norm(s, scale), every), scale)
        head = table.T if self.cfg.tie_embeddings else params["head"]["kernel"]
        return (x @ head)[:, :V], s


VARIANTS = {
    "huginn": BASE,
    "add_post_norm": changed(injection="add", block="post_norm", tie_embeddings=False),
    "gate_learned": changed(injection="gate", positions="learned", num_layers=3),
    "none_pre_norm": changed(injection="none", block="pre_norm"),
    "core_alone": changed(block="pre_norm", prelude_layers=0, coda_layers=0, num_layers=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_model_by_hand(name):
    cfg = VARIANTS[name]
    params = params_of(cfg)
    for r in (1, 2, 5):
        out = run(cfg, params, TOKENS, r)
        for b in range(B):
            logits, state = Row(cfg, params)(TOKENS[b], STATE[b], [r] * L)
            np.testing.assert_allclose(out.logits[b, :, :V], logits, rtol=2e-4, atol=1e-4)
            np.testing.assert_allclose(out.state[b], state, rtol=2e-4, atol=1e-4)
        assert np.all(out.logits[..., V:] < -1e29)


def test_the_tree_knows_nothing_of_the_number_of_iterations():
    trees = [boxed(changed(recurrence=r, backprop_steps=1)) for r in (1, 2, 100)]
    for tree in trees:
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, boxed(BASE))
    assert set(trees[0]) == {"embedding", "prelude", "core", "coda", "adapter", "final_norm"}
    assert trees[0]["core"]["blocks"]["mlp_norm"]["scale"].value.shape == (2, 16)
    assert trees[0]["adapter"]["kernel"].value.shape == (32, 16)
    assert set(boxed(VARIANTS["core_alone"])) == {"embedding", "core", "adapter", "final_norm"}
    assert "adapter" not in boxed(VARIANTS["add_post_norm"])


@pytest.mark.parametrize("r", [1, 8])
def test_no_token_sees_a_later_one(r):
    params = params_of(BASE)
    want = run(BASE, params, TOKENS, r).logits
    for t in range(L):
        moved = TOKENS.copy()
        moved[:, t] = (moved[:, t] + 1) % V
        differs = np.any(run(BASE, params, moved, r).logits != want, axis=-1)
        assert differs.tolist() == [[i >= t for i in range(L)]] * B


def test_a_sandwich_keeps_the_state_at_size_one():
    init = functools.partial(recurrent_depth.init_params, BASE)
    drawn = jax.jit(lambda: partitioning.unbox(init(KEY)))()
    for r in (1, 2, 3, 5, 8, 16, 32, 64):
        out = run(BASE, drawn, TOKENS, r)
        size = np.sqrt(np.mean(out.state**2, axis=-1))
        np.testing.assert_allclose(size, 1, atol=1e-4)
        np.testing.assert_allclose(out.norms, 1, atol=1e-4)
        assert np.isfinite(out.logits).all()


def test_the_final_norm_is_applied_twice_and_never_in_the_loop():
    # A pre-norm coda that writes nothing: norm(norm(s) g) g E is all there is.
    cfg, drawn = VARIANTS["none_pre_norm"], params_of(VARIANTS["none_pre_norm"])
    silent = jax.tree.map(np.zeros_like, drawn["coda"])
    scale, table = drawn["final_norm"]["scale"], drawn["embedding"]["table"]
    states = []
    for factor in (1, 2):
        params = drawn | {"coda": silent, "final_norm": {"scale": factor * scale}}
        out = run(cfg, params, TOKENS, 3)
        states.append(out.state)
        once = norm(out.state, factor * scale)
        want = norm(once, factor * scale) @ table.T
        np.testing.assert_allclose(out.logits[..., :V], want[..., :V], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(*states)


# The first state.


def test_the_first_state_is_a_cut_normal_of_its_position():
    draws = np.asarray(recurrent_depth.initial_state(BASE, KEY, (200, 200)))
    assert draws.shape == (200, 200, 16)
    assert abs(draws.std() - 0.624) < 0.002
    assert abs(draws.mean()) < 0.003
    assert 1.8 < np.abs(draws).max() <= 3 * 0.4**0.5
    np.testing.assert_array_equal(STATE[0], STATE[1])
    fifth = np.array([[5]], np.int32)
    alone = np.asarray(first_state(BASE, fifth, KEY))[0, 0]
    np.testing.assert_allclose(alone, STATE[0, 5], rtol=1e-6)
    assert np.all(STATE[0, 4] != STATE[0, 5])
    assert np.all(np.asarray(first_state(BASE, fifth, jax.random.key(1)))[0, 0] != STATE[0, 5])
    for scale in (0.5, 0.0):
        got = np.asarray(first_state(BASE, fifth, KEY, scale=scale))
        np.testing.assert_allclose(got[0, 0], scale * STATE[0, 5], rtol=1e-6)


# What a token sees.


def test_packed_documents_equal_separate_ones_whatever_the_padding_holds():
    # Three tokens, two tokens, two of padding.
    positions = np.array([[0, 1, 2, 0, 1, 0, 0]] * B, np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]] * B, np.int32)
    packed = functools.partial(run, BASE, params_of(BASE), positions=positions, segments=segments)
    first, second = TOKENS[:, :3], TOKENS[:, 3:5]
    got = packed(TOKENS, 4)
    for tokens, state, at in (
        (first, STATE[:, :3], slice(0, 3)),
        (second, STATE[:, 3:5], slice(3, 5)),
    ):
        for b in range(B):
            want, _ = Row(BASE, params_of(BASE))(tokens[b], state[b], [4] * len(state[b]))
            np.testing.assert_allclose(got.logits[b, at, :V], want, rtol=2e-4, atol=1e-4)
    junk, wild = TOKENS.copy(), STATE.copy()
    junk[:, 5:], wild[:, 5:] = (junk[:, 5:] + 3) % V, 1e3
    other = packed(junk, 4, state=wild)
    np.testing.assert_array_equal(other.logits[:, :5], got.logits[:, :5])
    # Nor what is measured of the states.
    np.testing.assert_array_equal(other.changes, got.changes)
    np.testing.assert_array_equal(other.norms, got.norms)


# The cache.


@functools.partial(jax.jit, static_argnums=0)
def consume(
    cfg: TransformerConfig,
    params: Any,
    cache: Any,
    tokens: Any,
    stops: Any,
    positions: Any,
    segments: Any,
) -> tuple[jax.Array, Any]:
    """Reads tokens `[B, l]` into the cache, each with `stops` `[B, l]` iterations."""
    places = {"positions": positions, "segments": segments}
    reading, cache = recurrent_depth.read(cfg, params, tokens, cache=cache, **places)

    def body(i: Any, carry: Any) -> Any:
        state, cache = carry
        return recurrent_depth.iterate(
            cfg, params, state, reading, cache=cache, step=i, active=stops > i
        )

    state = state_at(cfg, positions, KEY)
    state, cache = jax.lax.fori_loop(0, stops.max(), body, (state, cache))
    logits, _, cache = recurrent_depth.predict(cfg, params, state, reading, cache=cache)
    return logits, cache


@functools.cache
def empty(kept_steps: int, cfg: TransformerConfig = BASE) -> RecurrentCache:
    return jax.device_get(init_cache(cfg, batch_size=B, length=L + 2, kept_steps=kept_steps))


def read_all(
    cache: RecurrentCache, stops: Any, *, at_once: bool = False, cfg: TransformerConfig = BASE
) -> Any:
    """Logits of TOKENS, read one by one or at once, and the cache."""
    stops, width, found = np.broadcast_to(np.asarray(stops), (B, L)), L if at_once else 1, []
    for t in range(0, L, width):
        rows = (x[:, t : t + width] for x in (TOKENS, stops, POSITIONS, ONES))
        logits, cache = consume(cfg, params_of(cfg), cache, *rows)
        found.append(np.asarray(logits)[..., :V])
    return np.concatenate(found, axis=1), jax.device_get(cache)


@pytest.fixture
def exact() -> Iterator[TransformerConfig]:
    """BASE in float64: over five iterations float32 rounds as the processor has it."""
    with jax.enable_x64(True):
        yield changed(compute_dtype="float64", param_dtype="float64")


def test_decoding_one_by_one_equals_the_whole(exact):
    def logits(num_steps: int) -> np.ndarray:
        state = first_state(exact, POSITIONS, KEY)
        return run(exact, params_of(exact), TOKENS, num_steps, state=state).logits[..., :V]

    def decoded(kept_steps: int, num_steps: int) -> np.ndarray:
        return read_all(empty(kept_steps, exact), num_steps, cfg=exact)[0]

    np.testing.assert_allclose(decoded(5, 5), logits(5), rtol=1e-10)
    assert not np.allclose(decoded(1, 5), logits(5), atol=1e-3)
    np.testing.assert_allclose(decoded(1, 1), logits(1), rtol=1e-10)
    np.testing.assert_allclose(decoded(5, 1), logits(1), rtol=1e-10)


def test_tokens_see_the_deepest_iteration_of_those_that_stopped():
    # The second stopped at 3 and is seen at 5; the sixth goes no deeper than 1.
    stops = np.array([[5, 3, 5, 2, 4, 1, 5], [1, 2, 3, 4, 5, 5, 5]])
    for at_once in (False, True):
        got, cache = read_all(empty(5), stops, at_once=at_once)
        np.testing.assert_array_equal(cache.steps[:, :L], stops)
        for b in range(B):
            want, _ = Row(BASE, params_of(BASE))(TOKENS[b], STATE[b], stops[b])
            np.testing.assert_allclose(got[b], want, rtol=2e-4, atol=1e-4)


def test_later_iterations_overwrite_earlier_ones():
    # The first token sees itself alone, so that its iterations are the same in every cache.
    caches = [jax.tree.leaves(read_all(empty(kept), 5)[1].core) for kept in (5, 2, 1)]
    assert len(caches[0]) == 2 * 2  # keys and values of each block
    for every, two, one in zip(*caches, strict=True):
        assert every.shape == (5, B, 2, L + 2, 4)
        first = every[:, :, :, 0]
        assert np.all(first[3] != first[4])
        np.testing.assert_allclose(two[:, :, :, 0], first[np.array([4, 3])], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one[0, :, :, 0], first[4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept_steps", [5, 1])
def test_padding_writes_nothing(kept_steps):
    _, before = read_all(empty(kept_steps), 3)
    segments = np.array([[0], [1]], np.int32)
    rows = (np.full((B, 1), n, np.int32) for n in (1, 4, L))  # tokens, iterations, positions
    after = jax.device_get(consume(BASE, params_of(BASE), before, *rows, segments)[1])
    for old, new in zip(jax.tree.leaves(before[:3]), jax.tree.leaves(after[:3]), strict=True):
        written = np.any(old != new, axis=(*range(old.ndim - 4), -3, -1))  # [B, M]
        assert written.tolist() == [[False] * (L + 2), [m == L for m in range(L + 2)]]
    np.testing.assert_array_equal(after.steps - before.steps, [[0] * 9, [0] * 7 + [4, 0]])


def test_left_padded_prompts(exact):
    lengths, width = np.array([4, 6]), 6
    indices = np.arange(width)[None] - (width - lengths)[:, None]
    positions, segments = np.maximum(indices, 0), (indices >= 0).astype(np.int32)
    prompts = np.take_along_axis(TOKENS, positions, axis=1)
    prompts[segments == 0] = 12
    fives = np.full((B, width), 5)
    rows = (prompts, fives, positions, 3 * segments)  # a document of any number
    logits, cache = jax.device_get(consume(exact, params_of(exact), empty(5, exact), *rows))
    following = np.take_along_axis(TOKENS, lengths[:, None], axis=1)
    rows = (following, fives[:, :1], lengths[:, None], ONES[:, :1])
    last = np.asarray(consume(exact, params_of(exact), cache, *rows)[0])
    state = first_state(exact, POSITIONS, KEY)
    whole = run(exact, params_of(exact), TOKENS, 5, state=state).logits[..., :V]
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(logits[b, -length:, :V], whole[b, :length], rtol=1e-10)
        np.testing.assert_allclose(last[b, 0, :V], whole[b, length], rtol=1e-10)


def test_rows_may_be_at_different_iterations():
    places = {"positions": jnp.asarray(POSITIONS), "segments": jnp.asarray(ONES)}
    params = jax.tree.map(jnp.asarray, params_of(BASE))
    iterate = jax.jit(functools.partial(recurrent_depth.iterate, BASE, params))
    read = jax.jit(functools.partial(recurrent_depth.read, BASE, params))
    reading, start = read(jnp.asarray(TOKENS), cache=empty(5), **places)

    def take(steps: list[list[int]]) -> Any:
        """At each call, the step of each row; a negative one rests."""
        state, cache = jnp.asarray(STATE), start
        for step in np.array(steps):
            active = np.broadcast_to(step[:, None] >= 0, (B, L))
            state, cache = iterate(state, reading, cache=cache, step=step, active=active)
        return state, cache

    want = take([[0, 0], [1, 1], [2, -1]])
    got = take([[0, -1], [1, 0], [2, 1]])
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), got, want)


def test_a_cache_keeps_at_least_one_iteration():
    with pytest.raises(ValueError, match="kept_steps 0 must be at least 1"):
        init_cache(BASE, batch_size=1, length=1, kept_steps=0)
    assert (empty(5).num_slots, empty(5).kept_steps, empty(1).kept_steps) == (L + 2, 5, 1)


# Dtypes and devices.


def test_bfloat16_keeps_parameters_and_logits_float32():
    cfg = changed(compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed(cfg))} == {jnp.dtype("float32")}
    state = STATE.astype(jnp.bfloat16)
    got = run(cfg, params_of(BASE), TOKENS, 4, state=state)
    want = run(BASE, params_of(BASE), TOKENS, 4)
    dtypes = [x.dtype for x in (got.logits, got.state, got.changes, got.norms)]
    assert dtypes == [jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(got.logits[..., :V], want.logits[..., :V], atol=0.6)
    assert not np.allclose(got.logits[..., :V], want.logits[..., :V], atol=1e-4)
    assert init_cache(cfg, batch_size=1, length=1).core[0][0].dtype == jnp.bfloat16


def test_one_device_equals_eight():
    cfg = changed(num_layers=2, coda_layers=0, block="post_norm", mlp="gelu", qk_bias=False)
    tokens = np.random.default_rng(5).integers(0, V, size=(8, 8), dtype=np.int32)

    def loss(params: Any, tokens: Any, num_steps: Any) -> tuple[jax.Array, jax.Array]:
        out = forward(cfg, params, tokens, key=KEY, num_steps=num_steps)
        rows = jax.nn.log_softmax(out.logits[..., :V]) * jax.nn.one_hot(tokens, V)
        return -rows.sum() / tokens.size, out.changes

    def on(devices: Any, **sizes: int) -> Any:
        mesh = partitioning.make_mesh(devices=devices, **sizes)
        rows = jax.sharding.NamedSharding(mesh, partitioning.batch_spec())
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        with jax.set_mesh(mesh):
            places = partitioning.param_shardings(boxed(cfg), mesh)
            placed = jax.device_put((params_of(cfg), tokens), (places, rows))
            return jax.device_get(run(*placed, np.int32(5)))

    want = on(jax.devices()[:1])
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2, "sequence": 2}):
        got = on(jax.devices(), **sizes)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5 * float(np.abs(b).max()))
