"""Samplers of a recurrent-depth model against one token after the other, and against torch.

    python tests/benchmarks/recurrent_sampling.py

Measured: greedy continuations of prompts, the reading of the prompts included, by the samplers
`parallel`, `speculative` and `continuous`, the last with the exit `latent`. Against: sequential
sampling with the same weights, which must write the same text; the share of equal tokens of the
parallel and of the early exit is printed, they promise no more than converged predictions. Passes
are passes of the core one after the other for each new token, without those for the prompts.
Then sequential sampling, batch 1, against the published algorithm in torch: keys and values of
every iteration kept, fused attention, all cores, the same weights, the same text.
Weights are random. How soon states settle, and so how far samplers get ahead, depends on them as
on the training of a real model, and `--state_weight` changes it; where a nearly equal choice falls
otherwise, the rest of such a text differs.
Goal: the ratios, whatever they are; ours takes at most 1.0 of torch's time. Needs the extra
`oracle`, or `--notorch`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from torch_step import import_torch

from jaxlib_methods import continuous, depth_sampling, speculative, wavefront
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.models import decoding, partitioning, recurrent_depth
from jaxlib_methods.models.config import PUBLISHED, TransformerConfig
from jaxlib_methods.models.decoding import Stream

_PROMPT = flags.DEFINE_integer("prompt_length", 64, "Tokens of each prompt.", lower_bound=2)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens generated.", lower_bound=1)
_BATCHES = flags.DEFINE_multi_integer("prompts", [1, 8], "Prompts at a time; repeatable.")
_WIDTH = flags.DEFINE_integer("width", 128, "Of the model; a head has 32.", lower_bound=32)
_STEPS = flags.DEFINE_integer("iterations", 32, "Of each token.", lower_bound=4)
_STATE = flags.DEFINE_float("state_weight", 0.5, "Of the state in what the core begins with.")
_TORCH = flags.DEFINE_bool("torch", True, "Compares with torch.")
flags.set_default(harness.ROUNDS, 7)
flags.set_default(harness.CALLS, 1)

TORCH_GOAL = 1.0
SEQUENTIAL = "sequential"
SAMPLERS: dict[str, dict[str, Any]] = {
    SEQUENTIAL: {},
    "parallel, 4 a round": {"sampler": "parallel"},
    "parallel, 2 a round": {"sampler": "parallel", "inner_steps": 2},
    "speculative": {"sampler": "speculative"},
    "sequential, exit": {"exit": "latent"},
    "continuous, exit": {"sampler": "continuous", "exit": "latent"},
}
GREEDY = decoding.SamplingConfig(temperature=0.0)


class Result(NamedTuple):
    """tokens: int32 `[B, T]`. passes: int32 scalar, without those for the prompts."""

    tokens: jax.Array
    passes: jax.Array


@functools.partial(jax.jit, static_argnames="num_new")
def generate(model: RecurrentModel, params: Any, prompts: jax.Array, *, num_new: int) -> Result:
    """Continues prompts `[B, P]` as the model's depth says."""
    batch, length = prompts.shape
    lengths = jnp.full((batch,), length)
    draws = depth_sampling.make_draws(GREEDY, decoding.stream_key(0, Stream.TOKENS))
    if model.depth.sampler == "sequential":
        cache: Any = model.init_cache(params, batch_size=batch, length=length + num_new - 1)
        state = decoding.prefill(
            model, params, prompts, lengths, cache=cache, max_new_tokens=num_new
        )
        state = decoding.decode_steps(
            model, params, state, num_steps=num_new, sampling=GREEDY, key=draws.key
        )
        read: Any = state.cache
        steps = read.tokens.steps[:, length - 1 :]
        return Result(state.tokens, steps.max(axis=0).sum())
    given = (model, params, prompts, lengths, draws)
    if model.depth.sampler == "continuous":
        ticking = continuous.CONTINUOUS.generate(*given, max_new_tokens=num_new)
        return Result(ticking.tokens, ticking.ticks)
    parallel = model.depth.sampler == "parallel"
    sampler: Any = wavefront.PARALLEL if parallel else speculative.SPECULATIVE
    rounds = sampler.generate(*given, max_new_tokens=num_new)
    return Result(rounds.tokens, rounds.serial_steps - model.num_steps)


