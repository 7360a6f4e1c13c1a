"""Yes-or-no questions of known difficulty: how they are batched, split and served by index.

A task draws questions, this file decides which of them belong to which split: the hash of what a
question says does. No question of the training split is one of the validation split, whatever
the seeds.
"""

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

VERSION = 1  # of the drawing: another number where the same index gives another question

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

ATTEMPTS = 10_000  # draws of which none fits, or none is new, before there is said to be none


class Graphs(NamedTuple):
    """A batch of questions about directed graphs of at most N nodes.

    tokens: int32 `[R, N]`, names of the nodes, 0 behind the last one. edges: bool `[R, N, N]`,
    `edges[r, v, u]` where node v may attend to node u: there is an edge u -> v, or u is v (on
    every row, padding too). endpoints: int32 `[R, 2]`, rows of source and target. label: int32
    `[R]`, 1 where the target can be reached. difficulty: int32 `[R]`, hops. where: bool `[R]`,
    False behind the end of the validation split.
    """

    tokens: np.ndarray
    edges: np.ndarray
    endpoints: np.ndarray
    label: np.ndarray
    difficulty: np.ndarray
    where: np.ndarray


class Sentences(NamedTuple):
    """A batch of questions in words.

    tokens: int32 `[R, L]`, `[CLS]` first, 0 behind the last word. label, difficulty: int32 `[R]`.
    where: bool `[R]`, False behind the end of the validation split.
    """

    tokens: np.ndarray
    label: np.ndarray
    difficulty: np.ndarray
    where: np.ndarray


class Sentence(NamedTuple):
    """One question in words: its text, its answer (1 is true) and its difficulty."""

    text: str
    label: int
    difficulty: int


