"""absl flags made from the frozen dataclasses, and back: `--model.num_layers=4`.

Every field of `RunConfig` is a flag: `--seed`, `--SECTION.FIELD`, and `--METHOD.FIELD` for each
method of the registry. No flag has a value of its own: what is not given comes from the preset,
or else from the dataclass. Later flags win over earlier ones, a `--flagfile` counts
where it stands.
"""

import contextlib
import dataclasses
import difflib
import dis
import inspect
import math
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from absl import flags

from jaxlib_methods import registry
from jaxlib_methods.train import presets
from jaxlib_methods.train.config import RunConfig, sections

_RUN = "run"  # the section of the flags without a dot, in flagfiles


class _Field(NamedTuple):
    section: str
    name: str
    hint: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return self.name if self.section == _RUN else f"{self.section}.{self.name}"


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines all flags of a training run in `values`."""
    for field in _fields():
        text = f"{field.help} (default: {format_value(field.default)})".lstrip()
        parser = Parser(field.hint)
        flag: flags.Flag[Any]
        if field.hint is bool:
            flag = flags.BooleanFlag(field.flag, None, text)
            flag.parser = parser
        else:
            flag = flags.Flag(parser, None, field.flag, None, text)
        flags.DEFINE_flag(flag, values, module_name=sys.argv[0])
    for name, text in (
        ("print_config", "Print what would run, as a flagfile, and exit."),
        ("list_presets", "Print the presets with what they promise, and exit."),
        ("compile_only", "Compile the run for --topology, print what it needs, and exit."),
    ):
        flags.DEFINE_flag(flags.BooleanFlag(name, False, text), values, module_name=sys.argv[0])
    for name, kind, default, text in (
        ("topology", str, "cpu:8", "Devices to compile for: v5p:4x4x4, v5e:16x16, cpu:8."),
        ("search", int, "0", "With --compile_only: compile up to so many variants of the run."),
    ):
        flag = flags.Flag(Parser(kind), None, name, default, text)
        flags.DEFINE_flag(flag, values, module_name=sys.argv[0])


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the command line. Raises ValueError with one sentence for any mistake in it."""
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, values)) from None
    except flags.Error as error:
        raise ValueError(str(error).removeprefix("ERROR:: ")) from None
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    return rest


def parse_or_exit(argv: list[str]) -> list[str]:
    """`parse` for `absl.app.run`."""
    with one_line_errors():
        return parse(argv)


def run_config(values: flags.FlagValues = flags.FLAGS) -> RunConfig:
    """The run that the parsed flags describe: dataclass defaults < preset < flags.

    An empty `workdir` becomes `runs/PRESET`, or `runs/METHOD` without a preset.
    Raises ValueError for an impossible combination.
    """
    if not values.compile_only and (values["topology"].present or values["search"].present):
        raise ValueError("--topology and --search are for --compile_only; add it")
    given: dict[str, dict[str, Any]] = {}
    for field in _fields():
        if not values[field.flag].using_default_value:
            given.setdefault(field.section, {})[field.name] = values[field.flag].value
    run = given.pop(_RUN, {})
    base = _base(run)
    changes: dict[str, Any] = dict(run)
    method = run.get("method", base.method)
    if method != base.method:
        base = dataclasses.replace(base, method=method, method_config=None)
    for section, fields in given.items():
        if section in registry.METHODS:
            _require_own(section, fields, method)
            changes["method_config"] = _replace(section, base.method_config, fields)
        else:
            changes[section] = _replace(section, getattr(base, section), fields)
    config = dataclasses.replace(base, **changes)
    _refuse_text(config, base, given.get("data", {}))
    folder = config.workdir or f"runs/{config.preset or config.method}"
    return dataclasses.replace(config, workdir=folder)


def to_flagfile(config: RunConfig) -> str:
    """The whole configuration as a flagfile; `run_config` reads the same configuration back."""
    lines: list[str] = []
    section = ""
    for field in _fields(config.method):
        if field.section != section:
            section = field.section
            lines += ["", f"# {section}"]
        value = getattr(_part(config, section), field.name)
        text = format_value(value)
        if text != text.strip() or "\n" in text or parse_value(field.hint, text) != value:
            raise ValueError(f"--{field.flag}={value!r} cannot be written in a flagfile")
        lines.append(f"--{field.flag}={text}")
    return "\n".join(lines[1:]) + "\n"


def parse_value(hint: Any, text: str) -> Any:
    """Reads `text` as a value of the type `hint`. Raises ValueError saying what is possible."""
    try:
        return _read(hint, text)
    except ValueError:
        raise ValueError(f"expected {describe(hint)}") from None


def format_value(value: Any) -> str:
    """The text from which `parse_value` reads `value`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(format_value(item) for item in value)
    return str(value)


def describe(hint: Any) -> str:
    """What a flag of this type takes, in words. Raises TypeError for a type without flags."""
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is types.NoneType:
        return "none"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"values separated by commas (each {describe(arguments[0])})"
    raise TypeError(f"no flag can be made for a field of type {hint}")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors about what the user gave into one line on stderr and exit code 1.

    These are OSError, and ValueError, ImportError, NotImplementedError or FloatingPointError (a
    loss that is not finite) raised by this package's own code. Whatever comes from elsewhere is a
    defect and keeps its traceback.
    """
    try:
        yield
    except (ValueError, ImportError, NotImplementedError, OSError, FloatingPointError) as error:
        if not isinstance(error, OSError) and not _raised_here(error):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


