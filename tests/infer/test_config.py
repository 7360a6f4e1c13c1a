"""Flags of inference: what they give, and what they refuse in one line."""

import dataclasses
import re

import pytest
from absl import flags as absl_flags

from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.infer import config
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.train import flags
from jaxlib_methods.train.config import MeshConfig


def parsed(*arguments: str) -> config.InferConfig:
    values = absl_flags.FlagValues()
    config.define(values)
    flags.parse(["infer", *arguments], values)
    return config.from_flags(values)


def test_flags_become_the_configuration():
    got = parsed(
        "--workdir=runs/a",
        "--prompt=def ",
        "--prompt=",
        r"--stop=\n\n",
        r"--stop=a\\n,b",
        "--step=200",
        "--temperature=0.5",
        "--top_k=7",
        "--nostream",
        "--mesh.tensor=2",
    )
    assert got == config.InferConfig(
        workdir="runs/a",
        prompt=("def ", ""),
        stop=(r"\n\n", r"a\\n,b"),
        step=200,
        temperature=0.5,
        top_k=7,
        stream=False,
        mesh=MeshConfig(tensor=2),
    )
    assert got.stop_strings == ("\n\n", "a\\n,b")
    assert got.sampling == SamplingConfig(temperature=0.5, top_k=7)


def test_data_flags_are_overrides():
    got = parsed("--workdir=a", "--mode=evaluate", "--data.source=x.txt", "--data.batch_size=2")
    assert got.data == {"source": "x.txt", "batch_size": 2}


def test_think_flags_are_fields_of_the_thinking():
    got = parsed("--workdir=a", "--mode=think", "--think.num_steps=8", "--think.stop=energy")
    assert got.think == {"num_steps": 8, "stop": "energy"}
    assert parsed("--workdir=a", "--mode=think").think == {}


def test_depth_flags_are_fields_of_the_depth():
    got = parsed("--workdir=a", "--prompt=x", "--depth.exit=kl", "--depth.tolerance=none")
    assert got.depth == {"exit": "kl", "tolerance": None}
    assert parsed("--workdir=a", "--mode=evaluate", "--depth.num_steps=3").depth == {"num_steps": 3}


