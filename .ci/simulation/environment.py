"""What vmshim.py sees of the world, simulated: ctypes, time, _thread, sys, os.urandom().

A `Slot` is one copy of the unchanged vmshim.py in a namespace of its own, as one process has it.
Loading it takes some milliseconds, so the slots are kept and get a new process for each run. Its
imports, also those inside functions, go through a builtins.__import__ of the slot's own, which
hands out the simulated modules.

Ctrl-C: CPython looks for signals when a call into C has returned, so a KeyboardInterrupt can come
before a call has done anything, or after it, when its result is lost. Windows interrupts no wait
but time.sleep(). It is raised in a process' main thread only.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import sys
import types
from typing import Any, Callable

from simulation.fibers import GreenletExit
from simulation.kernel import INVALID_HANDLE_VALUE, Kernel, Process
from simulation.scheduler import Scheduler, Task

_FREEING = ("CloseHandle", "LocalFree")  # called by finalisers, so they can't be switch points

# The errors with which each function may fail, besides those that its arguments bring about:
# ERROR_NOT_ENOUGH_MEMORY, ERROR_NO_SYSTEM_RESOURCES, and what its documentation names.
DOCUMENTED_ERRORS: dict[str, tuple[int, ...]] = {
    "CreateFileW": (8, 1450, 5),
    "CreateNamedPipeW": (8, 1450, 231),
    "CreateEventW": (8, 1450),
    "WaitNamedPipeW": (2, 8, 121),
    "ReadFile": (8, 1450, 1453),
    "WriteFile": (8, 1450, 1453),
    "ConnectNamedPipe": (8, 1450),
}


class Slot:
    """A copy of vmshim.py, and the simulated process that runs it at the moment."""

    def __init__(self, code: types.CodeType) -> None:
        self.process = Process("none")
        self.process.dead = True
        self.scheduler: Any = None
        self.kernel: Any = None
        self.faulty: Any = ()
        self.clock_step = 0.0
        self.fine = False
        self.logged: list[str] = []
        self.module = types.ModuleType("vmshim")
        self.modules = self._modules()
        namespace = self.module.__dict__
        namespace["__builtins__"] = self.builtins()
        # dataclasses, enum and NamedTuple look their module up by its name.
        sys.modules["vmshim"] = self.module
        exec(code, namespace)
        self.max_request = namespace["MAX_REQUEST"]

    def begin(self, scheduler: Scheduler, kernel: Kernel, process: Process) -> None:
        """Start as a new process."""
        self.process = process
        self.process.under_way = self.module.__dict__["_under_way"]
        self.scheduler = scheduler
        self.kernel = kernel
        self.faulty = ()
        self.clock_step = 0.0
        self.logged.clear()

    def builtins(self) -> dict[str, Any]:
        """Return the builtins, with an import that hands out the simulated modules."""
        return {**builtins.__dict__, "__import__": _imports(self.modules)}

    def set_real_logging(self) -> None:
        """Let vmshim log as it does outside."""
        del self.modules["logging"]
        self.modules["sys"].__dict__["modules"] = sys.modules

    def end(self) -> None:
        """Forget the process."""
        self.process.dead = True
        self.module.__dict__["_under_way"].clear()
        self.module.__dict__["MAX_REQUEST"] = self.max_request

    # Each call into the simulated world begins with enter() and ends with leave().

    def enter(self, what: str) -> Task:
        """Let others go on; a Ctrl-C may come before the call has done anything."""
        if self.process.dead:
            raise GreenletExit
        scheduler = self.scheduler
        scheduler.point()
        task: Task = scheduler.current
        if task.interrupts:
            self._interrupt(task, what)
        return task

    def leave(self, task: Task, what: str) -> None:
        """A Ctrl-C may come when the call is done and its result not yet assigned."""
        if self.fine:
            self.scheduler.point()
        if task.interrupts:
            self._interrupt(task, f"{what}, done")

    def _interrupt(self, task: Task, what: str) -> None:
        task.points += 1
        if task.points == task.interrupts[0]:
            del task.interrupts[0]
            self.scheduler.interrupted(task, what)
            raise KeyboardInterrupt

    def _modules(self) -> dict[str, Any]:
        thread = types.ModuleType("_thread")
        thread.__dict__.update(
            start_new_thread=lambda function, arguments: id(
                start_thread(self.kernel, self.process, "thread", lambda: function(*arguments))
            ),
            get_ident=lambda: id(self.scheduler.current),
            interrupt_main=self._interrupt_main,
            _count=lambda: sum(not task.ended for task in self.scheduler.tasks[1:]),
        )
        time = types.ModuleType("time")
        time.__dict__.update(monotonic=self._monotonic, time=self._monotonic, sleep=self._sleep)
        time.__dict__.update(perf_counter=self._perf_counter)
        logging = types.ModuleType("logging")
        logging.__dict__.update(DEBUG=10, INFO=20, WARNING=30, ERROR=40)
        logging.__dict__.update(getLogger=lambda name: _Logger(self.logged))
        system = _System("sys")
        system.__dict__.update(platform="win32", modules={"logging": logging})
        operating_system = types.ModuleType("os")
        operating_system.__dict__.update(os.__dict__, urandom=self._urandom)
        return {
            "ctypes": self._ctypes(),
            "logging": logging,
            "os": operating_system,
            "_thread": thread,
            "time": time,
            "sys": system,
        }

    # time

    def _perf_counter(self) -> float:
        self.scheduler.look_at_clock()
        return float(self.scheduler.now)

    def _monotonic(self) -> float:
        now = self._perf_counter()
        step = self.clock_step
        return now - now % step if step else now

    def _sleep(self, seconds: float) -> None:
        task = self.enter("sleep")
        if self.scheduler.keep_history:
            self.scheduler.note(f"sleep {seconds:.3f}")
        self.scheduler.block(self.scheduler.now + seconds)
        task.paused += seconds
        self.leave(task, "sleep")

    # os

    def _urandom(self, size: int) -> bytes:
        """These bytes come again in a replay, which the system's would not."""
        return bytes([int(self.scheduler.now * 1000) % 256] * size)

    # _thread

    def _interrupt_main(self) -> None:
        main = self.scheduler.tasks[0]
        main.interrupts = [main.points + 1]

    # ctypes

    def _ctypes(self) -> types.ModuleType:
        module = types.ModuleType("ctypes")
        module.__dict__.update(ctypes.__dict__)
        module.__dict__.update(
            WinDLL=lambda name, use_last_error=False: Library(self, name),
            get_last_error=self._get_last_error,
            FormatError=lambda code: f"error {code}",
            c_long=ctypes.c_int32,  # a long of Windows has 32 bits
            c_ulong=ctypes.c_uint32,
        )
        return module

    def _get_last_error(self) -> int:
        error: int = self.scheduler.current.last_error
        return error


