"""The trunk: causality, documents, padding, hidden layers, variants, precision."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import flops
from jaxlib_methods.models import language_model, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.layers import Block, Norm, rotation
from jaxlib_methods.models.transformer import forward, init_params
from jaxlib_methods.pallas_kernels.attention import visible

L = 7
BASE = TransformerConfig(
    vocab_size=61,
    num_layers=3,
    embed_dim=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=9,
    max_length=16,
    compute_dtype="float32",
)
LEARNED = dataclasses.replace(
    BASE,
    positions="learned",
    learned_position_offset=2,
    norm="layer_norm",
    mlp="relu",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    tie_embeddings=True,
)
NEOX = dataclasses.replace(
    BASE, num_layers=1, parallel_residual=True, rotary_fraction=0.34, mlp="gelu", qkv_bias=True
)
TOKENS = jnp.array([[3, 60, 17, 0, 5, 5, 41], [9, 8, 59, 2, 30, 1, 22]])
run = jax.jit(forward, static_argnums=0, static_argnames="hidden_layer")


def shapes(cfg: TransformerConfig) -> Any:
    return partitioning.unbox(jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    """Numbers that depend on a parameter's name and shape only; no bias and no padding is zero."""

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape) / 3
        return jnp.asarray(x + 1 if name.endswith("['scale']") else x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes(cfg))


def eager(cfg: TransformerConfig, **inputs: Any) -> Any:
    """Without compiling the whole: many configurations share the compiled operations."""
    with jax.disable_jit():
        return forward(cfg, params_of(cfg), TOKENS, **inputs)


def logits(cfg: TransformerConfig, tokens: jax.Array = TOKENS, **inputs: Any) -> jax.Array:
    return run(cfg, params_of(cfg), tokens, **inputs).logits[..., : cfg.vocab_size]


# Who sees whom.


@pytest.mark.parametrize("t", range(L))
def test_logits_at_t_read_tokens_up_to_t(t):
    base, moved = logits(BASE), logits(BASE, TOKENS.at[:, t].add(1))
    assert jnp.array_equal(base[:, :t], moved[:, :t])
    assert jnp.all(jnp.any(jnp.abs(base - moved) > 1e-4, axis=-1)[:, t:])


@pytest.mark.parametrize("cfg", [BASE, LEARNED], ids=["rotary", "learned"])
def test_a_packed_row_equals_its_documents_alone(cfg):
    tokens = TOKENS.reshape(1, -1)
    positions = jnp.concatenate([jnp.arange(n) for n in (5, 5, 4)])[None]
    segments = jnp.array([[1] * 5 + [2] * 5 + [0] * 4])
    packed = logits(cfg, tokens, positions=positions, segments=segments)
    alone = logits(cfg, tokens[:, :10].reshape(2, 5))
    np.testing.assert_allclose(packed[0, :10].reshape(alone.shape), alone, atol=1e-5)
    # One document of the same tokens is something else, from the second document on.
    one = logits(cfg, tokens, positions=jnp.arange(14)[None], segments=jnp.minimum(segments, 1))
    np.testing.assert_allclose(one[:, :5], packed[:, :5], atol=1e-5)
    assert jnp.all(jnp.any(jnp.abs(one - packed) > 1e-3, axis=-1)[:, 5:10])


@pytest.mark.parametrize("junk", [60, -1, 10**6])
def test_padding_may_hold_any_token(junk):
    segments = jnp.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]])
    real = segments > 0
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 2, 3, 0]])
    moved = jnp.where(real, TOKENS, junk)

    def outputs(tokens, segments):
        inputs = {"positions": positions, "segments": segments, "hidden_layer": 2}
        return run(BASE, params_of(BASE), tokens, **inputs)

    base, other = outputs(TOKENS, segments), outputs(moved, segments)
    assert jnp.array_equal(base.logits[real], other.logits[real])
    assert jnp.array_equal(base.hidden[real], other.hidden[real])
    assert bool(jnp.isfinite(other.logits).all())
    # The opposite: the same tokens matter as soon as they are of the document.
    read = outputs(moved, jnp.ones_like(segments))
    assert not jnp.allclose(base.hidden[1, 2:6], read.hidden[1, 2:6], atol=1e-3)


