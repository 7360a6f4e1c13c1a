"""Text with thoughts in it: against rollouts, in rounds, from examples, and what is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.infer import config, evaluate, generate_thoughts, reasoning, restore
from jaxlib_methods.infer.__main__ import main
from jaxlib_methods.infer.config import InferConfig
from jaxlib_methods.infer.generate_thoughts import Reasoned, shown, think
from jaxlib_methods.infer.reason_config import ReasonConfig
from jaxlib_methods.infer.restore import Restored
from jaxlib_methods.models import decoding
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.rollouts import roll_out
from jaxlib_methods.tasks import parity
from jaxlib_methods.train import run_record
from jaxlib_methods.train.checkpoint import Checkpoints
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.run_record import Record
from jaxlib_methods.train.state import TrainState

GREEDY = SamplingConfig(temperature=0.0)
PROMPTS = ["01101001=", "1=", "0000="]
ASKED = ReasonConfig(budget=4, temperature=0.0)


def run_of(restored: Restored) -> RunConfig:
    assert restored.config is not None
    return restored.config


def greedy(restored: Restored, prompts: list[str], **fields: Any) -> list[Reasoned]:
    asked = dataclasses.replace(ASKED, **fields.pop("asked", {}))
    settings: dict[str, Any] = {"max_new_tokens": None, "sampling": GREEDY}
    return think(restored, prompts, asked, **settings | fields)


def test_a_greedy_answer_is_that_of_a_greedy_rollout(restored_thoughts: Restored):
    got = greedy(restored_thoughts, PROMPTS)
    data = evaluate.data_config(restored_thoughts, {})
    setting = reasoning.make_reasoner(restored_thoughts, ASKED, data).setting
    rows = [[*prompt.encode(), 1, ord("4"), 2] for prompt in PROMPTS]
    prompts, lengths = generate_thoughts.generate.left_pad(rows, width=12)

    @jax.jit
    def expected(params: Any) -> Any:
        cache = decoding.init_cache(setting.model, batch_size=3, length=12)
        return roll_out(
            setting.apply, params, jnp.asarray(prompts), jnp.asarray(lengths), cache=cache,
            num_rollouts=1, max_thought=4, max_answer=1, temperature=0.0, tokens=setting.tokens,
            force_close=True, key=jax.random.key(0),
        )  # fmt: skip

    found = jax.device_get(expected(restored_thoughts.params))
    for i, one in enumerate(got):
        size = found.thought_lengths[i, 0]
        (thought,) = one.thoughts
        assert thought.tokens == found.tokens[i, 0, :size].tolist()
        assert thought.closed == found.closed[i, 0]
        assert one.tokens == found.answers[i, 0].tolist()
        assert (one.prompt, one.finish, thought.at) == (PROMPTS[i], "answer", 0)
    assert len({tuple(one.thoughts[0].tokens) for one in got}) > 1
    assert shown(got[0]) == f"<think>{got[0].thoughts[0].thought}</think>{got[0].text}"


def test_a_mesh_and_other_prompts_change_nothing(
    restored_thoughts: Restored, restored_thoughts_on_eight: Restored
):
    together = greedy(restored_thoughts, PROMPTS)
    assert greedy(restored_thoughts_on_eight, PROMPTS) == together
    assert greedy(restored_thoughts, PROMPTS[1:2]) == together[1:2]


def test_thoughts_come_again_and_do_not_see_each_other(restored_thoughts: Restored):
    """Every second token is an answer to a thought; each as if its text had been the prompt."""
    cfg = dataclasses.replace(run_of(restored_thoughts).method_config, task="text")
    text = restored_thoughts._replace(
        config=dataclasses.replace(run_of(restored_thoughts), method_config=cfg)
    )
    (got,) = greedy(text, ["<1"], asked={"every": 2}, max_new_tokens=5)
    assert [thought.at for thought in got.thoughts] == [0, 2, 4]
    assert (len(got.tokens), got.finish) == (5, "length")
    assert [thought.answer for thought in got.thoughts] == [got.text[at] for at in (0, 2, 4)]
    (again,) = greedy(text, ["<1" + got.text[:2]], asked={"every": 2}, max_new_tokens=3)
    assert again.text == got.text[2:]
    assert [t.tokens for t in again.thoughts] == [t.tokens for t in got.thoughts[1:]]
    # Without `every` there is one thought, and the rest is continued plainly.
    (once,) = greedy(text, ["<1"], max_new_tokens=5)
    assert once.thoughts == got.thoughts[:1]
    assert once.tokens[:2] == got.tokens[:2]
    stop = got.text[1:3]
    (ended,) = greedy(text, ["<1"], asked={"every": 2}, max_new_tokens=5, stop=[stop])
    assert ended.finish == "stop_string"
    assert ended.text == got.text[: got.text.find(stop)]


def test_examples_are_questions_with_their_answers(restored_thoughts: Restored):
    asked = ReasonConfig(examples=20)  # more than a batch
    found = generate_thoughts.think_of_examples(restored_thoughts, asked, sampling=GREEDY)
    prompts = [f"{parity.question(i, split='validation')}=" for i in range(20)]
    assert [one.prompt for one in found] == prompts
    assert [one.truth for one in found] == [str(parity.answer(p[:-1])) for p in prompts]
    assert all(len(one.thoughts[0].tokens) <= 3 for one in found)
    assert len({one.thoughts[0].thought for one in found}) > 5


@pytest.fixture(scope="module")
def workdir(restored_thoughts: Restored, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved run, in another folder than it was trained in."""
    folder = str(tmp_path_factory.mktemp("run"))
    run = dataclasses.replace(run_of(restored_thoughts), workdir="elsewhere")
    record = Record(run, restored_thoughts.tokenizer.fingerprint, "corpus")
    run_record.write_config(folder, record)
    with Checkpoints(folder, keep=1, record=record) as checkpoints:
        count = {"count": jnp.array(10)}
        checkpoints.save(TrainState(jnp.array(10), restored_thoughts.params, count))
    return folder


