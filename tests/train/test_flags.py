"""Flags: every field settable, one line for every mistake, and back to a flagfile."""

import dataclasses
import pathlib
import subprocess
import textwrap
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import jax
import pytest
from absl import flags as absl_flags

from jaxlib_methods.train import flags
from jaxlib_methods.train.config import DataConfig, OptimizerConfig, RunConfig

FIELDS = {field.flag: field for field in flags._fields()}


def parsed(*arguments: str) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    flags.define(values)
    flags.parse(["train", *arguments], values)
    return values


def configured(*arguments: str) -> RunConfig:
    return flags.run_config(parsed(*arguments))


def candidates(hint: Any, default: Any) -> list[str]:
    """Texts of other values than the default, one of which the validation should accept."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        texts = [text for argument in arguments for text in candidates(argument, default)]
    elif get_origin(hint) is tuple:
        texts = candidates(arguments[0], None)
        texts += ["0.25,0.5,0.75", "0.5,0.25,0.25"] if arguments[0] is float else []
    elif get_origin(hint) is Literal:
        texts = [str(value) for value in arguments]
    elif hint is bool:
        texts = ["true", "false"]
    elif hint is int:
        texts = [str(2 * default), "2"] if isinstance(default, int) else ["2"]
    elif hint is float:
        texts = [str(default / 2), str(default * 2)] if isinstance(default, float) else []
        texts.append("0.5")
    else:
        texts = ["x"] if hint is str else []
    return [text for text in texts if text != flags.format_value(default)]


@pytest.mark.parametrize("flag", sorted(set(FIELDS) - {"method", "preset"}))
def test_every_flag_reaches_its_field(flag: str):
    section, name, hint, default, _ = field = FIELDS[flag]
    method = section if section in flags.registry.METHODS else "next_token"
    refused = []
    for text in candidates(hint, default):
        try:
            config = configured(f"--method={method}", f"--{flag}={text}")
        except ValueError as error:
            refused.append(str(error))
            continue
        value = getattr(flags._part(config, section), name)
        assert flags.format_value(value) == text
        assert value != default, field
        return
    raise AssertionError(f"no value was accepted: {refused}")


def test_flags_have_the_field_s_type():
    config = configured(
        "--preset=transformer_tiny",
        "--seed=7",
        "--compare",
        "--notrain.tensorboard",
        "--data.source=a.txt,b.txt",
        "--data.weights=1,0.25",
        "--model.num_kv_heads=2",
        "--model.mlp_dim=None",
        "--checkpoint.init_from=none",
        "--optimizer.learning_rate=3",
    )
    assert (config.seed, config.compare, config.train.tensorboard) == (7, True, False)
    assert config.data.weights == (1.0, 0.25)
    assert config.model.num_kv_heads == 2
    assert config.model.mlp_dim is None
    assert config.checkpoint.init_from is None
    assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int | Literal["early", "late"], "3", 3),
        (int | Literal["early", "late"], "late", "late"),
        (str | None, "none", None),
        (str | int, "3", 3),
        (tuple[float, ...], "", ()),
        (tuple[int, ...] | None, "1,2", (1, 2)),
        (Literal[1, 2], "2", 2),
    ],
)
def test_values_by_hand(hint: Any, text: str, value: Any):
    read = flags.parse_value(hint, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "possible"),
    [
        (int, "1.5", "an integer"),
        (float, "nan", "a number"),
        (float, "inf", "a number"),
        (bool, "2", "true or false"),
        (int | None, "x", "an integer or none"),
        (int | Literal["early", "late"], "x", "an integer or one of early, late"),
        (tuple[float, ...], "1,,2", "values separated by commas (each a number)"),
    ],
)
def test_unreadable_values_say_what_is_possible(hint: Any, text: str, possible: str):
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        flags.parse_value(hint, text)
    assert str(caught.value) == f"expected {possible}"


def test_a_field_without_a_flag_type_is_refused():
    with pytest.raises(TypeError, match="no flag can be made for a field of type dict"):
        flags.describe(dict[str, int])


def test_preset_then_flagfile_then_flag(tmp_path: pathlib.Path):
    recipe = tmp_path / "recipe"
    recipe.write_text("# a comment\n--train.num_steps=5\n--seed=5\n")
    preset, flagfile = "--preset=transformer_tiny", f"--flagfile={recipe}"
    base = configured(preset)
    assert base.model.num_layers == 6  # of the preset; the dataclass says 4
    assert base.train.num_steps not in (5, 6)
    config = configured(flagfile, "--train.num_steps=6", preset)
    assert (config.train.num_steps, config.seed, config.model.num_layers) == (6, 5, 6)
    assert configured(preset, "--train.num_steps=6", flagfile).train.num_steps == 5


def test_another_method_on_a_preset_takes_its_own_defaults():
    config = configured("--preset=late_to_early_tiny", "--method=next_token")
    assert config.method == "next_token"
    assert type(config.method_config).__name__ == "NextTokenConfig"
    assert config.model == configured("--preset=late_to_early_tiny").model


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--preset=transformer_tiny"], "runs/transformer_tiny"),
        (["--method=next_token"], "runs/next_token"),
        (["--method=next_token", "--workdir=there"], "there"),
    ],
)
def test_default_workdir(arguments: list[str], folder: str):
    assert configured(*arguments).workdir == folder


PRESET = "--preset=transformer_tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.num_layer=4"],
            "unknown flag --model.num_layer; did you mean --model.num_layers?",
        ),
        (["--num_layers=4"], "unknown flag --num_layers; did you mean --model.num_layers?"),
        (["--teacher=x"], "unknown flag --teacher; did you mean --late_to_early.teacher?"),
        (["--qqqqqqqq"], "unknown flag --qqqqqqqq; --help lists the flags"),
        (["--model.num_layers=four"], "flag --model.num_layers=four: expected an integer"),
        (["--train.tensorboard=si"], "flag --train.tensorboard=si: expected true or false"),
        (["--model.norm=l2"], "flag --model.norm=l2: expected one of rms_norm, layer_norm"),
        (["--data.weights=1;2"], "flag --data.weights=1;2: expected values separated by commas"),
        (["--preset"], "Missing value for flag --preset"),
        (["--flagfile=/absent"], "Unable to open flagfile: [Errno 2] No such file or directory"),
        (["next_token"], "unexpected argument 'next_token'; flags are written --name=value"),
        ([], "nothing to run: give --preset (one of " + ", ".join(flags.presets.PRESETS)),
        (["--preset=tiny"], "unknown preset 'tiny'; choose one of ['depth_recurrence_3p5b', "),
        (["--method=sgd"], "unknown method 'sgd'; choose one of ['depth_recurrence', "),
        (
            [PRESET, "--late_to_early.weight=0.5"],
            "--late_to_early.weight=0.5 belongs to the method late_to_early, but this run's method "
            "is next_token; remove it or give --method=late_to_early",
        ),
        ([PRESET, "--model.embed_dim=130"], "model: embed_dim 130 is not a multiple of num_heads"),
        ([PRESET, "--data.batch_size=0"], "data.batch_size=0 must be at least 1"),
        ([PRESET, "--mesh.fsdp=-1"], "mesh axes ['data', 'fsdp'] are all -1; one at most"),
        (
            [PRESET, "--data.sequence_length=4096"],
            "data.sequence_length=4096 is longer than model.max_length=128",
        ),
        (
            [PRESET, "--train.num_microbatches=3"],
            "data.batch_size=8 is not a multiple of train.num_microbatches=3",
        ),
        (
            ["--preset=energy_image_tiny", "--data.source=x"],
            "--data.source=x is for text, and a run of energy_image draws its examples here; leave",
        ),
        (
            ["--preset=depth_recurrence_reachability_tiny", "--data.tokenizer=x"],
            "--data.tokenizer=x is for text, and a run of depth_recurrence draws its examples",
        ),
        (
            ["--preset=reinforcement_midtraining_parity_warm_up", "--data.sequence_length=9"],
            "--data.sequence_length=9 is for text, and a run of reinforcement_midtraining draws",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=r".") as caught:
        configured(*arguments)
    assert str(caught.value).startswith(message)


def test_a_run_that_draws_its_examples_may_begin_with_one_that_reads_text():
    parity = "--preset=reinforcement_midtraining_parity_warm_up"
    config = configured(parity, "--data.source=x", "--checkpoint.init_from=preset:transformer_tiny")
    assert config.data.source == "x"
    assert configured(parity, "--data.tokenizer=x").data.tokenizer == "x"


def test_undefok_and_help_come_from_absl():
    assert configured(PRESET, "--undefok=later", "--later=1").seed == 0
    text = parsed().main_module_help()
    assert "--data.batch_size: sequences of the global batch, one optimiser step." in text
    assert "--checkpoint.every: optimiser steps; 0 saves at the end only (default: 200)" in text
    assert "--mesh.fsdp: parameters and optimiser state. (default: 1)" in text


@dataclasses.dataclass
class Documented:
    """A class.

    first: one sentence
        on two lines. second: another. Not a field: text.

    A paragraph about all of them.
    """

    first: int = 1
    second: int = 2
    third: int = 3  # from # the comment
    fourth: int = 4


def test_help_is_what_the_docstring_or_the_comment_says():
    assert flags.help_texts(Documented) == {
        "first": "one sentence on two lines.",
        "second": "another. Not a field: text.",
        "third": "from # the comment",
    }


def test_flagfile_gives_the_same_configuration_back(tmp_path: pathlib.Path):
    config = dataclasses.replace(
        configured("--preset=late_to_early_tiny", "--late_to_early.weight=0.3"),
        workdir="a b/c=d#e",
        seed=-3,
        data=DataConfig(source="x,y", weights=(0.1, 1e-7), sequence_length=8),
        optimizer=OptimizerConfig(learning_rate=1 / 3, clip_norm=0.0),
    )
    path = tmp_path / "run.flags"
    path.write_text(flags.to_flagfile(config))
    again = configured(f"--flagfile={path}")
    assert again == config
    assert again != configured(f"--flagfile={path}", "--optimizer.learning_rate=0.3333")


@pytest.mark.parametrize("text", ["a\nb", " a", "none "])
def test_what_a_flagfile_cannot_hold_is_refused(text: str):
    config = RunConfig(data=DataConfig(tokenizer=text))
    with pytest.raises(ValueError, match=r"--data.tokenizer=.* cannot be written in a flagfile"):
        flags.to_flagfile(config)


def test_the_word_none_is_not_taken_for_nothing():
    config = RunConfig(data=DataConfig(cache="none"))
    with pytest.raises(ValueError, match=r"--data.cache='none' cannot be written"):
        flags.to_flagfile(config)


def from_the_package(source: str) -> None:
    exec(textwrap.dedent(source), {"__name__": "jaxlib_methods.somewhere", "jax": jax})


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("raise ValueError('a=1 must\\nbe 2')", "error: a=1 must be 2\n"),
        ("raise NotImplementedError('no kernel')", "error: no kernel\n"),
        ("raise ImportError('pip install x')", "error: pip install x\n"),
        ("raise FloatingPointError('train/loss is nan')", "error: train/loss is nan\n"),
        ("open('/absent')", "error: [Errno 2] No such file or directory: '/absent'\n"),
        (
            "import pathlib; pathlib.Path('/absent').read_text()",
            "error: [Errno 2] No such file or directory: '/absent'\n",
        ),
        (
            """
            def refuse(x):
                raise ValueError('no kernel for cpu')
            jax.jit(jax.grad(refuse))(1.0)
            """,
            "error: no kernel for cpu\n",
        ),
    ],
)
def test_expected_errors_become_one_line(
    source: str, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught, flags.one_line_errors():
        from_the_package(source)
    assert caught.value.code == 1
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import json; json.loads('')", ValueError),  # raised by somebody else's code
        ("jax.vmap(lambda a, b: a)(jax.numpy.ones(2), jax.numpy.ones(3))", ValueError),  # by JAX
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_defects_keep_their_traceback(source: str, kind: type[Exception]):
    with pytest.raises(kind), flags.one_line_errors():
        from_the_package(source)


LAUNCH = """
import runpy, sys
sys.argv = ["train", *sys.argv[1:]]
code = None
try:
    runpy.run_module("jaxlib_methods.train", run_name="__main__")