def test_reason_flags_are_fields_of_the_reasoning():
    got = parsed("--workdir=a", "--reason.budget=8", "--noreason.show")
    assert got.reason == {"budget": 8, "show": False}
    assert parsed("--workdir=a", "--reason.budget=none").reason == {"budget": None}
    assert parsed("--workdir=a", "--mode=think", "--reason.places=2").reason == {"places": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to restore: give --workdir"),
        (["--workdir=a"], "nothing to continue: give --prompt"),
        (["--workdir=a", "--prompt=x", "--top_p=2"], "top_p 2.0 must be above 0 and at most 1"),
        (["--workdir=a", "--prompt=x", "--max_new_tokens=0"], "max_new_tokens=0 must be at least"),
        (["--workdir=a", "--prompt=x", "--stop="], "empty --stop"),
        (["--workdir=a", "--prompt=x", "--mode=evaluate"], "--prompt and --prompt_file are for"),
        (["--workdir=a", "--prompt=x", "--data.source=b"], "--data.* is for --mode=evaluate"),
        (
            ["--workdir=a", "--prompt=x", "--eval_batches=2"],
            "--eval_batches is for --mode=evaluate",
        ),
        (["--workdir=a", "--prompt=x", "--mode=dream"], "one of generate, evaluate"),
        (["--workdir=a", "--prompt=x", "--mode=think"], "are for --mode=generate and --mode=score"),
        (["--workdir=a", "--mode=score"], "nothing to score: give --prompt"),
        (["--workdir=a", "--prompt=x", "--think.num_steps=0"], "think.num_steps=0 must be at"),
        (["--workdir=a", "--mode=think", "--think.stop=now"], "one of none, energy, entropy"),
        (["--workdir=a", "--prompt=x", "--depth.num_steps=0"], "depth.num_steps=0 must be at"),
        (["--workdir=a", "--mode=think", "--depth.exit=now"], "one of none, kl, latent"),
        (
            ["--workdir=a", "--mode=evaluate", "--depth.warm_start"],
            "--depth.warm_start is for --mode=generate; --mode=evaluate reads its text at once",
        ),
        (
            ["--workdir=a", "--prompt=x", "--depth.noise=0.5"],
            "--depth.noise=0.5 is read by --depth.sampler=parallel alone, and it is sequential; "
            "give that or leave --depth.noise out",
        ),
        (
            ["--workdir=a", "--prompt=x", "--depth.inner_steps=4"],
            "--depth.inner_steps=4 is read by --depth.sampler=parallel alone",
        ),
        (
            ["--workdir=a", "--prompt=x", "--depth.sampler=parallel", "--depth.draft_steps=2"],
            "is read by --depth.sampler=speculative alone, and it is parallel",
        ),
        (
            ["--workdir=a", "--prompt=x", "--depth.tolerance=0.1"],
            "is read by --depth.exit=kl, latent, entropy or argmax alone, and it is none",
        ),
        (["--workdir=a", "--mode=evaluate", "--depth.min_steps=2"], "and it is none; give that"),
        (["--workdir=a", "--mode=think", "--depth.tolerance=1"], "and it is none; give that"),
        (
            ["--workdir=a", "--mode=export", "--output=b", "--depth.num_steps=2"],
            "--depth.num_steps is for --mode=generate, evaluate or think; --mode=export writes the",
        ),
        (["--workdir=a", "--prompt=x", "--reason.budget=0"], "reason.budget=0 must be at least 1"),
        (
            ["--workdir=a", "--prompt=x", "--reason.every=2"],
            "--reason.every is for thoughts, and without --reason.budget --mode=generate continues",
        ),
        (
            ["--workdir=a", "--prompt=x", "--reason.budget=2", "--reason.every=2"],
            "say how long that is by --max_new_tokens",
        ),
        (
            ["--workdir=a", "--prompt=x", "--reason.budget=2", "--reason.examples=2"],
            "--reason.examples is for no prompt",
        ),
        (["--workdir=a", "--reason.budget=2", "--stream"], "--stream shows plain text"),
        (
            ["--workdir=a", "--mode=export", "--output=b", "--reason.budget=2"],
            "--reason.budget is for --mode=generate, evaluate or think; leave it out",
        ),
        (["--workdir=a", "--mode=evaluate", "--num_samples=5"], "--num_samples is for --mode=gen"),
        (["--workdir=a", "--mode=evaluate", "--max_new_tokens=7"], "--max_new_tokens is for --mo"),
        (["--workdir=a", "--mode=think", "--top_k=3"], "--top_k is for --mode=generate; leave it"),
        (["--workdir=a", "--mode=think", "--stop=x"], "--stop is for --mode=generate; leave it o"),
        (["--workdir=a", "--mode=denoise", "--stream"], "--stream is for --mode=generate; leave"),
        (
            ["--workdir=a", "--mode=export", "--output=b", "--temperature=3"],
            "--temperature is for --mode=generate; leave it out",
        ),
        (["--workdir=a", "--mode=think", "--noreason.show"], "is for --mode=generate; leave it"),
        (["--workdir=a", "--promt=x"], "unknown flag --promt; did you mean --prompt"),
        (["--workdir=a", "--prompt=x", "--mesh.data=0"], "mesh.data=0"),
        (["--workdir=a", "--data.tokenizer=b"], "unknown flag --data.tokenizer"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        parsed(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", dataclasses.fields(DepthConfig), ids=lambda field: field.name)
def test_a_depth_flag_is_taken_where_something_reads_it(field: dataclasses.Field):
    """Each alone, or with the one choice that its refusal names."""
    value = {"exit": "kl", "sampler": "parallel", "num_steps": 8, "max_wave": 9}.get(field.name)
    value = field.default if value is None else value
    asked = ["--workdir=a", "--prompt=x", f"--depth.{field.name}={flags.format_value(value)}"]
    try:
        assert parsed(*asked).depth == {field.name: value}
        return
    except ValueError as error:
        choice = re.search(r"read by (--depth\.\w+=\w+)", str(error))
    assert choice is not None
    assert parsed(*asked, choice[1]).depth[field.name] == value


def test_thinking_tries_every_exit():
    asked = {"min_steps": 2, "check_every": 2}
    given = [f"--depth.{name}={value}" for name, value in asked.items()]
    assert parsed("--workdir=a", "--mode=think", *given).depth == asked


def test_every_own_flag_has_its_help():
    values = absl_flags.FlagValues()
    config.define(values)
    own = config.InferConfig.__annotations__
    for name in (n for n in values if n in own or n.startswith(("think.", "depth.", "reason."))):
        assert len(str(values[name].help).split("(default")[0]) > 10, name


def test_prompts_come_from_flags_and_files(tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"first"\n{"prompt": "second\\n", "id": 3}\n')
    got = parsed("--workdir=a", "--prompt=zero", f"--prompt_file={lines}").prompts()
    assert got == ["zero", "first", "second\n"]
    whole = tmp_path / "prompt.py"
    whole.write_text("def f():\n    return")
    assert parsed("--workdir=a", f"--prompt_file={whole}").prompts() == ["def f():\n    return"]
    lines.write_text('"first"\n3\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2 is neither a string nor"):
        parsed("--workdir=a", f"--prompt_file={lines}").prompts()