def make_model() -> tuple[TransformerConfig, dict]:
    """The published architecture, and random weights all of whose blocks count.

    Its own first ones write little to the stream, so that texts would repeat themselves.
    """
    width = _WIDTH.value
    cfg = dataclasses.replace(
        PUBLISHED["huginn_3p5b"],
        vocab_size=256,
        embed_dim=width,
        num_heads=width // 32,
        mlp_dim=3 * width,
        max_length=_PROMPT.value + _NEW.value,
        recurrence=_STEPS.value,
        compute_dtype="float32",
        remat="none",
    )
    init = jax.jit(lambda key: partitioning.unbox(recurrent_depth.init_params(cfg, key)))

    def value(path: Any, leaf: jax.Array) -> jax.Array:
        written = {"output", "up"} & {part.key for part in path}
        return leaf * (2 * cfg.unfolded_layers) ** 0.5 if written else leaf

    params = jax.tree.map_with_path(value, init(jax.random.key(0)))
    kernel = params["adapter"]["kernel"]
    params["adapter"]["kernel"] = kernel.at[:width].multiply(_STATE.value)
    return cfg, params


class Torch:
    """The published algorithm: every call continues prompts of one length greedily."""

    def __init__(self, cfg: TransformerConfig, params: Any, prompts: jax.Array) -> None:
        self._torch, _ = import_torch()
        self._cfg = cfg
        self._params = jax.tree.map(lambda x: self._torch.tensor(np.array(x)), params)
        self._blocks = {name: self._fused(name) for name in ("prelude", "core", "coda")}
        self._prompts = self._torch.tensor(np.array(prompts, np.int64))
        places = jnp.arange(prompts.shape[1] + _NEW.value)[None]
        # Where tokens begin is a function of their position.
        begin = recurrent_depth.state_at(cfg, places, decoding.stream_key(0, Stream.STATE))
        self._begin = self._torch.tensor(np.array(begin))
        rates = cfg.rope_theta ** (-np.arange(0, cfg.head_size, 2) / cfg.head_size)
        angles = self._torch.tensor(np.arange(places.size)[:, None] * rates).float()
        self._cos, self._sin = angles.cos(), angles.sin()

    def __call__(self) -> np.ndarray:
        """New tokens `[B, T]`."""
        with self._torch.inference_mode():
            cache: dict[Any, Any] = {}
            read, new, start = self._prompts, [], 0
            for _ in range(_NEW.value):
                logits = self._logits(read, start, cache)
                start += read.shape[1]
                read = logits.argmax(dim=-1, keepdim=True)
                new.append(read)
            return self._torch.cat(new, dim=1).numpy()

    def _fused(self, name: str) -> list[dict[str, Any]]:
        """The weights of each block, three projections in one and two halves in one."""
        stack, cat = self._params[name]["blocks"], self._torch.cat
        attention, mlp = stack["attention"], stack["mlp"]
        parts = [attention[part]["kernel"].flatten(2) for part in ("query", "key", "value")]
        every = {
            "qkv": cat(parts, dim=2),
            "query_bias": attention["query_bias"],
            "key_bias": attention["key_bias"],
            "output": attention["output"]["kernel"].flatten(1, 2),
            "halves": cat([mlp["gate"]["kernel"], mlp["up"]["kernel"]], dim=2),
            "down": mlp["down"]["kernel"],
            **{key: stack[key]["scale"] for key in stack if key.endswith("norm")},
        }
        return [{key: x[i] for key, x in every.items()} for i in range(len(every["qkv"]))]

    def _logits(self, tokens: Any, start: int, cache: dict[Any, Any]) -> Any:
        """Logits `[B, V]` after tokens `[B, L]` that stand at `start` and behind it."""
        torch, params, width = self._torch, self._params, self._cfg.embed_dim
        table, scale = params["embedding"]["table"], params["final_norm"]["scale"]
        end = start + tokens.shape[1]
        e = self._stack("prelude", 0, table[tokens] * width**0.5, start, cache)
        state = self._begin[:, start:end].expand_as(e)
        for i in range(self._cfg.recurrence):
            adapted = torch.cat([state, e], dim=-1) @ params["adapter"]["kernel"]
            state = self._stack("core", i, adapted, start, cache)
        x = self._stack("coda", 0, self._norm(state, scale), start, cache)
        return self._norm(x[:, -1], scale) @ table.T

    def _norm(self, x: Any, scale: Any) -> Any:
        return self._torch.nn.functional.rms_norm(x, scale.shape, scale, self._cfg.norm_eps)

    def _stack(self, name: str, step: int, x: Any, start: int, cache: dict[Any, Any]) -> Any:
        silu = self._torch.nn.functional.silu
        for layer, block in enumerate(self._blocks[name]):
            normed = self._norm(x, block["attention_norm"])
            x = x + self._attention(normed, block, start, cache, (name, step, layer))
            x = self._norm(x, block["attention_post_norm"])
            gate, up = (self._norm(x, block["mlp_norm"]) @ block["halves"]).chunk(2, dim=-1)
            x = self._norm(x + (silu(gate) * up) @ block["down"], block["mlp_post_norm"])
        return x

    def _attention(
        self, x: Any, block: dict[str, Any], start: int, cache: dict[Any, Any], slot: Any
    ) -> Any:
        torch, cfg = self._torch, self._cfg
        end = start + x.shape[1]
        heads = (x @ block["qkv"]).unflatten(-1, (3, cfg.num_heads, cfg.head_size))
        query, key, value = heads.unbind(dim=2)
        query, key = query + block["query_bias"], key + block["key_bias"]
        cos, sin = self._cos[start:end, None], self._sin[start:end, None]
        query, key = (
            torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
            for a, b in (part.chunk(2, dim=-1) for part in (query, key))
        )
        if slot not in cache:  # room for all positions, keys and values of this iteration
            shape = (2, len(x), cfg.num_heads, self._begin.shape[1], cfg.head_size)
            cache[slot] = torch.zeros(shape)
        cache[slot][:, :, :, start:end] = torch.stack([key, value]).transpose(2, 3)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), *cache[slot][:, :, :, :end], is_causal=start == 0
        )
        return mixed.transpose(1, 2).flatten(2) @ block["output"]


