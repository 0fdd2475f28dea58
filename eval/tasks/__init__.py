"""Tasks, found by file: every module of this package with a list TASKS adds its tasks, and any file of problems is one too."""

import importlib
import pkgutil
from pathlib import Path

from eval.tasks.base import Score, Task, TaskError

__all__ = ["TASKS", "Score", "Task", "TaskError", "find_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for module in pkgutil.iter_modules(__path__)
    for task in getattr(importlib.import_module(f"{__name__}.{module.name}"), "TASKS", ())
}


def find_task(name: str) -> Task:
    """A task by its name, or a file of problems as a task of its own.

    Raises:
        TaskError: neither.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise TaskError(f"no such file of problems: {name}")
        return Task(Path(name).stem, str(Path(name).resolve()), "a file of problems")
    raise TaskError(f"no such task: {name}; tasks: {', '.join(sorted(TASKS))}, or a path to a .jsonl file of problems")
