"""What `python -m jaxlib_methods.infer` is asked to do, and the flags made from it."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_origin, get_type_hints

from absl import flags
from etils import epath

from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.infer.kinds import either
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.thinking import ThinkConfig
from jaxlib_methods.train.config import DataConfig, MeshConfig
from jaxlib_methods.train.flags import Parser, format_value, help_texts

# The tokenizer belongs to the model: other ids would mean nothing to it.
FIXED_DATA = ("tokenizer", "separator_id")

# Of --depth.*, what means something for a text that is read at once.
READING_DEPTH = ("num_steps", "exit", "tolerance", "min_steps", "check_every", "state_scale")

# Of --depth.*, what is read by some values of another field alone.
_EXITS = ("exit", ("kl", "latent", "entropy", "argmax"))
_PARALLEL, _SPECULATIVE = ("sampler", ("parallel",)), ("sampler", ("speculative",))
_DEPTH_READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("tolerance", "min_steps", "check_every", "exit_in_prompt"), _EXITS),
    **dict.fromkeys(("inner_steps", "freeze_tolerance", "embedding_average"), _PARALLEL),
    **dict.fromkeys(("noise", "max_wave"), _PARALLEL),
    **dict.fromkeys(("draft_steps", "draft_tokens"), _SPECULATIVE),
}

# Modes that read a flag of --reason.*; the others are read by all three.
_REASON_MODES = ("generate", "evaluate", "think")
_REASON_READERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("every", "show", "examples"), ("generate",)),
    "places": ("evaluate", "think"),
}

# How text is drawn, which generation alone does.
_DRAWING = (
    "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "stream",
)  # fmt: skip

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
    """One call of inference.

    workdir: a run's workdir, or a Hugging Face folder.
    mode: generate text, evaluate the validation loss, or export a Hugging Face folder; of a model
        that is recurrent in depth, an energy run, one on reasoning questions and one that thinks
        before tokens also think (quality against compute on validation data); of an energy run
        score (the energy of prompts); of an image run denoise (error against forward passes); of
        a plain model, or one that thinks before tokens, entropy (that of its prediction for every
        token of a corpus, kept for reinforcement mid-training).
    step: which checkpoint of the run; none is the newest.
    prompt: text to continue, or to score; may be given several times.
    prompt_file: a .jsonl file with a prompt in each line (a string, or an object with "prompt"),
        or a text file that is one prompt as a whole.
    num_samples: continuations of each prompt.
    max_new_tokens: longest continuation; none is 128, or what the model's context has left, and
        of a thought its answer.
    temperature: divides the logits; 0 always takes the likeliest token.
    top_k: draw among the k likeliest tokens; 0 among all.
    top_p: draw among the fewest likeliest tokens whose probability reaches p.
    min_p: draw among tokens at least this many times as probable as the likeliest.
    stop: text that ends a continuation and is left out; may be given several times; \\n is a
        line break, \\t a tab, \\\\ a backslash.
    seed: of the draws.
    stream: show text while it is drawn; none does so for one continuation on a terminal.
    output: what to write: JSONL of continuations or scores, JSON of the evaluation or of thinking
        and denoising (with a drawing of the same name beside it), the exported folder, the
        entropies as ArrayRecord.
    eval_batches: batches of the validation set, evenly spread; none takes all of it, for thinking
        about text, or before its tokens, 8.
    entropy_top_k: entropies are of the k likeliest tokens, renormalised; none is of all.
    mesh: sizes of the mesh axes.
    data: fields of `DataConfig` that replace the run's own, for other text.
    think: fields of `ThinkConfig`, for an energy run.
    depth: fields of `DepthConfig`, for a language model that is recurrent in depth.
    reason: fields of `ReasonConfig`, for a run that thinks before tokens.
    """

    workdir: str = ""
    mode: Literal["generate", "evaluate", "export", "think", "score", "denoise", "entropy"] = (
        "generate"
    )
    step: int | None = None
    prompt: tuple[str, ...] = ()
    prompt_file: str | None = None
    num_samples: int = 1
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    stream: bool | None = None
    output: str | None = None
    eval_batches: int | None = None
    entropy_top_k: int | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    think: dict[str, Any] = dataclasses.field(default_factory=dict)
    depth: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.workdir:
            raise ValueError("nothing to restore: give --workdir, a run or a Hugging Face folder")
        for name in ("num_samples", "max_new_tokens", "eval_batches", "entropy_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if "" in self.stop:
            raise ValueError("an empty --stop would end every continuation before it begins")
        given = bool(self.prompt) or self.prompt_file is not None
        if self.mode == "generate" and not (given or self.reason):
            raise ValueError(
                "nothing to continue: give --prompt (it may be empty) or --prompt_file"
            )
        if self.mode == "score" and not given:
            raise ValueError("nothing to score: give --prompt or --prompt_file")
        if self.mode not in ("generate", "score") and given:
            raise ValueError("--prompt and --prompt_file are for --mode=generate and --mode=score")
        if self.mode == "export" and not self.output:
            raise ValueError("--mode=export needs --output, the folder to write")
        if self.mode == "entropy" and not self.output:
            raise ValueError("--mode=entropy needs --output, the file to write")
        if self.mode != "entropy" and self.entropy_top_k is not None:
            raise ValueError("--entropy_top_k is for --mode=entropy")
        if self.mode not in ("evaluate", "think") and self.eval_batches:
            raise ValueError("--eval_batches is for --mode=evaluate and --mode=think")
        if self.mode not in ("evaluate", "think", "entropy") and self.data:
            raise ValueError("--data.* is for --mode=evaluate, --mode=think and --mode=entropy")
        for name in _DRAWING:
            if self.mode != "generate" and getattr(self, name) != getattr(InferConfig, name):
                raise ValueError(f"--{name} is for --mode=generate; leave it out")
        _ = self.sampling  # validates itself
        _ = ThinkConfig(**self.think)
        self._check_depth()
        self._check_reason(given)

    def _check_depth(self) -> None:
        cfg = DepthConfig(**self.depth)
        for name, value in self.depth.items():
            flag = f"--depth.{name}"
            if self.mode == "export":
                raise ValueError(
                    f"{flag} is for --mode=generate, evaluate or think; --mode=export writes the "
                    "model as it is: leave it out"
                )
            if self.mode in ("evaluate", "think") and name not in READING_DEPTH:
                raise ValueError(
                    f"{flag} is for --mode=generate; --mode={self.mode} reads its text at once"
                )
            if value is None or (self.mode == "think" and name in ("min_steps", "check_every")):
                continue  # thinking tries every exit
            field, readers = _DEPTH_READERS.get(name, ("", ()))
            chosen = getattr(cfg, field) if field else None
            if field and chosen not in readers:
                raise ValueError(
                    f"{flag}={format_value(value)} is read by --depth.{field}="
                    f"{either(readers)} alone, and it is {chosen}; give that or leave {flag} out"
                )

    def _check_reason(self, prompted: bool) -> None:
        cfg = ReasonConfig(**self.reason)
        for name in self.reason:
            readers = _REASON_READERS.get(name, _REASON_MODES)
            if self.mode not in readers:
                raise ValueError(f"--reason.{name} is for --mode={either(readers)}; leave it out")
        if not self.reason or self.mode != "generate":
            return
        if "budget" not in self.reason:
            raise ValueError(
                f"--reason.{next(iter(self.reason))} is for thoughts, and without --reason.budget "
                "--mode=generate continues plainly; give a budget, or none for the run's own"
            )
        if "examples" in self.reason and prompted:
            raise ValueError("--reason.examples is for no prompt; leave it or the prompts out")
        if self.stream:
            raise ValueError("--stream shows plain text; with --reason.budget leave it out")
        if cfg.every and self.max_new_tokens is None:
            raise ValueError(
                f"--reason.every={cfg.every} thinks again and again in a text; say how long that "
                "is by --max_new_tokens"
            )

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` with its escapes resolved."""
        return tuple(re.sub(r"\\[ntr\\]", lambda m: _ESCAPES[m[0]], text) for text in self.stop)

    def prompts(self) -> list[str]:
        """The prompts of the flags, then those of the file. Raises ValueError for a bad file."""
        found = [*self.prompt, *(_read_prompts(self.prompt_file) if self.prompt_file else [])]
        if not found:
            raise ValueError(f"--prompt_file={self.prompt_file} holds no prompt")
        return found


