"""Presets: golden text, round trip, and the sizes that they promise.

After a wanted change of a default, write the golden text again and read the difference:

    UPDATE_GOLDEN=1 pytest tests/train/test_presets.py
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels.attention import Keys, attention
from jaxlib_methods.train import flags, presets
from jaxlib_methods.train.config import from_dict, require_complete, to_dict

GOLDEN = pathlib.Path(__file__).parent / "golden" / "presets"


def configured(*arguments: str):
    values = absl_flags.FlagValues()
    flags.define(values)
    flags.parse(["train", *arguments], values)
    return flags.run_config(values)


def num_parameters(config: TransformerConfig) -> int:
    """RMSNorm, SwiGLU and no biases; the padded vocabulary counts."""
    width, heads = config.embed_dim, config.num_heads + config.kv_heads
    attention = 2 * width * heads * config.head_size
    block = attention + 3 * width * config.mlp_size + 2 * width
    tables = (1 if config.tie_embeddings else 2) * config.padded_vocab_size * width
    return config.num_layers * block + tables + width


@pytest.mark.parametrize("name", presets.PRESETS)
def test_golden_text(name: str):
    path = GOLDEN / f"{name}.txt"
    text = flags.to_flagfile(configured(f"--preset={name}"))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "a changed preset: see this file's docstring"


def test_golden_folder_holds_nothing_else():
    assert {path.stem for path in GOLDEN.iterdir()} == set(presets.PRESETS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_flagfile_and_dict_give_the_preset_back(name: str, tmp_path: pathlib.Path):
    config = configured(f"--preset={name}")
    assert config.preset == presets.get(name).preset == name
    assert f"train --preset={name}" in presets.PRESETS[name].command
    path = tmp_path / "run.flags"
    path.write_text(flags.to_flagfile(config))
    assert configured(f"--flagfile={path}") == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", presets.PRESETS)
def test_needs_are_what_is_missing(name: str):
    preset = presets.PRESETS[name]
    require_complete(configured(f"--preset={name}", *preset.needs))
    for left_out in preset.needs:
        others = [flag for flag in preset.needs if flag != left_out]
        missing = left_out.split("=")[0]
        with pytest.raises(ValueError, match=f"still needs a value for {missing}$"):
            require_complete(configured(f"--preset={name}", *others))


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"unknown preset 'tiny'; choose one of \['depth_"):
        presets.get("tiny")


def test_the_tiny_teacher_has_a_tenth_of_the_student_s_parameters():
    student = presets.get("late_to_early_tiny")
    source, _, name = student.method_config.teacher.partition(":")
    teacher = presets.get(name)
    assert (source, teacher.method) == ("preset", "next_token")
    assert 9 <= num_parameters(student.model) / num_parameters(teacher.model) <= 11
    assert teacher.model.vocab_size == student.model.vocab_size
    assert teacher.data == student.data


def test_the_tiny_baseline_is_the_same_run_without_the_teacher():
    plain, student = presets.get("transformer_tiny"), presets.get("late_to_early_tiny")
    assert plain.method == "next_token"
    for part in ("model", "data", "train", "optimizer", "mesh", "seed"):
        assert getattr(plain, part) == getattr(student, part)


@pytest.mark.parametrize(
    ("name", "billions", "teacher"),
    [
        ("late_to_early_1p4b", 1.4, "smollm_135m"),
        ("late_to_early_3b", 3.5, "smollm_135m"),
        ("late_to_early_7b", 7.5, "llama_3p2_1b"),
    ],
)
def test_published_sizes(name: str, billions: float, teacher: str):
    config = presets.get(name)
    assert round(num_parameters(config.model) / 1e9, 1) == billions
    assert config.model.vocab_size == PUBLISHED[teacher].vocab_size
    tokens = config.data.batch_size * config.data.sequence_length
    assert tokens == 2**20
    assert round(tokens * config.train.num_steps / 1e9, 2) == 20.0
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_fraction) == (3e-4, 0.02)
    assert (optimizer.schedule, optimizer.final_fraction) == ("cosine", 0.1)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)


def test_transformer_1b_is_the_published_shape_in_bfloat16():
    model = presets.get("transformer_1b").model
    assert round(num_parameters(model) / 1e9, 2) == 1.24
    assert model.compute_dtype == "bfloat16"


def attention_shapes() -> list[tuple[int, int, int, int, str]]:
    """Tokens, heads, key heads, head size and dtype, of all presets."""
    runs = [preset.config for preset in presets.PRESETS.values()]
    found = {
        (
            run.data.sequence_length,
            run.model.num_heads,
            run.model.kv_heads,
            run.model.head_size,
            run.model.compute_dtype,
        )
        for run in runs
    }
    return sorted(found)


@pytest.mark.parametrize("shape", attention_shapes(), ids=str)
def test_kernels_for_tpus_are_made_for_what_presets_attend(shape: tuple[int, int, int, int, str]):
    """To second order, as energies need it; compiled to a program of theirs, which is not run."""
    length, heads, key_heads, size, dtype = shape
    query, key = (
        jax.ShapeDtypeStruct((1, length, count, size), dtype) for count in (heads, key_heads)
    )

    def total(query: jax.Array, key: jax.Array) -> jax.Array:
        at: dict[str, Any] = {
            "positions": jnp.arange(length)[None],
            "segments": jnp.ones((1, length), jnp.int32),
        }
        out, _ = attention(query, Keys(key, key, **at), implementation="pallas", **at)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    def product(query: jax.Array, key: jax.Array) -> Any:
        pair = query, key
        return jax.jvp(jax.grad(total, argnums=(0, 1)), pair, pair)[1]

    with dispatch.lowering_for("tpu"):
        text = jax.jit(product).trace(query, key).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 4
