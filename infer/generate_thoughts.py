"""Text with thoughts: a run thinks at the end of a prompt, answers, and goes on.

A thought is read by its answer alone: what follows is continued from the text, as it was learned.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlib_methods.infer import evaluate, generate, reasoning
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.generate import TextRow
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.reasoning import Reasoner
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import decoding
from jaxlib_methods.models.decoding import SamplingConfig, Stream
from jaxlib_methods.rollouts import Rollouts, roll_out
from jaxlib_methods.thought_prompts import frame


class Thought(NamedTuple):
    """A thought and its answer.

    at: characters of the text before it. closed: by the model, before the budget was spent.
    """

    at: int
    thought: str
    tokens: list[int]
    closed: bool
    answer: str


class Reasoned(NamedTuple):
    """A continuation of a prompt with the thoughts in it.

    text: the answers and what follows them, without thoughts and without the stop string. tokens:
    of the text. finish: why it ended. truth: what follows in the validation set; None behind a
    prompt that was given.
    """

    prompt: str
    sample: int
    thoughts: list[Thought]
    text: str
    tokens: list[int]
    finish: Literal["stop_token", "stop_string", "length", "answer"]
    truth: str | None = None


@functools.partial(jax.jit, static_argnums=0)
def _think(
    reasoner: Reasoner, params: Any, prefixes: jax.Array, lengths: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, Rollouts]:
    """Prompts `[B, W]`, their lengths, and a thought behind each."""
    setting, cfg = reasoner.setting, reasoner.setting.cfg
    prompts, lengths = frame(setting.frame, jnp.int32(reasoner.budget), prefixes, lengths)
    rows, width = prompts.shape
    cache = decoding.init_cache(setting.model, batch_size=rows, length=width)
    thoughts = roll_out(
        setting.apply, params, prompts, lengths, cache=cache, num_rollouts=1,
        max_thought=cfg.max_thought, max_answer=0, temperature=reasoner.temperature,
        tokens=setting.tokens, force_close=True, key=key,
    )  # fmt: skip
    return prompts, lengths, jax.tree.map(lambda x: x[:, 0], thoughts)


class _Writer:
    """Continuations under way: the tokens of each prompt, and what has been thought and said."""

    def __init__(
        self,
        restored: Restored,
        reasoner: Reasoner,
        encoded: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop: Sequence[str],
        key: jax.Array,
    ) -> None:
        self._restored, self._reasoner, self._prompts = restored, reasoner, encoded
        self._sampling, self._key, self._calls = sampling, key, itertools.count()
        self._most = max_new_tokens
        self.rows = [TextRow(restored, stop, max_new_tokens) for _ in encoded]
        self.thoughts: list[list[Thought]] = [[] for _ in encoded]
        self._begun = [0] * len(encoded)  # tokens before the last thought

    def answer(self) -> None:
        """Thinks at the end of each text, and adds the answer to it."""
        setting = self._reasoner.setting
        width = setting.prefix_length
        texts = [ids[-width:] for ids in self._texts()]
        with jax.set_mesh(self._restored.mesh):
            padded = generate.left_pad(texts, width=width)
            thought = _think(self._reasoner, self._restored.params, *padded, self._next_key())
        prompts, lengths, found = jax.device_get(thought)
        sizes = found.thought_lengths
        read = [
            [*prompt[len(prompt) - length :], *tokens[: size + 1]]  # close is the last
            for prompt, length, tokens, size in zip(
                prompts, lengths, found.tokens, sizes, strict=True
            )
        ]
        end = int(setting.tokens.end)
        stops = {*self._restored.stop_tokens, end} - {-1}
        answers = self._draw(read, setting.cfg.max_answer, sorted(stops))
        decode = self._restored.tokenizer.decode
        for i, (row, new) in enumerate(zip(self.rows, answers, strict=True)):
            if row.finish is not None:
                continue
            new = new[: new.index(end)] if end in new else new
            tokens = found.tokens[i, : sizes[i]].tolist()
            closed = bool(found.closed[i])
            self.thoughts[i].append(
                Thought(len(row.text), decode(tokens), tokens, closed, decode(new))
            )
            self._begun[i] = len(row.tokens)
            row.add(new[: self._most - len(row.tokens)])

    def go_on(self, every: int) -> None:
        """Continues texts without a thought, `every` tokens from the last one; 0 to the end."""
        wanted = []
        for row, begun in zip(self.rows, self._begun, strict=True):
            until = min(begun + every, self._most) if every else self._most
            wanted.append(0 if row.finish else max(0, until - len(row.tokens)))
        if max(wanted):
            drawn = self._draw(self._texts(), max(wanted), self._restored.stop_tokens)
            for row, new, count in zip(self.rows, drawn, wanted, strict=True):
                row.add(new[:count])

    def _texts(self) -> list[list[int]]:
        return [[*ids, *row.tokens] for ids, row in zip(self._prompts, self.rows, strict=True)]

    def _draw(
        self, texts: Sequence[Sequence[int]], count: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        pieces = generate.draw(
            self._restored, texts, max_new_tokens=count, sampling=self._sampling,
            key=self._next_key(), stop_tokens=stop_tokens,
        )  # fmt: skip
        return [list(itertools.chain(*parts)) for parts in zip(*pieces, strict=True)]

    def _next_key(self) -> jax.Array:
        return jax.random.fold_in(self._key, next(self._calls))


def write(
    restored: Restored,
    reasoner: Reasoner,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None,
    sampling: SamplingConfig,
    every: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[Reasoned]:
    """Continues prompts of token ids, each with thoughts within the budget.

    max_new_tokens: none ends with the answer to one thought. every: tokens from one thought to the
    next; 0 thinks once. All must fit into the model's context.
    """
    most = max_new_tokens or reasoner.setting.cfg.max_answer
    key = decoding.stream_key(seed, Stream.TOKENS)
    writer = _Writer(
        restored, reasoner, encoded, max_new_tokens=most, sampling=sampling, stop=stop, key=key
    )
    rows, unended = writer.rows, max_new_tokens is not None
    writer.answer()
    while unended and any(row.finish is None for row in rows):
        writer.go_on(every)
        if any(row.finish is None for row in rows):
            writer.answer()
    decode = restored.tokenizer.decode
    found = []
    for ids, thoughts, row in zip(encoded, writer.thoughts, rows, strict=True):
        ended = row.finish if unended or row.finish != "length" else None
        found.append(Reasoned(decode(ids), 0, thoughts, row.text, row.tokens, ended or "answer"))
    return found


def _plan(
    restored: Restored, prompts: Sequence[str], asked: ReasonConfig, max_new_tokens: int | None
) -> tuple[list[list[int]], Reasoner]:
    """The token ids of the prompts, and how to think behind them."""
    cfg = reasoning.run_config(restored)
    first = [restored.first_token] if cfg.task == "text" else []  # as in training
    encoded = [[*first, *restored.tokenizer.encode(prompt).tolist()] for prompt in prompts]
    longest, most = max(map(len, encoded)), max_new_tokens or cfg.max_answer
    reasoner = reasoning.make_reasoner(
        restored, asked, evaluate.data_config(restored, {}),
        prompt_tokens=longest + most - 1,
    )  # fmt: skip
    read = reasoner.setting.prefix_length
    if not reasoner.is_text and not 0 < min(map(len, encoded)) <= longest <= read:
        raise ValueError(
            f"a question has 1 to {read} tokens in this run, and these prompts have "
            f"{min(map(len, encoded))} to {longest}"
        )
    generate.check_context(longest, most, restored.model.max_length)
    return encoded, reasoner


def think(
    restored: Restored,
    prompts: Sequence[str],
    asked: ReasonConfig,
    *,
    max_new_tokens: int | None,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    seed: int = 0,
) -> list[Reasoned]:
    """Thinks behind each prompt `num_samples` times; see `write`."""
    encoded, reasoner = _plan(restored, prompts, asked, max_new_tokens)
    repeated = [ids for ids in encoded for _ in range(num_samples)]
    found = write(
        restored, reasoner, repeated, max_new_tokens=max_new_tokens, sampling=sampling,
        every=asked.every, stop=stop, seed=seed,
    )  # fmt: skip
    names = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    return [
        one._replace(prompt=prompt, sample=sample)
        for one, (prompt, sample) in zip(found, names, strict=True)
    ]


def think_of_examples(
    restored: Restored, asked: ReasonConfig, *, sampling: SamplingConfig, seed: int = 0
) -> list[Reasoned]:
    """Thinks once at places of the validation set."""
    data = evaluate.data_config(restored, {})
    reasoner = reasoning.make_reasoner(restored, asked, data)
    places = reasoning.examples(restored, reasoner, data, count=asked.examples, seed=seed)
    found = write(
        restored, reasoner, places.prefixes, max_new_tokens=None, sampling=sampling, seed=seed
    )
    decode = restored.tokenizer.decode
    return [
        one._replace(truth=decode(truth)) for one, truth in zip(found, places.truths, strict=True)
    ]


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError where the prompts, or thoughts behind them, do not fit into the context."""
    if config.prompt or config.prompt_file is not None:
        asked = ReasonConfig(**config.reason)
        _plan(restored, config.prompts(), asked, config.max_new_tokens)
    else:
        reasoning.check(config, restored)