def _read_prompts(path: str) -> list[str]:
    try:
        text = epath.Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt_file={path} cannot be read: {error}") from error
    if not path.endswith(".jsonl"):
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ValueError(f'{path}, line {number} is neither a string nor has it a "prompt"')
        prompts.append(prompt)
    return prompts


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `InferConfig`, of the mesh, the data and all thinking in `values`."""
    texts = {
        "": help_texts(InferConfig),
        "think": help_texts(ThinkConfig),
        "depth": help_texts(DepthConfig),
        "reason": help_texts(ReasonConfig),
    }
    for section, field, hint in _fields():
        name = f"{section}.{field.name}" if section else field.name
        default = "the run's" if section == "data" else format_value(field.default)
        about = texts[section][field.name] if section in texts else ""
        text = f"{about} (default: {default})".strip()
        flag: flags.Flag[Any]
        if hint in (bool, bool | None):
            flag = flags.BooleanFlag(name, None, text)
        elif not section and get_origin(hint) is tuple:
            parser, serializer = flags.ArgumentParser[str](), flags.ArgumentSerializer[str]()
            flag = flags.MultiFlag(parser, serializer, name, None, text)
        else:
            flag = flags.Flag(Parser(hint), None, name, None, text)
        flags.DEFINE_flag(flag, values, module_name=sys.argv[0])


def from_flags(values: flags.FlagValues = flags.FLAGS) -> InferConfig:
    """What the parsed flags ask for. Raises ValueError for an impossible combination."""
    given: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in _SECTIONS}}
    for section, field, hint in _fields():
        flag = values[f"{section}.{field.name}" if section else field.name]
        if not flag.using_default_value:
            value: Any = flag.value
            value = tuple(value) if get_origin(hint) is tuple else value
            given[section][field.name] = value
    top, mesh = given.pop(""), MeshConfig(**given.pop("mesh"))
    sections: dict[str, Any] = given
    return InferConfig(**top, mesh=mesh, **sections)


_SECTIONS = {
    "mesh": MeshConfig,
    "data": DataConfig,
    "think": ThinkConfig,
    "depth": DepthConfig,
    "reason": ReasonConfig,
}


def _fields() -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(section, field, type) of every flag."""
    for section, cls in {"": InferConfig, **_SECTIONS}.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            nested = not section and field.name in _SECTIONS
            if not nested and not (section == "data" and field.name in FIXED_DATA):
                yield section, field, hints[field.name]
