"""A run of reinforcement mid-training, ready to think: its prompts, its budget, its places."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import reinforcement_midtraining as rmt
from jaxlib_methods.infer import evaluate
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.method import Context, Method
from jaxlib_methods.models.decoding import Stream, stream_key
from jaxlib_methods.reinforcement_collect import EVENLY, Setting, think, tiers_of
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.thought_prompts import Asked
from jaxlib_methods.train import checkpoint, prepare
from jaxlib_methods.train.config import DataConfig

DEFAULT_BATCHES = 8
DEFAULT_PLACES = 4


@dataclasses.dataclass(frozen=True)
class Reasoner:
    """How a run thinks, for programs that are compiled for it.

    setting: the run's, for thoughts of up to `cfg.max_thought` tokens, which are always closed.
    method: the run's data, and the model that it began with. budget: the one that is asked for.
    made_of: all that the setting follows from; equal ones have the same programs.
    """

    setting: Setting = dataclasses.field(compare=False)
    method: Method = dataclasses.field(compare=False)
    budget: int
    temperature: float
    made_of: tuple[Any, ...]

    @property
    def is_text(self) -> bool:
        """Whether it thinks at places of a text, not about questions."""
        return self.setting.cfg.task == "text"


def run_config(restored: Restored) -> ReinforcementMidtrainingConfig:
    """The method's configuration of a run that thinks before tokens."""
    assert restored.config is not None
    cfg = restored.config.method_config
    assert isinstance(cfg, ReinforcementMidtrainingConfig)
    return cfg


def make_reasoner(
    restored: Restored,
    asked: ReasonConfig,
    data: DataConfig,
    *,
    prompt_tokens: int = 0,
    times: int = 1,
) -> Reasoner:
    """A run as it thinks within the asked budget, or within `times` as much where that is possible.

    data: the text whose rows are asked about. prompt_tokens: of the longest prompt that is to be
    read whole, where the run reads all that stands in front. Raises ValueError where a thought of
    the budget cannot be asked for or does not fit into the model's context.
    """
    cfg, context = run_config(restored), _context(restored, data)
    is_text = cfg.task == "text"
    if asked.places not in (None, 1) and not is_text:
        raise ValueError(
            f"--reason.places={asked.places} is for text, and this run is asked questions, each "
            "for one answer; leave it out"
        )
    trained = rmt.make_setting(cfg, context)
    prefix_length = trained.prefix_length
    if is_text and cfg.prompt_length is None:
        prefix_length = max(prefix_length, prompt_tokens)
    budget = asked.budget or usual_budget(restored)
    most = _most_budget(
        cfg, restored.model.max_length, prefix_length + trained.frame.length, budget
    )
    longest = times * budget if times * budget <= most else budget
    # Room for the prompts of training too, which show a budget in as many digits as the first.
    slots = max(cfg.budget, longest)
    sized = dataclasses.replace(
        cfg, budget=slots, max_thought=slots, least_budget=1, length_weight=0.0, kl_weight=0.0,
        force_close=True, entropy=None, collect_parts=1,
        positions="curriculum" if is_text else cfg.positions,
        positions_per_row=(asked.places or DEFAULT_PLACES) if is_text else 1,
    )  # fmt: skip
    setting, method = rmt.make_setting(sized, context), rmt.make(sized, context)
    reward = "match" if cfg.reward == "information_gain" else cfg.reward  # that draws no answer
    final = dataclasses.replace(sized, budget=longest, max_thought=longest, reward=reward)
    setting = setting._replace(cfg=final, prefix_length=prefix_length)
    temperature = cfg.temperature if asked.temperature is None else asked.temperature
    made_of = (final, slots, prefix_length, setting.num_steps, restored.model, context.tokenizer)
    return Reasoner(setting, method, budget, temperature, made_of)


def data_config(config: InferConfig, restored: Restored) -> DataConfig:
    """The run's data with the asked fields replaced; of questions none can be."""
    if config.data and run_config(restored).task != "text":
        raise ValueError(
            f"--data.{next(iter(config.data))} is for text; {config.workdir} has its own questions"
        )
    return evaluate.data_config(restored, config.data)


def check(config: InferConfig, restored: Restored) -> None:
    """Raises ValueError or FileNotFoundError where there is no such budget or no such data."""
    data = data_config(config, restored)
    if make_reasoner(restored, ReasonConfig(**config.reason), data).is_text:
        evaluate.check(config, restored)


def num_batches(config: InferConfig, reasoner: Reasoner) -> int | None:
    """How many batches to think about: of text a few, where nobody says; else all."""
    return config.eval_batches or (DEFAULT_BATCHES if reasoner.is_text else None)