@pytest.mark.parametrize("show", [True, False])
def test_the_command_line_writes_prompt_thought_and_answer(
    restored_thoughts: Restored,
    workdir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    show: bool,
):
    path = tmp_path / "out.jsonl"
    asked = InferConfig(
        workdir=workdir, prompt=tuple(PROMPTS), temperature=0.0, output=str(path),
        reason={"budget": 4, "temperature": 0.0, "show": show},
    )  # fmt: skip
    monkeypatch.setattr(config, "from_flags", lambda: asked)
    main([])
    expected = greedy(restored_thoughts, PROMPTS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [json.loads(json.dumps(generate_thoughts._to_json(one))) for one in expected]
    assert lines[0]["thoughts"][0]["answer"] == lines[0]["text"] == expected[0].text
    out = capsys.readouterr().out
    for one in expected:
        assert f"{one.prompt}{shown(one) if show else one.text}\n" in out
    mean = np.mean([len(one.thoughts[0].tokens) for one in expected])
    assert f"thoughts: 3, of {mean:.2f} tokens" in out
    assert ("<think>" in out) == show
    found = restore.restore(workdir, mesh=restored_thoughts.mesh)
    assert run_of(found).workdir == workdir


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (["01101001101="], {}, "a question has 1 to 9 tokens .* these prompts have 12 to 12"),
        (["1=", ""], {}, "these prompts have 0 to 2"),
        (["1" * 70], {"task": "text"}, "prompt of 74 tokens leaves no room .* context of 64"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    restored_thoughts: Restored, prompts: list[str], changes: dict[str, Any], message: str
):
    cfg = dataclasses.replace(run_of(restored_thoughts).method_config, **changes)
    run = dataclasses.replace(run_of(restored_thoughts), method_config=cfg)
    with pytest.raises(ValueError, match=message):
        greedy(restored_thoughts._replace(config=run), prompts)