def run(config: InferConfig, restored: Restored) -> None:
    """Thinks about what the flags ask for; prints it, and writes JSONL where `output` is given."""
    asked = ReasonConfig(**config.reason)
    if config.prompt or config.prompt_file is not None:
        found = think(
            restored, config.prompts(), asked, max_new_tokens=config.max_new_tokens,
            sampling=config.sampling, stop=config.stop_strings, num_samples=config.num_samples,
            seed=config.seed,
        )  # fmt: skip
    else:
        found = think_of_examples(restored, asked, sampling=config.sampling, seed=config.seed)
    print("\n".join(_blocks(found, show=asked.show)))
    if config.output:
        lines = [json.dumps(_to_json(one), ensure_ascii=False) + "\n" for one in found]
        epath.Path(config.output).expanduser().write_text("".join(lines))


def _blocks(found: Sequence[Reasoned], *, show: bool) -> Iterator[str]:
    for one in found:
        if len(found) > 1 and one.truth is None:
            yield f"--- sample {one.sample} of {one.prompt!r}"
        text = shown(one) if show else one.text
        truth = "" if one.truth is None else f"    (truth: {one.truth!r})"
        yield f"{one.prompt}{text}{truth}"
    thoughts = [thought for one in found for thought in one.thoughts]
    length = np.mean([len(thought.tokens) for thought in thoughts])
    closed = np.mean([thought.closed for thought in thoughts])
    yield f"--- thoughts: {len(thoughts)}, of {length:.2f} tokens, {closed:.0%} ended by the model"


def shown(one: Reasoned) -> str:
    """The text with its thoughts where they were thought."""
    pieces, end = [], 0
    for thought in one.thoughts:
        pieces += [one.text[end : thought.at], f"<think>{thought.thought}</think>"]
        end = thought.at
    return "".join([*pieces, one.text[end:]])


def _to_json(one: Reasoned) -> dict[str, Any]:
    return one._asdict() | {"thoughts": [thought._asdict() for thought in one.thoughts]}
