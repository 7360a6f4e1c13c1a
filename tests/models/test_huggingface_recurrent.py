"""The published recurrent-depth format, against the paper's equations written in torch."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlib_methods.models import huggingface, language_model, recurrent_training
from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.models.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    load_params,
    save_params,
)
from jaxlib_methods.models.partitioning import make_mesh, param_shardings, unbox

# The keys of tomg-group-umd/huginn-0125 that have a meaning for the architecture.
HUGINN = {
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "effective_expected_depth": 132,
    "head_dim": 96,
    "init_strategy": "takase",
    "init_values": {
        "std": 0.008703882797784892,
        "out_proj": 0.0005356869554443541,
        "embedding": 0.008703882797784892,
        "embed_scale": 72.6636084983398,
    },
    "injection_type": "linear",
    "intermediate_size": 17920,
    "mean_backprop_depth": 8,
    "mean_recurrence": 32,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "n_embd": 5280,
    "n_heads": 55,
    "n_layers": 8,
    "n_layers_in_coda": 2,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-06,
    "num_key_value_heads": 55,
    "padded_vocab_size": 65536,
    "qk_bias": True,
    "rope_base": 50000,
    "sampling_scheme": "poisson-lognormal-filling",
    "state_init": "like-init",
    "test_time_noise": 0,
    "tie_embeddings": True,
    "vocab_size": 65536,
}
VOCAB, WIDTH, HEADS, HIDDEN, LENGTH, THETA = 37, 24, 4, 20, 32, 500.0
SIZE = WIDTH // HEADS
STACKS = {"prelude": 1, "core_block": 3, "coda": 2}
TINY = {
    "model_type": "huginn_raven",
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_heads": HEADS,
    "intermediate_size": HIDDEN,
    "block_size": LENGTH,
    "n_layers": 6,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 3,
    "n_layers_in_coda": 2,
    "mean_recurrence": 3,
    "mean_backprop_depth": 2,
    "rope_base": THETA,
    "norm_eps": 1e-6,
}
BLOCK = {
    "norm_1.weight": (WIDTH,),
    "norm_2.weight": (WIDTH,),
    "norm_3.weight": (WIDTH,),
    "norm_4.weight": (WIDTH,),
    "attn.Wqkv.weight": (3 * WIDTH, WIDTH),
    "attn.qk_bias": (2, 1, HEADS, SIZE),
    "attn.proj.weight": (WIDTH, WIDTH),
    "mlp.fc.weight": (2 * HIDDEN, WIDTH),
    "mlp.proj.weight": (WIDTH, HIDDEN),
}
SHAPES = {
    "transformer.wte.weight": (VOCAB, WIDTH),
    "transformer.adapter.weight": (WIDTH, 2 * WIDTH),
    "transformer.ln_f.weight": (WIDTH,),
    **{
        f"transformer.{stack}.{layer}.{name}": shape
        for stack, layers in STACKS.items()
        for layer in range(layers)
        for name, shape in BLOCK.items()
    },
}


def angles() -> np.ndarray:
    """Radians of each position and pair, `[LENGTH, SIZE / 2]`."""
    return np.arange(LENGTH)[:, None] * THETA ** (-np.arange(0, SIZE, 2) / SIZE)


def weights() -> dict[str, np.ndarray]:
    """Random tensors under the published names, where nothing is 0 or 1."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = rng.normal(size=shape)
        if len(shape) == 1:
            drawn = 1 + 0.3 * drawn
        elif "bias" not in name:
            drawn /= math.sqrt(shape[1])
        return drawn.astype(np.float32)

    return {name: draw(name, shape) for name, shape in SHAPES.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | keys))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as published: with the rotation, and with the tied table twice."""
    tensors = weights()
    cos_sin = np.stack([np.cos(angles()), np.sin(angles())], axis=-1)
    tensors["freqs_cis"] = cos_sin[None, :, None].astype(np.float32)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    return write(tmp_path_factory.mktemp("huginn"), tensors)


def config_of(folder: Path, **overrides: Any) -> TransformerConfig:
    overrides = {"compute_dtype": "float32"} | overrides
    return config_from_huggingface(json.loads((folder / "config.json").read_text()), **overrides)


def boxed_params(cfg: TransformerConfig) -> Any:
    return jax.eval_shape(lambda: language_model.init_params(cfg, jax.random.key(0)))


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def published_logits(
    tensors: dict[str, np.ndarray], tokens: np.ndarray, state: np.ndarray, num_steps: int
) -> np.ndarray:
    """The published model in torch, float64: pairs (2j, 2j + 1) turn as complex numbers."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import silu  # pyright: ignore[reportMissingImports]

    weight = {name: torch.tensor(array, dtype=torch.float64) for name, array in tensors.items()}
    turns = torch.tensor(np.exp(1j * angles()[: tokens.shape[1]]))[None, :, None, :]
    hidden_from = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        fused = x @ weight[f"{name}.Wqkv.weight"].T
        query, key, value = (part.unflatten(-1, (HEADS, SIZE)) for part in fused.chunk(3, dim=-1))
        bias = weight[f"{name}.qk_bias"]
        query, key = turn(query + bias[0]), turn(key + bias[1])
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(SIZE)
        shares = scores.masked_fill(hidden_from, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", shares, value)
        return mixed.flatten(-2) @ weight[f"{name}.proj.weight"].T

    def stack(x: torch.Tensor, name: str) -> torch.Tensor:
        for layer in range(STACKS[name]):
            at = f"transformer.{name}.{layer}"
            x = norm(x + attention(norm(x, f"{at}.norm_1"), f"{at}.attn"), f"{at}.norm_2")
            gate, product = (norm(x, f"{at}.norm_3") @ weight[f"{at}.mlp.fc.weight"].T).chunk(2, -1)
            out = (silu(gate) * product) @ weight[f"{at}.mlp.proj.weight"].T
            x = norm(x + out, f"{at}.norm_4")
        return x

    table = weight["transformer.wte.weight"]
    embedded = stack(table[torch.tensor(tokens)] * math.sqrt(WIDTH), "prelude")
    x = torch.tensor(state, dtype=torch.float64)
    for _ in range(num_steps):
        adapted = torch.cat([x, embedded], dim=-1) @ weight["transformer.adapter.weight"].T
        x = stack(adapted, "core_block")
    x = norm(stack(norm(x, "transformer.ln_f"), "coda"), "transformer.ln_f")
    return (x @ table.T).numpy()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # torch about itself
def test_logits_are_those_of_the_published_equations(folder: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (2, 9), np.int32)
    state = rng.normal(size=(2, 9, WIDTH)).astype(np.float32)
    cfg = config_of(folder)
    params = load_params(folder, cfg)

    @jax.jit
    def run(num_steps: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        out = recurrent_training.forward(
            cfg, params, jnp.asarray(tokens), key=key, num_steps=num_steps, state=jnp.asarray(state)
        )
        return out.logits[..., :VOCAB]

    before = 0.0
    for num_steps in (1, 2, 5):
        want = published_logits(weights(), tokens, state, num_steps)
        assert np.abs(want - before).max() > 1
        np.testing.assert_allclose(run(jnp.int32(num_steps)), want, rtol=0, atol=1e-5)
        before = want


def test_where_each_part_of_a_fused_tensor_goes(folder: Path) -> None:
    cfg, tensors = config_of(folder), weights()
    params = load_params(folder, cfg)
    core = params["core"]["blocks"]
    fused = tensors["transformer.core_block.2.attn.Wqkv.weight"]
    bias = tensors["transformer.core_block.2.attn.qk_bias"]
    halves = [0, 2, 4, 1, 3, 5]  # our (j, j + 3) is the file's (2j, 2j + 1)
    for part, name in enumerate(("query", "key")):
        for head in range(HEADS):
            rows = [part * WIDTH + head * SIZE + i for i in halves]
            kernel = core["attention"][name]["kernel"][2, :, head]
            np.testing.assert_array_equal(kernel, fused[rows].T)
            ours = core["attention"][f"{name}_bias"][2, head]
            np.testing.assert_array_equal(ours, bias[part, 0, head, halves])
    value = core["attention"]["value"]["kernel"][2]
    np.testing.assert_array_equal(value.reshape(WIDTH, WIDTH), fused[2 * WIDTH :].T)
    gated = tensors["transformer.core_block.2.mlp.fc.weight"]
    np.testing.assert_array_equal(core["mlp"]["gate"]["kernel"][2], gated[:HIDDEN].T)
    np.testing.assert_array_equal(core["mlp"]["up"]["kernel"][2], gated[HIDDEN:].T)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000], ids=["one_file", "sharded"])
