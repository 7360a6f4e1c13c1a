"""A step of group-relative policy optimisation (GRPO) against TRL's `GRPOTrainer`.

    python tests/benchmarks/grpo.py --prompts=4 --rollouts=4 --new_tokens=32

Measured: one jitted step from this library's functions: `roll_out`, rewards, `group_advantages`,
`response_log_probs` and `clipped_surrogate`, clipping and AdamW. Against: `GRPOTrainer.train` of
the same Llama with the same weights, read from the safetensors that we write; the same prompts,
reward, group, optimiser and number of sampled tokens (no token ends a response on either side, both
assert it), float32, one update a batch, no divergence from a reference, all cores of the process.
Its step is taken between the callbacks `on_step_begin` and `on_step_end`, with the batch it loads.
Goal: at most 0.5 of TRL's time. Needs TRL, which no extra brings: pip install trl.
"""

import functools
import os
import tempfile
import threading
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rollouts as sampling
import shapes
from absl import app, flags
from torch_step import import_torch

from jaxlib_methods import linear_losses, policy_gradient, rollouts
from jaxlib_methods.models import huggingface, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params

FLAGS = flags.FLAGS
GOAL = 0.5
RATE, CLIP_NORM, CLIP = 1e-6, 1.0, 0.2


def import_trl() -> Any:
    """TRL. Raises SystemExit saying what to install."""
    import_torch()
    try:
        import trl  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"this benchmark cannot import {error.name}; pip install trl") from error
    return trl


class Ours:
    """This library's step; every call takes another one."""

    def __init__(self, cfg: TransformerConfig, params: Any, prompts: jax.Array) -> None:
        self._optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(RATE))
        self._state = params, self._optimizer.init(params)
        self._prompts, self._key = prompts, jax.random.key(0)
        self._step = jax.jit(functools.partial(self._take, cfg))

    def __call__(self) -> Any:
        self._key, key = jax.random.split(self._key)
        self._state, sampled = self._step(*self._state, key)
        return sampled

    def _take(self, cfg: TransformerConfig, params: Any, state: Any, key: jax.Array) -> Any:
        prompts, apply = self._prompts, functools.partial(forward, cfg)
        lengths = jnp.full((len(prompts),), prompts.shape[1])
        found = sampling.sample(cfg, params, prompts, jnp.float32(1), key)
        even = jnp.where(found.where, found.tokens % 2 == 0, False)
        advantages = policy_gradient.group_advantages(even.sum(axis=-1).astype(jnp.float32))

        def loss(params: Any) -> jax.Array:
            log_probs = rollouts.response_log_probs(
                apply, params, prompts, lengths, found, temperature=1.0,
                nll=functools.partial(linear_losses.token_nll, cfg),
            )  # fmt: skip
            each = policy_gradient.clipped_surrogate(
                log_probs, found.log_probs, advantages, where=found.where, clip_low=CLIP,
                clip_high=CLIP,
            )  # fmt: skip
            return policy_gradient.per_response(each, where=found.where).mean()

        updates, state = self._optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), found.where.sum()


class Trainer:
    """TRL's trainer in a thread of its own, which waits before each step until it is asked for."""

    def __init__(self, folder: str, prompts: jax.Array, vocab_size: int) -> None:
        self._trl = import_trl()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._sampled: list[int] = []
        trainer = self._trl.GRPOTrainer(
            model=self._model(folder),
            reward_funcs=self._reward,
            args=self._arguments(folder, len(prompts)),
            train_dataset=_dataset(prompts),
            processing_class=_tokenizer(vocab_size),
        )
        trainer.add_callback(self._callback())
        self._thread = threading.Thread(target=trainer.train, daemon=True)
        self._thread.start()

    def __call__(self) -> Any:
        self._go.release()
        while not self._done.acquire(timeout=1.0):
            if not self._thread.is_alive():
                raise RuntimeError("TRL's trainer has ended; its error stands above")
        return np.sum(self._sampled)

    def close(self) -> None:
        """Ends the trainer."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _model(self, folder: str) -> Any:
        torch, transformers = import_torch()
        return transformers.LlamaForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32
        )

    def _arguments(self, folder: str, num_prompts: int) -> Any:
        return self._trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=num_prompts * FLAGS.rollouts,
            num_generations=FLAGS.rollouts,
            max_completion_length=FLAGS.new_tokens,
            generation_kwargs={"min_new_tokens": FLAGS.new_tokens},
            temperature=1.0,
            beta=0.0,
            epsilon=CLIP,
            loss_type="grpo",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=1e-4,  # optax's
            max_grad_norm=CLIP_NORM,
            max_steps=10**6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )

    def _reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self._sampled = [len(ids) for ids in completion_ids]
        return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]

    def _callback(self) -> Any:
        _, transformers = import_torch()
        outer = self

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                outer._go.acquire()
                control.should_training_stop = outer._over

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = outer._over
                outer._done.release()

        return Turns()


def _dataset(prompts: jax.Array) -> Any:
    import datasets  # pyright: ignore[reportMissingImports]

    rows = [" ".join(f"t{token}" for token in row) for row in np.asarray(prompts)]
    return datasets.Dataset.from_dict({"prompt": rows})


def _tokenizer(vocab_size: int) -> Any:
    """Words t0, t1, ... for the tokens 0, 1, ..."""
    import tokenizers

    _, transformers = import_torch()
    words = {f"t{token}": token for token in range(vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="t0", eos_token="t1", padding_side="left"
    )


def main(_: list[str]) -> None:
    """Checks that both sample as many tokens, times both and prints their rows."""
    torch, _transformers = import_torch()
    import_trl()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cfg = shapes.model_config(FLAGS.prompt_length + FLAGS.new_tokens + 8)
    params = jax.jit(lambda key: partitioning.unbox(init_params(cfg, key)))(jax.random.key(0))
    shape = FLAGS.prompts, FLAGS.prompt_length
    prompts = jax.random.randint(jax.random.key(1), shape, 2, cfg.vocab_size)
    ours = Ours(cfg, params, prompts)
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "model")
        huggingface.save_params(folder, params, cfg)
        theirs = Trainer(folder, prompts, cfg.vocab_size)
        tokens = FLAGS.prompts * FLAGS.rollouts * FLAGS.new_tokens
        assert int(ours()) == int(theirs()) == tokens, "a response ended early"
        times = harness.measure({"TRL": theirs, "jaxlib_methods": ours})
        theirs.close()
    title = f"GRPO step, {FLAGS.prompts * FLAGS.rollouts} responses of {FLAGS.new_tokens} tokens "
    title += f"to prompts of {FLAGS.prompt_length}, torch with {torch.get_num_threads()} threads"
    found = harness.report(title, times, reference="TRL", tokens_per_call=tokens)
    harness.check_goal("GRPO step / TRL", found["jaxlib_methods"], limit=GOAL)


if __name__ == "__main__":
    app.run(main)
