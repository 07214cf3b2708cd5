"""What a flow can be trained to do: `TASKS` by name, each one file."""

from lfm_fast.tasks.base import CONDITIONED, TASKS, Task, task_named

__all__ = ["CONDITIONED", "TASKS", "Task", "task_named"]
