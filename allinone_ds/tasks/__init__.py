"""Task kinds: one class per kind with its head, loss, targets, metric and drawing.

May import `models`, `data` and the modules at the bottom of the package.
"""

from allinone_ds.data.base import Sample
from allinone_ds.tasks.base import Prediction, Task
from allinone_ds.tasks.registry import TASKS, build_task, task_class

__all__ = ["TASKS", "Prediction", "Sample", "Task", "build_task", "task_class"]
