"""The tasks by name: one line each."""

from collections.abc import Callable, Iterable, Mapping

from garage.core.types import Row
from garage.evals.task import Task
from garage.evals.tasks.custom import Custom
from garage.evals.tasks.gsm8k import Gsm8k
from garage.evals.tasks.worksheets import Worksheets
from garage.specs.evals import TaskName

TASKS: Mapping[TaskName, Callable[[], Task]] = {"gsm8k": Gsm8k, "worksheets": Worksheets, "custom": Custom}


def task_named(name: TaskName, rows: Iterable[Row] | None = None) -> Task:
    """The task called `name`; `rows` are items made by the caller, for worksheets only."""
    return Worksheets(rows) if name == "worksheets" else TASKS[name]()