def usual_budget(restored: Restored) -> int:
    """The budget of a run at its checkpoint, or at its end."""
    assert restored.config is not None
    last = restored.config.train.num_steps - 1
    step = last if restored.step is None else min(restored.step, last)
    return int(rmt.budget_at(run_config(restored), jnp.int32(step), last + 1))


def _most_budget(
    cfg: ReinforcementMidtrainingConfig, context: int, prompt: int, budget: int
) -> int:
    """The largest budget that can be asked for. Raises ValueError where `budget` is larger."""
    room = context - prompt - 1 - cfg.max_answer
    if room < 1:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves no room for a thought and an answer in the "
            f"model's context of {context}; shorten it"
        )
    if budget > room:
        raise ValueError(
            f"--reason.budget={budget} is too long: a prompt of {prompt} tokens and an answer of "
            f"{cfg.max_answer} leave {room} tokens of the model's context of {context}; give at "
            "most that"
        )
    if "{budget}" not in (cfg.prompt_before or "") + cfg.prompt_after:
        return room
    shown = 10 ** len(str(cfg.budget)) - 1
    if budget > shown:
        raise ValueError(
            f"--reason.budget={budget} has more digits than the prompts of this run, whose budgets "
            f"were at most {cfg.budget}; give at most {shown}"
        )
    return min(room, shown)


def _source(restored: Restored) -> str | None:
    """The model that a run began with, where it is still there."""
    assert restored.config is not None
    source = prepare.start_of(restored.config)
    if source is None:
        return None
    try:
        checkpoint.load_pretrained(source, weights=False)
    except FileNotFoundError:
        return None
    return source


def _context(restored: Restored, data: DataConfig) -> Context:
    assert restored.config is not None
    return Context(
        model=restored.model,
        num_steps=restored.config.train.num_steps,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        tokenizer=restored.tokenizer.fingerprint,
        load_pretrained=functools.partial(checkpoint.load_pretrained, mesh=restored.mesh),
        tokens=restored.tokenizer,
        init_from=_source(restored) or restored.config.workdir,
    )


def batches(
    restored: Restored, reasoner: Reasoner, data: DataConfig, max_batches: int | None
) -> Iterable[Any]:
    """Batches of the validation set: of text, or of the run's questions."""
    if reasoner.method.dataset is None:
        dataset = evaluate.open_validation(restored, data)
        return evaluate.batches(dataset, data.batch_size, max_batches, restored)
    dataset = reasoner.method.dataset("validation")
    return evaluate.question_batches(dataset, restored, max_batches)


def first_model(restored: Restored, reasoner: Reasoner) -> tuple[Any, str | None]:
    """The `extra` that tiers are made by, and whose entropy it is; nothing for questions.

    The model that the run began with; where that is gone, the run itself.
    """
    if not reasoner.is_text:
        return (), None
    source = _source(restored)
    assert restored.config is not None
    if source is None:
        return {"initial": restored.params}, restored.config.workdir
    return reasoner.method.init(stream_key(0, Stream.TOKENS)), source


class Examples(NamedTuple):
    """Places of the validation set: what stands before them, and what follows; token ids."""

    prefixes: list[list[int]]
    truths: list[list[int]]


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    reasoner: Reasoner, params: Any, extra: Any, batch: Any, key: jax.Array
) -> tuple[Asked, jax.Array]:
    setting = reasoner.setting
    tiers = tiers_of(setting, extra, batch)
    found = think(  # the thoughts are not asked for, and so not drawn
        setting, params, batch, tiers, jnp.asarray(EVENLY), jnp.int32(0), num_rollouts=1, key=key
    )
    return found.asked, found.valid.reshape(-1)


def examples(
    restored: Restored, reasoner: Reasoner, data: DataConfig, *, count: int, seed: int = 0
) -> Examples:
    """The first `count` places that are drawn; fewer where there are no more."""
    found = Examples([], [])
    key = stream_key(seed, Stream.TOKENS)
    extra, _ = first_model(restored, reasoner)
    with jax.set_mesh(restored.mesh):
        for number, batch in enumerate(batches(restored, reasoner, data, None)):
            batch_key = jax.random.fold_in(key, number)
            asked, valid = jax.device_get(_ask(reasoner, restored.params, extra, batch, batch_key))
            for i in np.flatnonzero(valid):
                found.prefixes.append(asked.prefixes[i, -asked.lengths[i] :].tolist())
                found.truths.append(asked.truths[i, : asked.truth_lengths[i]].tolist())
            if len(found.truths) >= count:
                break
    return Examples(found.prefixes[:count], found.truths[:count])