# Layers.


def positions_from(start: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, start + L), TOKENS.shape)


@functools.cache
def by_hand(cfg: TransformerConfig, start: int) -> tuple[list[jax.Array], jax.Array]:
    """The residual stream after each block, then the final state; and the logits."""
    params, positions = params_of(cfg), positions_from(start)
    x = params["embedding"]["table"][TOKENS]
    angles = None
    if cfg.positions == "learned":
        table = params["position_embedding"]["table"]
        x = x + table[positions + cfg.learned_position_offset]
    else:
        angles = rotation(positions, cfg)
    ones = jnp.ones_like(TOKENS)
    where = visible(positions, positions, ones, ones)
    block: Any = jax.jit(lambda p, x: Block(cfg).apply({"params": p}, x, where, angles, None))
    states = [x]
    for layer in range(cfg.num_layers):
        of_layer = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        states.append(block(of_layer, states[-1])[0])
    final: Any = Norm(cfg, cfg.embed_dim).apply({"params": params["final_norm"]}, states[-1])
    kernel = params["embedding"]["table"].T if cfg.tie_embeddings else params["head"]["kernel"]
    return [*states, final], (final @ kernel)[..., : cfg.vocab_size]


@pytest.mark.parametrize(
    "cfg",
    [BASE, LEARNED, NEOX],
    ids=["rotary", "learned_tied", "parallel"],
)
def test_equals_a_loop_over_blocks(cfg):
    states, want = by_hand(cfg, 3)
    got = run(cfg, params_of(cfg), TOKENS, positions=positions_from(3), hidden_layer="final")
    assert bool(jnp.isfinite(got.logits).all())
    np.testing.assert_allclose(got.logits[..., : cfg.vocab_size], want, atol=1e-5)
    np.testing.assert_allclose(got.hidden, states[-1], atol=1e-5)
    assert got.cache is None


@pytest.mark.parametrize("layer", range(4))
def test_hidden_layer_is_the_residual_stream_after_that_block(layer):
    states, want = by_hand(BASE, 3)
    got = eager(BASE, positions=positions_from(3), hidden_layer=layer)
    np.testing.assert_allclose(got.hidden, states[layer], atol=1e-5)
    np.testing.assert_allclose(got.logits[..., : BASE.vocab_size], want, atol=1e-5)
    others = [state for k, state in enumerate(states) if k != layer]
    assert not any(jnp.allclose(got.hidden, state, atol=1e-2) for state in others)


def test_hidden_is_none_unless_asked_for_and_asking_changes_no_logits():
    plain = run(BASE, params_of(BASE), TOKENS)
    asked = run(BASE, params_of(BASE), TOKENS, hidden_layer=1)
    assert plain.hidden is None
    assert asked.hidden.shape == (2, L, 10)
    assert jnp.array_equal(plain.logits, asked.logits)


@pytest.mark.parametrize("layer", [-1, 4, "last"])
def test_a_hidden_layer_that_does_not_exist_is_refused(layer):
    message = f"hidden_layer {layer!r} does not exist; choose 0 to 3, or 'final'"
    with pytest.raises(ValueError, match=message):
        forward(BASE, {}, TOKENS, hidden_layer=layer)


# Vocabulary.


def test_padded_vocabulary_is_masked():
    out = run(BASE, params_of(BASE), TOKENS).logits
    assert out.shape == (2, L, 128)
    assert bool(jnp.isfinite(out).all())
    assert jnp.all(jax.nn.softmax(out, axis=-1)[..., 61:] == 0)
    assert bool(jnp.all(jnp.argmax(out, axis=-1) < 61))


# The last logits alone.


