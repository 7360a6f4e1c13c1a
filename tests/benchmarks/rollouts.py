"""Rollouts against transformers' `generate`, and what a step of mid-training spends on what.

    python tests/benchmarks/rollouts.py

Measured: `rollouts.roll_out` in float32, G thoughts of each prompt with their log-probabilities,
the prompt read once for all of them. Against: `LlamaForCausalLM.generate` with the same weights,
read from the safetensors that we write: as many sampled sequences of as many new tokens,
`num_return_sequences` of each prompt, key-value cache, eager and sdpa attention (the faster one is
the reference), all cores of the process. No token ends a sequence on either side; first both must
give the same tokens where the likeliest is taken.
Then the parts of a step of `reinforcement_midtraining`: rollouts (collecting without its scores),
scores (the information gain of RLP; a match costs nothing), update (loss, gradient, AdamW), each
as a share of the whole step and over the share of its analytic FLOPs.
Goals: rollouts take at most 0.5 of transformers' time; update and scores together at most 1.15 of
their share of the FLOPs. A whole step against TRL's is in `grpo.py`.
Needs the extra `oracle`, or `--notorch`.
"""

import dataclasses
import functools
import os
import tempfile
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import shapes
from absl import app, flags
from torch_step import ATTENTIONS, import_torch

from jaxlib_methods import reinforcement_collect, reinforcement_flops
from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.method import Context
from jaxlib_methods.models import decoding, huggingface, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.rollouts import Tokens, roll_out
from jaxlib_methods.train.step import loss_and_gradients
from jaxlib_methods.train.tokenizer import ByteTokenizer

_PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts at a time.", lower_bound=1)
_ROLLOUTS = flags.DEFINE_integer("rollouts", 8, "Responses of each prompt.", lower_bound=2)
_LENGTH = flags.DEFINE_integer("prompt_length", 64, "Tokens of each prompt.", lower_bound=2)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Tokens of each response.", lower_bound=2)
_TORCH = flags.DEFINE_bool("torch", True, "Compares with torch.")
flags.set_default(harness.ROUNDS, 5)
flags.set_default(harness.CALLS, 1)

ROLLOUT_GOAL, UPDATE_GOAL = 0.5, 1.15
NEVER = Tokens(close=-1, end=-1, pad=0)  # no token ends a thought


@functools.partial(jax.jit, static_argnums=0)
def sample(
    cfg: TransformerConfig, params: Any, prompts: jax.Array, temperature: jax.Array, key: jax.Array
) -> Any:
    """Responses of `--new_tokens` tokens, all of them thought."""
    count, length = prompts.shape
    return roll_out(
        functools.partial(forward, cfg),
        params,
        prompts,
        jnp.full((count,), length),
        cache=decoding.init_cache(cfg, batch_size=count, length=length),
        num_rollouts=_ROLLOUTS.value,
        max_thought=_NEW.value,
        max_answer=0,
        temperature=temperature,
        tokens=NEVER,
        force_close=False,
        key=key,
    )


class Torch:
    """transformers' sampler with one kind of attention."""

    def __init__(self, folder: str, prompts: jax.Array, attention: str) -> None:
        self._torch, transformers = import_torch()
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=self._torch.float32
        ).eval()
        self._prompts = self._torch.from_numpy(np.array(prompts, np.int64))

    def __call__(self, **given: Any) -> Any:
        """New tokens `[N G, T]`, or `[N, T]` where `given` takes the likeliest."""
        sampling = {"do_sample": True, "num_return_sequences": _ROLLOUTS.value, "top_k": 0}
        with self._torch.inference_mode():
            found = self._model.generate(
                self._prompts,
                attention_mask=self._torch.ones_like(self._prompts),
                min_new_tokens=_NEW.value,
                max_new_tokens=_NEW.value,
                pad_token_id=0,
                eos_token_id=None,
                **(given or sampling),
            )
        return found[:, self._prompts.shape[1] :].numpy()


def compare(cfg: TransformerConfig, params: Any) -> None:
    """Asserts that both take the same likeliest tokens, times both and prints their rows."""
    torch, _ = import_torch()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prompts = jax.random.randint(
        jax.random.key(1), (_PROMPTS.value, _LENGTH.value), 0, cfg.vocab_size
    )
    ours = functools.partial(sample, cfg, params, prompts)
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "model")
        huggingface.save_params(folder, params, cfg)
        theirs = {f"transformers {name}": Torch(folder, prompts, name) for name in ATTENTIONS}
    likeliest = ours(jnp.float32(0), jax.random.key(0)).tokens[:, 0, : _NEW.value]
    for name, sampler in theirs.items():
        same = (sampler(do_sample=False) == np.asarray(likeliest)).mean()
        assert same > 0.99, f"{name}: {1 - same:.1%} of the likeliest tokens differ"
    keys = iter(range(10**6))
    times = harness.measure(
        {
            **theirs,
            "jaxlib_methods": lambda: ours(jnp.float32(1), jax.random.key(next(keys))),
        }
    )
    reference = harness.fastest(times, list(theirs))
    count = _PROMPTS.value * _ROLLOUTS.value
    title = f"{count} responses of {_NEW.value} tokens to prompts of {_LENGTH.value}, torch with "
    title += f"{torch.get_num_threads()} threads"
    found = harness.report(title, times, reference=reference, tokens_per_call=count * _NEW.value)
    harness.check_goal(f"rollouts / {reference}", found["jaxlib_methods"], limit=ROLLOUT_GOAL)