class Parser(flags.ArgumentParser):
    """Reads the text of one flag as the type of its field."""

    def __init__(self, hint: Any) -> None:
        super().__init__()
        self.hint = hint
        self.syntactic_help = describe(hint)

    def parse(self, argument: Any) -> Any:
        return parse_value(self.hint, str(argument))

    def flag_type(self) -> str:
        return self.syntactic_help


def _read(hint: Any, text: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # str accepts everything: last.
        for argument in sorted(arguments, key=lambda argument: argument is str):
            with contextlib.suppress(ValueError):
                return _read(argument, text)
        raise ValueError
    if origin is tuple:
        return tuple(_read(arguments[0], part) for part in text.split(",")) if text else ()
    if hint is float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError
        return number
    if hint in (int, str):
        return hint(text)
    if origin is Literal:
        words = {str(value): value for value in arguments}
    else:
        words = {"none": None} if hint is types.NoneType else {"true": True, "false": False}
    word = text if origin is Literal else text.lower()
    if word not in words:
        raise ValueError
    return words[word]


def _fields(method: str | None = None) -> list[_Field]:
    """All fields of a run, with those of one method, or of every method."""
    hints = get_type_hints(RunConfig)
    parts = {_RUN: RunConfig} | sections()
    names = registry.METHODS if method is None else [method]
    parts |= {name: registry.config_class(name) for name in names}
    found = []
    for section, cls in parts.items():
        hints, texts = get_type_hints(cls), help_texts(cls)
        for field in dataclasses.fields(cls):
            if section == _RUN and field.name in ("method_config", *parts):
                continue
            text = texts.get(field.name, "")
            found.append(_Field(section, field.name, hints[field.name], field.default, text))
    return found


def help_texts(cls: type) -> dict[str, str]:
    """What the docstring (`name: text`) or the comment behind a field says about it."""
    names = [field.name for field in dataclasses.fields(cls)]
    try:
        source = inspect.getsource(cls)
    except OSError:  # installed without its source: flags without help, but flags
        source = ""
    texts = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.MULTILINE))
    start = rf"(?:^|(?<=\.\s))({'|'.join(names)}): "
    pieces = re.split(start, inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        texts[name] = " ".join(text.split("\n\n")[0].split())
    return texts


def _base(run: dict[str, Any]) -> RunConfig:
    preset, method = run.get("preset", ""), run.get("method")
    if preset:
        return presets.get(preset)
    if method is None:
        raise ValueError(
            f"nothing to run: give --preset (one of {', '.join(presets.PRESETS)}; --list_presets "
            f"describes them) or --method (one of {', '.join(registry.METHODS)})"
        )
    return RunConfig(method=method)


def _require_own(section: str, fields: dict[str, Any], method: str) -> None:
    if section != method:
        name, value = next(iter(fields.items()))
        raise ValueError(
            f"--{section}.{name}={format_value(value)} belongs to the method {section}, but this "
            f"run's method is {method}; remove it or give --method={section}"
        )


def _refuse_text(config: RunConfig, base: RunConfig, fields: dict[str, Any]) -> None:
    """Refuses flags about text that differ from the base's, where no run of this one reads any."""
    if _reads_text(config):
        return
    model_of_tokens = registry.entry(config.method).init_model is None
    unread = ["source", "sequence_length", *([] if model_of_tokens else ["tokenizer"])]
    for name, value in fields.items():
        if name in unread and value != getattr(base.data, name):
            raise ValueError(
                f"--data.{name}={format_value(value)} is for text, and a run of {config.method} "
                "draws its examples here; leave it out"
            )


def _reads_text(config: RunConfig) -> bool:
    start = config.checkpoint.init_from or ""
    return registry.entry(config.method).reads_text(config.method_config) or (
        start.startswith("preset:") and _reads_text(presets.get(start.removeprefix("preset:")))
    )


def _replace(section: str, part: Any, fields: dict[str, Any]) -> Any:
    try:
        return dataclasses.replace(part, **fields)
    except ValueError as error:
        message = str(error)
        named = message if section in message else f"{section}: {message}"
        raise ValueError(named) from None


def _part(config: RunConfig, section: str) -> Any:
    if section == _RUN:
        return config
    return config.method_config if section == config.method else getattr(config, section)


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    same_field = [flag for flag in values if flag.split(".")[-1] == name]
    close = same_field or difflib.get_close_matches(name, list(values), n=1)
    advice = f"did you mean --{close[0]}?" if close else "--help lists the flags"
    return f"unknown flag --{name}; {advice}"


def _raised_here(error: Exception) -> bool:
    """Whether this package raised the error.

    JAX leaves a note where it cut its own frames; the last one left then stands at a call where
    JAX raised the error, and at a `raise` where this package did, while it was traced.
    """
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "")
    raises = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return module.split(".")[0] == "jaxlib_methods" and (raises or not hasattr(error, "__notes__"))
