"""Where the time of a call of vmshim goes; see `python3 .ci/bench.py --profile`."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from typing import Any, Callable

import vmshim


class TimedFunctions:
    """Stands for kernel32: does the same, and remembers how long each call took."""

    def __init__(self) -> None:
        self.real = vmshim._kernel32
        self.seconds: dict[str, list[float]] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.real, name)

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.seconds.setdefault(name, []).append(time.perf_counter() - started)
            # A handle by its number: we must not keep it open.
            self.arguments[name] = tuple(
                each.value if isinstance(each, ctypes.c_void_p) else each for each in arguments
            )
            return result

        setattr(self, name, call)
        return call


def conversion_time(name: str, arguments: tuple[Any, ...]) -> float:
    """Return how long ctypes takes for a call: for one of a function that does nothing."""
    model = getattr(vmshim._kernel32, name)
    idle = ctypes.WinDLL("kernel32", use_last_error=True)["GetLastError"]
    idle.argtypes = model.argtypes
    count = 2000
    started = time.perf_counter()
    for _ in range(count):
        idle(*arguments)
    return (time.perf_counter() - started) / count


class LineTimer:
    """Traces vmshim.py, and adds up the time of each line, less what the tracing itself takes."""

    def __init__(self) -> None:
        self.file = vmshim.__file__
        self.samples: dict[int, list[float]] = {}
        self.counts: dict[int, int] = {}
        self._line = 0
        self._since = 0.0
        self._spent: dict[int, float] = {}

    def run(self, call: Callable[[], object]) -> None:
        self._line, self._spent, self.counts = 0, {}, {}
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(None)
        for line, seconds in self._spent.items():
            self.samples.setdefault(line, []).append(seconds)

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        now = time.perf_counter()
        if self._line:
            self._spent[self._line] = self._spent.get(self._line, 0.0) + now - self._since
        self._line = 0
        if event == "return":
            # What remains of the caller's line.
            frame = frame.f_back
        if frame and frame.f_code.co_filename == self.file:
            self._line = frame.f_lineno
            if event == "line":
                self.counts[self._line] = self.counts.get(self._line, 0) + 1
        self._since = time.perf_counter()
        return self._trace if self._line else None

    def print(self) -> None:
        """Print each line that ran, in the file's order."""
        medians = {line: statistics.median(samples) for line, samples in self.samples.items()}
        # The cheapest line stands for what the tracing of any line takes.
        tracing = min(medians[line] / count for line, count in self.counts.items())
        with open(self.file, encoding="utf-8") as file:
            text = file.read().splitlines()
        for line, seconds in sorted(medians.items()):
            count = self.counts.get(line, 0)
            own = (seconds - tracing * count) * 1e6
            print(f"{own:7.1f} µs  {count:2} x  {line:4}  {text[line - 1]}")


def profile(call: Callable[[], object], rounds: int) -> None:
    """Print where a call's time goes: in sum, by Win32 function, and line by line."""
    lines = LineTimer()
    for _ in range(rounds):
        lines.run(call)
    functions = TimedFunctions()
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
        vars(vmshim)["_kernel32"] = functions
        try:
            call()
        finally:
            vars(vmshim)["_kernel32"] = functions.real
    whole = statistics.median(samples)

    print(f"A call takes {whole * 1e6:.0f} µs; of that in the functions of kernel32:\n")
    print("| function | calls | kernel, µs | ctypes conversion, µs |")
    print("| --- | --- | --- | --- |")
    kernel = conversion = 0.0
    for name, seconds in functions.seconds.items():
        count = len(seconds) / rounds
        converting = conversion_time(name, functions.arguments[name]) * count
        inside = statistics.median(seconds) * count - converting
        kernel, conversion = kernel + inside, conversion + converting
        print(f"| {name} | {count:.1f} | {inside * 1e6:.1f} | {converting * 1e6:.1f} |")
    rest = whole - kernel - conversion
    print(
        f"\nKernel {kernel * 1e6:.0f} µs, ctypes conversion {conversion * 1e6:.0f} µs; the other "
        f"{rest * 1e6:.0f} µs are Python's and the closing of the handle.\n\n"
        "Line by line, less what the tracing takes. A line that calls Windows waits for it, too:\n"
    )
    lines.print()
