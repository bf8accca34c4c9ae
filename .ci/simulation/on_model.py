"""The histories of histories.py, on the model."""

from __future__ import annotations

from typing import Any, Callable

from simulation import histories
from simulation.environment import start_thread
from simulation.kernel import Kernel, Process
from simulation.scheduler import Decisions, Scheduler, Task


class _Functions:
    """The model's functions, called for one process."""

    def __init__(self, kernel: Kernel, process: Process) -> None:
        self._kernel = kernel
        self._process = process

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._kernel, name)
        return lambda *arguments: function(self._process, *arguments)


def _run_on_model(number: int, history: histories.History) -> list[str]:
    """Return what went wrong in a history."""
    scheduler = Scheduler(Decisions(number))
    process = Process("history")
    api = histories.Api()
    kernel = Kernel(scheduler, strict=False)
    api.functions = _Functions(kernel, process)
    api.functions_of = lambda account: _functions_of(kernel, process, account)
    api.last_error = lambda: int(scheduler.current.last_error)
    api.start = lambda step: _ignore(start_thread(kernel, process, "thread", step))
    api.sleep = scheduler.sleep
    wrong = ["it has not come to its end"]

    def body() -> None:
        wrong[:] = histories.compare(history, api, f"history-{number}", wine=False)

    scheduler.spawn(process, "main", body)
    try:
        scheduler.run()
    except Exception as error:
        wrong.append(repr(error))
    scheduler.finish()
    return wrong + scheduler.violations


def _functions_of(kernel: Kernel, process: Process, account: str) -> _Functions:
    """Return the functions for a process of another account, with the same handles."""
    other = Process(account, account=account)
    other.handles = process.handles
    other.next_value = process.next_value
    return _Functions(kernel, other)


def _ignore(task: Task) -> None:
    """A history has no use for the thread that it has started."""


def compare_model() -> list[str]:
    """Run all histories on the model; return where it isn't as Windows."""
    return [
        f"{history.name}: {text}"
        for number, history in enumerate(histories.HISTORIES)
        for text in _run_on_model(number, history)
    ]
