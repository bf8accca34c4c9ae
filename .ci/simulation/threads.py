"""The threading module on the scheduler, as far as the tests of test_vmshim.py use it."""

from __future__ import annotations

import math
import types
from typing import Any, Callable

from simulation.environment import Slot, start_thread


class Waiting:
    """A thing that threads wait for until something is so."""

    slot: Slot  # set by make_threading()

    def __init__(self) -> None:
        self.waiters: list[Any] = []

    def wait_until(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Sleep until it is so, or the time is over; return whether it is."""
        scheduler = self.slot.scheduler
        task = self.slot.enter("wait")
        give_up = math.inf if timeout is None else scheduler.now + timeout
        while not ready() and scheduler.now < give_up:
            self.waiters.append(task)
            scheduler.block(give_up)
            self.waiters.remove(task)
        result = ready()
        self.slot.leave(task, "wait")
        return result

    def wake(self) -> None:
        """Have all look again."""
        for task in self.waiters:
            self.slot.scheduler.wake(task)


class Event(Waiting):
    """threading.Event."""

    def __init__(self) -> None:
        super().__init__()
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self.wake()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self.wait_until(lambda: self._is_set, timeout)


class Semaphore(Waiting):
    """threading.Semaphore."""

    def __init__(self, value: int = 1) -> None:
        super().__init__()
        self._value = value

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        seconds = (None if timeout is None or timeout < 0 else timeout) if blocking else 0.0
        if not self.wait_until(lambda: self._value > 0, seconds):
            return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n
        self.wake()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Thread(Waiting):
    """threading.Thread."""

    def __init__(
        self,
        target: Callable[..., object] = bool,
        name: str = "thread",
        args: tuple[Any, ...] = (),
        daemon: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.daemon = daemon
        self._target = target
        self._arguments = args
        self._task: Any = None

    def start(self) -> None:
        self._task = start_thread(self.slot.kernel, self.slot.process, self.name, self._run)

    def _run(self) -> None:
        try:
            self._target(*self._arguments)
        finally:
            self._task.ended = True
            self.wake()

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.ended

    def join(self, timeout: float | None = None) -> None:
        self.wait_until(lambda: not self.is_alive(), timeout)


def make_threading(slot: Slot) -> types.ModuleType:
    """Return a threading module for a slot."""
    module = types.ModuleType("threading")
    for kind in (Event, Semaphore, Thread):
        module.__dict__[kind.__name__] = type(kind.__name__, (kind,), {"slot": slot})
    return module
