"""Fine-tuning tasks, one file each; a new file adds a task, whose name is that of the file."""

import importlib
import inspect
import pkgutil

from commands.finetune_settings import FinetuneSettings

from .base import Task

TASKS: dict[str, type[Task]] = {}

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f".{_file.name}", __name__)
    for _class in vars(_module).copy().values():
        is_own = inspect.isclass(_class) and _class.__module__ == _module.__name__
        if is_own and issubclass(_class, Task) and not inspect.isabstract(_class):
            TASKS[_file.name] = _class

SETTINGS: dict[str, type[FinetuneSettings]] = {name: task.settings_class for name, task in TASKS.items()}

__all__ = ["SETTINGS", "TASKS", "Task"]
