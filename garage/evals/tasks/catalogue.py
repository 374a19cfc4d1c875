"""The tasks by name: one line each."""

from collections.abc import Mapping

from garage.evals.task import Task
from garage.evals.tasks.custom import Custom
from garage.evals.tasks.gsm8k import Gsm8k
from garage.evals.tasks.worksheets import Worksheets
from garage.specs.evals import TaskName

TASKS: Mapping[TaskName, Task] = {"gsm8k": Gsm8k(), "worksheets": Worksheets(), "custom": Custom()}