@pytest.mark.parametrize("cfg", [BASE, LEARNED], ids=["head", "tied"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_last_logits_are_those_of_a_whole_pass(cfg, count):
    whole = eager(cfg, hidden_layer="final")
    last = eager(cfg, hidden_layer="final", num_logits=count)
    assert last.logits.shape == (2, count, 128)
    np.testing.assert_allclose(last.logits, whole.logits[:, L - count :], atol=1e-5)
    assert jnp.array_equal(last.hidden, whole.hidden)  # of all tokens


def test_logits_that_are_not_asked_for_cost_nothing():
    def cost(num_logits: int | None) -> float:
        ask = functools.partial(forward, BASE, num_logits=num_logits)
        return flops.count_dot_flops(lambda params: ask(params, TOKENS).logits, params_of(BASE))

    # Rows, width and vocabulary: two FLOPs each.
    assert cost(None) - cost(3) == (L - 3) * 2 * 2 * 10 * 128


@pytest.mark.parametrize("count", [0, -1, L + 1])
def test_an_impossible_number_of_logits_is_refused(count):
    message = f"num_logits {count} is impossible for {L} tokens; choose 1 to {L}, or None"
    with pytest.raises(ValueError, match=message):
        forward(BASE, {}, TOKENS, num_logits=count)


def test_a_language_model_passes_the_number_of_logits_on_or_refuses_it():
    run: Any = functools.partial(language_model.forward, key=jax.random.key(0), num_logits=2)
    with jax.disable_jit():
        got = run(BASE, params_of(BASE), TOKENS).logits
    np.testing.assert_allclose(got, eager(BASE).logits[:, -2:], atol=1e-5)
    recurrent = dataclasses.replace(BASE, recurrence=4)
    with pytest.raises(
        ValueError, match=r"num_logits 2 is for plain transformers; .* recurrence 4"
    ):
        run(recurrent, {}, TOKENS)


def test_more_tokens_than_learned_positions_are_refused():
    long = jnp.zeros((1, BASE.max_length + 1), jnp.int32)
    with pytest.raises(ValueError, match="rows of 17 tokens are longer than the 16 learned pos"):
        forward(LEARNED, params_of(LEARNED), long)
    # Rotary positions go on, and a row of several documents begins each at 0.
    jax.eval_shape(lambda: logits(BASE, long))
    jax.eval_shape(lambda: logits(LEARNED, long, positions=jnp.arange(17)[None] % 9))


def test_a_recurrent_configuration_is_refused():
    recurrent = dataclasses.replace(BASE, recurrence=4)
    message = "recurrence 4 is no plain transformer; use init_params and forward of models.lang"
    with pytest.raises(ValueError, match=message):
        init_params(recurrent, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        forward(recurrent, params_of(BASE), TOKENS)


# Parameters.


def test_parameter_tree():
    # 3 layers, 10 wide, 4 query heads and 2 key heads of 6, 9 hidden, 61 tokens padded to 128.
    query, key = {"kernel": (3, 10, 4, 6)}, {"kernel": (3, 10, 2, 6)}
    assert jax.tree.map(lambda leaf: leaf.shape, shapes(BASE)) == {
        "embedding": {"table": (128, 10)},
        "blocks": {
            "attention_norm": {"scale": (3, 10)},
            "attention": {
                "query": query,
                "key": key,
                "value": key,
                "output": {"kernel": (3, 4, 6, 10)},
            },
            "mlp_norm": {"scale": (3, 10)},
            "mlp": {
                "gate": {"kernel": (3, 10, 9)},
                "up": {"kernel": (3, 10, 9)},
                "down": {"kernel": (3, 9, 10)},
            },
        },
        "final_norm": {"scale": (10,)},
        "head": {"kernel": (10, 128)},
    }
    norm = {"scale": (3, 10), "bias": (3, 10)}
    query, key = query | {"bias": (3, 4, 6)}, key | {"bias": (3, 2, 6)}
    assert jax.tree.map(lambda leaf: leaf.shape, shapes(LEARNED)) == {
        "embedding": {"table": (128, 10)},
        "position_embedding": {"table": (18, 10)},
        "blocks": {
            "attention_norm": norm,
            "attention": {
                "query": query,
                "key": key,
                "value": key,
                "output": {"kernel": (3, 4, 6, 10), "bias": (3, 10)},
                "query_norm": {"scale": (3, 6)},
                "key_norm": {"scale": (3, 6)},
            },
            "mlp_norm": norm,
            "mlp": {
                "up": {"kernel": (3, 10, 9), "bias": (3, 9)},
                "down": {"kernel": (3, 9, 10), "bias": (3, 10)},
            },
        },
        "final_norm": {"scale": (10,), "bias": (10,)},
    }


def test_initial_parameters():
    cfg = dataclasses.replace(BASE, norm="layer_norm")
    key = jax.random.key(0, impl="rbg")  # compiles faster
    params = jax.jit(lambda: partitioning.unbox(init_params(cfg, key)))()
    for table in (params["embedding"]["table"], params["head"]["kernel"].T):
        assert not table[61:].any()
        assert bool(jnp.all(jnp.any(table[:61] != 0, axis=-1)))
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert not jnp.any(kernel[0] == kernel[1])
    assert jnp.all(params["blocks"]["mlp_norm"]["scale"] == 1)
    assert not params["blocks"]["mlp_norm"]["bias"].any()


@functools.partial(jax.jit, static_argnums=0)
def gradient(cfg: TransformerConfig, params: Any) -> Any:
    def nll(params):
        return -jax.nn.log_softmax(forward(cfg, params, TOKENS).logits)[..., 0].sum()

    return jax.grad(nll)(params)


@pytest.mark.parametrize("cfg", [BASE, LEARNED], ids=["rotary", "learned"])
def test_every_parameter_has_a_gradient_and_vocabulary_padding_none(cfg):
    grads = gradient(cfg, params_of(cfg))
    assert not grads["embedding"]["table"][61:].any()
    assert cfg.tie_embeddings or not grads["head"]["kernel"][:, 61:].any()
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        used = leaf.any(axis=tuple(range(1, leaf.ndim))) if "blocks" in str(path) else leaf.any()
        assert bool(jnp.isfinite(leaf).all()), path
        assert bool(jnp.all(used)), path


# Every field of the configuration: (what else must be set for it to matter, another value).
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_theta": 64.0,
    "rope_scaling_factor": 8.0,
    "rope_original_length": 60,
}
FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "vocab_size": ({}, 67),
    "num_layers": ({}, 2),
    "embed_dim": ({}, 12),
    "num_heads": ({}, 2),
    "num_kv_heads": ({}, 4),
    "head_dim": ({}, 4),
    "mlp_dim": ({}, 11),
    "max_length": ({"positions": "learned"}, 17),
    "norm": ({}, "layer_norm"),
    "norm_eps": ({}, 0.1),
    "mlp": ({"mlp": "gelu"}, "gelu_tanh"),
    "positions": ({}, "learned"),
    "learned_position_offset": ({"positions": "learned"}, 2),
    "rotary_fraction": ({}, 0.34),
    "rope_theta": ({}, 100.0),
    "rope_scaling": ({"rope_scaling_factor": 2.0}, "linear"),
    "rope_scaling_factor": ({"rope_scaling": "linear"}, 2.0),
    "rope_low_frequency_factor": (LLAMA3, 2.0),
    "rope_high_frequency_factor": (LLAMA3, 5.0),
    "rope_original_length": (LLAMA3, 50),
    "parallel_residual": ({}, True),
    "block": ({}, "sandwich"),
    "qk_bias": ({}, True),
    "qkv_bias": ({}, True),
    "output_bias": ({}, True),
    "mlp_bias": ({}, True),
    "qk_norm": ({}, True),
    "tie_embeddings": ({}, True),
    "compute_dtype": ({}, "bfloat16"),
    "param_dtype": ({}, "bfloat16"),
}


def test_every_field_is_listed():
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    # remat must not matter, kernel_init only where parameters are drawn: see below. Those of the
    # recurrence, of the losses and of attention have their own, in test_recurrent_depth.py,
    # test_linear_losses.py and test_self_attention.py.
    recurrence = {"recurrence", "recurrence_sampling", "backprop_steps", "injection"}
    recurrence |= {"prelude_layers", "coda_layers"}
    forms = {"remat", "kernel_init", "loss_implementation", "attention_implementation"}
    assert names - set(FIELDS) == forms | recurrence


def test_kernels_are_drawn_as_the_configuration_says():
    # Width 256, hidden 768, 8 heads of 32 of which 2 have keys: fan-ins 256, 256 and 768.
    cfg = dataclasses.replace(
        BASE, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=32, mlp_dim=768
    )
    read, written = 256**-0.5, (2 * cfg.num_layers) ** -0.5
    scaled = {"query": read, "key": read, "output": read * written, "up": read}
    scaled["down"] = 768**-0.5 * written
    xavier = {"query": (2 / 512) ** 0.5, "key": (2 / 320) ** 0.5, "output": (2 / 512) ** 0.5}
    xavier |= dict.fromkeys(("up", "down"), (2 / 1024) ** 0.5)
    narrow = (2 / (5 * 256)) ** 0.5 * 0.98658  # which a cut at three deviations leaves
    takase = {name: narrow for name in ("query", "key", "value", "gate")}
    takase |= {name: narrow * written for name in ("output", "up", "down")}
    for kind, deviations in (("scaled", scaled), ("xavier", xavier), ("takase", takase)):
        blocks = jax.jit(
            lambda key, kind=kind: partitioning.unbox(
                init_params(dataclasses.replace(cfg, kernel_init=kind), key)
            )["blocks"]
        )(jax.random.key(0))
        kernels = blocks["attention"] | blocks["mlp"]
        for name, deviation in deviations.items():
            np.testing.assert_allclose(jnp.std(kernels[name]["kernel"]), deviation, rtol=0.02)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_the_parameters_or_the_logits(name):
    others, value = FIELDS[name]
    base = dataclasses.replace(BASE, **others)
    changed = dataclasses.replace(base, **{name: value})
    if jax.tree.map(_signature, shapes(base)) == jax.tree.map(_signature, shapes(changed)):
        before, after = eager(base).logits, eager(changed).logits
        assert bool(jnp.isfinite(after).all())
        assert float(jnp.abs(before - after).max()) > 1e-5


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype} {leaf.shape}"


