"""Configurations: validation and the form in which checkpoints keep them."""

import dataclasses
import json

import pytest

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train.config import (
    DataConfig,
    MeshConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    require_complete,
    to_dict,
)

CONFIG = RunConfig(
    method="late_to_early",
    preset="mine",
    seed=3,
    model=TransformerConfig(num_layers=2, num_kv_heads=2),
    data=DataConfig(source="a,b", weights=(0.5, 1.5)),
    train=TrainConfig(num_steps=7),
)


def test_json_gives_the_same_configuration_back():
    text = json.dumps(to_dict(CONFIG))
    assert json.loads(text) == to_dict(CONFIG)
    assert from_dict(json.loads(text)) == CONFIG
    assert from_dict(json.loads(text.replace("1.5", "2.5"))) != CONFIG


def test_missing_keys_take_the_defaults():
    assert from_dict({}) == RunConfig()
    config = from_dict({"seed": 3, "model": {"num_layers": 2}})
    assert config == RunConfig(seed=3, model=TransformerConfig(num_layers=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"unknown keys \['sed'\] in the run configuration; known are \['method', "),
        ({"mesh": {"x": 1, "a": 2}}, r"unknown keys \['a', 'x'\] in the mesh; known are \['data"),
        ({"method_config": {"x": 1}}, r"unknown keys \['x'\] in the method_config"),
        ({"method": "sgd"}, "unknown method 'sgd'; choose one of"),
        ({"train": {"num_steps": 0}}, "train.num_steps=0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_empty_text_is_a_value_still_to_be_given():
    require_complete(RunConfig())  # preset and workdir may be empty
    data = DataConfig(tokenizer="", text_field="")
    with pytest.raises(ValueError, match=r"needs a value for --data.text_field, --data.tokenizer$"):
        require_complete(dataclasses.replace(RunConfig(), data=data))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, "mesh.fsdp=0 must be at least 1, or -1"),
        ({"data": -1, "tensor": -1}, r"mesh axes \['data', 'tensor'\] are all -1"),
        ({"dcn_data": -1, "data": 1}, "mesh.dcn_data=-1 must be at least 1"),
    ],
)
def test_impossible_meshes_are_refused(sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**sizes)


def test_a_method_takes_its_own_configuration():
    other = CONFIG.method_config
    with pytest.raises(ValueError, match="method 'next_token' takes a NextTokenConfig, got Late"):
        RunConfig(method="next_token", method_config=other)
