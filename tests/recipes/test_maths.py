"""`doctor --math`: everything agrees here, and what is broken is found."""

import pytest
import torch

from garage.models import attend
from garage.recipes import maths
from garage.train.objectives.likelihood import Likelihood


def test_everything_agrees() -> None:
    torch.set_num_threads(1)
    found = list(maths.differences("cpu"))
    assert len(found) == 18 and all(each.largest <= each.allowed for each in found), found
    assert {each.name for each in found if each.allowed == 0} == {"qwen3: resumed = never stopped", "gemma3: resumed = never stopped"}


def wrong(found) -> set[str]:
    return {each.name.partition(": ")[2] for each in found if not each.largest <= each.allowed}


def test_attention_that_sees_other_documents_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attend.PackedAttend.__call__
    monkeypatch.setattr(attend.PackedAttend, "__call__", lambda self, *qkv, **how: real(attend.PackedAttend((0, len(qkv[0]))), *qkv, **how))
    assert "packed, fused, in chunks = row by row, plainly" in wrong(maths.differences("cpu"))


def test_a_loss_divided_by_each_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Likelihood.loss
    monkeypatch.setattr(Likelihood, "loss", lambda self, model, micro: real(self, model, micro) / micro.learned)
    assert "many passes = one pass" in wrong(maths.differences("cpu"))