# Precision and memory.


def test_remat_changes_the_work_and_not_the_gradients():
    cfgs = {name: dataclasses.replace(BASE, remat=name) for name in ("none", "dots", "full")}
    params = params_of(BASE)
    want = gradient(cfgs["none"], params)
    for name in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            gradient(cfgs[name], params),
            want,
        )
    work = {
        n: flops.count_dot_flops(lambda p, c=c: gradient(c, p), params) for n, c in cfgs.items()
    }
    assert work["none"] < work["dots"] < work["full"]


def test_bfloat16_computes_in_it_and_keeps_parameters_and_logits_in_float32():
    cfg = dataclasses.replace(BASE, compute_dtype="bfloat16")
    params = params_of(cfg)
    out = run(cfg, params, TOKENS, hidden_layer=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(cfg))} == {jnp.dtype("float32")}
    assert (out.logits.dtype, out.hidden.dtype) == (jnp.float32, jnp.bfloat16)
    grads = jax.eval_shape(lambda params: gradient(cfg, params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out.logits[..., :61], logits(BASE), atol=0.1)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        cfg = dataclasses.replace(BASE, compute_dtype="float64", param_dtype="float64")
        out = run(cfg, params_of(cfg), TOKENS, hidden_layer=2)
        assert (out.logits.dtype, out.hidden.dtype) == (jnp.float64, jnp.float64)
    np.testing.assert_allclose(out.logits[..., :61], logits(BASE), atol=1e-4)
