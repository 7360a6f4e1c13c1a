"""The energy transformer: against ordinary attention on prefixes, what sees what, its cache."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import energy_transformer, partitioning, self_attention
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig, Rows
from jaxlib_methods.pallas_kernels import attention, dispatch

B, L = 2, 5
TRUNK = TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    max_length=16,
    compute_dtype="float32",
)
PLAIN = EnergyTransformerConfig(trunk=TRUNK)
TIMED = EnergyTransformerConfig(trunk=TRUNK, num_landscapes=2, candidate_embedding="token")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 11, size=(B, L), dtype=np.int32)
CANDIDATES = RNG.dirichlet(np.ones(128), size=(B, L)).astype(np.float32)
CANDIDATES[..., 11:] = 0
PLACES = Rows(jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)), jnp.ones((B, L), jnp.int32))


@functools.cache
def drawn(cfg: EnergyTransformerConfig) -> Any:
    return jax.jit(
        lambda key: partitioning.unbox(energy_transformer.init_params(cfg, key))
    )(jax.random.key(0))  # fmt: skip


@functools.cache
def params_of(cfg: EnergyTransformerConfig) -> Any:
    """Parameters at which no scale is one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), drawn(cfg))


@functools.partial(jax.jit, static_argnums=0)
def energies(
    cfg: EnergyTransformerConfig,
    params: Any,
    tokens: Any,
    candidates: Any,
    seen: Rows = PLACES,
    rows: Rows = PLACES,
    step: Any = 0,
) -> jax.Array:
    cache = energy_transformer.observe(cfg, params, tokens, **seen._asdict())
    cache = energy_transformer.landscape_at(cache, jnp.asarray(step))
    return energy_transformer.judge(cfg, params, candidates, rows, cache)


# Ordinary causal attention over one sequence, in NumPy.


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + TRUNK.norm_eps) * scale


