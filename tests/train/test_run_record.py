"""What a workdir says about its run, and which runs go on in it."""

import dataclasses
import json

import pytest

from jaxlib_methods.late_to_early import LateToEarlyConfig
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import run_record
from jaxlib_methods.train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from jaxlib_methods.train.run_record import Record

MODEL = TransformerConfig(
    vocab_size=11, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=8, max_length=8
)
RUN = RunConfig(model=MODEL, data=DataConfig(sequence_length=8), workdir="w")
RECORD = Record(RUN, "bytes", "corpus")


def test_record_is_read_back(tmp_path):
    assert run_record.read_record(tmp_path) is None
    run_record.write_config(tmp_path, RECORD)
    assert run_record.read_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    record = RECORD._replace(config=dataclasses.replace(RUN, workdir="~/run"))
    assert record.config.workdir == str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run_record.write_config(record.config.workdir, record)
    assert run_record.read_record("~/run") == record


BAD_FILES = [
    (lambda v: v | {"format": 2}, r"has format 2, this version reads up to 1; install a newer"),
    (lambda v: v | {"format": "2"}, r"has a format that is not a whole number"),
    (lambda v: v | {"format": True}, r"has a format that is not a whole number"),
    (lambda v: v | {"run": {"colour": 1}}, r"config\.json does not describe .* \['colour'\]"),
    (lambda v: v | {"run": 3}, r"config\.json does not describe a run of this version"),
    (lambda v: {"format": 1}, r"config\.json does not describe a run of this library"),
    (lambda v: [1], r"config\.json is not a JSON object"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_a_record_that_is_not_ours_is_refused(tmp_path, change, message):
    run_record.write_config(tmp_path, RECORD)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        run_record.read_record(tmp_path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not JSON"):
            run_record.read_record(tmp_path)


def test_checkpoints_without_their_record_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds checkpoints, but the config\.json of"):
        run_record.read_record(tmp_path)


OTHER_RUNS = [
    ({"seed": 1}, r"w belongs to a run with seed=0, this run has seed=1; give another --workdir"),
    ({"model": dataclasses.replace(MODEL, num_layers=3)}, r"model\.num_layers=2.*=3"),
    ({"data": DataConfig(sequence_length=8, batch_size=4)}, r"data\.batch_size=16.*=4"),
    ({"optimizer": OptimizerConfig(name="muon")}, r"optimizer\.name=adamw.*=muon"),
    ({"method": "late_to_early", "method_config": None}, r"method=next_token.*=late_to_early"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_RUNS)
def test_another_run_is_refused_by_name(change, message):
    current = RECORD._replace(config=dataclasses.replace(RUN, **change))
    with pytest.raises(ValueError, match=message):
        run_record.check_same_run(RECORD, current, where="w")


def test_another_value_of_the_method_is_refused_by_name():
    runs = [
        RECORD._replace(
            config=dataclasses.replace(
                RUN,
                method="late_to_early",
                method_config=LateToEarlyConfig(weight=weight),
            )
        )
        for weight in (0.1, 0.2)
    ]
    with pytest.raises(ValueError, match=r"late_to_early\.weight=0\.1, .*=0\.2"):
        run_record.check_same_run(*runs, where="w")


def test_what_may_change_between_starts():
    current = dataclasses.replace(
        RUN,
        workdir="elsewhere",
        train=TrainConfig(num_steps=7),
        optimizer=OptimizerConfig(learning_rate=3.0),
        checkpoint=CheckpointConfig(every=7),
        mesh=MeshConfig(fsdp=2),
        data=DataConfig(sequence_length=8, num_threads=5, cache="folder"),
    )
    run_record.check_same_run(RECORD, RECORD._replace(config=current), where="w")


def test_another_teacher_is_refused():
    record = RECORD._replace(pretrained="step 4")
    with pytest.raises(ValueError, match=r"from 'step 4' to 'step 8'; give the same model"):
        run_record.check_same_run(record, RECORD._replace(pretrained="step 8"), where="w")


def test_an_older_record_names_a_teacher_by_its_step_alone():
    record = RECORD._replace(pretrained="step 4; 1a2b; step 8")
    same = RECORD._replace(pretrained="step 4, aa; 1a2b; step 8, bb")
    run_record.check_same_run(record, same, where="w")
    for other in (
        "step 4, aa; 1a2b; step 9, bb",
        "step 4, aa; 1a2b",
        "step 4, bb; 1a2b; step 8, bb",
    ):
        with pytest.raises(ValueError, match="has changed since then"):
            run_record.check_same_run(same, RECORD._replace(pretrained=other), where="w")
    with pytest.raises(ValueError, match="has changed since then"):
        run_record.check_same_run(same, record, where="w")


def test_other_held_out_text_is_refused():
    record = RECORD._replace(validation="one")
    run_record.check_same_run(RECORD, record, where="w")  # an older record does not say
    with pytest.raises(ValueError, match="text that is held out has changed since w was written"):
        run_record.check_same_run(record, RECORD._replace(validation="two"), where="w")


def test_a_longer_run_does_not_move_the_step_at_which_its_method_changes():
    record = RECORD._replace(until=250)
    run_record.check_same_run(record, record, where="w")
    with pytest.raises(ValueError, match=r"first part at step 250, this run at 500"):
        run_record.check_same_run(record, RECORD._replace(until=500), where="w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "other"}, r"the corpus has changed since w was written"),
        ({"tokenizer": "other"}, r"the tokenizer has changed since w was written"),
    ],
)
def test_other_text_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run_record.check_same_run(RECORD, RECORD._replace(**change), where="w")


def test_another_architecture_is_refused_by_name():
    other = dataclasses.replace(
        MODEL, compute_dtype="float32", remat="full", loss_implementation="xla",
        attention_implementation="xla", max_length=9,
    )  # fmt: skip
    run_record.check_same_architecture(other, MODEL, where="w")
    learned, longer = (
        dataclasses.replace(MODEL, positions="learned", max_length=length) for length in (8, 9)
    )
    with pytest.raises(ValueError, match=r"model\.max_length=9, this run has 8"):
        run_record.check_same_architecture(longer, learned, where="w")
    with pytest.raises(ValueError, match=r"model in w has model\.mlp_dim=4, this run has 8"):
        run_record.check_same_architecture(dataclasses.replace(MODEL, mlp_dim=4), MODEL, where="w")
