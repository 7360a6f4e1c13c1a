"""Presets: whole runs with a name and a promise (hardware, time, expected result).

A preset is a base for flags: `--preset=NAME --train.num_steps=100` changes one number of it.
What a run of published size cannot know (where the text, the tokenizer and the teacher lie) is
left empty and must be given; `--list_presets` shows the whole command.
"""

import dataclasses

from jaxlib_methods.train import (
    presets_depth_recurrence,
    presets_energy,
    presets_late_to_early,
    presets_reinforcement,
)
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.preset import Preset

_TABLE = presets_late_to_early.PRESETS | presets_energy.PRESETS
_TABLE |= presets_depth_recurrence.PRESETS | presets_reinforcement.PRESETS
PRESETS: dict[str, Preset] = {
    name: dataclasses.replace(preset, config=dataclasses.replace(preset.config, preset=name))
    for name, preset in _TABLE.items()
}


def get(name: str) -> RunConfig:
    """The configuration of a preset. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {sorted(PRESETS)}")
    return PRESETS[name].config


def table() -> str:
    """All presets with their promises, as text for a terminal."""
    lines = []
    for name, preset in PRESETS.items():
        lines += [f"{name}  ({preset.hardware}; {preset.time})", f"    {preset.result}"]
        lines += [f"    {preset.command}"]
        if preset.shapes:
            shapes = " ".join(preset.shapes)
            lines += [f"    without files: --compile_only --topology=KIND:SHAPE {shapes}"]
        lines += [f"    on {pod}: {changes}" for pod, changes in preset.pods.items()] + [""]
    return "\n".join(lines)