class Library:
    """A ctypes.WinDLL whose functions are the model's."""

    def __init__(self, slot: Slot, name: str) -> None:
        self._slot = slot
        self._name = name  # which the suite looks at

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = Freeing(self._slot, name) if name in _FREEING else Function(self._slot, name)
        setattr(self, name, function)
        return function


class Function:
    """A function of a Library; takes a prototype as ctypes' do."""

    def __init__(self, slot: Slot, name: str) -> None:
        self.slot = slot
        self.name = self.__name__ = name
        self.restype: Any = ctypes.c_int
        self.argtypes: Any = None
        self.errors = DOCUMENTED_ERRORS.get(name, ())
        self.makes_handle = name in ("CreateFileW", "CreateNamedPipeW")

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._call(arguments)
        except KeyboardInterrupt as error:
            # A traceback keeps the variables of its frames. A call into C has none.
            arguments = ()
            raise error.with_traceback(None) from None

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        slot = self.slot
        task = slot.enter(self.name)
        scheduler = slot.scheduler
        size = 0.0
        if self.name in slot.faulty:
            size = scheduler.fault(self.name)
        if size:
            if self.name in ("CreateNamedPipeW", "ConnectNamedPipe"):
                slot.process.refused_at = scheduler.now
            task.last_error = self.errors[int(size * len(self.errors))]
            result = INVALID_HANDLE_VALUE if self.makes_handle else 0
        else:
            result = getattr(slot.kernel, self.name)(slot.process, *arguments)
        if scheduler.keep_history:
            scheduler.note(describe_call(self.name, arguments, result, task.last_error))
        # The result exists before a Ctrl-C can make it get lost.
        made = self._convert(result)
        slot.leave(task, self.name)
        return made

    def _convert(self, result: int) -> Any:
        restype = self.restype
        if restype is ctypes.c_void_p:
            return result or None
        if isinstance(restype, type) and issubclass(restype, ctypes.c_void_p):
            return restype(result)
        return result