def test_export_repeats_the_checkpoint(folder: Path, max_shard_bytes: int, tmp_path: Path) -> None:
    cfg = config_of(folder)
    params = load_params(folder, cfg)
    out = tmp_path / "out"
    save_params(out, params, cfg, max_shard_bytes=max_shard_bytes)
    held = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    written = {name: array for tensors in held.values() for name, array in tensors.items()}
    assert written.keys() == SHAPES.keys() | {"freqs_cis"}
    original = load_file(folder / "model.safetensors")
    for name in SHAPES:
        assert written[name].tobytes() == original[name].tobytes(), name
    assert written["freqs_cis"].dtype == np.float32
    np.testing.assert_allclose(written["freqs_cis"], original["freqs_cis"], rtol=0, atol=1e-5)
    assert (len(held) > 3) == (max_shard_bytes == 10_000)
    if len(held) > 1:
        index = json.loads((out / huggingface.INDEX_FILE).read_text())
        assert index["weight_map"] == {n: file for file, tensors in held.items() for n in tensors}
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in written.values())
    assert config_of(out) == cfg
    assert_same(load_params(out, cfg), params)


@pytest.mark.parametrize(
    "change", [{"tie_embeddings": False}, {"qk_bias": False}, {"prelude_layers": 0}]
)
def test_round_trip_keeps_every_parameter(change: dict[str, Any], tmp_path: Path) -> None:
    cfg = dataclasses.replace(config_from_huggingface(TINY), **change)
    rng = np.random.default_rng(2)
    # All but the padding of the vocabulary, which the file has not.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
            if path[0].key not in ("embedding", "head")
            else jnp.zeros(leaf.shape)
        ),
        unbox(boxed_params(cfg)),
    )
    save_params(tmp_path, params, cfg)
    assert config_of(tmp_path, compute_dtype="bfloat16") == cfg
    assert_same(load_params(tmp_path, cfg), params)


