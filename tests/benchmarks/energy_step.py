"""What training an energy-based transformer costs beside the plain step, against its FLOPs.

    python tests/benchmarks/energy_step.py

Measured: the whole step of System 1 (two trained descent steps, two landscapes) and of System 2
(three descent steps, one trained), with `memory=recompute`, and System 1 with `memory=save`,
which is reverse over reverse. Against: plain next-token training of the same sizes in the same
process, and the ratio of the analytic FLOPs.
Goal: time ratio over FLOP ratio at most 1.15 for both systems.
"""

from typing import Any

import harness
import shapes
import training
from absl import app

from jaxlib_methods import energy, next_token
from jaxlib_methods.energy_config import EnergyConfig

GOAL = 1.15
SYSTEM_1: dict[str, Any] = {"num_steps": 2, "num_landscapes": 2, "step_size": 5.0}
SYSTEM_2: dict[str, Any] = {
    "num_steps": 3, "num_landscapes": 0, "step_size": 5.0, "learn_step_size": False,
    "random_step_size": 2.0, "noise": 3.0, "loss_steps": "last",
}  # fmt: skip


def main(_: list[str]) -> None:
    """Times the programs, prints the rows and the ratios to the FLOPs."""
    model = shapes.model_config(training.LENGTH.value)
    context = training.context(model)
    batch = shapes.make_batch(model, training.BATCH_SIZE.value, documents=1)
    configs = {
        "System 1": EnergyConfig(**SYSTEM_1),
        "System 2": EnergyConfig(**SYSTEM_2),
        "System 1, reverse over reverse": EnergyConfig(**SYSTEM_1, memory="save"),
    }
    methods = {"plain": next_token.make(next_token.NextTokenConfig(), context)}
    methods |= {name: energy.make(cfg, context) for name, cfg in configs.items()}
    times = harness.measure({name: training.OurStep(m, batch) for name, m in methods.items()})
    title = "Energy training step beside the plain step"
    ratio = harness.report(title, times, reference="plain", tokens_per_call=batch.inputs.size)
    for name in ("System 1", "System 2"):
        counted = methods[name].flops_per_token / methods["plain"].flops_per_token
        print(f"\n{name} / plain: measured {ratio[name]:.2f}, FLOPs {counted:.2f}")
        harness.check_goal(f"{name}, time ratio / FLOP ratio", ratio[name] / counted, limit=GOAL)


if __name__ == "__main__":
    app.run(main)
