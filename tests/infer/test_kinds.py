"""What each kind of model is, and what it is refused."""

import pytest

from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.energy_image import EnergyImageConfig
from jaxlib_methods.infer import kinds
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig
from jaxlib_methods.train.config import RunConfig

PLAIN = TransformerConfig(num_layers=3)
RECURRENT = TransformerConfig(num_layers=3, recurrence=4)


def depth(task: str) -> RunConfig:
    return RunConfig(
        method="depth_recurrence",
        method_config=DepthRecurrenceConfig(task=task),  # pyright: ignore[reportArgumentType]
    )


def test_the_kind_is_that_of_the_method_and_the_model():
    energy = RunConfig(method="energy", method_config=EnergyConfig())
    images = RunConfig(method="energy_image", method_config=EnergyImageConfig())
    thoughts = ReinforcementMidtrainingConfig()
    run = RunConfig(method="reinforcement_midtraining", method_config=thoughts)
    assert kinds.kind_of(run, PLAIN) == "thoughts"
    assert kinds.kind_of(None, PLAIN) == "plain"
    assert kinds.kind_of(None, RECURRENT) == "recurrent"
    assert kinds.kind_of(RunConfig(), PLAIN) == "plain"
    assert kinds.kind_of(RunConfig(), RECURRENT) == "recurrent"
    assert kinds.kind_of(depth("language"), RECURRENT) == "recurrent"
    assert kinds.kind_of(depth("logic"), PLAIN) == "questions"
    assert kinds.kind_of(energy, PLAIN) == "energy"
    assert kinds.kind_of(images, PLAIN) == "images"


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        ("questions", "generate", "runs/a is a run on reasoning questions: give --mode=think"),
        ("questions", "evaluate", "runs/a is a run on reasoning questions: give --mode=think"),
        ("questions", "export", "--mode=export is for a plain language model, a language model"),
        ("questions", "score", "--mode=score is for an energy run; runs/a is a run on reasoning"),
        ("images", "think", "for a language model that is recurrent in depth, an energy run, a ru"),
        ("thoughts", "score", "before tokens: give --mode=generate, evaluate, export, think or en"),
        ("images", "evaluate", "runs/a is a run on images: give --mode=denoise"),
        ("energy", "export", "energy run: give --mode=generate, evaluate, think or score"),
        ("plain", "denoise", "--mode=denoise is for a run on images; runs/a is a plain language"),
    ],
)
def test_a_mode_of_another_kind_is_refused_in_one_sentence(
    kind: kinds.Kind, mode: str, message: str
):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        kinds.check_mode("runs/a", kind, mode)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_kind_does_what_its_modes_are():
    for kind, about in kinds.KINDS.items():
        for mode in about.modes:
            kinds.check_mode("runs/a", kind, mode)


def test_flags_of_another_kind_are_refused():
    kinds.check_flags("runs/a", "plain", think={}, depth={})
    kinds.check_flags("runs/a", "energy", think={"noise": 1.0}, depth={})
    kinds.check_flags("runs/a", "recurrent", think={}, depth={"exit": "kl"})
    with pytest.raises(ValueError, match=r"--depth.exit is for a language model .* an energy run"):
        kinds.check_flags("runs/a", "energy", think={"noise": 1.0}, depth={"exit": "kl"})
    kinds.check_flags("runs/a", "thoughts", think={}, reason={"budget": 4})
    with pytest.raises(ValueError, match=r"--reason.budget is for a run that thinks before tok"):
        kinds.check_flags("runs/a", "plain", reason={"budget": 4})
    with pytest.raises(ValueError, match=r"--think.noise is for an energy run; runs/a is a lang"):
        kinds.check_flags("runs/a", "recurrent", think={"noise": 1.0})