def turn(x: np.ndarray) -> np.ndarray:
    """Rotary positions 0, 1, ... of `[S, heads, 6]`: features i and i + 3 are a pair."""
    angles = np.arange(len(x))[:, None, None] * 10_000.0 ** -(np.arange(3) / 3)
    cos, sin, first, second = np.cos(angles), np.sin(angles), x[..., :3], x[..., 3:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def energy_of_the_last(x: np.ndarray, params: Any) -> float:
    for i in range(TRUNK.num_layers):
        layer = jax.tree.map(lambda p, i=i: np.asarray(p[i], np.float64), params["blocks"])
        kernels = {name: p["kernel"] for name, p in (layer["attention"] | layer["mlp"]).items()}
        y = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (np.einsum("sd,dhc->shc", y, kernels[n]) for n in ("query", "key", "value"))
        q, k, v = turn(q), np.repeat(turn(k), 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("qhc,khc->hqk", q, k) / np.sqrt(6)
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khc,hcd->qd", shares, v, kernels["output"])
        y = norm(x, layer["mlp_norm"]["scale"])
        gate = y @ kernels["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ kernels["up"])) @ kernels["down"]
    return (norm(x[-1], params["final_norm"]["scale"]) @ params["energy_head"]["kernel"])[0]


@pytest.mark.parametrize(("cfg", "step"), [(PLAIN, 0), (TIMED, 0), (TIMED, 1)])
def test_equals_ordinary_attention_on_every_prefix(cfg, step):
    params = params_of(cfg)
    tables = {n: np.asarray(params[n]["table"], np.float64) for n in params if "table" in params[n]}
    own = tables["candidate_embedding" if cfg is PLAIN else "embedding"]
    before = tables["landscapes"][[step]] if cfg.num_landscapes else np.zeros((0, 16))
    got = energies(cfg, params, TOKENS, CANDIDATES, step=step)
    for b, i in np.ndindex(B, L):
        text = tables["embedding"][TOKENS[b, : i + 1]]
        x = np.concatenate([before, text, CANDIDATES[b, i][None] @ own])
        np.testing.assert_allclose(got[b, i], energy_of_the_last(x, params), rtol=1e-4, atol=2e-5)


def test_an_energy_reads_the_tokens_before_it_and_its_own_candidate():
    params = params_of(TIMED)
    base = energies(TIMED, params, TOKENS, CANDIDATES)
    for j in range(L):
        moved = TOKENS.copy()
        moved[:, j] = (moved[:, j] + 1) % 11
        differs = energies(TIMED, params, moved, CANDIDATES) != base
        assert differs.tolist() == [[i >= j for i in range(L)]] * B
    slopes = jax.jit(jax.jacrev(lambda c: energies(TIMED, params, TOKENS, c).sum(0)))(CANDIDATES)
    reads = np.any(slopes != 0, axis=(1, 3))  # [energy, candidate]
    assert reads.tolist() == np.eye(L, dtype=bool).tolist()


def test_packed_documents_equal_separate_ones():
    # Documents of three and two tokens; places as in the batches that packing makes.
    positions, segments = jnp.array([[0, 1, 2, 0, 1]] * B), jnp.array([[1, 1, 1, 2, 2]] * B)
    packed = Rows(positions, segments)
    params = params_of(TIMED)
    got = energies(TIMED, params, TOKENS, CANDIDATES, packed, packed)
    # Alone: behind it in the row stands text that it does not see.
    first = energies(TIMED, params, TOKENS, CANDIDATES)[:, :3]
    second = energies(TIMED, params, np.roll(TOKENS, 2, 1), np.roll(CANDIDATES, 2, 1))[:, :2]
    np.testing.assert_allclose(got, jnp.concatenate([first, second], axis=1), rtol=2e-5, atol=1e-6)


def test_observing_in_parts_equals_observing_at_once():
    params = params_of(TIMED)

    @jax.jit
    def in_parts(tokens: jax.Array) -> Any:
        cache = energy_transformer.begin(TIMED, params, batch_size=B, length=L)
        for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
            seen = jax.tree.map(lambda x, part=part: x[:, part], PLACES)._asdict()
            cache = energy_transformer.observe(
                TIMED, params, tokens[:, part], cache=cache, **seen
            )  # fmt: skip
        return cache

    whole = jax.jit(
        lambda tokens: energy_transformer.observe(TIMED, params, tokens, **PLACES._asdict())
    )(TOKENS)  # fmt: skip
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), in_parts(TOKENS), whole
    )


def test_each_landscape_is_its_own_and_the_last_one_stays():
    one, two, three = (
        energies(TIMED, params_of(TIMED), TOKENS, CANDIDATES, step=k) for k in (0, 1, 2)
    )
    assert bool(jnp.all(one != two))
    assert jnp.array_equal(two, three)


def test_candidates_in_one_place_do_not_meet():
    # All at the last token: as each would be alone in the last place.
    rows = Rows(jnp.full((B, L), L - 1), PLACES.segments)
    params = params_of(PLAIN)
    together = energies(PLAIN, params, TOKENS, CANDIDATES, rows=rows)
    for i in range(L):
        there = np.roll(CANDIDATES, L - 1 - i, axis=1)
        alone = energies(PLAIN, params, TOKENS, there)[:, -1]
        np.testing.assert_allclose(together[:, i], alone, rtol=2e-5, atol=1e-6)


def test_padded_vocabulary_has_no_effect_at_the_start():
    for cfg in (PLAIN, TIMED):
        params = drawn(cfg)
        for name in ("embedding", "candidate_embedding"):
            if name in params:
                assert not np.any(params[name]["table"][11:])
        padded = CANDIDATES.copy()
        padded[..., 11:] = 0.5
        before = energies(cfg, params, TOKENS, CANDIDATES)
        np.testing.assert_array_equal(energies(cfg, params, TOKENS, padded), before)
        padded[..., 10] += 0.5
        assert np.all(energies(cfg, params, TOKENS, padded) != before)


def test_initialisation_and_shape_of_the_parameters():
    wide = dataclasses.replace(TRUNK, vocab_size=1000, embed_dim=64)
    cfg = EnergyTransformerConfig(trunk=wide, num_landscapes=3)
    params = drawn(cfg)
    assert set(params["energy_head"]) == {"kernel"}  # a constant would change nothing
    assert params["energy_head"]["kernel"].shape == (64, 1)
    assert params["landscapes"]["table"].shape == (3, 64)
    assert set(drawn(PLAIN)) == set(params) - {"landscapes"}
    assert set(drawn(TIMED)) == set(params) - {"candidate_embedding"}
    deviations = {
        "embedding": (params["embedding"]["table"][:1000], 1.0),
        "candidate_embedding": (params["candidate_embedding"]["table"][:1000], (2 / 1064) ** 0.5),
        "output": (params["blocks"]["attention"]["output"]["kernel"], (2 / (24 + 64)) ** 0.5),
    }
    for values, deviation in deviations.values():
        np.testing.assert_allclose(jnp.std(values), deviation, rtol=0.03)
    np.testing.assert_allclose(jnp.std(params["landscapes"]["table"]), 1.0, rtol=0.2)


def test_unfit_trunks_are_refused():
    with pytest.raises(ValueError, match="num_landscapes -1 must not be negative"):
        EnergyTransformerConfig(num_landscapes=-1)
    changes: Any = {"positions": "learned", "parallel_residual": True, "loss_implementation": "xla"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=r"model\..* has no meaning in an energy transformer"):
            EnergyTransformerConfig(trunk=dataclasses.replace(TRUNK, **{name: value}))


def slope_of_slope(
    cfg: EnergyTransformerConfig,
    params: Any,
    tokens: Any,
    candidates: Any,
    places: Rows = PLACES,
) -> Any:
    """Energies, and the gradient in the parameters of the slope in the candidates, squared."""

    def steepness(params: Any) -> tuple[jax.Array, jax.Array]:
        def total(candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = energies(cfg, params, tokens, candidates, places, places)
            return found.sum(), found

        slope, found = jax.grad(total, has_aux=True)(candidates)
        return jnp.sum(slope**2), found

    return jax.grad(steepness, has_aux=True)(params)


second_order = jax.jit(slope_of_slope, static_argnums=0)


def with_trunk(**changes: Any) -> EnergyTransformerConfig:
    return dataclasses.replace(PLAIN, trunk=dataclasses.replace(TRUNK, **changes))


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    def check(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))

    jax.tree.map(check, got, want)


def test_remat_and_bfloat16():
    params = params_of(PLAIN)
    want = second_order(PLAIN, params, TOKENS, CANDIDATES)
    for remat in ("dots", "full"):
        got = second_order(with_trunk(remat=remat), params, TOKENS, CANDIDATES)
        assert_close(got, want, 2e-5)
    coarse = energies(with_trunk(compute_dtype="bfloat16"), params, TOKENS, CANDIDATES)
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, want[1], atol=0.1)
    assert not np.allclose(coarse, want[1], atol=1e-6)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two queries and two keys, in float64."""
    monkeypatch.setattr(attention, "CPU_TILE", (2, 2))
    with jax.enable_x64(True):
        yield


EXACT: Any = {"compute_dtype": "float64", "param_dtype": "float64"}


def test_attention_in_tiles_is_that_of_all_scores(small_tiles):
    del small_tiles
    plain = with_trunk(**EXACT, attention_implementation="plain")
    tiles = with_trunk(**EXACT, attention_implementation="xla", remat="full")
    got, want = (second_order(cfg, params_of(plain), TOKENS, CANDIDATES) for cfg in (tiles, plain))
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_more_candidates_than_fit_go_in_tiles(platform, monkeypatch):
    monkeypatch.setattr(self_attention, "MOST_TWICE", L - 1)
    monkeypatch.setattr(self_attention, "NO_SLOWER", {"cpu": 2})
    rows = (*PLACES, *PLACES)
    with dispatch.lowering_for(platform):
        assert isinstance(self_attention.sight(TRUNK, *rows, twice=True), attention.Places)
        fewer = (x[:, :-1] for x in rows)
        assert isinstance(self_attention.sight(TRUNK, *fewer, twice=True), jax.Array)
        once = self_attention.sight(TRUNK, *rows)
        assert isinstance(once, attention.Places if platform == "cpu" else jax.Array)


def test_one_device_equals_eight(small_tiles):
    del small_tiles
    forms: dict[str, Any] = {
        form: with_trunk(**EXACT, num_layers=1, embed_dim=32, attention_implementation=form)
        for form in ("plain", "xla")
    }
    cfg = forms["plain"]
    params = params_of(cfg)
    # Four tokens of each row: the sequence axis cuts them too.
    tokens, candidates = np.tile(TOKENS[:, :4], (4, 1)), np.tile(CANDIDATES[:, :4], (4, 1, 1))
    candidates = candidates + np.linspace(0, 0.1, 8)[:, None, None]
    boxed = jax.eval_shape(
        functools.partial(energy_transformer.init_params, cfg), jax.random.key(0)
    )
    places = jax.tree.map(lambda x: jnp.tile(x[:, :4], (4, 1)), PLACES)

    def on(devices: Any, form: str, **sizes: int) -> Any:
        mesh = partitioning.make_mesh(devices=devices, **sizes)
        rows = jax.sharding.NamedSharding(mesh, partitioning.batch_spec())
        cut = jax.sharding.NamedSharding(mesh, jax.P(*partitioning.batch_spec(), None))

        outer = jax.jit(functools.partial(slope_of_slope, forms[form], places=places))
        with jax.set_mesh(mesh):
            shardings = partitioning.param_shardings(boxed, mesh, indivisible="whole")
            placed = jax.device_put(params, shardings)
            return jax.device_get(outer(placed, *jax.device_put((tokens, candidates), (rows, cut))))

    want = on(jax.devices()[:1], "plain")
    assert_close(on(jax.devices(), "plain", data=1, fsdp=8), want, 1e-10)
    # Two key heads: on four devices two copies of each, of the candidates' own too.
    for sizes in ({"data": 1, "sequence": 2, "tensor": 2, "fsdp": 2}, {"data": 2, "tensor": 4}):
        assert_close(on(jax.devices(), "xla", **sizes), want, 1e-10)
