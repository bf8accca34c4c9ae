"""The histories of histories.py, on the model."""

from __future__ import annotations

from typing import Any, Callable, List

from simulation import histories
from simulation.kernel import Kernel, Process
from simulation.scheduler import Decisions, Scheduler


class _Functions:
    """The model's functions, called for one process."""

    def __init__(self, kernel: Kernel, process: Process) -> None:
        self._kernel = kernel
        self._process = process

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._kernel, name)
        return lambda *arguments: function(self._process, *arguments)


def compare_model() -> List[str]:
    """Run all histories on the model; return where it isn't as Windows."""
    wrong: List[str] = []
    for number, history in enumerate(histories.HISTORIES):
        scheduler = Scheduler(Decisions(number))
        process = Process("history")
        kernel = Kernel(scheduler, strict=False)
        api = histories.Api()
        api.functions = _Functions(kernel, process)
        api.last_error = lambda world=scheduler: world.current.last_error
        api.start = lambda step, world=scheduler, p=process: world.spawn(p, "thread", step)
        api.sleep = scheduler.sleep
        results: List[str] = []

        def body(history=history, api=api, number=number, results=results) -> None:
            results += histories.run_history(history, api, f"history-{number}")

        scheduler.spawn(process, "main", body)
        try:
            scheduler.run()
        except Exception as error:
            wrong.append(f"{history.name}: {error!r}")
        wrong += [f"{history.name}: {text}" for text in scheduler.violations]
        lines = histories.lines_of(history)
        if len(results) != len(lines):
            wrong.append(f"{history.name}: {len(results)} of {len(lines)} steps were run")
        for (call, windows, _), result in zip(lines, results):
            if result != windows:
                wrong.append(f"{history.name}: {call} -> {result}, not {windows}")
        scheduler.finish()
    return wrong