except SystemExit as error:
    code = error.code
from jax._src import xla_bridge
heavy = [name for name in ("grain", "orbax.checkpoint") if name in sys.modules]
print("devices:", xla_bridge.backends_are_initialized(), heavy, code)
"""


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_print_config_and_errors_touch_no_device(python: Run, tmp_path: pathlib.Path):
    done = python("-c", LAUNCH, "--preset=late_to_early_7b", "--print_config", "--seed=3")
    *lines, last = done.stdout.splitlines()
    assert (last, done.stderr) == ("devices: False [] None", "")
    path = tmp_path / "run.flags"
    path.write_text("\n".join(lines))
    assert configured(f"--flagfile={path}") == configured("--preset=late_to_early_7b", "--seed=3")

    done = python("-c", LAUNCH, "--preset=late_to_early_7b")
    assert done.stdout == "devices: False [] 1\n"
    assert done.stderr == (
        "error: this run still needs a value for --data.source, --data.tokenizer, "
        "--late_to_early.teacher\n"
    )

    done = python("-c", LAUNCH, "--seed=x")
    assert done.stdout == "devices: False [] 1\n"
    assert done.stderr == "error: flag --seed=x: expected an integer\n"


def test_list_presets_prints_every_command(python: Run):
    done = python("-m", "jaxlib_methods.train", "--list_presets")
    assert (done.returncode, done.stderr) == (0, "")
    for preset in flags.presets.PRESETS.values():
        assert f"    {preset.command}\n" in done.stdout
        assert all(f"{flag}\n" in done.stdout for flag in preset.shapes)
