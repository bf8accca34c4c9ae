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


def _run_on_model(number: int, history: histories.History) -> tuple[list[str], list[str]]:
    """Return what came of each step, and what went wrong beside that."""
    scheduler = Scheduler(Decisions(number))
    process = Process("history")
    api = histories.Api()
    kernel = Kernel(scheduler, strict=False)
    api.functions = _Functions(kernel, process)
    api.last_error = lambda: int(scheduler.current.last_error)
    api.start = lambda step: _ignore(start_thread(kernel, process, "thread", step))
    api.sleep = scheduler.sleep
    results: list[str] = []
    wrong: list[str] = []

    def body() -> None:
        results.extend(histories.run_history(history, api, f"history-{number}"))

    scheduler.spawn(process, "main", body)
    try:
        scheduler.run()
    except Exception as error:
        wrong.append(repr(error))
    scheduler.finish()
    return results, wrong + scheduler.violations


def _ignore(task: Task) -> None:
    """A history has no use for the thread that it has started."""


def compare_model() -> list[str]:
    """Run all histories on the model; return where it isn't as Windows."""
    wrong: list[str] = []
    for number, history in enumerate(histories.HISTORIES):
        results, others = _run_on_model(number, history)
        wrong += [f"{history.name}: {text}" for text in others]
        lines = histories.lines_of(history)
        if len(results) != len(lines):
            wrong.append(f"{history.name}: {len(results)} of {len(lines)} steps were run")
        for (call, windows, _), result in zip(lines, results):
            if result != windows:
                wrong.append(f"{history.name}: {call} -> {result}, not {windows}")
    return wrong
