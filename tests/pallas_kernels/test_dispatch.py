"""Choice of an implementation: what auto takes, what a name refuses, what is logged."""

import logging
import threading
import types
from typing import Any

import jax
import pytest

from jaxlib_methods.pallas_kernels import dispatch

WIN: dict[str, Any] = {"unsupported": None, "wins_on": ("tpu",), "kernels": ("tpu",)}


def test_platform_is_jax_s_unless_lowering_for_another():
    assert dispatch.platform() == jax.default_backend()
    with dispatch.lowering_for("tpu"):
        assert dispatch.platform() == "tpu"
        with dispatch.lowering_for("gpu"):
            assert dispatch.platform() == "gpu"
        assert dispatch.platform() == "tpu"
    assert dispatch.platform() == jax.default_backend()


def test_contexts_end_where_an_error_leaves_them():
    with pytest.raises(KeyError), dispatch.lowering_for("tpu"), dispatch.interpreted():
        raise KeyError
    assert dispatch.platform() == jax.default_backend()
    assert not dispatch.interpret()


def test_contexts_belong_to_a_thread():
    seen = []
    with dispatch.lowering_for("tpu"), dispatch.interpreted():
        assert dispatch.interpret()
        thread = threading.Thread(
            target=lambda: seen.append((dispatch.platform(), dispatch.interpret()))
        )
        thread.start()
        thread.join()
    assert seen == [(jax.default_backend(), False)]


def test_auto_takes_the_kernel_where_it_wins_alone():
    assert dispatch.choose("op", "auto", **WIN) == "xla"  # on a CPU
    with dispatch.interpreted():
        assert dispatch.choose("op", "auto", **WIN) == "xla"
    with dispatch.lowering_for("tpu"):
        assert dispatch.choose("op", "auto", **WIN) == "pallas"
        assert dispatch.choose("op", "auto", **WIN | {"unsupported": "D is odd"}) == "xla"
        assert dispatch.choose("op", "auto", unsupported=None) == "xla"
        assert dispatch.choose("op", "xla", **WIN) == "xla"


def test_pallas_by_name_runs_or_says_why_not():
    with pytest.raises(
        ValueError,
        match="op: pallas was asked for, but no kernel is written for "
        f"{jax.default_backend()}, only for tpu; choose auto or xla",
    ):
        dispatch.choose("op", "pallas", unsupported=None)
    with dispatch.interpreted():
        assert dispatch.choose("op", "pallas", unsupported=None) == "pallas"
        with pytest.raises(ValueError, match="but D is odd"):
            dispatch.choose("op", "pallas", unsupported="D is odd")
    with dispatch.lowering_for("tpu"):
        assert dispatch.choose("op", "pallas", unsupported=None) == "pallas"


def test_an_unknown_implementation_names_the_choices():
    with pytest.raises(ValueError, match="'triton'; choose one of auto, xla, pallas"):
        dispatch.choose("op", "triton", unsupported=None)  # type: ignore[arg-type]


def test_auto_says_once_what_it_chose_and_why(caplog):
    with caplog.at_level(logging.INFO), dispatch.lowering_for("tpu"):
        for _ in range(2):
            dispatch.choose("logged", "auto", **WIN)
            dispatch.choose("logged", "auto", **WIN | {"unsupported": "D is odd"})
    messages = [m for m in caplog.messages if m.startswith("logged")]
    assert messages == [
        "logged runs as pallas: it is the faster one on tpu",
        "logged runs as xla: D is odd",
    ]


def test_kernels_for_hopper_name_what_another_gpu_is(monkeypatch):
    assert dispatch.gpu_why_not() is None  # ahead of time
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    says = "GPU kernels are for compute capability 9.0 (Hopper) and NVIDIA A100 has 8.0"
    assert dispatch.gpu_why_not() == says
    device.compute_capability = "9.0"
    assert dispatch.gpu_why_not() is None