def compare(cfg: TransformerConfig, params: dict, batch_size: int) -> None:
    """Times the samplers, prints their rows, passes and the shares of equal tokens."""
    new = _NEW.value
    prompts = make_prompts(batch_size)
    models = {name: RecurrentModel(cfg, DepthConfig(**depth)) for name, depth in SAMPLERS.items()}
    calls = {
        name: functools.partial(generate, model, params, prompts, num_new=new)
        for name, model in models.items()
    }
    results = {name: jax.device_get(call()) for name, call in calls.items()}
    times = harness.measure(calls)
    title = f"Recurrent sampling, batch {batch_size}, {_PROMPT.value} + {new} tokens"
    harness.report(title, times, reference=SEQUENTIAL, tokens_per_call=batch_size * new)
    print(
        "\n| sampler | passes a token | equal tokens | different ones |\n| --- | --- | --- | --- |"
    )
    wanted = results[SEQUENTIAL].tokens
    for name, (tokens, passes) in results.items():
        # `different ones`: a text that repeats itself would flatter a draft.
        kinds = np.mean([len(np.unique(row)) for row in tokens])
        print(f"| {name} | {passes / new:.2f} | {(tokens == wanted).mean():.3f} | {kinds:.1f} |")
    assert (results["speculative"].tokens == wanted).all(), "drafts change the text"
    same = (results[name].tokens for name in ("sequential, exit", "continuous, exit"))
    assert np.array_equal(*same), "rows that do not wait change the text"


def compare_torch(cfg: TransformerConfig, params: dict) -> None:
    """Asserts that torch writes the same text, times both and prints their rows."""
    prompts, model = make_prompts(1), RecurrentModel(cfg)
    ours = functools.partial(generate, model, params, prompts, num_new=_NEW.value)
    theirs = Torch(cfg, params, prompts)
    tokens = jax.device_get(ours()).tokens
    assert (theirs() == tokens).all(), f"{(theirs() != tokens).sum()} of {tokens.size} differ"
    times = harness.measure({SEQUENTIAL: ours, "torch": theirs})
    title = f"Sequential against torch, {_PROMPT.value} + {_NEW.value} tokens"
    ratio = harness.report(title, times, reference="torch", tokens_per_call=_NEW.value)
    harness.check_goal("sequential / torch", ratio[SEQUENTIAL], limit=TORCH_GOAL)


def make_prompts(batch_size: int) -> jax.Array:
    """Random tokens `[B, P]`."""
    return jax.random.randint(jax.random.key(1), (batch_size, _PROMPT.value), 0, 256)


def main(_: list[str]) -> None:
    """Compares at every batch size, then with torch."""
    cfg, params = make_model()
    for batch_size in _BATCHES.value:
        compare(cfg, params, batch_size)
    if _TORCH.value:
        compare_torch(cfg, params)


if __name__ == "__main__":
    app.run(main)
