"""Text from a finished model: batches of prompts, stop strings, streaming."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlib_methods import continuous, depth_sampling, speculative, wavefront
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.depth_sampling import Sampler
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.restore import LanguageModel, Restored
from jaxlib_methods.models import decoding
from jaxlib_methods.models.decoding import SamplingConfig, Stream

DEFAULT_NEW_TOKENS = 128
CHUNK_TOKENS = 32  # between two looks at the text, where nobody watches
SMALLEST_BUCKET = 16
_CUT_CHARACTER = "\ufffd"  # what `decode` gives for the bytes of an unfinished character


class Completion(NamedTuple):
    """A continuation of a prompt.

    text: without the stop string. tokens: what was drawn, with the stop token or the tokens of
    the stop string. finish: why it ended.
    """

    prompt: str
    sample: int
    text: str
    tokens: list[int]
    finish: Literal["stop_token", "stop_string", "length"]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None.

    >>> find_stop("one. two; three", [";", ". "])
    3
    """
    found = [at for at in map(text.find, stop) if at >= 0]
    return min(found, default=None)


def settled_length(text: str, stop: Sequence[str]) -> int:
    """How many characters of an unfinished text will stay, whatever follows.

    The bytes of a cut character and the beginning of a stop string may still change.

    >>> settled_length("a line\\n", ["\\n\\n"])
    6
    """
    end = len(text.rstrip(_CUT_CHARACTER))
    begun = [
        size for word in stop for size in range(1, len(word)) if text[:end].endswith(word[:size])
    ]
    return end - max(begun, default=0)


