"""`garage distill`: a model, a larger teacher of the same vocabulary, and conversations -> an adapter, or the whole model tuned."""

import torch

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.kernels.distill import Match
from garage.models.adapters import attach
from garage.models.families import config_of
from garage.models.layers import Model
from garage.models.weights import load_model, pick_device
from garage.recipes.run import Run
from garage.recipes.trained import Trained
from garage.recipes.tune import plan as plan_tuning
from garage.recipes.tune import tune
from garage.specs.train import DistillSpec
from garage.store.dataset import Encoded
from garage.store.locate import Located, locate
from garage.tokens.tokenizer import Tokenizer
from garage.train.objectives.distill import Distillation

SHOWN = 5  # tokens named where two vocabularies differ


def distill(spec: DistillSpec, *listeners: Listener) -> Trained:
    """Tune `spec.model` on `spec.data` towards `spec.teacher`.

    Raises:
        UserError: the two vocabularies differ; a missing model or dataset, rows that must not be trained on, a loss that is not finite.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    source = locate(spec.teacher)
    same_vocabulary(locate(spec.model), source)

    def aim(run: Run, model: Model, train: Encoded, held: Encoded | None) -> Distillation:
        run.events.emit("stage", name=f"loading the teacher {source.name}")
        match = Match(spec.divergence, spec.temperature, spec.mix)
        return Distillation(_teacher(spec, source), match, spec.fit.loss_chunk)

    return tune("distill", spec, listeners, aim)


def plan(spec: DistillSpec) -> dict[str, object]:
    """What would be trained, from whom, and how long."""
    source = locate(spec.teacher)
    same_vocabulary(locate(spec.model), source)
    return plan_tuning(spec) | {"teacher": source.name, "teacher layers": config_of(source.base).num_hidden_layers}


def same_vocabulary(student: Located, teacher: Located) -> None:
    """Refuse two models whose ids mean different tokens, and say which."""
    mine, theirs = (Tokenizer.load(source.newest) for source in (student, teacher))
    sizes = mine.vocab_size, theirs.vocab_size
    differ = [i for i in range(max(sizes)) if mine.id_to_token(i) != theirs.id_to_token(i)] if mine.hash != theirs.hash else []
    if differ:
        listed = ", ".join(f"{i} is {mine.id_to_token(i)!r} here and {theirs.id_to_token(i)!r} there" for i in differ[:SHOWN])
        what = f"the vocabulary of {student.name} ({sizes[0]:,} tokens) is not that of the teacher {teacher.name} ({sizes[1]:,})"
        remedy = "take a teacher of the same family; or let it write answers (garage synthesize --teacher) and tune on them"
        raise UserError(f"{what}: {len(differ):,} ids differ: {listed}", remedy=remedy)


def _teacher(spec: DistillSpec, source: Located) -> Model:
    """The teacher in the run's precision; an adapter stays unmerged, so that its base may be held in few bits."""
    bits, dtype = "" if spec.teacher_quantize == "none" else spec.teacher_quantize, getattr(torch, spec.fit.dtype)
    model = load_model(source.base, dtype=dtype, device=pick_device(spec.device), quantize=bits)
    model.compute_dtype = dtype
    return model if source.adapter is None else attach(model, source.adapter)