class Freeing:
    """A function that finalisers call: no switch point, and no Ctrl-C inside."""

    def __init__(self, slot: Slot, name: str) -> None:
        self.slot = slot
        self.name = name
        self.argtypes: Any = None
        self.restype: Any = None

    def __call__(self, object_: Any) -> int:
        slot = self.slot
        value = object_.value
        if slot.process.dead or (value or 0) - slot.process.first_handle & ~0xFFFF:
            return 1  # of an earlier run, or of a call that failed
        if slot.scheduler.keep_history:
            slot.scheduler.note(f"{self.name} {value & 0xFFFF:#x}")
        result: int = getattr(slot.kernel, self.name)(slot.process, object_)
        return result


class _System(types.ModuleType):
    """The module sys, but for what is set here."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


class _Logger:
    """logging.Logger, as far as vmshim uses it."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def isEnabledFor(self, level: int) -> bool:
        return level >= 30

    def log(self, level: int, message: str, *arguments: object) -> None:
        name = "error" if level >= 40 else "warning"
        self._lines.append(f"{name}: {message % arguments}")


def start_thread(
    kernel: Kernel, process: Process, name: str, function: Callable[[], object]
) -> Task:
    """Start a thread; when it ends, Windows cancels what it has started."""
    scheduler: Any = kernel.world

    def body() -> None:
        try:
            function()
        except GreenletExit:
            raise
        except BaseException as error:
            scheduler.broken("exception", f"a thread ended with {error!r}")
        finally:
            if not process.dead:
                kernel.end_thread(process, task)

    task: Task = scheduler.spawn(process, name, body)
    return task


def _imports(modules: dict[str, Any]) -> Callable[..., Any]:
    def import_(
        name: str,
        globals_: Any = None,
        locals_: Any = None,
        fromlist: tuple[str, ...] = (),
        level: int = 0,
    ) -> Any:
        if name in modules:
            return modules[name]
        return __import__(name, globals_, locals_, fromlist, level)

    return import_


def describe_call(name: str, arguments: tuple[Any, ...], result: int, error: int) -> str:
    """Return a call as a line of the history."""
    shown = ", ".join(_describe(argument) for argument in arguments[:4])
    failed = not result or result == INVALID_HANDLE_VALUE
    return f"{name}({shown}) = {f'error {error}' if failed else f'{result:#x}'}"


def _describe(argument: Any) -> str:
    argument = getattr(argument, "_obj", argument)
    if isinstance(argument, ctypes.Structure):
        return f"ov@{ctypes.addressof(argument) & 0xFFFFF:x}"
    if isinstance(argument, ctypes.Array):
        return f"buffer[{len(argument)}]"
    if isinstance(argument, bytes):
        return repr(argument[:60])
    value = getattr(argument, "value", argument)
    if isinstance(value, str):
        return repr(value[-20:])
    if isinstance(value, int):
        # A handle without the base that its run has.
        return hex(value & 0xFFFF if 0x10000 < value < 2**31 else value)
    return str(value)
