"""Specs refuse what they do not know and what cannot be, and say so in words."""

import pytest

from garage.core.errors import UserError
from garage.specs.data import SynthesizeSpec
from garage.specs.options import help_text, read_arguments, to_toml
from garage.specs.serve import ServeSpec
from garage.specs.train import ArchitectureSpec, FitSpec, SFTSpec

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SHAPE = {**WIDTHS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def sft(line: str) -> SFTSpec:
    return SFTSpec.parse(read_arguments(SFTSpec, line.split()).values)


def test_options_become_a_spec():
    spec = sft("nano --data a.jsonl,b.jsonl --out r --adapter.rank 32 --adapter.dora --fit.max_steps 9 --fit.optimizer.lr=1e-3")
    assert [str(path) for path in spec.data] == ["a.jsonl", "b.jsonl"]
    assert spec.adapter.kind == "lora" and (spec.adapter.rank, spec.adapter.dora) == (32, True)
    assert (spec.fit.max_steps, spec.fit.optimizer.lr, spec.model) == (9, 1e-3, "nano")


def test_a_table_given_in_part_keeps_the_defaults_of_the_field():
    spec = FitSpec.parse({"max_steps": 1, "optimizer": {"kind": "muon", "adamw": {"weight_decay": 0.1}}})
    assert spec.optimizer.kind == "muon" and spec.optimizer.adamw.lr == 1e-3 and spec.optimizer.adamw.weight_decay == 0.1


def test_a_resolved_spec_reads_back_from_toml_and_json(tmp_path):
    spec = sft("nano --data a.jsonl --out r --fit.epochs 2 --adapter.kind full --fit.checkpointing off")
    path = tmp_path / "s.toml"
    path.write_text(to_toml(spec.resolved()))
    assert SFTSpec.read(path) == spec
    assert SFTSpec.read(path, {"fit": {"epochs": "3"}}).fit.epochs == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nano --dato x", "did you mean --data"),
        ("nano --fit.max_stepz 3", "did you mean --fit.max_steps"),
        ("nano more", "unexpected argument 'more'"),
        ("nano --data", "needs a value"),
        ("nano --out r --fit.max_steps 3", "data: required"),
        ("nano --data a --out r", "fit: required"),
        ("nano --data a --out r --fit.max_steps 3 --fit.epochs 1", "exactly one of epochs and max_steps"),
        ("nano --data a --out r --fit.max_steps x", "valid integer"),
        ("nano --data a --out r --fit.max_steps 1 --fit.batch_tokens 100 --fit.micro_tokens 200", "micro_tokens 200 is larger"),
        ("nano --data a --out r --fit.max_steps 1 --fit.max_length 9000", "does not fit into micro_tokens"),
        ("nano --data a --out r --fit.max_steps 1 --fit.schedule.kind sawtooth", "'constant', 'linear', 'cosine' or 'wsd'"),
        ("nano --data a --out r --fit.max_steps 1 --adapter.kind full --adapter.rank 3", "no such setting"),
    ],
)
def test_mistakes_are_told(line, says):
    with pytest.raises(UserError) as error:
        sft(line)
    assert says in str(error.value) and error.value.remedy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "odd"),
        ({"sliding_window": 8}, "belongs to gemma3"),
        ({"family": "gemma3"}, "needs it"),
    ],
)
def test_impossible_shapes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        ArchitectureSpec.parse(SHAPE | change)


def test_an_open_server_needs_a_key():
    assert ServeSpec.parse({"model": "nano"}).host == "127.0.0.1"
    with pytest.raises(UserError, match="without api_key"):
        ServeSpec.parse({"model": "nano", "host": "0.0.0.0"})


def test_a_teacher_gets_what_it_reads():
    with pytest.raises(UserError, match="reads a corpus"):
        SynthesizeSpec.parse({"out": "d"})
    with pytest.raises(UserError, match="reads no corpus"):
        SynthesizeSpec.parse({"out": "d", "corpus": "c", "teacher": "worksheets"})


@pytest.mark.parametrize("text", ["model = ", "[fit\n", "\x00", "just words"])
def test_a_damaged_spec_file_is_told(tmp_path, text):
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(UserError):
        SFTSpec.read(path)


def test_a_missing_or_huge_spec_file_is_told(tmp_path):
    with pytest.raises(UserError, match="no spec file"):
        SFTSpec.read(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_text("#" * (2 << 20))
    with pytest.raises(UserError, match="larger than"):
        SFTSpec.read(tmp_path / "big.toml")


def test_help_lists_every_variant():
    text = help_text("sft", SFTSpec)
    assert "(adamw | adamw8 | muon)" in text and "(lora | full)" in text and "--fit.schedule.kind" in text
