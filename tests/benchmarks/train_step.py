"""The whole training step against a minimal one written by hand in plain JAX.

    python tests/benchmarks/train_step.py

Measured: `make_train_step` with next-token prediction, clipping and AdamW. Against: the same model
as a dictionary of arrays, einsums, `jax.lax.scan` over the layers, and optax; it reports the loss
only, and counts rotary positions from the row's start, which changes no score within a document.
Same parameters, same packed batch, same process; first both are trained for three steps and their
losses must agree to 1e-4 nats in float32.
Goal: our step takes at most 1.05 times as long.
"""

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import shapes
import training
from absl import app

from jaxlib_methods import next_token
from jaxlib_methods.method import Batch
from jaxlib_methods.models.config import TransformerConfig

GOAL = 1.05
DOCUMENTS = 3  # in each row


def plain_params(params: Any, cfg: TransformerConfig) -> dict[str, Any]:
    """Our parameters under short names: copies, because our step donates its own."""
    blocks = params["blocks"]
    attention, mlp = blocks["attention"], blocks["mlp"]
    named = {
        "embedding": params["embedding"]["table"],
        "norm": params["final_norm"]["scale"],
        "head": params["head"]["kernel"][:, : cfg.vocab_size],
        "blocks": {
            "norm_1": blocks["attention_norm"]["scale"],
            "q": attention["query"]["kernel"],
            "k": attention["key"]["kernel"],
            "v": attention["value"]["kernel"],
            "o": attention["output"]["kernel"],
            "norm_2": blocks["mlp_norm"]["scale"],
            "gate": mlp["gate"]["kernel"],
            "up": mlp["up"]["kernel"],
            "down": mlp["down"]["kernel"],
        },
    }
    return jax.tree.map(jnp.copy, named)


def plain_loss(params: dict[str, Any], batch: Batch, cfg: TransformerConfig) -> jax.Array:
    """Mean next-token loss in nats."""
    dtype, half = jnp.dtype(cfg.compute_dtype), cfg.head_size // 2
    time = jnp.arange(batch.inputs.shape[1])
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    where = same & (time[:, None] >= time)
    angles = time[:, None, None] * cfg.rope_theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
        return (y * scale).astype(dtype)

    def rotate(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    def block(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = norm(x, w["norm_1"])
        w = jax.tree.map(lambda leaf: leaf.astype(dtype), w)
        q, k, v = (jnp.einsum("bld,dhc->blhc", y, w[name]) for name in "qkv")
        scores = jnp.einsum("blhc,bmhc->bhlm", rotate(q), rotate(k)) * cfg.head_size**-0.5
        scores = jnp.where(where[:, None], scores.astype(jnp.float32), -1e30)
        mixed = jnp.einsum("bhlm,bmhc->blhc", jax.nn.softmax(scores).astype(dtype), v)
        x = x + jnp.einsum("blhc,hcd->bld", mixed, w["o"])
        y = norm(x, w["norm_2"])
        return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None

    x = params["embedding"].astype(dtype)[batch.inputs]
    x, _ = jax.lax.scan(block, x, params["blocks"])
    logits = (norm(x, params["norm"]) @ params["head"].astype(dtype)).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.where(batch.where, nll, 0).sum() / batch.where.sum()


class PlainStep:
    """The hand-written step; every call trains once more on the same batch."""

    def __init__(self, params: dict[str, Any], batch: Batch, cfg: TransformerConfig) -> None:
        hyper = training.OPTIMIZER
        rate, final = hyper.learning_rate, hyper.final_fraction
        decayed = jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in path[-1].key, params
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(hyper.clip_norm),
            optax.adamw(
                optax.cosine_decay_schedule(rate, training.NUM_STEPS, final),
                b1=hyper.beta1,
                b2=hyper.beta2,
                eps=hyper.epsilon,
                weight_decay=hyper.weight_decay,
                mask=decayed,
            ),
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
            loss, grads = jax.value_and_grad(plain_loss)(params, batch, cfg)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step, self._batch = step, batch
        self._params, self._opt_state = params, optimizer.init(params)

    def __call__(self) -> Any:
        new = self._step(self._params, self._opt_state, self._batch)
        self._params, self._opt_state, loss = new
        return self._params, self._opt_state, loss


def main(_: list[str]) -> None:
    """Checks the losses, times both, prints the rows."""
    cfg = shapes.model_config(training.LENGTH.value)
    batch = shapes.make_batch(cfg, training.BATCH_SIZE.value, documents=DOCUMENTS)
    method = next_token.make(next_token.NextTokenConfig(), training.context(cfg))
    ours = training.OurStep(method, batch)
    plain = PlainStep(plain_params(ours.state.params, cfg), batch, cfg)
    training.check_losses(
        [ours.loss() for _ in range(training.CHECKED_STEPS)],
        [float(plain()[2]) for _ in range(training.CHECKED_STEPS)],
        tolerance=training.LOSS_TOLERANCE[cfg.compute_dtype],
    )
    times = harness.measure({"plain JAX": plain, "jaxlib_methods": ours})
    measured = harness.report(
        "Training step", times, reference="plain JAX", tokens_per_call=batch.inputs.size
    )
    harness.check_goal("our step / plain JAX", measured["jaxlib_methods"], limit=GOAL)


if __name__ == "__main__":
    app.run(main)
