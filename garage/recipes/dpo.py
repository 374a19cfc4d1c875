"""`garage dpo`: a model and pairs of a better and a worse answer -> an adapter, or the whole model tuned."""

from collections import deque
from collections.abc import Mapping

from garage.core.events import Listener
from garage.models.layers import Model
from garage.recipes.run import Run
from garage.recipes.trained import Trained
from garage.recipes.tune import plan as plan_tuning
from garage.recipes.tune import tune
from garage.specs.train import DPOSpec
from garage.store.dataset import Encoded
from garage.train.objectives.preference import Preference, reference_log_probs

PATIENCE = 10  # steps over which the better answer's likelihood must have fallen


def dpo(spec: DPOSpec, *listeners: Listener) -> Trained:
    """Tune `spec.model` on preferences.

    Warns when the better answers themselves become less likely, which is how this objective goes wrong.

    Raises:
        UserError: a missing model or dataset, rows without two different answers, a loss that is not finite, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """

    def aim(run: Run, model: Model, train: Encoded, held: Encoded | None) -> Preference:
        run.events.listen(Watch(run))
        if spec.preference.kind == "simpo":
            return Preference(spec.preference, spec.fit.loss_chunk)
        run.events.emit("stage", name="reference", detail="log-probabilities under the model as it is")
        sums = [None if rows is None or not len(rows) else reference_log_probs(model, rows, spec.fit) for rows in (train, held)]
        return Preference(spec.preference, spec.fit.loss_chunk, train=sums[0], held=sums[1])

    return tune("dpo", spec, listeners, aim, pairs=True)


def plan(spec: DPOSpec) -> dict[str, object]:
    """What would be trained, and how long."""
    return plan_tuning(spec, pairs=True)


class Watch:
    """Says once when the better answers have become less likely over the last steps."""

    def __init__(self, run: Run) -> None:
        self._run, self._changes, self._has_said = run, deque[float](maxlen=PATIENCE), False

    def __call__(self, event: Mapping[str, object]) -> None:
        if (change := event.get("chosen_change")) is None:
            return
        self._changes.append(float(str(change)))
        if not self._has_said and len(self._changes) == PATIENCE and max(self._changes) < 0:
            self._has_said = True
            message = f"the better answers have become less likely, by {-self._changes[-1]:.2f} nats: the model is forgetting how to answer"
            remedy = "lower --fit.optimizer.lr, raise --preference.beta, or give --preference.rpo 1"
            self._run.events.emit("warning", message=message, remedy=remedy)