class TextRow:
    """The text of one continuation as its tokens arrive."""

    def __init__(self, restored: Restored, stop: Sequence[str], max_new_tokens: int) -> None:
        self._decode = restored.tokenizer.decode
        self._stop_tokens, self._stop = restored.stop_tokens, stop
        self._max_new_tokens = max_new_tokens
        self._shown = 0
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Literal["stop_token", "stop_string", "length"] | None = None

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens, up to the end of the text. Returns what can be shown.

        The result does not depend on how the tokens were cut into calls.
        """
        if self.finish is not None:
            return ""
        for token in tokens:
            self.tokens.append(token)
            if token in self._stop_tokens:
                self.finish = "stop_token"
                break
        if self.finish is None and len(self.tokens) == self._max_new_tokens:
            self.finish = "length"
        self.text = self._decode(self.tokens)
        if find_stop(self.text, self._stop) is not None:
            self._end_at_stop()
        end = len(self.text) if self.finish else settled_length(self.text, self._stop)
        begin, self._shown = self._shown, end
        return self.text[begin:end]

    def _end_at_stop(self) -> None:
        """Drops the tokens after the one that completed a stop string, and the string."""
        while find_stop(self._decode(self.tokens[:-1]), self._stop) is not None:
            self.tokens.pop()
        self.text = self._decode(self.tokens)
        self.text = self.text[: find_stop(self.text, self._stop)]
        self.finish = "stop_string"


def bucket(length: int) -> int:
    """The smallest power of two, 16 or more, that holds `length` tokens.

    >>> [bucket(n) for n in (1, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def left_pad(prompts: Sequence[Sequence[int]], *, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 `[B, width]`, padded on the left, and their lengths int32 `[B]`."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _start(
    model: LanguageModel,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
) -> Any:
    sampler = _sampler(model)
    if sampler is not None:
        return sampler.start(model, params, tokens, lengths, max_new_tokens=max_new_tokens)
    slots = tokens.shape[1] + max_new_tokens - 1
    cache = model.init_cache(params, batch_size=tokens.shape[0], length=slots)
    return decoding.prefill(
        model, params, tokens, lengths, cache=cache, max_new_tokens=max_new_tokens
    )


@functools.partial(jax.jit, donate_argnums=2)
def _steps(
    model: LanguageModel, params: Any, state: Any, *, num_tokens: int, **settings: Any
) -> Any:
    """Until a row has `num_tokens` more; it is read by the host then, and not before."""
    sampler = _sampler(model)
    if sampler is not None:
        draws = depth_sampling.make_draws(**settings)
        return sampler.advance(model, params, state, draws, num_tokens=num_tokens)
    return decoding.decode_steps(model, params, state, num_steps=num_tokens, **settings)


_SAMPLERS: dict[str, Sampler[Any]] = {
    "continuous": continuous.CONTINUOUS,
    "parallel": wavefront.PARALLEL,
    "speculative": speculative.SPECULATIVE,
}


def _sampler(model: LanguageModel) -> Any:
    """What samples a recurrent model otherwise than token by token; None for those."""
    return _SAMPLERS.get(model.depth.sampler) if isinstance(model, RecurrentModel) else None


def draw(
    restored: Restored,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    key: jax.Array,
    stop_tokens: Sequence[int],
    num_tokens: int = CHUNK_TOKENS,
) -> Iterator[list[list[int]]]:
    """The new tokens of each row, piece by piece, each of `num_tokens` in the longest row.

    A row ends with a stop token or after max_new_tokens; it is empty from then on, and the pieces
    end with the last row.
    """
    tokens, lengths = left_pad(encoded, width=bucket(max(map(len, encoded))))
    settings: dict[str, Any] = {"num_tokens": num_tokens, "sampling": sampling, "key": key}
    settings["stop_tokens"] = jnp.asarray(stop_tokens, jnp.int32)
    model, params = restored.language_model, restored.params
    with jax.set_mesh(restored.mesh):
        state = _start(model, params, tokens, lengths, max_new_tokens=max_new_tokens)
    taken, ended = np.zeros(len(encoded), int), False
    while not ended:
        with jax.set_mesh(restored.mesh):  # not while the caller runs
            state = _steps(model, params, state, **settings)
            drawn, counts = np.asarray(state.tokens), np.asarray(state.lengths)
        new = [row[a:b].tolist() for row, a, b in zip(drawn, taken, counts, strict=True)]
        last = drawn[np.arange(len(drawn)), np.maximum(counts - 1, 0)]
        taken = counts
        ended = bool((np.isin(last, stop_tokens) | (counts == max_new_tokens)).all())
        yield new


def generate(
    restored: Restored,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    num_samples: int = 1,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continues each prompt `num_samples` times, all in one batch.

    show: is given the text of the first continuation piece by piece, while it is drawn; it changes
    no token. Raises ValueError where a prompt and its continuation exceed the model's context.
    """
    encoded = _encode(restored, prompts, max_new_tokens)
    repeated = [ids for ids in encoded for _ in range(num_samples)]
    rows = [TextRow(restored, stop, max_new_tokens) for _ in repeated]
    pieces = draw(
        restored,
        repeated,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=decoding.stream_key(seed, Stream.TOKENS),
        stop_tokens=restored.stop_tokens,
        num_tokens=1 if show else CHUNK_TOKENS,
    )
    while any(row.finish is None for row in rows):
        for index, (row, new) in enumerate(zip(rows, next(pieces), strict=True)):
            piece = row.add(new)
            if show and index == 0 and piece:
                show(piece)
    names = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    return [
        Completion(*name, row.text, row.tokens, row.finish or "length")
        for name, row in zip(names, rows, strict=True)
    ]


def _encode(restored: Restored, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    encoded = [[restored.first_token, *restored.tokenizer.encode(p).tolist()] for p in prompts]
    check_context(max(map(len, encoded)), max_new_tokens, restored.model.max_length)
    return encoded


def _room(restored: Restored, prompts: Sequence[str]) -> int:
    """How many tokens to draw where nobody says: DEFAULT_NEW_TOKENS, or what the context has."""
    longest = max(len(restored.tokenizer.encode(prompt)) for prompt in prompts) + 1
    return max(1, min(DEFAULT_NEW_TOKENS, restored.model.max_length - longest))


def check_context(longest: int, max_new_tokens: int, max_length: int) -> None:
    """Raises ValueError where a prompt of `longest` tokens and its continuation are too long."""
    if longest >= max_length:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {max_length}; "
            "shorten it"
        )
    if longest + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"context of {max_length}; give at most --max_new_tokens={max_length - longest}"
        )


def _streams(config: InferConfig, prompts: Sequence[str]) -> bool:
    single = len(prompts) * config.num_samples == 1
    stream = single and sys.stdout.isatty() if config.stream is None else config.stream
    if stream and not single:
        raise ValueError(
            f"--stream shows one continuation, not {len(prompts)} prompts x "
            f"num_samples={config.num_samples}; leave it out"
        )
    return stream


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError where the prompts cannot be read or do not fit into the context."""
    prompts = config.prompts()
    _streams(config, prompts)
    _encode(restored, prompts, config.max_new_tokens or _room(restored, prompts))


def run(config: InferConfig, restored: Restored) -> None:
    """Generates what the flags ask for; prints it, and writes JSONL where `output` is given."""
    prompts = config.prompts()
    stream = _streams(config, prompts)
    if stream:
        _print(prompts[0])
    completions = generate(
        restored,
        prompts,
        max_new_tokens=config.max_new_tokens or _room(restored, prompts),
        sampling=config.sampling,
        stop=config.stop_strings,
        num_samples=config.num_samples,
        seed=config.seed,
        show=_print if stream else None,
    )
    _print("\n" if stream else "\n".join(_blocks(completions)) + "\n")
    if config.output:
        lines = [json.dumps(c._asdict(), ensure_ascii=False) + "\n" for c in completions]
        epath.Path(config.output).expanduser().write_text("".join(lines))


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _blocks(completions: Sequence[Completion]) -> Iterator[str]:
    for completion in completions:
        if len(completions) > 1:
            yield f"--- sample {completion.sample} of {completion.prompt!r}"
        yield completion.prompt + completion.text