def make_parts(model: TransformerConfig, params: Any, cfg: ReinforcementMidtrainingConfig) -> Any:
    """Candidates: rollouts, scores, update and the whole step; and the analytic FLOPs of each."""
    length, rows = _LENGTH.value, _PROMPTS.value
    context = Context(
        model=model,
        num_steps=10,
        sequence_length=length,
        batch_size=rows,
        tokenizer="bytes",
        load_pretrained=lambda *_, **__: None,  # pyright: ignore[reportArgumentType]
        tokens=ByteTokenizer(),
    )
    method, setting = rmt.make(cfg, context), rmt.make_setting(cfg, context)
    batch = shapes.make_batch(dataclasses.replace(model, max_length=length), rows, documents=1)
    optimizer = optax.adamw(1e-6)
    step, key = jnp.int32(0), jax.random.key(3)
    budget = jnp.int32(cfg.budget)

    @jax.jit
    def roll(params: Any) -> Any:
        tiers = reinforcement_collect.tiers_of(setting, (), batch)
        return reinforcement_collect.think(
            setting, params, batch, tiers, jnp.array([0.0, 0.0, 1.0]), budget,
            num_rollouts=cfg.rollouts, key=key,
        )  # fmt: skip

    @jax.jit
    def score(params: Any, thoughts: Any) -> Any:
        return reinforcement_collect.score(setting, params, params, thoughts, budget)

    def learn(params: Any, optimizer_state: Any, collected: Any) -> Any:
        gradients, metrics, _ = loss_and_gradients(
            method.loss, params, (), collected, step=step, key=key
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, metrics

    def collect(params: Any, state: Any) -> Any:
        assert method.collect is not None
        return method.collect(params, (), batch, state, step=step, key=key)

    @jax.jit
    def whole(params: Any, optimizer_state: Any, state: Any) -> Any:
        collected, state, _ = collect(params, state)
        return learn(params, optimizer_state, collected), state

    assert method.init_state is not None
    state = partitioning.unbox(method.init_state(key))
    optimizer_state = optimizer.init(params)
    thoughts, (collected, _, _) = roll(params), jax.jit(collect)(params, state)
    update = jax.jit(learn)
    candidates = {
        "whole step": lambda: whole(params, optimizer_state, state),
        "rollouts": lambda: roll(params),
        "scores": lambda: score(params, thoughts),
        "update": lambda: update(params, optimizer_state, collected),
    }
    prompt_length = setting.prompt_length
    counted = reinforcement_flops.parts(model, length, cfg, prompt_length=prompt_length)
    work = {
        "rollouts": counted.rollout,
        "scores": counted.score,
        "update": counted.policy + counted.text,
    }
    return candidates, {name: flops / sum(work.values()) for name, flops in work.items()}


def share(model: TransformerConfig, params: Any) -> None:
    """Times the parts of RLP's step and prints their shares of time and of FLOPs."""
    cfg = ReinforcementMidtrainingConfig(
        positions="uniform",
        reward="information_gain",
        advantage="leave_one_out",
        length_weight=0.0,
        rollouts=_ROLLOUTS.value,
        max_thought=_NEW.value,
        budget=_NEW.value,
        prompt_after="<think>",
    )
    candidates, work = make_parts(model, params, cfg)
    times = harness.measure(candidates)
    tokens = _PROMPTS.value * _ROLLOUTS.value * _NEW.value
    found = harness.report("Parts of a step", times, reference="whole step", tokens_per_call=tokens)
    for name, of_flops in work.items():
        ratio = found[name] / of_flops
        print(f"{name}: {found[name]:.1%} of the time, {of_flops:.1%} of the FLOPs, {ratio:.2f}")
    both = ("scores", "update")
    ratio = sum(found[name] for name in both) / sum(work[name] for name in both)
    harness.check_goal("share of scores and update / that of their FLOPs", ratio, limit=UPDATE_GOAL)


def main(_: list[str]) -> None:
    """Compares with transformers, then takes a step apart."""
    if _TORCH.value:
        jax.config.update("jax_platforms", "cpu")
    cfg = shapes.model_config(_LENGTH.value + _NEW.value + 8)
    params = jax.jit(lambda key: partitioning.unbox(init_params(cfg, key)))(jax.random.key(0))
    if _TORCH.value:
        compare(cfg, params)
    share(cfg, params)


if __name__ == "__main__":
    app.run(main)
