"""Decoding: the cache, left padding, sampling rules, early end, chunks, meshes."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import decoding, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.models.transformer import forward, init_params

ROTARY = TransformerConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=24,
    num_heads=6,
    num_kv_heads=2,
    mlp_dim=20,
    max_length=32,
    compute_dtype="float32",
)
LEARNED = dataclasses.replace(
    ROTARY, positions="learned", learned_position_offset=2, norm="layer_norm", mlp="relu"
)
CONFIGS = {"rotary": ROTARY, "learned": LEARNED}
GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = [[7, 3, 60, 21, 9], [5], [11, 40, 2]]


WIDTH, NEW = 8, 9  # one shape for most tests, so that they share compilations


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    return jax.jit(lambda: partitioning.unbox(init_params(cfg, jax.random.key(0))))()


def padded(prompts: list[list[int]], width: int = WIDTH) -> tuple[jax.Array, jax.Array]:
    rows = [[13] * (width - len(p)) + p for p in prompts]  # padding may be any token
    return jnp.array(rows, jnp.int32), jnp.array([len(p) for p in prompts], jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "new"))
def start(
    cfg: TransformerConfig, params: Any, tokens: jax.Array, lengths: jax.Array, new: int = NEW
) -> decoding.DecodeState:
    cache = decoding.init_cache(cfg, batch_size=len(tokens), length=tokens.shape[1] + new - 1)
    apply = functools.partial(forward, cfg)
    return decoding.prefill(apply, params, tokens, lengths, cache=cache, max_new_tokens=new)


@functools.partial(jax.jit, static_argnames=("cfg",))
def steps(
    cfg: TransformerConfig, params: Any, state: decoding.DecodeState, **settings: Any
) -> decoding.DecodeState:
    return decoding.decode_steps(functools.partial(forward, cfg), params, state, **settings)


@functools.partial(jax.jit, static_argnames=("cfg", "new"))
def _run(
    cfg: TransformerConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    new: int,
    settings: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    cache = decoding.init_cache(cfg, batch_size=len(tokens), length=tokens.shape[1] + new - 1)
    apply = functools.partial(forward, cfg)
    return decoding.generate(
        apply, params, tokens, lengths, cache=cache, max_new_tokens=new, **settings
    )


def run(
    prompts: list[list[int]],
    sampling: SamplingConfig,
    *,
    cfg: TransformerConfig = ROTARY,
    stop_tokens: list[int] | None = None,
    key: int = 0,
) -> tuple[list[list[int]], list[int]]:
    settings = {
        "sampling": sampling,
        "key": jax.random.key(key),
        "stop_tokens": jnp.array(stop_tokens or [-1, -1, -1]),
        "pad_token": 60,
    }
    tokens, counts = _run(cfg, params_of(cfg), *padded(prompts), NEW, settings)
    return tokens.tolist(), counts.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_the_full_forward_at_every_position(name: str):
    cfg = CONFIGS[name]
    tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, cfg.vocab_size)
    segments = jnp.array([[1] * 4 + [2] * 7, [1] * 11])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6], list(range(11))])
    apply = jax.jit(functools.partial(forward, cfg))
    params = params_of(cfg)
    full = apply(params, tokens, positions=positions, segments=segments).logits
    cache = decoding.init_cache(cfg, batch_size=2, length=13)
    for begin, end in [(0, 3), (3, 6), *((t, t + 1) for t in range(6, 11))]:
        out = apply(
            params,
            tokens[:, begin:end],
            positions=positions[:, begin:end],
            segments=segments[:, begin:end],
            cache=cache,
        )
        cache = out.cache
        np.testing.assert_allclose(out.logits, full[:, begin:end], rtol=1e-5, atol=1e-5)
    assert int(cache.length) == 11


def test_rows_that_share_a_prefix_equal_the_full_forward():
    cfg, times, begin = ROTARY, 3, 5
    rows = jax.random.randint(jax.random.key(2), (2 * times, 9), 0, cfg.vocab_size)
    rows = rows.at[:, :begin].set(jnp.repeat(rows[::times, :begin], times, axis=0))
    apply, params = jax.jit(functools.partial(forward, cfg)), params_of(cfg)
    full = apply(params, rows).logits
    first = decoding.init_cache(cfg, batch_size=2, length=begin + 1)
    positions = jnp.broadcast_to(jnp.arange(begin)[None], (2, begin))
    prefix = apply(params, rows[::times, :begin], positions=positions, cache=first).cache
    cache = decoding.branch(prefix, times, length=4)
    for left, right in [(5, 7), (7, 9)]:
        positions = jnp.broadcast_to(jnp.arange(left, right)[None], (2 * times, right - left))
        out = apply(params, rows[:, left:right], positions=positions, cache=cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits, full[:, left:right], rtol=1e-5, atol=1e-5)
    assert (int(cache.length), cache.num_slots) == (4, 4)
    jax.tree.map(np.testing.assert_array_equal, cache.prefix, prefix)


def test_a_cache_without_positions_is_refused():
    cache = decoding.init_cache(ROTARY, batch_size=1, length=4)
    with pytest.raises(ValueError, match="where the next token of a row stands; give its pos"):
        forward(ROTARY, {}, jnp.zeros((1, 1), jnp.int32), cache=cache)


def test_a_step_writes_its_cache_in_place():
    apply, params = functools.partial(forward, ROTARY), params_of(ROTARY)
    state = start(ROTARY, params, *padded(PROMPTS))

    @functools.partial(jax.jit, donate_argnums=1)
    def more(params: Any, state: decoding.DecodeState) -> decoding.DecodeState:
        settings: Any = {"num_steps": 4, "sampling": GREEDY, "key": jax.random.key(0)}
        return decoding.decode_steps(apply, params, state, **settings)

    program = more.lower(params, state).compile().as_text() or ""
    kept = state.cache.layers[0][0]
    shape = rf"f32\[{','.join(map(str, kept.shape))}\]"
    assert len(re.findall(rf"= {shape}\S* \S*dynamic-update-slice", program)) >= 4
    assert not re.findall(rf"= {shape}\S* (?:copy|slice|select|concatenate)\(", program)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_changes_nothing(name: str):
    cfg = CONFIGS[name]
    params = params_of(cfg)
    next_logits = jax.jit(functools.partial(decoding.next_logits, functools.partial(forward, cfg)))
    state = start(cfg, params, *padded(PROMPTS))
    together, _ = next_logits(params, state)
    # Without padding, right-padded to one shape: what comes after cannot be seen.
    rows = jnp.array([prompt + [0] * (WIDTH - len(prompt)) for prompt in PROMPTS])
    alone = jax.jit(functools.partial(forward, cfg))(params, rows).logits
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(together[row], alone[row, len(prompt) - 1], rtol=1e-5, atol=1e-5)
    # The opposite: the same tokens without their context give something else.
    empty = state.cache._replace(segments=jnp.zeros_like(state.cache.segments))
    bare, _ = next_logits(params, state._replace(cache=empty))
    assert not np.allclose(bare[0], together[0], atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_chain_of_argmaxes(name: str):
    cfg = CONFIGS[name]
    apply = jax.jit(functools.partial(forward, cfg))
    got, counts = run(PROMPTS, GREEDY, cfg=cfg)
    for row, prompt in enumerate(PROMPTS):
        chain = list(prompt)
        for _ in range(NEW):
            whole = jnp.array([chain + [0] * (WIDTH + NEW - len(chain))])
            logits = apply(params_of(cfg), whole).logits[0, len(chain) - 1]
            chain.append(int(logits.argmax()))
        assert got[row] == chain[len(prompt) :]
    assert counts == [NEW] * 3
    assert len({tuple(row) for row in got}) == 3  # the prompts matter


def test_a_token_is_drawn_with_the_key_of_its_row_and_step():
    apply = jax.jit(functools.partial(forward, ROTARY))
    sampling = SamplingConfig(temperature=1.5, top_p=0.9)
    got, _ = run(PROMPTS, sampling, key=5)
    for row, prompt in enumerate(PROMPTS):
        whole = jnp.array([prompt + got[row] + [0] * (5 - len(prompt))])
        logits = apply(params_of(ROTARY), whole).logits[0]
        row_key = jax.random.fold_in(jax.random.key(5), row)
        for t in range(NEW):
            key = jax.random.fold_in(row_key, t)
            assert got[row][t] == int(
                decoding.sample(logits[len(prompt) + t - 1], sampling, key=key)
            )


def kept(prob: list[float], **rules: float) -> list[int]:
    logits = decoding.filter_logits(jnp.log(jnp.array(prob)), **rules)  # type: ignore[arg-type]
    return [i for i, x in enumerate(logits.tolist()) if x > -math.inf]


# Probabilities 0.1, 0.4, 0.2, 0.3: by rank the tokens 1, 3, 2, 0, and sums 0.4, 0.7, 0.9, 1.
PROB = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 1e-60}, [1]),  # 0 in float32
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.8}, [1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"min_p": 0.24}, [0, 1, 2, 3]),  # 0.24 * 0.4 < 0.1
        ({"min_p": 0.26}, [1, 2, 3]),
        ({"min_p": 0.6}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        # After top-k the two are 4/7 = 0.571 and 3/7: the first reaches 0.55, not in the whole.
        ({"top_k": 2, "top_p": 0.55}, [1]),
        ({"top_k": 2, "top_p": 0.58}, [1, 3]),
        ({"top_k": 3, "min_p": 0.6}, [1, 3]),
        ({"top_p": 0.8, "min_p": 0.6}, [1, 3]),
    ],
)
def test_filters_by_hand(rules: dict[str, float], expected: list[int]):
    assert kept(PROB, **rules) == expected


def test_of_equal_tokens_the_lower_id_stays():
    assert kept([0.2, 0.3, 0.3, 0.2], top_k=1) == [1]
    assert kept([0.2, 0.3, 0.3, 0.2], top_k=3) == [0, 1, 2]
    assert kept([0.25] * 4, top_p=0.5) == [0, 1]
    assert kept([0.25] * 4, min_p=1.0) == [0, 1, 2, 3]


def test_top_p_of_one_keeps_tokens_beyond_the_rounding_of_the_sum():
    prob = np.array([0.7, 0.3 - 2e-9, 1e-9, 1e-9])
    assert kept(prob.tolist(), top_p=1.0) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_k", [1, 3])
def test_as_many_are_kept_of_logits_that_the_same_program_makes(top_k):
    """What it compares must not be computed a second time, in another order."""

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        logits = jax.nn.log_softmax(jnp.tanh(x @ w) * 1.7 + 0.3 * x @ w, axis=-1)
        return jax.vmap(functools.partial(decoding.filter_logits, top_k=top_k))(logits / 0.7)

    keys = jax.random.split(jax.random.key(0))
    found = run(jax.random.normal(keys[0], (64, 24)), jax.random.normal(keys[1], (24, 300)))
    assert (found > -jnp.inf).sum(axis=-1).tolist() == [top_k] * 64


def test_filters_rank_each_row_alone():
    logits = jnp.log(jnp.array([[PROB, PROB[::-1]]]))
    got = decoding.filter_logits(logits, top_k=2)
    assert (got > -jnp.inf).tolist() == [[[False, True, False, True], [True, False, True, False]]]
    np.testing.assert_allclose(got[0, 0, 1], math.log(0.4), rtol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(), [0.1, 0.4, 0.2, 0.3]),
        # Temperature 1/2 squares and renormalises: 1, 16, 4, 9 of 30.
        (SamplingConfig(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        # Tempered first: 16/30 reaches 0.5 alone, 0.4 would not.
        (SamplingConfig(temperature=0.5, top_p=0.5), [0, 1, 0, 0]),
        (SamplingConfig(temperature=0.5, top_k=3, min_p=0.5), [0, 16 / 25, 0, 9 / 25]),
        (SamplingConfig(temperature=0.0), [0, 1, 0, 0]),
        (SamplingConfig(temperature=1e-37), [0, 1, 0, 0]),
    ],
)
def test_sampled_frequencies_are_the_filtered_distribution(
    sampling: SamplingConfig, expected: list[float]
):
    n = 20_000
    logits = jnp.log(jnp.broadcast_to(jnp.array(PROB), (n, 4))) + 50.0
    tokens = decoding.sample(logits, sampling, key=jax.random.key(3))
    share = np.bincount(np.asarray(tokens), minlength=4) / n
    spread = np.sqrt(np.array(expected) * (1 - np.array(expected)) / n)
    np.testing.assert_array_less(np.abs(share - expected), 4 * spread + 1e-12)


def test_the_padding_of_the_vocabulary_is_never_drawn():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -1e30, -1e30]), (500, 4))
    hot = SamplingConfig(temperature=1e30)
    assert set(decoding.sample(logits, hot, key=jax.random.key(0)).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_sampling_refuses_nonsense(field: str, value: float):
    with pytest.raises(ValueError, match=rf"{field} {value}"):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]


def test_a_cache_that_is_too_small_is_refused():
    tokens, lengths = padded(PROMPTS)
    cache = decoding.init_cache(ROTARY, batch_size=3, length=10)
    apply = functools.partial(forward, ROTARY)
    with pytest.raises(ValueError, match=r"cache of 10 slots .* 8 prompt tokens and 4 new .* 11"):
        decoding.prefill(apply, {}, tokens, lengths, cache=cache, max_new_tokens=4)


def test_finished_rows_stop_and_the_loop_ends_when_all_are_done():
    free, _ = run(PROMPTS, GREEDY)
    stop = [free[0][2], free[1][0], free[2][4]]
    first = [next(t for t, token in enumerate(row) if token in stop) for row in free]
    assert 0 < max(first) < NEW - 1
    got, counts = run(PROMPTS, GREEDY, stop_tokens=stop)
    assert counts == [t + 1 for t in first]
    for row, t in enumerate(first):
        assert got[row] == free[row][: t + 1] + [60] * (NEW - t - 1)
    settings = {
        "sampling": GREEDY,
        "key": jax.random.key(0),
        "stop_tokens": jnp.array(stop),
        "pad_token": 60,
    }
    state = start(ROTARY, params_of(ROTARY), *padded(PROMPTS))
    state = steps(ROTARY, params_of(ROTARY), state, num_steps=NEW, **settings)
    assert int(state.step) == max(first) + 1
    # A row that is done reads padding, which leaves nothing in the cache.
    written = np.asarray(state.cache.segments)[:, WIDTH - 1 : WIDTH + max(first)]
    assert written.sum(axis=1).tolist() == [t + 1 for t in first]
    assert state.tokens[:, : max(first) + 1].tolist() == [r[: max(first) + 1] for r in got]
    again = steps(ROTARY, params_of(ROTARY), state, num_steps=3, **settings)
    assert int(again.step) == int(state.step)


def test_chunks_and_neighbours_do_not_change_the_samples():
    sampling = SamplingConfig(temperature=1.5, top_p=0.9)
    whole, _ = run(PROMPTS, sampling, key=5)
    state = start(ROTARY, params_of(ROTARY), *padded(PROMPTS))
    settings = {
        "sampling": sampling,
        "key": jax.random.key(5),
        "stop_tokens": jnp.array([-1] * 3),
        "pad_token": 60,
    }
    for num_steps in (1, 4, 2, 7):
        state = steps(ROTARY, params_of(ROTARY), state, num_steps=num_steps, **settings)
    assert int(state.step) == NEW
    assert state.tokens.tolist() == whole
    others, _ = run([PROMPTS[0], [1, 2, 3, 4], [9]], sampling, key=5)
    assert others[0] == whole[0]
    assert others[1] != whole[1]
    rows, _ = run([PROMPTS[0]] * 3, sampling, key=5)
    assert len({tuple(row) for row in rows}) == 3  # each row has its own key
    assert run(PROMPTS, sampling, key=6)[0] != whole


def test_one_compilation_for_all_prompts_and_settings_of_a_shape():
    run(PROMPTS, GREEDY)
    before = _run._cache_size()  # type: ignore[attr-defined]
    run([[4], [1, 2], [3, 4, 7]], SamplingConfig(temperature=1, top_k=5), stop_tokens=[1, 2, 3])
    run(PROMPTS, SamplingConfig(top_p=0.3, min_p=0.1))
    assert _run._cache_size() == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CONFIGS)
def test_gathered_weights_are_those_that_every_token_multiplies_by(name: str):
    cfg = dataclasses.replace(CONFIGS[name], compute_dtype="bfloat16", qkv_bias=True)
    mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    params = jax.device_put(params_of(cfg), partitioning.param_shardings(boxed, mesh))
    gather = jax.jit(functools.partial(decoding.gather_weights, cfg))
    with jax.set_mesh(mesh):
        gathered = gather(params)
    query, norm = (gathered["blocks"][n] for n in ("attention", "attention_norm"))
    assert query["query"]["kernel"].dtype == jnp.bfloat16
    assert query["query"]["kernel"].sharding.spec == jax.P(None, None, "tensor")
    assert query["query"]["bias"].sharding.spec == jax.P(None, "tensor", None)
    assert norm["scale"].dtype == jnp.float32
    tokens, _ = padded(PROMPTS)
    apply = jax.jit(functools.partial(forward, cfg))
    whole = apply(params_of(cfg), tokens).logits
    np.testing.assert_array_equal(apply(gather(params_of(cfg)), tokens).logits, whole)


@pytest.mark.parametrize(("data", "tensor"), [(4, 2), (2, 2)])
def test_a_mesh_changes_no_token(data: int, tensor: int):
    mesh = partitioning.make_mesh(data=data, fsdp=8 // (data * tensor), tensor=tensor)
    prompts = [[i + 1, *PROMPTS[i % 3]] for i in range(8)]
    sampling = SamplingConfig(temperature=1.5, top_k=20, top_p=0.95)
    settings = {"sampling": sampling, "key": jax.random.key(2)}
    alone, _ = _run(ROTARY, params_of(ROTARY), *padded(prompts), 5, settings)
    boxed = jax.eval_shape(lambda: init_params(ROTARY, jax.random.key(0)))
    params = jax.device_put(params_of(ROTARY), partitioning.param_shardings(boxed, mesh))
    with jax.set_mesh(mesh):
        together, _ = _run(ROTARY, params, *padded(prompts), 5, settings)
        cache = jax.jit(lambda: decoding.init_cache(ROTARY, batch_size=8, length=12))()
    assert together.tolist() == alone.tolist()
    assert cache.layers[0][0].addressable_shards[0].data.shape == (tensor, 2 // tensor, 12, 4)
