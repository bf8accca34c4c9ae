"""The pipe tests of test_vmshim.py, on the model: Windows' rules, virtual time, no Wine.

Left out are those that need a second process or the registry.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import time
import types
import unittest
from typing import Any

from simulation.environment import Library, Slot, start_thread
from simulation.kernel import Kernel, Process
from simulation.scheduler import Decisions, Scheduler
from simulation.threads import make_threading

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run_suite(path: str, only: str) -> int:
    """Run the tests whose names hold `only`; return the exit status."""
    with open(path, encoding="utf-8") as file:
        slot = Slot(compile(file.read(), "vmshim.py", "exec"))
    scheduler = Scheduler(Decisions(0))
    scheduler.max_steps = 10**9
    scheduler.max_seconds = 10**6
    kernel = Kernel(scheduler, reuse_handles=True)
    kernel.judges_waits = False  # a test may replace what makes a wait sensible
    slot.begin(scheduler, kernel, Process("tests"))
    slot.set_real_logging()
    slot.module.__dict__["__file__"] = path
    results: list[unittest.TestResult] = []
    began = time.monotonic()

    def main() -> None:
        tests = _load_tests(slot)
        make_runner: Any = unittest.TextTestRunner
        runner = make_runner(sys.stderr, resultclass=_Result)
        results.append(runner.run(_pipe_tests(tests, only)))

    start_thread(kernel, slot.process, "main", main)
    scheduler.run()
    scheduler.finish()
    for line in scheduler.violations:
        print(f"broken: {line}")
    print(f"{time.monotonic() - began:.1f} s, {scheduler.now - scheduler.started:.0f} s simulated")
    return 0 if results and results[0].wasSuccessful() and not scheduler.violations else 1


def _load_tests(slot: Slot) -> types.ModuleType:
    """Load test_vmshim.py so that it sees the simulated world."""
    module = types.ModuleType("test_vmshim")
    module.__dict__["__file__"] = os.path.join(ROOT, "test_vmshim.py")
    os.environ.setdefault("COMPUTERNAME", "SIMULATED")
    threading = make_threading(slot)
    processes = types.ModuleType("subprocess")
    processes.__dict__.update(subprocess.__dict__)
    processes.__dict__["Popen"] = _needs_a_process
    slot.modules.update(
        threading=threading, subprocess=processes, vmshim=slot.module, winreg=_NoRegistry()
    )
    slot.modules["ctypes"].__dict__.update(
        set_last_error=lambda code: setattr(slot.scheduler.current, "last_error", code),
        WinError=_win_error,
        windll=types.SimpleNamespace(
            **{name: Library(slot, name) for name in ("kernel32", "advapi32")}
        ),
        wintypes=importlib.import_module("ctypes.wintypes"),
    )
    module.__dict__["__builtins__"] = slot.builtins()
    sys.modules["test_vmshim"] = module
    with open(module.__dict__["__file__"], encoding="utf-8") as file:
        exec(compile(file.read(), "test_vmshim.py", "exec"), module.__dict__)
    return module


# The first traces a thread, where all threads are one; the second loads vmshim.py by import.
NOT_ON_THE_MODEL = ("test_signal_handler_may_stop_", "test_file_is_not_reloaded_")


def _pipe_tests(module: types.ModuleType, only: str) -> unittest.TestSuite:
    """Return the tests that use pipes."""
    chosen = unittest.TestSuite()
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and issubclass(kind, module.__dict__["PipeCase"]):
            for name in unittest.defaultTestLoader.getTestCaseNames(kind):
                if only in f"{kind.__name__}.{name}" and not name.startswith(NOT_ON_THE_MODEL):
                    chosen.addTest(kind(name))
    return chosen


class _Result(unittest.TextTestResult):
    """If a test is left out in the middle, its cleaning up may fail: that counts for nothing."""

    def _is_left_out(self, test: unittest.TestCase) -> bool:
        return any(test is other for other, _ in self.skipped)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        if not self._is_left_out(test):
            super().addFailure(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        if isinstance(err[1], AttributeError) and "'Kernel'" in str(err[1]):
            self.addSkip(test, f"the model lacks it: {err[1]}")
        elif not self._is_left_out(test):
            super().addError(test, err)


def _needs_a_process(*arguments: Any, **options: Any) -> Any:
    raise unittest.SkipTest("needs a second process")


class _NoRegistry(types.ModuleType):
    """Stands for winreg."""

    def __init__(self) -> None:
        super().__init__("winreg")

    def __getattr__(self, name: str) -> Any:
        raise unittest.SkipTest("needs the registry")


def _win_error(code: int) -> OSError:
    """Return what ctypes.WinError() does on Windows: the errno follows from the Win32 error."""
    kinds = {2: FileNotFoundError, 5: PermissionError, 109: BrokenPipeError, 232: BrokenPipeError}
    error = kinds.get(code, OSError)(ctypes.c_int(code).value, f"error {code}")
    error.__dict__["winerror"] = code
    return error