class Draws:
    """Uniform draws from a numpy generator, taken in blocks: one call costs it microseconds."""

    def __init__(self, random: np.random.Generator) -> None:
        self.uniform: Callable[[], float] = _uniforms(random).__next__  # in [0, 1)

    def below(self, count: int) -> int:
        """One of 0, ..., count - 1."""
        return int(self.uniform() * count)

    def between(self, low: int, high: int) -> int:
        """One of low, ..., high."""
        return low + int(self.uniform() * (high + 1 - low))

    def pick(self, items: Sequence[Any]) -> Any:
        """One of the items."""
        return items[int(self.uniform() * len(items))]

    def sample(self, items: Sequence[Any], count: int | None = None) -> list[Any]:
        """`count` different ones of the items, or all of them, in random order."""
        pool, size = list(items), len(items)
        count = size if count is None else count
        for i in range(count):
            j = i + int(self.uniform() * (size - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]


def _uniforms(random: np.random.Generator) -> Iterator[float]:
    while True:
        yield from random.random(64).tolist()


def split_of(content: bytes) -> Split:
    """The only split that may hold a question: one in eight is for validation."""
    return "train" if hashlib.blake2b(content, digest_size=1).digest()[0] % 8 else "validation"


def batch_sentences(
    examples: Sequence[Sentence], encode: Callable[[str], bytes], length: int
) -> Sentences:
    """Stacks questions of at most `length` tokens; `encode` gives a byte per token."""
    padded = b"".join(encode(example.text).ljust(length, b"\0") for example in examples)
    tokens = np.frombuffer(padded, np.uint8).reshape(len(examples), length).astype(np.int32)
    label = np.array([example.label for example in examples], np.int32)
    difficulty = np.array([example.difficulty for example in examples], np.int32)
    return Sentences(tokens, label, difficulty, np.ones(len(examples), bool))


class Task(Protocol):
    """A kind of question. `repr` must tell apart tasks that draw different ones."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        ...

    @property
    def balanced(self) -> bool:
        """Whether questions are drawn for a label, or have the one that comes."""
        ...

    def draw(
        self,
        random: np.random.Generator,
        difficulty: int,
        *,
        label: int | None,
        split: Split,
        hardest: int,
    ) -> Any:
        """One question; `hardest` is the largest difficulty that it is mixed with."""
        ...

    def content(self, example: Any) -> bytes:
        """What the question says; its hash decides where it belongs."""
        ...

    def to_text(self, example: Any) -> str:
        """The question for a reader, without its answer."""
        ...

    def batch(self, examples: Sequence[Any]) -> Graphs | Sentences:
        """Stacks questions, all of which count."""
        ...


class QuestionDataset:
    """The questions of a split by index, as a `jaxlib_methods.method.Dataset`.

    Training indices go through the difficulties in turn, a yes and a no of each where the task is
    balanced. Validation consists of buckets of one difficulty each; no question is twice in a
    bucket unless 10 000 draws find no other (nested expressions of depth 1 are that few).
    """

    bytes_per_token: float | None = None

    def __init__(
        self,
        split: Split,
        task: Task,
        *,
        difficulties: Sequence[int],
        num_train: int = 0,
        per_bucket: int = 500,
        seed: int = 0,
    ) -> None:
        """num_train: questions of an epoch, each in an order of its own; 0 for always new ones."""
        if not difficulties:
            raise ValueError("difficulties is empty; name at least one")
        if per_bucket < 1 or num_train < 0:
            raise ValueError(
                f"per_bucket {per_bucket} must be at least 1 and num_train {num_train} at least 0"
            )
        self._split: Split = split
        self._task, self._seed = task, seed
        self._difficulties, self._per_bucket = tuple(difficulties), per_bucket
        in_validation = len(self._difficulties) * per_bucket
        self._num_stored = in_validation if split == "validation" else num_train
        self.num_examples = self._num_stored or 2**31
        self.sequence_length = task.sequence_length
        parts = ("questions", VERSION, split, repr(task), self._difficulties, seed)
        parts += (per_bucket,) if split == "validation" else (num_train,)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self._lock = threading.Lock()  # of the buckets, which are filled in order
        self._buckets = [(self._bucket(difficulty), []) for difficulty in self._difficulties]
        self._stored: Graphs | Sentences | None = None
        self._is_stored = np.zeros(self._num_stored, bool)
        self._order = None
        if split == "train" and num_train:
            import grain  # here, so that drawing questions needs numpy alone

            self._order = grain.MapDataset.range(num_train).seed(seed).shuffle().repeat()
        every = per_bucket if split == "validation" else 2
        for number in range(len(self._difficulties)):  # refuses now what no index could give
            self.example(number * every)
            self.example(number * every + min(1, per_bucket - 1))

    def example(self, index: int) -> Any:
        """The question at an index, as its task draws it."""
        index = int(index)
        if self._split == "validation":
            bucket, position = divmod(index, self._per_bucket)
            source, examples = self._buckets[bucket]
            with self._lock:
                while len(examples) <= position:
                    examples.append(next(source))
            return examples[position]
        number = index % self._num_stored if self._num_stored else index
        difficulty = self._difficulties[number // 2 % len(self._difficulties)]
        random = np.random.default_rng([self._seed, SPLITS.index("train"), number])
        return self._draw(random, difficulty, number, max(self._difficulties))[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> Graphs | Sentences:
        """The questions at `indices`, `[len(indices), ...]`.

        Behind the end of the validation split its last question stands, with `where` False.
        """
        numbers = np.asarray(indices, np.int64)
        if not self._num_stored:
            return self._task.batch([self.example(number) for number in numbers])
        if self._order is not None:
            numbers = np.array([self._order[int(number)] for number in numbers], np.int64)
        where = numbers < self._num_stored
        numbers = np.minimum(numbers, self._num_stored - 1)
        stored = self._store(numbers[~self._is_stored[numbers]])
        fields = {name: values[numbers] for name, values in stored._asdict().items()}
        return type(stored)(**{**fields, "where": where})

    def _store(self, numbers: np.ndarray) -> Graphs | Sentences:
        """Makes the questions at `numbers` and keeps them; returns all that are kept.

        Two threads may make the same ones: they are marked once they are written.
        """
        built = self._task.batch([self.example(number) for number in numbers])
        with self._lock:
            if self._stored is None:
                shapes = ((self._num_stored, *field.shape[1:]) for field in built)
                dtypes = (field.dtype for field in built)
                self._stored = type(built)(*map(np.zeros, shapes, dtypes))
        for kept, field in zip(self._stored, built, strict=True):
            kept[numbers] = field
        self._is_stored[numbers] = True
        return self._stored

    def _bucket(self, difficulty: int) -> Iterator[Any]:
        """Questions of one difficulty for validation, new ones as long as there are any."""
        random = np.random.default_rng([self._seed, SPLITS.index("validation"), difficulty])
        seen: set[bytes] = set()
        exhausted: set[int | None] = set()
        for number in itertools.count():
            label = self._label(number)
            example, content = self._draw(random, difficulty, number, difficulty)
            attempts = 1
            while content in seen and label not in exhausted:
                example, content = self._draw(random, difficulty, number, difficulty)
                attempts += 1
                if attempts == ATTEMPTS:
                    exhausted.add(label)
            seen.add(content)
            yield example

    def _label(self, number: int) -> int | None:
        return 1 - number % 2 if self._task.balanced else None

    def _draw(
        self, random: np.random.Generator, difficulty: int, number: int, hardest: int
    ) -> tuple[Any, bytes]:
        """Draws until a question belongs to this split; also gives what it says."""
        label = self._label(number)
        for _ in range(ATTEMPTS):
            example = self._task.draw(
                random, difficulty, label=label, split=self._split, hardest=hardest
            )
            content = self._task.content(example)
            if split_of(content) == self._split:
                return example, content
        raise ValueError(
            f"no question of difficulty {difficulty} belongs to the {self._split} split in "
            f"{ATTEMPTS} draws; ask for harder ones"
        )