def test_sharded_load_equals_unsharded(folder: Path) -> None:
    cfg = config_of(folder)
    shardings = param_shardings(boxed_params(cfg), make_mesh(data=2, fsdp=2, tensor=2))
    sharded = load_params(folder, cfg, shardings=shardings)
    assert_same(sharded, load_params(folder, cfg))
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
    query = sharded["core"]["blocks"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (3, WIDTH // 2, HEADS // 2, SIZE)


def test_any_part_of_a_parameter_is_that_part_of_the_whole(folder: Path) -> None:
    cfg = config_of(folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    for placement in huggingface._placements(cfg):
        everything = (slice(None),) * len(placement.shape)
        whole = placement.read(tensors.__getitem__, everything, np.dtype(np.float32))
        for _ in range(8):
            starts = [int(rng.integers(size)) for size in placement.shape]
            index = tuple(
                slice(start, int(rng.integers(start + 1, size + 1)))
                for start, size in zip(starts, placement.shape, strict=True)
            )
            part = placement.read(tensors.__getitem__, index, np.dtype(np.float32))
            np.testing.assert_array_equal(part, whole[index], placement.path)


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["transformer.ln_f.weight"]
    tensors["transformer.core_block.3.norm_1.weight"] = np.ones(WIDTH, np.float32)
    tensors["transformer.coda.1.attn.qk_bias"] = np.ones((2, HEADS, SIZE), np.float32)
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match="does not hold this model") as error:
        load_params(tmp_path, config_of(tmp_path))
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "transformer.coda.1.attn.qk_bias is [2, 4, 6], wanted [2, 1, 4, 6]",
        "transformer.core_block.3.norm_1.weight is not known",
        "transformer.ln_f.weight is missing",
    ]


def test_the_published_size() -> None:
    cfg = PUBLISHED["huginn_3p5b"]
    assert config_from_huggingface(HUGINN, remat="full") == cfg
    shapes = jax.tree.leaves(unbox(boxed_params(cfg)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == 3_564_976_800
    written = config_to_huggingface(cfg)
    assert written["init_values"] == pytest.approx(HUGINN["init_values"], rel=1e-9)
    for key in HUGINN.keys() - {"init_values"}:
        assert written[key] == HUGINN[key], key
    derived = config_to_huggingface(dataclasses.replace(cfg, recurrence=12, backprop_steps=None))
    assert derived["mean_backprop_depth"] == 3


def test_keys_that_are_absent_mean_what_the_published_code_takes() -> None:
    required = {"vocab_size", "n_layers", "n_embd", "n_heads", "intermediate_size", "block_size"}
    required |= {"n_layers_in_prelude", "n_layers_in_coda", "mean_recurrence"}
    required |= {"model_type", "mean_backprop_depth"}
    bare = {key: HUGINN[key] for key in required}
    assert config_from_huggingface(bare) == config_from_huggingface(HUGINN)
    with pytest.raises(ValueError, match="lacks n_embd"):
        config_from_huggingface(HUGINN | {"n_embd": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_values": {"embed_scale": 1.0}}, r"init_values\.embed_scale=1\.0.* be 72\.66.*n_em"),
        ({"init_values": {"std": 0.02}}, r"init_values\.std=0\.02.* be 0\.0087"),
        ({"init_values": {"std": "x"}}, r"init_values\.std='x'.* be 0\.0087"),
        ({"init_values": [1]}, r"init_values=\[1\].* be a JSON object"),
        ({"n_layers_in_prelude": -1}, "n_layers_in_prelude=-1.* integer from 0 to"),
        ({"injection_type": "add"}, "injection_type='add'.* must be linear"),
        ({"block_class_name": "TransformerPreNormBlock"}, "block_class_name='TransformerPreNorm"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm'"),
        ({"mlp_class_name": "BaseMLP"}, "mlp_class_name='BaseMLP'"),
        ({"architecture_class_name": "GPT"}, "architecture_class_name='GPT'"),
        ({"state_init": "zero"}, "state_init='zero'"),
        ({"nonlin_name": "GELU"}, "nonlin_name='GELU'"),
        ({"bias": True}, "bias=True"),
        ({"test_time_noise": 0.1}, r"test_time_noise=0\.1"),
        ({"num_key_value_heads": 11}, "num_key_value_heads=11.* must be 55"),
        ({"head_dim": 64}, "head_dim=64.* must be 96"),
        ({"padded_vocab_size": 69632}, "padded_vocab_size=69632.* must be 65536"),
        ({"n_layers_in_recurrent_block": 3}, "n_layers_in_recurrent_block=3.* must be 4"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False.* must be True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'.*'default'"),
    ],
)
def test_what_the_model_lacks_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(HUGINN | change)


RECURRENT = config_from_huggingface(TINY)


@pytest.mark.parametrize(
    ("cfg", "family", "message"),
    [
        (RECURRENT, "llama", "llama: recurrence 3 must be 0"),
        (TransformerConfig(), "huginn_raven", "huginn_raven: recurrence 0 must be above 0"),
        (dataclasses.replace(RECURRENT, injection="add"), None, "injection 'add' must be 'linear'"),
        (dataclasses.replace(RECURRENT, block="pre_norm"), None, "huginn_raven: block 'pre_norm'"),
        (dataclasses.replace(RECURRENT, num_kv_heads=2), None, "num_kv_heads 2 must be num_heads"),
        (TransformerConfig(block="sandwich"), None, "llama: block 'sandwich' must be 'pre_norm'"),
        (TransformerConfig(block="post_norm", qkv_bias=True), None, "qwen2: block 'post_norm' mus"),
        (TransformerConfig(qk_bias=True), None, "llama: qk_bias True must be False"),
        (TransformerConfig(qk_bias=True, qk_norm=True), None, "qwen3: qk_bias True must be False"),
        (
            TransformerConfig(norm="layer_norm", mlp="gelu", mlp_bias=True, qk_bias=True),
            None,
            "gpt_neox: qk_bias True.*opt: (qk_bias|block|norm)",
        ),
    ],
)
def test_what_no_family_expresses_is_refused(
    cfg: TransformerConfig, family: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_huggingface(cfg, family=family)
