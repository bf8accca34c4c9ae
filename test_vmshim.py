# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the vmshim maintainers
"""The tests of vmshim: `python test_vmshim.py`, or on Linux `.ci/wine-python test_vmshim.py`.

What needs no pipe runs on every platform. The other tests use real pipes of the real kernel32,
and stand on both sides: the client is tried against server ends written here, the server against
clients written here, so that the two can't share a mistake.

vmshim.py may have been cut after any of its parts: the tests of what isn't there are skipped.

Besides unittest's options, `--fuzz N` tries N inputs made at random instead of 2000, and `--seed N`
makes others.
"""

from __future__ import annotations

import _thread
import argparse
import builtins
import contextlib
import copy
import ctypes
import decimal
import dis
import doctest
import errno
import faulthandler
import functools
import gc
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import unittest
import uuid
from ctypes.wintypes import BOOL, DWORD, HANDLE, LPCWSTR, LPDWORD, LPVOID
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, Callable, ContextManager, Dict, Iterator, NamedTuple, TypeVar
from unittest import mock

import vmshim
from vmshim import *

HERE = os.path.dirname(os.path.abspath(__file__))
WINDOWS = sys.platform == "win32"


def needs(name: str, part: str) -> Callable[[Tested], Tested]:
    """Skip a test, or a class and those that are derived from it, where vmshim has no such name."""
    return unittest.skipUnless(hasattr(vmshim, name), f"vmshim.py was cut: it has no {part}")


needs_pipes = unittest.skipUnless(
    WINDOWS, "needs named pipes: `.ci/wine-python test_vmshim.py` runs it on Linux"
)
needs_state = needs("Container", "state of runhcs")
needs_server = needs("VMShimServer", "server")
needs_command_line = needs("main", "command line")

LONG = 30.0  # seconds; longer than anything here takes, unless it hangs
MEBIBYTE = 1 << 20
REQUEST = VMRequest("test", VMRequestOp.CREATE_CONTAINER)
NEVER = datetime(1, 1, 1, tzinfo=timezone.utc)
GUID = str(uuid.uuid4())  # another each time, so that two runs of this suite don't meet
STOPPED = b"the VM shim stopped before it had carried the request out"
TOO_LATE = b"no complete request came in time"
NO_TEXT = b"the handler gave no text"

Step = Callable[[], object]
Handler = Callable[[VMRequest], object]
T = TypeVar("T")
Tested = TypeVar("Tested", bound=Callable[..., Any])
Error = TypeVar("Error", bound=BaseException)


# ---- The other end of a pipe --------------------------------------------------------------------

ERROR_ACCESS_DENIED = 5
ERROR_NETNAME_DELETED = 64
ERROR_BROKEN_PIPE = 109
ERROR_PIPE_BUSY = 231
ERROR_NO_DATA = 232
ERROR_PIPE_NOT_CONNECTED = 233
ERROR_PIPE_CONNECTED = 535
ERROR_INTERNAL_ERROR = 1359
STATUS_PENDING = 0x103
STATUS_CANCELLED = 0xC0000120

PIPE_ACCESS_INBOUND = 1
PIPE_ACCESS_DUPLEX = 3
PIPE_TYPE_BYTE = 0
PIPE_TYPE_MESSAGE = 4
PIPE_READMODE_MESSAGE = 2
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
INVALID_HANDLE_VALUE = ctypes.c_void_p(-1).value

windows: Any = ctypes  # some of its functions are there on Windows only
kernel32: Any = None


class RawHandle(ctypes.c_void_p):
    """A handle that nobody closes by itself."""


if WINDOWS:
    # A library of our own: out of reach of what tests put in the place of vmshim's functions.
    kernel32 = windows.WinDLL("kernel32", use_last_error=True)
    for function, restype, *argtypes in (
        (kernel32.CloseHandle, BOOL, HANDLE),
        (kernel32.ConnectNamedPipe, BOOL, HANDLE, LPVOID),
        (kernel32.CreateEventW, RawHandle, LPVOID, BOOL, BOOL, LPCWSTR),
        (kernel32.CreateFileW, RawHandle, LPCWSTR, DWORD, DWORD, LPVOID, DWORD, DWORD, HANDLE),
        (kernel32.CreateNamedPipeW, RawHandle, LPCWSTR, *[DWORD] * 6, LPVOID),
        (kernel32.DisconnectNamedPipe, BOOL, HANDLE),
        (kernel32.FlushFileBuffers, BOOL, HANDLE),
        (kernel32.ReadFile, BOOL, HANDLE, LPVOID, DWORD, LPDWORD, LPVOID),
        (kernel32.SetNamedPipeHandleState, BOOL, HANDLE, LPDWORD, LPVOID, LPVOID),
        (kernel32.WaitNamedPipeW, BOOL, LPCWSTR, DWORD),
        (kernel32.WriteFile, BOOL, HANDLE, LPVOID, DWORD, LPDWORD, LPVOID),
    ):
        function.restype, function.argtypes = restype, argtypes


def win_error() -> OSError:
    error: OSError = windows.WinError(windows.get_last_error())
    return error


def winerror(error: BaseException) -> int:
    """Return error.winerror, which type checkers know on Windows only."""
    number: int = getattr(error, "winerror", 0)
    return number


class RawPipe:
    """One end of a pipe, blocking and without any care: the other half of each test."""

    def __init__(self, handle: Any) -> None:
        if handle.value == INVALID_HANDLE_VALUE:
            raise win_error()
        self.handle = handle

    def __enter__(self) -> RawPipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def listen(
        cls,
        path: str,
        *,
        access: int = PIPE_ACCESS_DUPLEX,
        mode: int = PIPE_TYPE_MESSAGE,
        instances: int = 255,
        buffers: int = 4096,
        inbound: int | None = None,
        security: Any = None,
    ) -> RawPipe:
        sizes = buffers, buffers if inbound is None else inbound
        return cls(kernel32.CreateNamedPipeW(path, access, mode, instances, *sizes, 0, security))

    @classmethod
    def dial(cls, path: str, *, patience: float = LONG) -> RawPipe:
        give_up = time.monotonic() + patience
        while True:
            try:
                return cls(kernel32.CreateFileW(path, 0xC0000000, 0, None, 3, 0, None))
            except OSError as error:
                if winerror(error) != ERROR_PIPE_BUSY or time.monotonic() >= give_up:
                    raise
            kernel32.WaitNamedPipeW(path, 100)

    def connect(self) -> None:
        if not kernel32.ConnectNamedPipe(self.handle, None):
            error = win_error()
            if winerror(error) not in (ERROR_PIPE_CONNECTED, ERROR_NO_DATA):
                raise error

    def read(self, size: int = 65536) -> bytes:
        buffer, count = ctypes.create_string_buffer(size), DWORD()
        if not kernel32.ReadFile(self.handle, buffer, size, count, None):
            error = win_error()
            if winerror(error) == ERROR_BROKEN_PIPE:
                return b""
            raise error
        return buffer.raw[: count.value]

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def write(self, data: bytes) -> int:
        if not kernel32.WriteFile(self.handle, data, len(data), DWORD(), None):
            raise win_error()
        return len(data)

    def flush(self) -> None:
        """Wait until the other end has read everything."""
        kernel32.FlushFileBuffers(self.handle)

    def disconnect(self) -> None:
        kernel32.DisconnectNamedPipe(self.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            kernel32.CloseHandle(handle)


Script = Callable[[RawPipe], object]


def new_pipe_path() -> str:
    return rf"\\.\pipe\vmshim-test-{uuid.uuid4()}"


def wire(id: str = "test", op: str = "create") -> bytes:
    return VMRequest(id, op).to_json()


def lowest_free_handle() -> int:
    """Windows and Wine hand out the lowest free handle value: with no leak it does not grow."""
    handle = kernel32.CreateEventW(None, True, False, None)
    kernel32.CloseHandle(handle)
    value: int = handle.value
    return value


def nothing() -> None:
    pass


def once(act: Step) -> Step:
    """Return a function that does something when it is called first."""
    acts = iter([act])
    return lambda: next(acts, nothing)()


@contextlib.contextmanager
def spying(name: str, *, before: Step = nothing, after: Step = nothing) -> Iterator[list[Any]]:
    """Give the arguments of vmshim's calls of a Win32 function; call these around each."""
    function = getattr(vmshim._kernel32, name)
    calls = []

    def spy(*arguments: Any) -> Any:
        # A reference to a handle would keep it open.
        calls.append(
            tuple(part.value if isinstance(part, vmshim._Handle) else part for part in arguments)
        )
        before()
        result = function(*arguments)
        error = windows.get_last_error()
        after()
        windows.set_last_error(error)
        return result

    with replacing(name, spy):
        yield calls


@contextlib.contextmanager
def failing(name: str, *errors: int | None) -> Iterator[None]:
    """Have a Win32 function fail with these errors, one a call; at None it works, as afterwards."""
    function = getattr(vmshim._kernel32, name)
    left = list(errors)

    def fail(*arguments: Any) -> Any:
        error = left.pop(0) if left else None
        if error is None:
            return function(*arguments)
        windows.set_last_error(error)
        failure = INVALID_HANDLE_VALUE if name.endswith(("FileW", "PipeW")) else None
        return vmshim._Handle(failure) if name.startswith("Create") else 0

    with replacing(name, fail):
        yield


def replacing(name: str, function: Callable[..., Any]) -> ContextManager[Any]:
    """Put another function in the place of one of Windows' functions, for vmshim only."""
    return mock.patch.object(vmshim._kernel32, name, function)


# ---- Helpers of the tests -----------------------------------------------------------------------


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    give_up = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < give_up, "it doesn't come true"
        time.sleep(0.001)


def another_copy(name: str) -> Any:
    """Load vmshim.py once more, as another module."""
    spec = importlib.util.spec_from_file_location(name, vmshim.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {name: module}):
        spec.loader.exec_module(module)
    return module


class Case(unittest.TestCase):
    def caught(
        self, kind: type[Error], call: Callable[..., object], *arguments: Any, **options: Any
    ) -> Error:
        """Return the exception that a call raises."""
        with self.assertRaises(kind) as caught:
            call(*arguments, **options)
        return caught.exception

    def enter(self, manager: ContextManager[T]) -> T:
        """Enter a context that the test's end leaves."""
        result = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return result

    def with_broken_logging(self, call: Callable[[io.StringIO], object]) -> None:
        """Call something for each way in which logging can be broken, with what stderr gets."""
        # The usual hook of a program that logs: it would meet the same handler.
        self.enter(mock.patch.object(sys, "excepthook", lambda *_: logging.error("uncaught")))
        logger = logging.getLogger("vmshim")
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.DEBUG)
        in_place = functools.partial(mock.patch.dict, sys.modules)
        fail = mock.Mock(side_effect=ZeroDivisionError("disk full"))
        for name, broken in (
            ("blocked", in_place(logging=None)),
            ("somebody's own", in_place(logging=types.ModuleType("logging"))),
            ("no traceback", in_place(logging=None, traceback=None)),
            ("a logger class that raises", mock.patch.object(logging, "getLogger", fail)),
            ("a filter that raises", mock.patch.object(logging.Logger, "isEnabledFor", fail)),
            ("a handler that raises", mock.patch.object(logging.Logger, "handle", fail)),
        ):
            with self.subTest(name), broken, contextlib.redirect_stderr(io.StringIO()) as err:
                call(err)

    def skip_unless_denied(self, call: Step, reason: str) -> None:
        """Skip the test where access is not denied to what Windows denies it to."""
        with contextlib.suppress(PermissionError):
            call()
            self.skipTest(reason)


def writing(data: bytes) -> Script:
    """Return a step of a fake shim's."""
    return lambda pipe: pipe.write(data)


@needs_pipes
class PipeCase(Case):
    """Runs the other half of a test in a thread, and sees to it that no thread is left."""

    def setUp(self) -> None:
        # A test that hangs says where.
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.path = new_pipe_path()
        self.addCleanup(self.assert_nothing_is_under_way)
        threads = _thread._count()
        self.addCleanup(wait_until, lambda: _thread._count() <= threads)

    def assert_nothing_is_under_way(self) -> None:
        self.assertEqual(vmshim._under_way, {})

    def run_aside(self, *steps: Step) -> threading.Thread:
        """Take these steps in a thread."""
        failures = []

        def run() -> None:
            try:
                for step in steps:
                    step()
            except BaseException as error:
                failures.append(error)

        def end() -> None:
            self.assert_ends(thread)
            self.assertEqual(failures, [])

        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(end)
        return thread

    def assert_ends(self, *threads: threading.Thread) -> None:
        for thread in threads:
            thread.join(LONG)
            self.assertFalse(thread.is_alive(), "the other half hangs")

    def run_into(self, function: str, call: Step) -> threading.Thread:
        """Call something in a thread; return once that has begun to wait for this function."""
        started = threading.Event()
        with spying(function, after=started.set):
            thread = self.run_aside(call)
            self.assertTrue(started.wait(LONG))
        return thread

    def once_in(self, function: str, *steps: Step) -> threading.Thread:
        """Have a thread take these steps when vmshim calls this function of Windows."""
        entered = threading.Event()
        self.enter(spying(function, before=entered.set))
        return self.run_aside(lambda: entered.wait(LONG), *steps)

    def listen(self, **options: Any) -> RawPipe:
        return self.enter(RawPipe.listen(self.path, **options))

    def dial(self, *data: bytes) -> RawPipe:
        """Connect a client that writes these data."""
        client = self.enter(RawPipe.dial(self.path))
        for piece in data:
            client.write(piece)
        return client

    def make_busy(self) -> RawPipe:
        """Make a pipe whose one instance is taken; return its server's end."""
        server = self.listen()
        self.dial()
        return server

    def fake_shim(self, *script: Script, **options: Any) -> None:
        """Be the server end for one client: connect, take these steps, close."""
        pipe = RawPipe.listen(self.path, **options)

        def serve() -> None:
            with pipe:
                pipe.connect()
                for step in script:
                    step(pipe)

        self.run_aside(serve)

    def fake_shim_responding(self, *pieces: bytes, **options: Any) -> None:
        """Be a shim that reads the request and responds in these pieces."""
        self.fake_shim(RawPipe.read, *map(writing, pieces), **options)

    def fake_shim_hanging(self, *script: Script, **options: Any) -> threading.Event:
        """Be a shim that keeps the connection after these steps until the event is set."""
        gone = threading.Event()
        self.fake_shim(*script, lambda pipe: gone.wait(LONG), **options)
        self.addCleanup(gone.set)
        return gone

    def fake_shim_for(self, clients: int) -> list[str]:
        """Be a shim for so many clients, one after the other; return the IDs that come."""
        first = RawPipe.listen(self.path)
        ids = []

        def serve() -> None:
            pipe = first
            for _ in range(clients):
                pipe.connect()
                ids.append(VMRequest.from_json(pipe.read()).id)
                pipe.write(SHIM_SUCCESS)
                following = RawPipe.listen(self.path)
                pipe.close()
                pipe = following
            pipe.close()

        self.run_aside(serve)
        return ids

    def issue(self, id: str = "test", **options: Any) -> None:
        """Issue a request, as patiently as is possible unless the options say otherwise."""
        options = {"connect_timeout": LONG, "timeout": LONG, **options}
        issue_vm_request(self.path, VMRequest(id, "create"), **options)

    def refusal(self, **options: Any) -> ShimError:
        return self.caught(ShimError, self.issue, **options)

    def issue_from_many_threads(self, turns: int) -> list[str]:
        """Issue requests from 16 threads at once; return all IDs, sorted."""

        def client(number: int) -> None:
            for turn in range(turns):
                self.issue(f"{number}.{turn}")

        numbers = range(16)
        self.assert_ends(*[self.run_aside(functools.partial(client, n)) for n in numbers])
        return sorted(f"{number}.{turn}" for number in numbers for turn in range(turns))


class HeldHandler:
    """A handler that stays in its requests until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.carried_out: list[str] = []

    def __call__(self, request: VMRequest) -> None:
        self.entered.set()
        self.go_on.wait(LONG)
        self.carried_out.append(request.id)


@needs_server
class ServerCase(PipeCase):
    def make_server(self, handler: Handler = bool, **options: Any) -> VMShimServer:
        """Make a server that is closed at the test's end."""
        return self.enter(VMShimServer(self.path, handler, **options))

    def serve_in_thread(self, server: VMShimServer) -> threading.Thread:
        thread = self.run_aside(server.serve_forever)
        self.addCleanup(server.close)
        return thread

    def start_server(self, handler: Handler = bool, **options: Any) -> VMShimServer:
        """Serve in a thread, self.serving; the server is self.server, too."""
        self.server = self.make_server(handler, **options)
        self.serving = self.serve_in_thread(self.server)
        return self.server

    def start_recording(self, **options: Any) -> list[VMRequest]:
        """Serve in a thread; return the requests that come."""
        requests: list[VMRequest] = []
        self.start_server(requests.append, **options)
        return requests

    def start_held(self, **options: Any) -> tuple[HeldHandler, RawPipe]:
        """Serve in a thread; return the handler, which is in a request "first", and its client."""
        handler = HeldHandler()
        self.start_server(handler, **options)
        client = self.dial(wire("first"))
        self.assertTrue(handler.entered.wait(LONG))
        return handler, client

    def raw_exchange(self, *pieces: bytes) -> bytes:
        """Send raw bytes and read the response to its end."""
        with RawPipe.dial(self.path) as client:
            for piece in pieces:
                client.write(piece)
            return client.read_all()


def refuse(request: VMRequest) -> None:
    raise ShimError("no such container\n")


def refuse_some(request: VMRequest) -> None:
    if request.id == "no":
        raise ShimError("boom")


def start_process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python of our own kind with these arguments."""
    options = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **options}
    command = [sys.executable, *arguments]
    try:
        return subprocess.Popen(command, **options)
    except OSError as error:
        # Wine says so once in some thousand times, if the machine is busy.
        if winerror(error) != ERROR_INTERNAL_ERROR:
            raise
    return subprocess.Popen(command, **options)


def python_says(code: str, *, before: str = "") -> tuple[int, bytes, bytes]:
    """Run code after `import sys, vmshim` in a Python of its own; return its status and output."""
    folder = os.path.dirname(os.path.abspath(vmshim.__file__))
    code = f"{before}\nimport sys; sys.path.insert(0, {folder!r}); import vmshim\n{code}"
    with start_process("-c", code) as process:
        try:
            out, err = process.communicate(timeout=LONG)
        finally:
            process.kill()
    return process.returncode, out, err


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """Run the command line; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli_status(*arguments)
    return status, out.getvalue(), err.getvalue()


def run_json(*arguments: str) -> tuple[int, list[Any], str]:
    """Run the command line; return its exit status, its lines of JSON, and stderr."""
    status, out, err = run_cli(*arguments)
    return status, [json.loads(line) for line in out.splitlines()], err


def cli_status(*arguments: str) -> int:
    try:
        return vmshim.main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


def requests_ending(*ends: Any) -> Any:
    """Have requests raise these exceptions, one after the other, or succeed for None."""
    return mock.patch.object(vmshim, "issue_vm_request", side_effect=ends)


def readme() -> str:
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def readme_examples() -> list[str]:
    """Return the README's Python examples."""
    parts = [part.partition("\n") for part in readme().split("```")[1::2]]
    return [code for language, _, code in parts if language.strip() == "python"]


def readme_example(part: str) -> str:
    """Return the README's Python example with this part."""
    [example] = [code for code in readme_examples() if part in code]
    return example


# ---- Names and paths ----------------------------------------------------------------------------

SAFE_PREFIX = "\\\\.\\pipe\\ProtectedPrefix\\Administrators\\"
# The ASCII characters that the reference leaves as they are; it escapes all others.
SAFE_ASCII = "$&+-.0123456789:=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
SAFE_NAMES = {
    **{char: char if char in SAFE_ASCII else f"%{ord(char):02X}" for char in map(chr, range(128))},
    **{name: name for name in ("", "test.with..dots...", "a+b", "CON", "x:y")},
    "test with spaces": "test%20with%20spaces",
    "é": "%C3%A9",
    "\U0001f600": "%F0%9F%98%80",
    "100%": "100%25",
    "a/b\\c": "a%2Fb%5Cc",
}
NOT_GUIDS = (
    *("{6ba7b810-9dad-11d1-80b4-00c04fd430c8}", "6ba7b8109dad11d180b400c04fd430c8"),
    *("6ba7b810-9dad-11d1-80b4-00c04fd430c", " 6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    *("urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8", "not-a-guid", ""),
)
NOT_PIPE_PATHS = (
    *("", "pipe", r"C:\pipe\x", r"\\.\pipe", "\\\\.\\pipe\\", r"\\.\mailslot\x", r"\\.\x\pipe\y"),
    *(r"\\\pipe\x", "\\\\?\\pipe\\", r"a\b\.\pipe\x", "//./pipe/x", "\\\\.\\pipe\\a\0b"),
    "\\\\.\\pipe\\a\ud800",
)
# Windows would resolve these before it looks for the pipe.
CHANGING_PATHS = (
    *(r"\\.\pipe\.", r"\\.\pipe\..\C:\x", r"\\.\pipe\a\.\b", r"\\.\pipe\a\..\b", r"\\.\pipe\a/b"),
    *(r"\\.\pipe\a.", r"\\.\pipe\a ", r"\\.\pipe\a.\b", r"\\.\pipe\a\\b", "\\\\.\\pipe\\a\\"),
    *(r"\\host\pipe\a.", r"\\./C:\pipe\x", r"\\a/b\pipe\x"),
)


class NamesTest(Case):
    def test_safe_path_escapes_as_the_reference_does_and_refuses_a_lone_surrogate(self) -> None:
        self.assertEqual(SAFE_PIPE_PREFIX, SAFE_PREFIX)
        for name, escaped in SAFE_NAMES.items():
            with self.subTest(name=name):
                self.assertEqual(safe_pipe_path(name), SAFE_PREFIX + escaped)
        with self.assertRaisesRegex(ValueError, "lone surrogate"):
            safe_pipe_path("a\ud800")

    def test_pipe_path_of_a_guid(self) -> None:
        for text in "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff":
            for guid in text, text.upper(), uuid.UUID(text):
                self.assertEqual(vm_pipe_path(guid), SAFE_PREFIX + "runhcs-vm-" + text)
                self.assertEqual(shim_pipe_path(guid), SAFE_PREFIX + "runhcs-shim-" + text)

    def test_text_that_is_not_a_guid_is_refused(self) -> None:
        for text, path in itertools.product(NOT_GUIDS, (vm_pipe_path, shim_pipe_path)):
            with self.subTest(text=text):
                self.assertEqual(str(self.caught(ValueError, path, text)), f'invalid GUID "{text}"')


def calls_of_all(path: str) -> dict[str, Callable[..., object]]:
    """Return a call of each function that opens something, with arguments that are right."""
    calls: dict[str, Callable[..., object]] = {
        "dial_pipe": functools.partial(dial_pipe, path),
        "issue_vm_request": functools.partial(issue_vm_request, path, REQUEST),
    }
    if hasattr(vmshim, "Container"):
        calls["read_container"] = functools.partial(read_container, "a")
        calls["list_containers"] = list_containers
        calls["issue_container_request"] = functools.partial(issue_container_request, "a", "create")
    if hasattr(vmshim, "VMShimServer"):
        calls["VMShimServer"] = functools.partial(VMShimServer, path, print)
    return calls


class BadInputTest(Case):
    """Refused before anything is opened: on every platform alike."""

    def test_path_that_is_not_a_pipe_path_or_that_windows_would_change_is_refused(self) -> None:
        for paths, reason in (
            (NOT_PIPE_PATHS, "not a pipe path|lone surrogate"),
            (CHANGING_PATHS, "Windows would change"),
        ):
            for path in paths:
                for name, call in calls_of_all(path).items():
                    if name in ("dial_pipe", "issue_vm_request", "VMShimServer"):
                        with self.subTest(path=path, name=name):
                            self.assertRegex(str(self.caught(ValueError, call)), reason)

    def test_path_that_windows_takes_as_it_is_is_accepted(self) -> None:
        for path in r"\\?\pipe\a.", r"\\?\pipe\a/b ", r"\\.\PIPE\a\.b", r"\\host\pipe\a":
            vmshim._check_pipe_path(path)

    @needs_server
    def test_pipe_of_another_host_and_a_handler_that_is_none_are_refused(self) -> None:
        self.caught(TypeError, VMShimServer, new_pipe_path(), None)
        for path in r"\\host\pipe\a", r"\\localhost\pipe\a", r"\\?\pipe\a":
            error = self.caught(ValueError, VMShimServer, path, print)
            self.assertIn("pipe path must begin with", str(error))

    def test_wrong_number_is_refused_by_the_name_of_its_parameter(self) -> None:
        calls = calls_of_all(new_pipe_path())
        calls["check"] = functools.partial(check_shim_response, io.BytesIO(b"\0OK\0boom"))
        issuers = "issue_vm_request", "issue_container_request"
        seconds = -1, -0.001, math.nan, -math.inf
        odd = "1", decimal.Decimal(60), 5j
        cases: tuple[tuple[str, tuple[str, ...], tuple[float, ...], tuple[Any, ...]], ...] = (
            ("connect_timeout", ("dial_pipe", *issuers), seconds, odd),
            ("timeout", ("dial_pipe", *issuers), seconds, odd),
            ("request_timeout", ("VMShimServer",), (*seconds, 0), odd),
            ("max_response", ("check", *issuers), (3, 0, -1), (*odd, 100.0)),
            ("max_clients", ("VMShimServer",), (0, -1, math.nan), ()),
        )
        for parameter, names, wrong_values, wrong_types in cases:
            wrongs = [(ValueError, wrong) for wrong in wrong_values]
            for name, (kind, wrong) in itertools.product(
                calls.keys() & names, [*wrongs, *((TypeError, wrong) for wrong in wrong_types)]
            ):
                with self.subTest(name=name, parameter=parameter, wrong=wrong):
                    error = self.caught(kind, calls[name], **{parameter: wrong})
                    self.assertRegex(str(error), f"^{parameter} must be ")

    def test_timeout_of_any_length_is_a_deadline(self) -> None:
        for seconds in 1e300, 10**400, math.inf:
            self.assertGreater(vmshim._deadline(seconds), time.monotonic() + 1e8)

    def test_request_that_no_shim_may_see_is_refused(self) -> None:
        for id, op, reason in (
            ("a", "bogus", "unknown op 'bogus'; a VM shim knows create, sync, unmount, unmount-"),
            ("a", "", "unknown op"),
            ("a", "CREATE", "unknown op"),
            ("a", type("Op", (str,), {"__str__": lambda self: "create"})("evil"), "unknown op"),
            ("", "create", "the container ID is empty"),
            ("\ud800", "create", "lone surrogate"),
        ):
            with self.subTest(id=id, op=op):
                with self.assertRaisesRegex(ValueError, reason):
                    issue_vm_request(new_pipe_path(), VMRequest(id, op))
                if hasattr(vmshim, "Container"):
                    with self.assertRaisesRegex(ValueError, reason):
                        issue_container_request(id, op)

    def test_argument_of_a_wrong_type_and_an_empty_id_or_root_are_refused(self) -> None:
        path = new_pipe_path()
        wrong: Any
        for wrong, kind, text in (
            (b"bytes", TypeError, "must be a str, not bytes"),
            ("", ValueError, "is empty"),
        ):
            calls: list[Step] = [lambda: issue_vm_request(path, VMRequest(wrong, "create"))]
            if wrong:
                calls += [lambda: dial_pipe(wrong), lambda: safe_pipe_path(wrong)]
                calls += [lambda: vm_pipe_path(wrong), lambda: shim_pipe_path(wrong)]
                calls.append(lambda: issue_vm_request(path, VMRequest("a", wrong)))
            if hasattr(vmshim, "Container"):
                calls += [lambda: read_container(wrong), lambda: list_containers(root=wrong)]
                calls.append(lambda: read_container("x", root=wrong))
                calls.append(lambda: issue_container_request("x", "create", root=wrong))
            for call in calls:
                with self.assertRaisesRegex(kind, text):
                    call()
        self.caught(TypeError, issue_vm_request, path, ("a", "create"))

    def test_argument_of_a_wrong_type_is_refused_where_python_allows_no_comparison(self) -> None:
        test = "BadInputTest.test_argument_of_a_wrong_type_and_an_empty_id_or_root_are_refused"
        with start_process("-bb", __file__, test) as process:
            _, err = process.communicate(timeout=LONG)
        self.assertEqual(process.returncode, 0, err)

    @unittest.skipIf(WINDOWS, "this is Windows")
    def test_call_that_needs_windows_says_so_in_one_line(self) -> None:
        for call in calls_of_all(new_pipe_path()).values():
            error = self.caught(NeedsWindowsError, call)
            self.assertIsInstance(error, NotSentError)
            self.assertEqual(error.errno, errno.ENOSYS)
            self.assertRegex(str(error), r"^[^\n]* needs Windows, and this is \w+$")


# ---- Errors -------------------------------------------------------------------------------------

# How a request may end: by each exception, with its public bases, the exit status, the outcome.
# Those with bases are all that this module has.
ENDS: dict[str, tuple[str, int, str]] = {
    "VMShimError": ("Exception", 70, "unknown"),
    "ShimError": ("VMShimError", 1, "refused"),
    "NotSentError": ("VMShimError", 3, "not-sent"),
    "OutcomeUnknownError": ("VMShimError", 6, "unknown"),
    "NeedsWindowsError": ("NotSentError OSError", 3, "not-sent"),
    "PipeOpenError": ("NotSentError OSError", 3, "not-sent"),
    "PipeNotFoundError": ("PipeOpenError FileNotFoundError", 3, "not-sent"),
    "PipeAccessError": ("PipeOpenError PermissionError", 4, "not-sent"),
    "PipeBusyError": ("PipeOpenError TimeoutError", 5, "not-sent"),
    "ShimBusyError": ("NotSentError OSError TimeoutError", 5, "not-sent"),
    "RegistryError": ("NotSentError OSError", 3, "not-sent"),
    "ContainerNotFoundError": ("NotSentError LookupError", 3, "not-sent"),
    "ContainerStateError": ("NotSentError ValueError", 3, "not-sent"),
    "ResponseTimeoutError": ("OutcomeUnknownError TimeoutError", 6, "unknown"),
    "ConnectionLostError": ("OutcomeUnknownError BrokenPipeError", 6, "unknown"),
    **dict.fromkeys(("ValueError", "TypeError"), ("", 2, "not-sent")),
    **dict.fromkeys(
        ("KeyError", "OSError", "LookupError", "ZeroDivisionError"), ("", 70, "unknown")
    ),
    "KeyboardInterrupt": ("", 130, "unknown"),
}
PATH = r"\\.\pipe\x"
LOOK_FIRST = "so the outcome is unknown; look at the container before you repeat the request"
# What an operation fails with, the Win32 error, and the exception's kind, its errno and its text.
WIN32_ERRORS: tuple[tuple[Any, int, type[OSError], int, str], ...] = (
    (PipeOpenError, 2, PipeNotFoundError, errno.ENOENT, "no shim listens there"),
    (PipeOpenError, 5, PipeAccessError, errno.EACCES, "run this as an elevated administrator"),
    (PipeOpenError, 87, PipeOpenError, errno.EIO, "."),
    (PipeOpenError, 231, PipeBusyError, errno.ETIMEDOUT, "the pipe stayed busy; try again later"),
    (ConnectionLostError, 5, ConnectionLostError, errno.EPIPE, f"., {LOOK_FIRST}"),
    *((ConnectionLostError, n, ConnectionLostError, 32, "was lost") for n in (64, 109, 232, 233)),
)


def kind_of(name: str) -> Any:
    """Return an exception by its name; None if vmshim.py was cut before it."""
    return getattr(vmshim, name, getattr(builtins, name, None))


def failures() -> list[BaseException]:
    """Return an exception of each kind that there is."""
    kinds = [kind for kind in map(kind_of, ENDS) if kind]
    return [kind(5, "x", PATH, 1450) if issubclass(kind, OSError) else kind("x") for kind in kinds]


def win32_errors() -> list[Any]:
    """Return the exceptions of WIN32_ERRORS, as this module makes them."""
    return [vmshim._pipe_error(kind, number, PATH) for kind, number, *_ in WIN32_ERRORS]


def errors_of_all_kinds() -> list[BaseException]:
    plain = [error for error in failures() if isinstance(error, VMShimError)]
    return [ShimError("boom\n", b"boom\n", 5), *plain, *win32_errors()]


class ErrorsTest(Case):
    def test_hierarchy_tells_whether_a_request_may_be_repeated(self) -> None:
        public = [getattr(vmshim, name) for name in vmshim.__all__]
        kinds = [kind for kind in public if inspect.isclass(kind) and issubclass(kind, Exception)]
        self.assertEqual(set(kinds), {kind_of(name) for name in ENDS if ENDS[name][0]} - {None})
        for kind in kinds:
            with self.subTest(kind=kind.__name__):
                bases = set(map(kind_of, ENDS[kind.__name__][0].split()))
                self.assertLessEqual(bases, set(kind.__mro__))
                given = {ShimError, NotSentError, OutcomeUnknownError}.intersection(kind.__mro__)
                self.assertEqual(len(given), 0 if kind is VMShimError else 1)
                if issubclass(kind, OSError):
                    self.assertEqual(str(kind(5, "text")), "text")

    def test_each_win32_error_has_its_exception_and_says_what_to_do(self) -> None:
        for error, (_, number, kind, errno_, text) in zip(win32_errors(), WIN32_ERRORS):
            with self.subTest(error=error):
                self.assertIs(type(error), kind)
                self.assertEqual((error.errno, error.winerror), (errno_, number))
                self.assertEqual(error.filename, PATH)
                self.assertRegex(error.strerror, text)
                self.assertEqual(str(error), f"[WinError {number}] {error.strerror}: {PATH!r}")
                if isinstance(error, OutcomeUnknownError):
                    self.assertIn("look at the container before you repeat", str(error))

    def test_no_text_says_try_again_where_the_outcome_is_unknown(self) -> None:
        for error in errors_of_all_kinds():
            if not isinstance(error, (PipeBusyError, ShimBusyError)):
                self.assertNotIn("try again", str(error))

    def test_every_error_survives_pickling_and_copying(self) -> None:
        names = "args", "errno", "strerror", "filename", "winerror", "__dict__"
        for error in errors_of_all_kinds():
            error.__dict__.update(extra=1, __notes__=["as error.add_note() leaves them"])
            for other in copies_of(error):
                with self.subTest(error=error):
                    self.assertIs(type(other), type(error))
                    self.assertEqual((str(other), repr(other)), (str(error), repr(error)))
                    for name in names:
                        self.assertEqual(getattr(other, name, 0), getattr(error, name, 0), name)

    def test_repr_of_an_error_reads_well(self) -> None:
        self.assertEqual(repr(NotSentError("x")), "NotSentError('x')")
        self.assertEqual(str(ShimError(KeyError(7))), "7")
        self.assertEqual(repr(ShimError("x", b"x")), "ShimError('x', b'x', None)")
        self.assertRegex(repr(win32_errors()[0]), r"^PipeNotFoundError\(2, 'no shim ")

    @needs_command_line
    def test_readme_and_help_tell_each_exit_status_as_the_code_does(self) -> None:
        rows = re.findall(r"^\| *(\d+) *\|(.*)\|(.*)\|.*\|$", readme(), re.MULTILINE)
        statuses = {name: status for name, (_, status, _) in ENDS.items() if kind_of(name)}
        self.assertEqual([int(row[0]) for row in rows], sorted({0, *statuses.values()}))
        help = " ".join(run_cli("--help")[1].split())
        for status, names, meaning in rows:
            with self.subTest(status=status):
                self.assertIn(f"{status} {meaning.strip()}", help)
                # Those whose bases have another status; a bug can be any other.
                expected = {
                    name
                    for name in statuses
                    if status not in ("70", *(str(statuses.get(b)) for b in ENDS[name][0].split()))
                    and statuses[name] == int(status)
                }
                self.assertEqual(set(re.findall("`(.*?)`", names)), expected)


def copies_of(value: Any) -> list[Any]:
    """Return copies of a value, made in every way."""
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    pickled = [pickle.loads(pickle.dumps(value, protocol)) for protocol in protocols]
    return [copy.copy(value), copy.deepcopy(value), *pickled]


# ---- JSON and messages --------------------------------------------------------------------------

REQUESTS = [  # ID, op, wire
    ("", "create", b'{"ID":"","Op":"create"}\n'),
    ("c8d6f0", "unmount", b'{"ID":"c8d6f0","Op":"unmount"}\n'),
    ('quote"back\\slash', "create", b'{"ID":"quote\\"back\\\\slash","Op":"create"}\n'),
    ("tab\tnl\ncr\r", "unmount", b'{"ID":"tab\\tnl\\ncr\\r","Op":"unmount"}\n'),
    ("\b\f", "create", b'{"ID":"\\u0008\\u000c","Op":"create"}\n'),
    ("\u2028\u2029", "unmount", b'{"ID":"\\u2028\\u2029","Op":"unmount"}\n'),
    ("\ufeffbom", "create", b'{"ID":"\xef\xbb\xbfbom","Op":"create"}\n'),
    ("<&>", "sync", b'{"ID":"\\u003c\\u0026\\u003e","Op":"sync"}\n'),
    ("é\x7f\U0001f600", "unmount-disk", '{"ID":"é\x7f\U0001f600","Op":"unmount-disk"}\n'.encode()),
]
DECODED: list[tuple[bytes | str, str, str]] = [  # wire, ID, op
    *((wire, id, op) for id, op, wire in REQUESTS),
    (b'{"ID":"a","Op":"create"}\n' + b"[" * 99, "a", "create"),
    (b'{"Op":"sync","ID":"b"}', "b", "sync"),
    (b'{"iD":"mix","oP":"create"}', "mix", "create"),
    (b'{"ID":"a","id":"c","Op":"create"}', "c", "create"),
    (b'{"ID":"a","id":"c","ID":"b","Op":"create"}', "b", "create"),
    (b'{"ID":"a","ID":null,"Op":"create"}', "a", "create"),
    (b"{}", "", ""),
    (b"null", "", ""),
    (b'   \n\t {"ID":"ws","Op":"create"}', "ws", "create"),
    (b'{"ID":"\\ud83d\\ude00","Op":"create"}', "\U0001f600", "create"),
    (b'{"ID":"\\ud83d","Op":"create"}', "\ufffd", "create"),
    (b'{"ID":"\\ud83d\\u0041","Op":"create"}', "\ufffdA", "create"),
    (b'{"ID":"\xff\xfe","Op":"create"}', "\ufffd\ufffd", "create"),
    (b'{"ID":"\xe2\x82","Op":"create"}', "\ufffd\ufffd", "create"),
    (b'{"ID":"\\ud83d\xed\xb8\x80","Op":"create"}', "\ufffd" * 4, "create"),
    (b'{"ID":"a","Op":"create"} trailing', "a", "create"),
    (b'{"ID":"a","Op":"bogus"}', "a", "bogus"),
    (b'{"\\u0049D":"esc","Op":"create"}', "esc", "create"),
    (b'{"x":[1,{"ID":"no"}],"ID":"a","y":1e999,"Op":"create"}', "a", "create"),
    (b'{"x":' + b"9" * 60000 + b',"ID":"a","Op":"sync"}', "a", "sync"),
    (b'{"x":' + b"[" * 31 + b"]" * 31 + b',"ID":"a","Op":"sync"}', "a", "sync"),
    (b'{"x":"' + b"[" * 99 + b'","ID":"a","Op":"sync"}', "a", "sync"),
    ('{"ID":"é","Op":"sync"}', "é", "sync"),
]
NOT_DECODED = [
    *(b"", b" ", b"[]", b"1", b'"ID"', b"true", b'{"ID":"a"', b"{'ID':'a'}", b'{"ID":"a",}'),
    *(b'{"ID":"a","Op":7}', b'{"ID":["a"],"Op":"create"}', b'{"ID":7,"ID":"a","Op":"create"}'),
    *(b'{"ID":{},"Op":"create"}', b'{"ID":true,"Op":"create"}', b'{"ID":"a\n","Op":"create"}'),
    *(b'{"ID":NaN}', b'{"x":-Infinity}', b'\x0b{"ID":"a","Op":"create"}'),
    b'{"x":"\\\\","y":' + b"[" * 40 + b"]" * 40 + b"}",
    b'\xef\xbb\xbf{"ID":"a","Op":"create"}',
    *(b'{"x":' + b"[" * depth + b"]" * depth + b',"ID":"a","Op":"sync"}' for depth in (32, 10**6)),
]


class RequestTest(Case):
    def test_encodes_as_the_reference_does_but_no_lone_surrogate(self) -> None:
        for id, op, wire in REQUESTS:
            with self.subTest(id=id):
                self.assertEqual(VMRequest(id, op).to_json(), wire)
        self.caught(ValueError, VMRequest("\ud800", "create").to_json)

    def test_decodes_as_the_reference_does(self) -> None:
        for wire, id, op in DECODED:
            with self.subTest(wire=wire[:60]):
                self.assertEqual(VMRequest.from_json(wire), (id, op))

    def test_decoding_refuses_what_the_reference_refuses(self) -> None:
        for wire in NOT_DECODED:
            with self.subTest(wire=wire[:60]), self.assertRaises(ValueError):
                VMRequest.from_json(wire)
        with self.assertRaisesRegex(ValueError, "^Op must be a string$"):
            VMRequest.from_json('{"Op":7}')

    def test_no_nesting_overflows_a_small_stack(self) -> None:
        code = """
import threading
def read():
    for depth in 31, 32, 960, 9999:
        try:
            vmshim.VMRequest.from_json('{"x":' + "[" * depth + "]" * depth + "}")
            print(depth)
        except ValueError:
            pass
threading.stack_size(65536)
threading.Thread(target=read).start()
"""
        self.assertEqual(python_says(code)[:2], (0, b"31" + os.linesep.encode()))

    def test_op_may_be_given_as_its_wire_text_and_is_read_as_the_member(self) -> None:
        self.assertEqual([*VMRequestOp], ["create", "sync", "unmount", "unmount-disk"])
        request = VMRequest("a", "create")
        self.assertEqual(request, VMRequest("a", VMRequestOp.CREATE_CONTAINER))
        request._replace(op="sync").check()
        self.assertIs(VMRequest.from_json(request.to_json()).op, VMRequestOp.CREATE_CONTAINER)
        unknown = VMRequest.from_json('{"Op":"bogus"}')
        self.assertEqual((unknown, type(unknown.op)), (("", "bogus"), str))

    def test_op_is_its_wire_text_in_every_kind_of_format(self) -> None:
        op = VMRequestOp.CREATE_CONTAINER
        texts = [str(op), f"{op}", f"{op!s}", format(op), op + ""]
        self.assertEqual(texts, ["create"] * 5)
        self.assertEqual(f"{op:>8}", "  create")

    def test_request_is_immutable_and_its_repr_reads_well(self) -> None:
        for name in "id", "other":
            with self.assertRaises(AttributeError):
                setattr(REQUEST, name, "other")
        self.assertEqual(
            repr(REQUEST), "VMRequest(id='test', op=<VMRequestOp.CREATE_CONTAINER: 'create'>)"
        )


ZERO_TIME = "0001-01-01T00:00:00Z"
EMPTY_STATE = '{"ociVersion":"","id":"","pid":%s,"status":"","bundle":"","rootfs":"",' + (
    '"created":"%s","owner":""}'
)
STATE_JSON = (
    r'{"ociVersion":"1.0.2","id":"test","pid":1234,"status":"running","bundle":"C:\\bundles\\test",'
    r'"rootfs":"\\\\?\\Volume{6ba7b810-9dad-11d1-80b4-00c04fd430c8}\\",'
    r'"created":"%s","owner":"runhcs.exe"}'
)
CREATED = [  # text, nanoseconds since 1970
    ("2022-12-12T20:30:15Z", 1670877015000000000),
    ("2022-12-12T20:30:15.123456789Z", 1670877015123456789),
    ("2022-12-12T20:30:15.1234567Z", 1670877015123456700),
    ("2022-12-12T20:30:15.12-08:00", 1670905815120000000),
]
STATES = [  # JSON, pid, created as the reference writes them again
    ("{}", 0, ZERO_TIME),
    ("null", 0, ZERO_TIME),
    ('{"pid":-1}', -1, ZERO_TIME),
    ('{"created":"2019-05-01T01:02:03.1234567890123Z"}', 0, "2019-05-01T01:02:03.123456789Z"),
    ('{"created":"2019-05-01T01:02:03.100+00:00"}', 0, "2019-05-01T01:02:03.1Z"),
    ('{"created":"2020-01-02T3:04:05Z"}', 0, "2020-01-02T03:04:05Z"),
    ('{"created":"2020-01-02T03:04:05,5Z"}', 0, "2020-01-02T03:04:05.5Z"),
    ('{"created":"2020-01-02T03:04:05+23:59"}', 0, "2020-01-02T03:04:05+23:59"),
    ('{"created":null,"pid":null,"PID":7}', 7, ZERO_TIME),
    ('{"pid":1,"pid":2,"Pid":3}', 3, ZERO_TIME),
    ('{"\\u017ftatu\u017f":"","PID":7}', 7, ZERO_TIME),  # Go takes a long s for an s
    ('{"annotations":{},"unknown":{"pid":5},"pid":1}', 1, ZERO_TIME),
]
NOT_TIMES = [
    *(
        "",
        "2019-05-01T01:02:03.123456\u0663Z",
        "2019-05-01T01:02:03",
        "2019-05-01t01:02:03Z",
        "2019-05-01T01:02:03z",
    ),
    *("2019-05-01T24:00:00Z", "2019-05-01T01:60:00Z", "2019-05-01T01:02:60Z"),
    *("2019-05-01T01:2:03Z", "2019-5-01T01:02:03Z", "2019-05-1T01:02:03Z", "2019-02-30T00:00:00Z"),
    *("2019-05-01T01:02:03.Z", "2019-05-01T01:02:03Z\\n", "2019-05-01T01:02:03+1:00"),
    *("2019-05-01T01:02:0\u0663Z", "2020-01-02T03:04:05+24:00", "2020-01-02T03:04:05+23:60"),
]
PARIS = timezone(timedelta(minutes=9, seconds=21))  # until 1911
NO_STATES = [
    *(f'{{"created":"{text}"}}' for text in NOT_TIMES),
    *('{"\u017ftatus":5}', '{"created":5}', '{"pid":"5"}', '{"pid":1.0}', '{"pid":true}', "[]"),
    *('{"pid":9223372036854775808}', '{"pid":' + "9" * 100_000 + "}", '{"id":7}', "{} {}", ""),
    *('{"annotations":{"a":1}}', '{"annotations":["a"]}'),
]


def zero_state(**fields: Any) -> ContainerState:
    """Return Go's zero value with some fields replaced."""
    return ContainerState.from_json("{}")._replace(**fields)


def sample_state(**fields: Any) -> ContainerState:
    """Return what STATE_JSON says, created never, with some fields replaced."""
    return ContainerState.from_json(STATE_JSON % ZERO_TIME)._replace(**fields)


@needs_state
class ContainerStateTest(Case):
    def test_each_field_is_read(self) -> None:
        state = zero_state(
            version="1.0.2",
            id="test",
            init_process_pid=1234,
            status="running",
            bundle="C:\\bundles\\test",
            rootfs="\\\\?\\Volume{6ba7b810-9dad-11d1-80b4-00c04fd430c8}\\",
            created=NEVER,
            owner="runhcs.exe",
        )
        self.assertEqual(state, sample_state())

    def test_every_time_round_trips_byte_for_byte_and_is_read_from_indented_json(self) -> None:
        self.assertEqual(sample_state().to_json().decode(), STATE_JSON % ZERO_TIME)
        for text, nanoseconds in CREATED:
            with self.subTest(text=text):
                state = ContainerState.from_json(STATE_JSON % text)
                self.assertEqual(state.to_json().decode(), STATE_JSON % text)
                indented = json.dumps(json.loads(STATE_JSON % text), indent=2)
                self.assertEqual(ContainerState.from_json(indented), state)
                since_1970 = state.created - datetime(1970, 1, 1, tzinfo=timezone.utc)
                microseconds = since_1970 // timedelta(microseconds=1)
                self.assertEqual(microseconds * 1000 + state.created_nanosecond, nanoseconds)
                state = state._replace(created=NEVER, created_nanosecond=0)
                self.assertEqual(state, sample_state(), "the other fields")

    def test_decodes_as_the_reference_does(self) -> None:
        for text, pid, created in STATES:
            with self.subTest(text=text):
                state = ContainerState.from_json(text)
                self.assertEqual(state.to_json().decode(), EMPTY_STATE % (pid, created))

    def test_decoding_refuses_what_the_reference_refuses(self) -> None:
        for text in NO_STATES:
            with self.subTest(text=text[:60]), self.assertRaises(ValueError):
                ContainerState.from_json(text)

    def test_docstring_names_what_the_reference_reads_otherwise(self) -> None:
        text = " ".join((ContainerState.from_json.__doc__ or "").split())
        self.assertIn("an offset of 24 hours", text)  # see NOT_TIMES
        state = ContainerState.from_json('{"created":"\\u0032024-01-02T03:04:05Z"}')
        self.assertEqual(state.created.year, 2024)
        self.assertIn("refuses a time that is written with escapes", text)
        for second, expected in ('{"c":"d"}', {"c": "d"}), ("null", {"a": "b"}):
            wire = f'{{"annotations":{{"a":"b"}},"annotations":{second}}}'
            self.assertEqual(ContainerState.from_json(wire).annotations, expected)
        self.assertIn("merges the annotations if that key comes twice", text)

    def test_annotations_are_sorted_and_stand_before_the_owner(self) -> None:
        wire = (EMPTY_STATE % (0, ZERO_TIME)).replace(
            ',"owner"', ',"annotations":{"A":"\\u003c","b":"","é":"2"},"owner"'
        )
        state = ContainerState.from_json('{"annotations":{"\\ud800":"a"}}')
        self.assertEqual(state.annotations, {"\ufffd": "a"})
        state = zero_state(annotations={"é": "2", "b": "", "A": "<"})
        self.assertEqual(state.to_json().decode(), wire)
        for text in wire, wire.replace('"b":""', '"b":null'):
            self.assertEqual(ContainerState.from_json(text), state)

    def test_state_that_json_can_not_hold_is_not_encoded(self) -> None:
        without_offset = type("WithoutOffset", (tzinfo,), {"utcoffset": lambda *_: None})()
        naive = [datetime(1, 1, 1, tzinfo=zone) for zone in (None, without_offset, PARIS)]
        for field, values in (
            ("created", naive),
            ("created_nanosecond", [1000, -1]),
            ("init_process_pid", [2**63, 1.5]),
            ("id", ["\ud800"]),
        ):
            for value in values:
                with self.subTest(field=field, value=value):
                    self.caught(ValueError, zero_state(**{field: value}).to_json)

    def test_example_of_the_readme_reads_what_runhcs_prints(self) -> None:
        state = zero_state(id="my-container", status="running").to_json()
        outputs = {"state": state, "list": b"[" + state + b"]\n"}
        out = io.StringIO()
        with mock.patch.object(subprocess, "check_output", lambda command: outputs[command[1]]):
            with contextlib.redirect_stdout(out):
                exec(readme_example("runhcs"), {})
        self.assertEqual(
            out.getvalue(), "running 0001-01-01 00:00:00+00:00\nmy-container running\n"
        )


class RecordsTest(Case):
    def test_every_record_survives_pickling_and_copying(self) -> None:
        records: list[Any] = [REQUEST, VMRequest("", "x")]
        if hasattr(vmshim, "Container"):
            guids = uuid.UUID(int=1), uuid.UUID(int=2)
            records += [zero_state(), sample_state(annotations={"a": "b"})]
            records.append(Container("c", "", "", "", "", NEVER, "", False, *guids, -1, 0))
        for record in records:
            for other in (*copies_of(record), record._replace()):
                self.assertEqual((other, type(other)), (record, type(record)))
                self.assertEqual(repr(other).partition("(")[0], type(record).__name__)

    @needs_state
    def test_default_annotations_can_not_be_changed_for_everybody(self) -> None:
        annotations: Any = zero_state().annotations
        annotations["a"] = "b"
        self.assertEqual(zero_state().annotations, {})

    @needs_state
    def test_no_key_is_taken_that_go_would_not_take(self) -> None:
        for field, taken, keys in (
            ("id", True, ("id", "ID", "iD")),
            ("id", False, ("i\u0307d", "\u0130d", "\u0131d")),
            ("status", True, ("STATUS", "\u017ftatu\u017f")),
            ("status", False, ("\ufb06atus", "\ufb05atus")),
        ):
            for key in keys:
                with self.subTest(key=key):
                    state = ContainerState.from_json(json.dumps({key: "x"}))
                    self.assertEqual(state, zero_state(**({field: "x"} if taken else {})))


# ---- The response -------------------------------------------------------------------------------

REFUSALS = [b"\0OK", b"\0OK\0\0", b"\0OK\0\0OK\0", b"OK\0", b"boom\n", b"\xff\xfe bad utf8", b"\0"]


class ResponseTest(Case):
    def start(self, code: str) -> subprocess.Popen[bytes]:
        process = self.enter(start_process("-c", f"import os, sys; {code}"))
        self.addCleanup(process.kill)
        return process

    def refusal(self, *arguments: Any, **options: Any) -> ShimError:
        return self.caught(ShimError, check_shim_response, *arguments, **options)

    def test_anything_but_the_four_bytes_is_the_text_of_an_error(self) -> None:
        check_shim_response(io.BytesIO(b"\0OK\0"))
        for response in REFUSALS:
            with self.subTest(response=response):
                error = self.refusal(io.BytesIO(response))
                self.assertEqual(error.response, response)
                self.assertEqual(error.message, response.decode("utf-8", "replace"))
                self.assertIsNone(error.exit_code)

    def test_str_of_an_error_is_one_line_and_never_empty(self) -> None:
        for response, text in (b"boom\r\n", "boom"), (b"", "unknown shim failure"):
            error = self.refusal(io.BytesIO(response))
            self.assertEqual((str(error), error.response), (text, response))

    def test_response_in_pieces_is_put_together(self) -> None:
        pieces = iter([b"\0", b"OK", b"\0"])
        check_shim_response(mock.Mock(read=lambda size: next(pieces, b"")))

    def test_response_beyond_the_limit_is_an_error_and_is_not_read_to_its_end(self) -> None:
        pipe = io.BytesIO(b"x" * 2 * MEBIBYTE)
        error = self.refusal(pipe)
        self.assertRegex(str(error), r"^the response is longer than 1048576 bytes; .* x{200}$")
        self.assertEqual(pipe.tell(), MEBIBYTE + 1)
        self.assertEqual(self.refusal(io.BytesIO(b"x" * MEBIBYTE)).message, "x" * MEBIBYTE)
        self.assertRegex(str(self.refusal(io.BytesIO(b"boom!"), max_response=4)), "longer than 4")
        self.assertEqual(self.refusal(io.BytesIO(b"boom"), max_response=4).message, "boom")
        check_shim_response(io.BytesIO(SHIM_SUCCESS), max_response=4)
        self.refusal(io.BytesIO(SHIM_SUCCESS + b"boom"), max_response=4)

    def test_pipe_that_would_block_is_an_error_and_no_end_of_file(self) -> None:
        self.caught(BlockingIOError, check_shim_response, mock.Mock(read=lambda size: None))

    def test_process_that_succeeds_lives_on(self) -> None:
        process = self.start("os.write(1, b'\\0OK\\0'); os.close(1); sys.stdin.read(); sys.exit(7)")
        assert process.stdout and process.stdin
        check_shim_response(process.stdout, process)
        self.assertIsNone(process.poll())
        process.stdin.close()
        self.assertEqual(process.wait(LONG), 7)

    def test_process_that_fails_is_killed_and_reaped(self) -> None:
        process = self.start("os.write(1, b'no memory\\n'); os.close(1); sys.stdin.read()")
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "no memory")
        self.assertIsNotNone(process.returncode)
        self.assertEqual(error.exit_code, process.returncode)

    def test_process_that_dies_without_a_word_tells_its_exit_code(self) -> None:
        process = self.start("sys.exit(3)")
        process.wait(LONG)
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "unknown shim failure, exit code 3")
        self.assertEqual((error.exit_code, error.response), (3, b""))

    def test_process_that_can_not_be_killed_hides_no_text_and_is_not_awaited_for_ever(self) -> None:
        for code in 3, None:  # Windows denies it for one that is ending; the other never ends
            clock = itertools.count()
            process = mock.Mock(poll=lambda: code, returncode=code)
            process.kill.side_effect = PermissionError(13, "denied", None, 5)
            with mock.patch.multiple(time, monotonic=clock.__next__, sleep=bool):
                error = self.refusal(io.BytesIO(b"no memory"), process)
            self.assertEqual((str(error), error.exit_code), ("no memory", code))
            self.assertLess(next(clock), 15)

    def test_process_is_killed_when_reading_fails_or_is_interrupted(self) -> None:
        for failure in OSError("broken"), KeyboardInterrupt():
            process = self.start("sys.stdin.read()")
            pipe = mock.Mock(read=mock.Mock(side_effect=failure))
            with self.subTest(failure=failure):
                self.caught(type(failure), check_shim_response, pipe, process)
                self.assertIsNotNone(process.returncode)


# ---- Win32 --------------------------------------------------------------------------------------


class Win32Test(PipeCase):
    def test_structures_are_laid_out_as_win32_has_them(self) -> None:
        size = ctypes.sizeof(ctypes.c_void_p)
        self.assertEqual(vmshim.OVERLAPPED.hEvent.offset, 2 * size + 8)
        self.assertEqual(ctypes.sizeof(vmshim.OVERLAPPED), 3 * size + 8)
        if hasattr(vmshim, "SECURITY_ATTRIBUTES"):
            self.assertEqual(vmshim.SECURITY_ATTRIBUTES.lpSecurityDescriptor.offset, size)
            self.assertEqual(ctypes.sizeof(vmshim.SECURITY_ATTRIBUTES), 3 * size)

    def test_every_function_has_its_prototype(self) -> None:
        names = [name for name in ("_kernel32", "_advapi32") if hasattr(vmshim, name)]
        for library in [getattr(vmshim, name) for name in names]:
            self.assertIsNot(library, getattr(windows.windll, library._name))
            functions = [f for f in vars(library).values() if hasattr(f, "argtypes")]
            self.assertTrue(functions)
            for function in functions:
                self.assertTrue(function.argtypes, function.__name__)

    def test_handle_is_closed_once_when_its_last_reference_goes(self) -> None:
        handle = vmshim._Handle(kernel32.CreateEventW(None, True, False, None).value)
        value, other = handle.value, handle
        del handle
        self.assertNotEqual(lowest_free_handle(), value)
        del other
        self.assertEqual(lowest_free_handle(), value)

    def test_finalisers_are_no_python_code_that_ctrl_c_could_cut_short(self) -> None:
        for kind in vmshim._Handle, getattr(vmshim, "_SecurityDescriptor", Pipe), Pipe:
            self.assertFalse(hasattr(getattr(kind, "__del__"), "__code__"), kind)

    def test_closing_a_handle_leaves_the_last_error_alone(self) -> None:
        windows.set_last_error(4711)
        vmshim._Handle(12345676)  # there is none of this value
        self.assertEqual(windows.get_last_error(), 4711)


# ---- Pipe ---------------------------------------------------------------------------------------


class PipeTest(PipeCase):
    def pair(self, **options: Any) -> tuple[Pipe, RawPipe]:
        """Return the two ends of a new pipe: ours, and the raw server's."""
        self.path = new_pipe_path()
        server = self.listen(**options)
        client = self.enter(dial_pipe(self.path, timeout=LONG))
        server.connect()
        return client, server

    def test_is_a_raw_binary_file(self) -> None:
        client, server = self.pair()
        self.assertIsInstance(client, io.RawIOBase)
        self.assertTrue(client.readable() and client.writable() and not client.seekable())
        self.assertEqual(client.write(bytearray(b"one")), 3)
        self.assertEqual(client.write(memoryview(b"two")), 3)
        self.assertEqual(server.read(), b"onetwo")
        server.write(b"three")
        buffer = bytearray(8)
        self.assertEqual(client.readinto(buffer), 5)
        self.assertEqual(buffer, b"three\0\0\0")
        server.write(b"one\ntwo\n")
        self.assertEqual(io.BufferedReader(client).readline(), b"one\n")

    def test_wrong_argument_is_an_error_that_costs_no_data(self) -> None:
        client, server = self.pair()
        released = memoryview(bytearray(8))
        released.release()
        server.write(b"response")
        for wrong in "text", 5, 0, None:
            self.caught(TypeError, client.write, wrong)
        self.caught(ValueError, client.readinto, released)
        for read_only in "text", b"read-only":
            self.caught(TypeError, client.readinto, read_only)
        for copy_of in copy.deepcopy, pickle.dumps:
            self.caught(TypeError, copy_of, client)
        client.write(b"request")
        self.assertEqual((server.read(), client.read(10)), (b"request", b"response"))

    def test_zero_length_message_is_end_of_file_and_stays_it(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")
        server.write(b"")
        self.assertEqual(client.read(10), b"")
        server.write(b"late")
        self.assertEqual(client.read(10), b"")

    def test_closing_is_end_of_file_after_the_data(self) -> None:
        for mode, sizes in itertools.product(
            (PIPE_TYPE_MESSAGE, PIPE_TYPE_BYTE), ((2, 10, 10, 10), (-2, 10, 10), (-1, 10, 10))
        ):
            client, server = self.pair(mode=mode)
            server.write(b"da")
            server.write(b"ta")
            server.close()
            data = [b"da", b"ta"] if sizes[0] == 2 else [b"data"]
            self.assertEqual([client.read(size) for size in sizes], [*data, b"", b""])

    def test_connection_to_another_host_that_is_lost_is_end_of_file_too(self) -> None:
        client, _ = self.pair()
        with failing("ReadFile", ERROR_NETNAME_DELETED):
            self.assertEqual([client.read(10), client.read(10)], [b"", b""])
        with failing("WriteFile", ERROR_NETNAME_DELETED):
            self.caught(ConnectionLostError, client.write, b"data")

    def test_disconnecting_is_an_error_and_no_end_of_file(self) -> None:
        client, server = self.pair()
        server.write(b"\0OK\0")
        server.disconnect()
        error = self.caught(BrokenPipeError, client.read, 10)
        self.assertEqual(winerror(error), ERROR_PIPE_NOT_CONNECTED)
        self.assertEqual(error.errno, errno.EPIPE)
        self.assertRegex(str(error), "outcome is unknown")

    def test_empty_read_and_empty_write_do_nothing(self) -> None:
        client, server = self.pair()
        self.assertEqual(client.read(0), b"")
        with spying("WriteFile") as calls:
            self.assertEqual(client.write(b""), 0)  # a message of length zero is end of file
        self.assertEqual(calls, [])
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")
        client.write(b"x")
        self.assertEqual(server.read(), b"x")

    def test_closed_pipe_raises_value_error_whatever_is_asked_of_it(self) -> None:
        client, server = self.pair()
        server.close()
        self.assertEqual(client.read(10), b"")
        with client:
            pass
        client.close()
        self.assertTrue(client.closed)
        for size in 0, 10:
            with self.assertRaisesRegex(ValueError, "closed"):
                client.read(size)
            with self.assertRaisesRegex(ValueError, "closed"):
                client.write(bytes(size))

    def test_message_that_does_not_fit_is_read_in_parts(self) -> None:
        client, server = self.pair()
        kernel32.SetNamedPipeHandleState(client._handle, DWORD(PIPE_READMODE_MESSAGE), None, None)
        server.write(b"message")
        self.assertEqual([client.read(4), client.read(4)], [b"mess", b"age"])
        server.write(b"four")
        server.write(b"")
        self.assertEqual([client.read(4), client.read(4)], [b"four", b""])

    def test_readinto_uses_no_memory_of_the_caller_that_could_go_away(self) -> None:
        client, server = self.pair()
        buffer = bytearray(8)
        server.write(b"data")
        with spying("ReadFile") as calls:
            self.assertEqual(client.readinto(buffer), 4)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self.assertNotIn(ctypes.addressof(calls[0][1]), range(begin, begin + 8))
        client.deadline = 0.0
        try:
            client.readinto(buffer)
        except ResponseTimeoutError:
            buffer.extend(b"grows")  # a BufferError if the traceback still used it

    def test_deadline_ends_a_read_whose_waits_are_short_so_that_ctrl_c_is_seen(self) -> None:
        client, server = self.pair()
        client.deadline = time.monotonic() + 0.25
        with spying("WaitForSingleObject") as waits:
            error = self.caught(ResponseTimeoutError, client.read, 10)
        self.assertLessEqual({milliseconds for _, milliseconds in waits}, set(range(101)))
        self.assertLess(sum(milliseconds for _, milliseconds in waits), 300)
        self.assertGreaterEqual(time.monotonic(), client.deadline)
        self.assertIsInstance(error, TimeoutError)
        self.assertEqual((error.errno, error.winerror), (errno.ETIMEDOUT, 258))
        self.assertEqual(error.filename, self.path)
        self.assertRegex(str(error), f"did not end in time, {LOOK_FIRST}")
        self.assert_nothing_is_under_way()
        client.deadline = math.inf
        server.write(b"late")
        self.assertEqual(client.read(10), b"late")

    def test_deadline_ends_a_write(self) -> None:
        for buffers in 0, 4096:
            client, _ = self.pair(buffers=buffers)
            client.deadline = time.monotonic() + 0.15
            self.caught(ResponseTimeoutError, client.write, b"x" * MEBIBYTE)
            self.assert_nothing_is_under_way()

    def test_deadline_in_the_past_takes_what_is_there_or_comes_before_the_cancel(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        client.deadline = 0.0
        self.assertEqual(client.read(10), b"data")
        with spying("CancelIoEx", before=lambda: server.write(b"late")):
            self.assertEqual(client.read(10), b"late")

    def test_pending_read_does_not_hold_up_a_write(self) -> None:
        client, server = self.pair()
        reader = self.run_into("ReadFile", lambda: self.assertEqual(client.read(10), b"response"))
        client.write(b"request")
        self.assertEqual(server.read(), b"request")
        server.write(b"response")
        self.assert_ends(reader)

    def test_error_that_a_signal_handler_replaces_changes_no_end_of_an_operation(self) -> None:
        client, server = self.pair()
        wait = vmshim._kernel32.WaitForSingleObject
        waiting = threading.Event()

        def wait_and_replace(*arguments: Any) -> Any:
            waiting.set()
            result = wait(*arguments)
            windows.set_last_error(0)
            return result

        self.run_aside(lambda: waiting.wait(LONG), lambda: server.write(b"data"), server.close)
        with replacing("WaitForSingleObject", wait_and_replace):
            self.assertEqual([client.read(10), client.read(10)], [b"data", b""])

    def test_operation_whose_error_a_signal_handler_has_replaced_is_not_let_go(self) -> None:
        client, _ = self.pair()
        with spying("ReadFile") as calls:
            with mock.patch.object(vmshim, "_last_error", lambda: ERROR_NO_DATA):
                self.caught(OutcomeUnknownError, client.read, 10)
        self.assertEqual(calls[0][-1].Internal, STATUS_CANCELLED)

    def test_memory_is_kept_before_an_operation_starts_and_has_its_byte_count(self) -> None:
        client, server = self.pair()
        server.write(b"response")
        kept: list[Any] = []
        look = {"before": lambda: kept.extend(vmshim._under_way.values())}
        with spying("WriteFile", **look) as writes, spying("ReadFile", **look) as reads:
            client.write(b"request")
            client.read(MEBIBYTE)
        self.assertEqual(kept, [(call[4], call[1:4]) for call in (*writes, *reads)])
        self.assertLessEqual(reads[0][2], len(reads[0][1]))
        self.assertEqual([call[3] for call in (*writes, *reads)], [None, None])
        self.assert_nothing_is_under_way()

    def test_memory_that_ctrl_c_again_and_again_leaves_behind_is_kept(self) -> None:
        client, server = self.pair()
        client.deadline = 0.0
        with replacing("CancelIoEx", mock.Mock(side_effect=KeyboardInterrupt)):
            self.caught(KeyboardInterrupt, client.read, 1)
        [(overlapped, _)] = vmshim._under_way.values()
        self.assertEqual(overlapped.Internal, STATUS_PENDING)
        server.write(b"x")
        wait_until(lambda: overlapped.Internal != STATUS_PENDING)
        vmshim._under_way.clear()

    def test_finaliser_runs_no_python_code_that_ctrl_c_could_cut_short(self) -> None:
        self.listen()
        pipe = dial_pipe(self.path)
        profile = mock.Mock()
        sys.setprofile(profile)
        del pipe
        sys.setprofile(None)
        called = [call[0][0].f_code for call in profile.call_args_list if call[0][1] == "call"]
        self.assertNotIn(Pipe.write.__code__.co_filename, [code.co_filename for code in called])

    def test_close_from_another_thread_makes_a_blocked_call_raise(self) -> None:
        for function, name, value in ("ReadFile", "read", 10), ("WriteFile", "write", b"x"):
            client, server = self.pair(buffers=0)
            call = functools.partial(getattr(client, name), value)
            thread = self.run_into(function, lambda: self.caught(ValueError, call))
            began = time.monotonic()
            client.close()
            self.assert_ends(thread)
            self.assertLess(time.monotonic() - began, 1.0)
            self.assert_nothing_is_under_way()
            self.assertEqual(server.read(), b"")

    def test_operation_that_begins_while_another_thread_closes_the_pipe_ends_at_once(self) -> None:
        client, _ = self.pair()
        client.deadline = math.inf
        with spying("ReadFile", before=lambda: self.run_aside(client.close).join(LONG)):
            self.caught(ValueError, client.read, 10)
        self.assert_nothing_is_under_way()

    def test_nothing_is_pending_after_the_deadline_or_ctrl_c(self) -> None:
        cancel, wait = vmshim._kernel32.CancelIoEx, vmshim._kernel32.WaitForSingleObject
        cases: tuple[Any, ...] = (
            (ResponseTimeoutError, 0.0, []),
            (KeyboardInterrupt, math.inf, [KeyboardInterrupt]),
        )
        for kind, deadline, presses in cases:
            client, _ = self.pair()
            client.deadline = deadline
            cancelled, waiting = threading.Event(), threading.Event()
            ends = itertools.chain(presses, itertools.repeat(mock.DEFAULT))
            wait_or_press = mock.Mock(wraps=wait, side_effect=ends)

            def cancel_late(handle: Any, operation: Any) -> int:
                """Cancel only while vmshim waits for the cancelled read."""
                self.run_aside(lambda: waiting.wait(LONG), lambda: cancel(handle, operation))
                cancelled.set()
                return 1

            def note_wait(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
                if cancelled.is_set():
                    waiting.set()
                sleep(seconds)

            with spying("ReadFile") as calls, mock.patch.object(time, "sleep", note_wait):
                with replacing("WaitForSingleObject", wait_or_press):
                    with replacing("CancelIoEx", cancel_late):
                        self.caught(kind, client.read, 10)
            self.assertTrue(waiting.is_set(), "it didn't wait for the cancelled read")
            self.assertNotEqual(calls[0][-1].Internal, STATUS_PENDING)
            self.assert_nothing_is_under_way()

    def test_failure_at_once_is_told_and_not_waited_for_even_if_ctrl_c_hides_it(self) -> None:
        # Windows leaves the operation looking as if it were pending, for ever.
        client, server = self.pair()
        server.close()
        with mock.patch.object(vmshim, "_last_error", lambda: 0):  # a signal handler's
            self.caught(OutcomeUnknownError, client.write, b"x")
            self.caught(OutcomeUnknownError, client.read, 10)
        with spying("ReadFile", after=mock.Mock(side_effect=KeyboardInterrupt)):
            self.caught(KeyboardInterrupt, client.read, 10)
        self.assert_nothing_is_under_way()
        with spying("WaitForSingleObject") as waits:
            self.assertEqual(client.read(10), b"")
            self.caught(ConnectionLostError, client.write, b"x")
        self.assertEqual(waits, [])
        self.assert_nothing_is_under_way()

    def test_pipe_that_is_dropped_is_closed(self) -> None:
        self.pair()
        before = lowest_free_handle()
        for _ in range(20):
            with RawPipe.listen(self.path) as another:
                dial_pipe(self.path)
                self.assertEqual(another.read(), b"")
        self.assertLessEqual(lowest_free_handle(), before)


# ---- Client -------------------------------------------------------------------------------------


class DialTest(PipeCase):
    def dial_in_vain(self, kind: type[OSError], number: int, text: str, **options: Any) -> None:
        error = self.caught(PipeOpenError, dial_pipe, self.path, **options)
        self.assertIs(type(error), kind)
        self.assertEqual((error.winerror, error.filename), (number, self.path))
        self.assertRegex(str(error), text)

    def test_opens_as_the_reference_does(self) -> None:
        self.listen()
        with spying("CreateFileW") as calls:
            dial_pipe(self.path).close()
        # GENERIC_READ | GENERIC_WRITE, share 0, OPEN_EXISTING, and
        # FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS
        self.assertEqual(calls, [(self.path, 0xC0000000, 0, None, 3, 0x40100000, None)])

    def test_timeout_counts_from_the_connection(self) -> None:
        self.listen()
        with dial_pipe(self.path) as pipe:
            self.assertEqual(pipe.deadline, math.inf)
        self.listen()
        with dial_pipe(self.path, timeout=0.1) as pipe:
            self.caught(ResponseTimeoutError, pipe.read, 10)
        self.make_busy()
        # How long it stays busy must not count.
        self.once_in("WaitNamedPipeW", lambda: time.sleep(0.2), self.listen)
        with dial_pipe(self.path, connect_timeout=None, timeout=1.0) as pipe:
            self.assertGreater(pipe.deadline - time.monotonic(), 0.9)

    def test_error_other_than_busy_is_told_at_once_with_number_text_and_path(self) -> None:
        self.caught(FileNotFoundError, self.issue, connect_timeout=None)
        self.dial_in_vain(PipeNotFoundError, 2, "no shim listens there", connect_timeout=None)
        with failing("CreateFileW", 1450):
            self.dial_in_vain(PipeOpenError, 1450, re.escape(windows.FormatError(1450).strip()))
        self.listen(access=PIPE_ACCESS_INBOUND)
        self.dial_in_vain(PipeAccessError, 5, "elevated administrator", connect_timeout=None)

    def test_busy_pipe_is_given_up_after_the_timeout_in_waits_of_1_to_100_ms(self) -> None:
        self.make_busy()
        give_up = functools.partial(
            self.dial_in_vain, PipeBusyError, 231, "the pipe stayed busy; try again"
        )
        with spying("CreateFileW") as calls:
            give_up(connect_timeout=0)
        self.assertEqual(len(calls), 1)
        give_up(connect_timeout=0.05)
        with spying("WaitNamedPipeW") as waits, mock.patch.object(time, "sleep", self.fail):
            give_up(connect_timeout=0.25)
        self.assertGreater(sum(milliseconds for _, milliseconds in waits), 100)
        self.assertLessEqual({milliseconds for _, milliseconds in waits}, set(range(101)))
        with spying("WaitNamedPipeW") as waits:
            while not waits:  # the time may be over before it comes to that
                give_up(connect_timeout=0.0009)
        # Not 0, which is the server's default.
        self.assertEqual({milliseconds for _, milliseconds in waits}, {1})

    def test_wait_that_fails_at_once_decides_nothing_and_is_no_busy_loop(self) -> None:
        # ERROR_FILE_NOT_FOUND, as in some containers
        self.make_busy()
        with failing("WaitNamedPipeW", *[2] * 1000), spying("CreateFileW") as calls:
            self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0.2)
        self.assertLess(len(calls), 50)
        tries = itertools.count()

        def free() -> None:
            if next(tries) == 3:
                self.listen()

        with failing("WaitNamedPipeW", *[2] * 9), spying("WaitNamedPipeW", before=free):
            dial_pipe(self.path, connect_timeout=LONG).close()

    def test_client_that_lost_an_instance_to_another_stands_back_for_a_random_while(self) -> None:
        self.make_busy()
        # It returns at once, and make_busy() has another client have the instance.
        wait = mock.Mock(return_value=1)
        with replacing("WaitNamedPipeW", wait), mock.patch.object(
            time, "sleep", wraps=time.sleep
        ) as sleep:
            self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0.5)
        pauses = [call[0][0] for call in sleep.call_args_list]
        self.assertIn(wait.call_count - len(pauses), (0, 1))
        self.assertGreater(len(set(pauses)), 2)
        self.assertLess(max(pauses), 0.066)

    def test_traceback_of_ctrl_c_keeps_no_connection_open(self) -> None:
        server = self.listen()
        deadlines = mock.Mock(side_effect=[math.inf, KeyboardInterrupt])
        with mock.patch.object(vmshim, "_deadline", deadlines):
            try:
                dial_pipe(self.path)
            except KeyboardInterrupt as error:
                interrupt = error
        self.assertEqual(server.read(), b"")
        self.assertIsNotNone(interrupt.__traceback__)


class ExchangeTest(PipeCase):
    def test_request_is_one_write_of_the_bytes_that_the_reference_writes(self) -> None:
        requests = []
        mode = PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE
        self.fake_shim(lambda pipe: requests.append(pipe.read()), writing(SHIM_SUCCESS), mode=mode)
        self.issue()
        self.assertEqual(requests, [b'{"ID":"test","Op":"create"}\n'])

    def test_every_response_in_one_piece_or_many_on_every_kind_of_pipe(self) -> None:
        for mode, buffers in itertools.product((PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE), (0, 4096)):
            options: dict[str, int] = {"mode": mode, "buffers": buffers}
            with self.subTest(options=options):
                for pieces in (SHIM_SUCCESS,), (b"\0", b"O", b"K", b"\0"):
                    self.fake_shim_responding(*pieces, **options)
                    self.issue()
                text = "é: boom\n".encode()
                self.fake_shim_responding(text, **options)
                error = self.refusal()
                self.assertEqual((str(error), error.response), ("é: boom", text))
                self.assertIsNone(error.exit_code)
                self.fake_shim_responding(*[b"piece "] * 500, **options)
                self.assertEqual(self.refusal().message, "piece " * 500)

    def test_success_ends_with_a_zero_length_message_and_our_closing(self) -> None:
        rest: list[bytes] = []
        for buffers in 0, 4096:
            self.fake_shim(
                *(RawPipe.read, writing(SHIM_SUCCESS), RawPipe.flush, writing(b"")),
                lambda pipe: rest.append(pipe.read_all()),  # it serves nobody until we close
                buffers=buffers,
            )
            self.issue()
        wait_until(lambda: rest == [b"", b""])

    def test_response_that_is_not_exactly_the_four_bytes_is_an_error(self) -> None:
        for response in (*REFUSALS, b"\0O"):
            with self.subTest(response=response):
                self.fake_shim_responding(response)
                self.assertEqual(self.refusal().response, response)

    def test_empty_response_leaves_the_outcome_unknown(self) -> None:
        for pieces in (), (b"",):
            self.fake_shim_responding(*pieces)
            error = self.caught(OutcomeUnknownError, self.issue)
            self.assertIs(type(error), OutcomeUnknownError)
            self.assertRegex(str(error), "^unknown shim failure: .*outcome is unknown")

    def test_response_of_a_mebibyte_is_read_and_a_longer_one_is_cut_off(self) -> None:
        def respond(pipe: RawPipe, size: int, step: int) -> None:
            with contextlib.suppress(OSError):
                for begin in range(0, size, step):
                    pipe.write(b"x" * min(step, size - begin))

        sizes = MEBIBYTE, MEBIBYTE + 1, 4 * MEBIBYTE
        modes = PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE
        for size, mode, step in itertools.product(sizes, modes, (4096, 4 * MEBIBYTE)):
            script = RawPipe.read, functools.partial(respond, size=size, step=step)
            self.fake_shim(*script, mode=mode)
            error = self.refusal()
            self.assertEqual(len(error.response), min(size, MEBIBYTE + 1))
            self.assertEqual("is longer than" in str(error), size > MEBIBYTE)

    def test_limit_of_the_response_can_be_chosen(self) -> None:
        self.fake_shim_responding(b"boom!")
        error = self.refusal(max_response=4)
        self.assertRegex(str(error), "longer than 4 bytes")
        self.assertEqual(error.response, b"boom!")
        self.fake_shim_responding(b"x" * (MEBIBYTE + 2))
        self.assertEqual(len(self.refusal(max_response=MEBIBYTE + 2).response), MEBIBYTE + 2)
        self.fake_shim_responding(SHIM_SUCCESS)
        self.issue(max_response=4)

    def test_server_that_closes_before_reading_leaves_the_outcome_unknown(self) -> None:
        closed = threading.Event()
        self.fake_shim(RawPipe.close, lambda pipe: closed.set())
        with spying("WriteFile", before=lambda: closed.wait(LONG)):
            error = self.caught(ConnectionLostError, self.issue)
        self.assertIn(error.winerror, (ERROR_NO_DATA, ERROR_BROKEN_PIPE))
        self.assertEqual(error.filename, self.path)
        self.assertRegex(str(error), LOOK_FIRST)

    def test_write_that_fails_for_another_reason_waits_for_no_response(self) -> None:
        self.fake_shim_hanging()
        with failing("WriteFile", 8):
            self.caught(ConnectionLostError, self.issue, timeout=0.2)

    def test_server_that_closes_while_reading_leaves_the_outcome_unknown(self) -> None:
        self.fake_shim(lambda pipe: pipe.read(5), mode=PIPE_TYPE_BYTE, buffers=0)
        self.assertEqual(self.caught(ConnectionLostError, self.issue).winerror, ERROR_BROKEN_PIPE)

    def test_server_that_disconnects_leaves_the_outcome_unknown(self) -> None:
        self.fake_shim(RawPipe.read, writing(b"\0"), RawPipe.flush, RawPipe.disconnect)
        self.assertRegex(str(self.caught(ConnectionLostError, self.issue)), LOOK_FIRST)

    def test_refusal_that_comes_before_the_whole_request_was_read_is_told(self) -> None:
        for mode in PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE:
            self.fake_shim(lambda pipe: pipe.read(5), writing(b"too long"), mode=mode, inbound=0)
            with spying("WriteFile") as writes:
                self.assertEqual(str(self.refusal()), "too long")
            self.assertEqual(len(writes), 1)
        self.fake_shim(lambda pipe: pipe.read(5), writing(b"too long"), inbound=0)
        self.assertEqual(self.refusal(max_response=4).response, b"too l")

    def test_server_that_never_responds_is_a_timeout_with_unknown_outcome(self) -> None:
        for without_end in [], [writing(SHIM_SUCCESS)]:
            gone = self.fake_shim_hanging(RawPipe.read, *without_end)
            error = self.caught(ResponseTimeoutError, self.issue, timeout=0.2)
            self.assertRegex(str(error), LOOK_FIRST)
            gone.set()

    def test_request_that_is_never_read_was_not_sent_unless_it_fills_a_buffer_of_go(self) -> None:
        filling = 512, 1536, 3584, 7680
        for size in (511, 513, 1024, 100_000, *filling):
            gone = self.fake_shim_hanging(buffers=0)
            kind: Any = ResponseTimeoutError if size in filling else ShimBusyError
            text = LOOK_FIRST if size in filling else "busy with another request"
            id = "x" * (size + len(b"\n") - len(wire("")))
            with self.subTest(size=size):
                error = self.caught(kind, self.issue, id, timeout=0.05)
                self.assertEqual((error.errno, error.winerror), (errno.ETIMEDOUT, 258))
                self.assertEqual(error.filename, self.path)
                self.assertRegex(str(error), text)
            gone.set()

    def test_server_that_never_frees_an_instance_is_busy_and_nothing_is_sent(self) -> None:
        with RawPipe.listen(self.path) as server:
            with RawPipe.dial(self.path):
                for connect_timeout in 0, 0.2:
                    self.caught(PipeBusyError, self.issue, connect_timeout=connect_timeout)
            self.assertEqual(server.read(), b"")

    def test_ctrl_c_ends_the_wait_for_a_response(self) -> None:
        before = lowest_free_handle()
        self.fake_shim_hanging(RawPipe.read, lambda pipe: _thread.interrupt_main())
        self.caught(KeyboardInterrupt, self.issue, timeout=None)
        self.doCleanups()
        self.assertLessEqual(lowest_free_handle(), before)

    def test_ctrl_c_ends_the_wait_for_an_instance(self) -> None:
        self.make_busy()
        self.once_in("WaitNamedPipeW", _thread.interrupt_main)
        self.caught(KeyboardInterrupt, self.issue, connect_timeout=None)

    def test_one_debug_line_a_request(self) -> None:
        for response, issue, end in (
            (SHIM_SUCCESS, self.issue, " done "),
            (b"boom", self.refusal, "ShimError: boom"),
        ):
            self.fake_shim_responding(response)
            with self.assertLogs("vmshim", logging.DEBUG) as logs:
                issue()
            self.assertEqual([record.levelname for record in logs.records], ["DEBUG"])
            for part in self.path, "'test'", " create: ", end, " ms":
                self.assertIn(part, logs.output[0])

    def test_broken_logging_hides_no_outcome(self) -> None:
        def issue(err: io.StringIO) -> None:
            for stream in err, None:
                with mock.patch.object(sys, "stderr", stream):
                    self.fake_shim_responding(SHIM_SUCCESS)
                    self.issue()
            self.assertRegex(err.getvalue(), r"^$|^[^\n]*: done .*logging failed: \w+Error.*\n$")

        self.with_broken_logging(issue)

    def test_container_shim_is_sent_nothing_and_responds_on_a_byte_pipe(self) -> None:
        self.fake_shim(writing(SHIM_SUCCESS), RawPipe.flush, mode=PIPE_TYPE_BYTE)
        with dial_pipe(self.path) as pipe:
            check_shim_response(pipe)

    def test_process_of_a_container_is_started_by_connecting(self) -> None:
        """The README's recipe."""
        self.path = shim_pipe_path(GUID)
        code = readme_example("shim_pipe_path")
        for response in SHIM_SUCCESS, b"no such program":
            with start_process("-c", "import sys; sys.stdin.read()") as process:
                self.fake_shim(writing(response), mode=PIPE_TYPE_BYTE)
                names = {"process": process, "unique_id": GUID}
                if response == SHIM_SUCCESS:
                    exec(code, names)
                    self.assertIsNone(process.poll())
                else:
                    with self.assertRaisesRegex(ShimError, "^no such program$"):
                        exec(code, names)
                    self.assertIsNotNone(process.returncode)

    def test_nothing_is_left_after_a_thousand_requests(self) -> None:
        self.fake_shim_for(1000)
        for _ in range(10):
            self.issue()
        handle = lowest_free_handle()
        for _ in range(990):
            self.issue()
        self.assertLessEqual(lowest_free_handle(), handle + 8)  # the server's two come and go

    def test_sixteen_threads_at_once_are_all_served(self) -> None:
        ids = self.fake_shim_for(160)
        self.assertEqual(self.issue_from_many_threads(10), sorted(ids))


# ---- runhcs's own state -------------------------------------------------------------------------

RUNHCS = r"SOFTWARE\Microsoft\runhcs"
winreg: Any = __import__("winreg") if WINDOWS else None  # type checkers know it on Windows only
ZERO_GUID = "00000000-0000-0000-0000-000000000000"
BROKEN_STATES = (
    *(b"", b"{", b"[]", b"{} {}", b'{"Owner":5}', b'{"IsHost":1}', b'{"UniqueID":"x"}'),
    *(b'{"Created":"x"}', b'{"UniqueID":""}'),
)


def state_of(id: str, guid: str = ZERO_GUID, **more: Any) -> dict[str, Any]:
    """Return what runhcs stores of a container in the VM with this GUID."""
    vm = {} if guid == ZERO_GUID else {"HostID": f"vm of {id}"}
    created = "2019-05-01T01:02:03.1234567Z"
    return {"ID": id, "Created": created, "UniqueID": GUID, "HostUniqueID": guid, **vm, **more}


@needs_state
class RegistryCase(PipeCase):
    """Writes containers as runhcs does, below a root of its own that is gone afterwards."""

    def setUp(self) -> None:
        super().setUp()
        self.root = f"vmshim test/{uuid.uuid4()}"
        self.root_key = f"{RUNHCS}\\{self.root.replace(' ', '%20').replace('/', '%2F')}"
        had_runhcs = self.key_exists(RUNHCS)
        error = self.create_key(self.root_key)
        if error == 5:
            self.skipTest("the registry can't be written to here: Win32 error 5")
        self.assertEqual(error, 0)
        self.addCleanup(self.delete_root, and_runhcs=not had_runhcs)

    def open_key(self, path: str) -> Any:
        access = winreg.KEY_ALL_ACCESS | winreg.KEY_WOW64_64KEY
        return winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path, 0, access)

    def key_exists(self, path: str) -> bool:
        try:
            self.open_key(path).Close()
        except FileNotFoundError:
            return False
        return True

    def create_key(self, path: str) -> int:
        """Create a volatile key, which winreg can't; return the Win32 error.

        runhcs's key is volatile, and below such a key only volatile keys can be made.
        """
        key = HANDLE()
        local_machine = HANDLE(winreg.HKEY_LOCAL_MACHINE)
        access = winreg.KEY_ALL_ACCESS | winreg.KEY_WOW64_64KEY
        volatile = winreg.REG_OPTION_VOLATILE
        advapi32 = windows.WinDLL("advapi32")
        error: int = advapi32.RegCreateKeyExW(
            *(local_machine, path, 0, None, volatile, access, None, ctypes.byref(key), None)
        )
        advapi32.RegCloseKey(key)
        return error

    def delete_key(self, path: str) -> None:
        winreg.DeleteKeyEx(winreg.HKEY_LOCAL_MACHINE, path, winreg.KEY_WOW64_64KEY, 0)

    def delete_root(self, *, and_runhcs: bool) -> None:
        with self.open_key(self.root_key) as key:
            count, *_ = winreg.QueryInfoKey(key)
            names = [winreg.EnumKey(key, number) for number in range(count)]
        for name in names:
            self.delete_key(f"{self.root_key}\\{name}")
        self.delete_key(self.root_key)
        if and_runhcs:
            with contextlib.suppress(OSError):  # another run of this suite may be using it
                self.delete_key(RUNHCS)

    def write_container(
        self, name: str, state: Any = None, kind: str = "REG_BINARY", **values: int
    ) -> None:
        """Write a container's key: its state (JSON of a dict, or as it is), and QWORDs."""
        if isinstance(state, dict):
            state = json.dumps(state).encode()
        path = f"{self.root_key}\\{name}"
        self.assertEqual(self.create_key(path), 0)
        with self.open_key(path) as key:
            if state is not None:
                winreg.SetValueEx(key, "state", 0, getattr(winreg, kind), state)
            for value, number in values.items():
                winreg.SetValueEx(key, value, 0, winreg.REG_QWORD, number)

    def write_in_vm(self, id: str, **more: Any) -> str:
        """Write a container in a VM of its own; return the VM's GUID. Its pipe is self.path."""
        guid = str(uuid.uuid4())
        self.write_container(id.replace(" ", "%20"), state_of(id, guid, **more))
        self.path = vm_pipe_path(guid)
        return guid

    def read(self, id: str) -> Container:
        return read_container(id, root=self.root)

    def listed(self) -> list[str]:
        return sorted(container.id for container in list_containers(root=self.root))


class ContainerTest(RegistryCase):
    def test_container_is_read_as_runhcs_wrote_it(self) -> None:
        guid = uuid.uuid4()
        state = state_of(
            "c", str(guid), Owner="me", SandboxID="s", Bundle="C:\\b", Rootfs="C:\\r", IsHost=True
        )
        state.update(Spec={"x": [1.5, None]}, RequestedNetNS="")
        self.write_container("c", state, shim=4711, pid=5)
        expected = Container(
            id="c",
            owner="me",
            sandbox_id="s",
            host_id="vm of c",
            bundle="C:\\b",
            created=datetime(2019, 5, 1, 1, 2, 3, 123456, timezone.utc),
            rootfs="C:\\r",
            is_host=True,
            unique_id=uuid.UUID(GUID),
            host_unique_id=guid,
            shim_pid=4711,
            created_nanosecond=700,
        )
        self.assertEqual(self.read("c"), expected)

    def test_what_may_be_absent_has_a_default(self) -> None:
        state = {"Created": "2019-05-01T01:02:03Z", "UniqueID": GUID, "HostUniqueID": GUID}
        self.write_container("c", state)
        container = self.read("c")
        self.assertEqual((container.id, container.owner, container.host_id), ("c", "", ""))
        self.assertEqual((container.is_host, container.shim_pid), (False, -1))
        self.write_container("c", shim=0)
        self.assertEqual(self.read("c").shim_pid, 0)
        self.write_container("empty", {})
        zero = uuid.UUID(int=0)
        expected = Container("empty", "", "", "", "", NEVER, "", False, zero, zero, -1, 0)
        self.assertEqual(self.read("empty"), expected)

    def test_odd_ids_are_found_and_listed(self) -> None:
        keys = {"a b": "a%20b", "a/b": "a%2Fb", "é": "%C3%A9", "..": "..", "a\\b": "a%5Cb"}
        keys["%"] = "%25"
        for id, key in keys.items():
            self.write_container(key, state_of(id))
            self.assertEqual(self.read(id).id, id)
        self.assertEqual(self.listed(), sorted(keys))

    def test_unknown_id_is_told_as_the_reference_tells_it(self) -> None:
        issue: Any = functools.partial(issue_container_request, op="create")
        # No key of the registry has a longer name than 255 characters.
        ids, roots = ("x", "x" * 300, "\0" * 86), (self.root, "no-such-root", "x" * 300)
        for call, id, root in itertools.product((read_container, issue), ids, roots):
            error = self.caught(ContainerNotFoundError, call, id, root=root)
            self.assertEqual(str(error), f"ID '{id}' was not found")
        self.assertEqual(list_containers(root="no-such-root"), [])

    def test_broken_state_is_a_clear_error(self) -> None:
        for state in BROKEN_STATES:
            self.write_container("c", state)
            error = self.caught(ContainerStateError, self.read, "c")
            self.assertRegex(str(error), "^the state of ID 'c' is broken: .")
        self.write_container("none", shim=1)
        self.write_container("text", "{}", kind="REG_SZ")
        for id in "none", "text":
            missing = self.caught(ContainerNotFoundError, self.read, id)
            self.assertRegex(str(missing), f"'state' is not present for ID '{id}'")

    def test_broken_entries_are_logged_and_hide_no_others(self) -> None:
        for number, state in enumerate(BROKEN_STATES):
            self.write_container(f"broken{number}", state)
        self.write_container("none")
        for name in "100%", "%FF", "%", "%2", "%zz":
            self.write_container(name, state_of("x"))
        self.write_container("%EF%BF%BD", state_of("\ufffd"))  # what a decoder puts for %FF
        with self.assertLogs("vmshim", logging.WARNING) as logs:
            self.assertEqual(self.listed(), ["\ufffd"])
        self.assertEqual(len(logs.output), len(BROKEN_STATES) + 6)
        for name in "'none'", "'100%'", "'%FF'", "'%'", "'%2'", "'%zz'", "'broken0'":
            self.assertEqual(sum(name in line for line in logs.output), 1)

    def test_container_that_is_deleted_meanwhile_is_not_found_and_hides_no_others(self) -> None:
        query = winreg.QueryValueEx

        def delete_first(*arguments: Any) -> Any:
            with contextlib.suppress(OSError):
                self.delete_key(f"{self.root_key}\\c")
            return query(*arguments)

        self.write_container("c", state_of("c"))
        with mock.patch.object(winreg, "QueryValueEx", delete_first):
            error = self.caught(ContainerNotFoundError, self.read, "c")
            self.assertEqual(str(error), "ID 'c' was not found")
            self.write_container("c", state_of("c"))
            with self.assertLogs("vmshim", logging.WARNING):
                self.assertEqual(self.listed(), [])
        enum = winreg.EnumKey

        def delete_then(*arguments: Any) -> Any:
            name = enum(*arguments)
            with contextlib.suppress(OSError):
                self.delete_key(f"{self.root_key}\\a")
            return name

        for id in "abcd":
            self.write_container(id, state_of(id))
        with mock.patch.object(winreg, "EnumKey", delete_then):
            self.assertEqual(self.listed(), ["b", "c", "d"])

    def test_registry_is_only_read_and_in_its_64_bit_view(self) -> None:
        self.write_container("c", state_of("c"))
        with mock.patch.object(winreg, "OpenKey", wraps=winreg.OpenKey) as spy:
            self.read("c")
            self.listed()
        self.assertEqual(spy.call_count, 3)
        for call in spy.call_args_list:
            self.assertEqual(call.args[3], 0x20019 | 0x100)  # KEY_READ | KEY_WOW64_64KEY
        self.assertFalse(self.key_exists(f"{RUNHCS}\\no-such-root"))

    def test_error_of_the_registry_names_the_key_and_says_that_nothing_was_sent(self) -> None:
        self.write_container("c", state_of("c"))
        cases: tuple[tuple[str, str, Step], ...] = (
            ("OpenKey", "\\c", lambda: self.read("c")),
            ("QueryValueEx", "\\c", lambda: self.read("c")),
            ("EnumKey", "", self.listed),  # a list that breaks off is no list
        )
        advice = "(denied); run this as an elevated administrator"
        ends = (5, errno.EACCES, advice), (14, errno.EINVAL, "(denied)")
        for (function, key, call), (number, errno_, text) in itertools.product(cases, ends):
            failure = OSError(errno_, "denied", None, number)
            with mock.patch.object(winreg, function, side_effect=failure):
                error = self.caught(RegistryError, call)
            self.assertEqual(error.strerror, f"can't be read {text}")
            self.assertIsInstance(error, NotSentError)
            self.assertEqual(error.filename, f"HKLM\\{self.root_key}{key}")
            self.assertEqual((error.errno, error.winerror), (errno_, number))


class ContainerRequestTest(RegistryCase):
    def issue_for(self, id: str, **options: Any) -> None:
        issue_container_request(id, "unmount", root=self.root, **{"timeout": LONG, **options})

    def test_request_goes_to_the_vm_of_the_container(self) -> None:
        self.write_in_vm("a b")
        requests: list[bytes] = []
        self.fake_shim(lambda pipe: requests.append(pipe.read()), writing(SHIM_SUCCESS))
        self.issue_for("a b", connect_timeout=LONG)
        self.assertEqual(requests, [wire("a b", "unmount")])

    def test_container_without_a_vm_is_told_and_the_zero_guid_is_never_dialled(self) -> None:
        self.write_container("c", state_of("c"))
        with mock.patch.object(vmshim, "dial_pipe") as spy:
            error = self.caught(ContainerNotFoundError, self.issue_for, "c")
        self.assertRegex(str(error), "^container 'c' runs in no VM")
        spy.assert_not_called()

    def test_vm_that_is_not_there_cannot_be_contacted(self) -> None:
        self.write_in_vm("c")
        error = self.caught(PipeNotFoundError, self.issue_for, "c")
        self.assertEqual(error.strerror, "VM vm of c cannot be contacted")
        self.assertEqual((error.filename, error.winerror), (self.path, 2))
        self.assertEqual({repr(other) for other in copies_of(error)}, {repr(error)})

    def test_limits_are_passed_on(self) -> None:
        self.write_in_vm("c")
        self.fake_shim_responding(b"boom!")
        error = self.caught(ShimError, self.issue_for, "c", max_response=4)
        self.assertRegex(str(error), "longer than 4 bytes")
        self.fake_shim_hanging(RawPipe.read)
        self.caught(ResponseTimeoutError, self.issue_for, "c", timeout=0.1)
        self.caught(PipeBusyError, self.issue_for, "c", connect_timeout=0)


@needs_command_line
class CommandLineOnContainersTest(RegistryCase, ServerCase):
    def run_for(self, *arguments: str) -> tuple[int, Any, str]:
        status, out, err = run_cli(*arguments, "--json", "--root", self.root)
        return status, json.loads(out), err

    def run_list(self, *arguments: str) -> str:
        status, out, err = run_cli("list", "--root", self.root, *arguments)
        self.assertEqual((status, err), (0, ""))
        return out

    def test_command_line_finds_the_vm_by_itself(self) -> None:
        self.write_in_vm("c")
        self.write_container("bare", state_of("bare"))
        status, row, err = self.run_for("unmount", "c")
        self.assertEqual((status, err.count("\n")), (3, 1))
        self.assertTrue(err.startswith(f"{self.path}: VM vm of c cannot be contacted"))
        self.start_server()
        with mock.patch.object(vmshim, "_issue_to_vm", wraps=vmshim._issue_to_vm) as spy:
            status, row, err = self.run_for("unmount", "c", "--timeout", "7")
        self.assertEqual(spy.call_args[1], {"timeout": 7.0, "connect_timeout": 2.0})
        self.assertEqual((status, err), (0, ""))
        self.assertEqual((row["pipe"], row["ok"]), (self.path, True))
        status, row, err = self.run_for("unmount", "bare")
        self.assertEqual((status, row["pipe"]), (3, None))
        self.assertIn("runs in no VM", err)
        ended = 3, "", "ID 'x' was not found\n"
        self.assertEqual(run_cli("unmount", "--root", self.root, "c", "x"), ended)

    def test_broken_entry_is_no_wrong_usage(self) -> None:
        self.write_container("c", b"{")
        status, row, err = self.run_for("unmount", "c")
        self.assertEqual((status, row["outcome"]), (3, "not-sent"))
        self.assertRegex(err, r"^the state of ID 'c' is broken: [^\n]*\n$")

    def test_list_tells_whether_each_shim_listens_and_takes_no_instance(self) -> None:
        self.assertEqual(self.run_list("--json-lines"), "")
        pipes = self.enter(mock.patch.object(os, "listdir", return_value=[]))  # Wine lists none
        absent, free, busy = (self.write_in_vm(id, Owner="mé") for id in "afb")
        self.make_busy()
        self.write_container("none", state_of("none", Owner="mé"))
        self.enter(RawPipe.listen(vm_pipe_path(free)))
        created = "2019-05-01T01:02:03.1234567Z"
        self.assertEqual(
            [line.split(None, 3) for line in self.run_list().splitlines()],
            [
                ["ID", "VM", "OWNER", "CREATED                       VM SHIM"],
                ["a", absent, "mé", f"{created}  absent"],
                ["b", busy, "mé", f"{created}  busy"],
                ["f", free, "mé", f"{created}  free"],
                ["none", "-", "mé", f"{created}  -"],
            ],
        )
        rows = json.loads(self.run_list("--json"))
        self.assertEqual([row["id"] for row in rows], ["a", "b", "f", "none"])
        self.assertEqual([row["vm_shim"] for row in rows], ["absent", "busy", "free", None])
        self.assertEqual((rows[0]["created"], rows[0]["host_unique_id"]), (created, absent))
        out = self.run_list("--json-lines")
        self.assertTrue(out.isascii())
        host = os.environ["COMPUTERNAME"]
        self.assertEqual([*map(json.loads, out.splitlines())], [{"host": host, **r} for r in rows])
        # In some containers no wait finds a pipe: one that is there, or may be, isn't absent.
        pipes.return_value = [vm_pipe_path(absent)[len("\\\\.\\pipe\\") :]]
        self.assertIn(f"{created}  unknown", self.run_list())
        pipes.side_effect = OSError
        self.assertIn(f"{created}  unknown", self.run_list())
        RawPipe.dial(vm_pipe_path(free), patience=0).close()  # nobody has taken it

    def test_row_of_list_is_one_line_whatever_a_container_is_called(self) -> None:
        self.write_container("a%0A%1B%09", state_of("a\n\x1b\t", Owner="\u202e\r\nforged"))
        self.write_container("%C3%A9", state_of("é"))  # the registry has this one first
        _, row, last = self.run_list().splitlines()
        self.assertEqual(row.split()[:3], ["a\\n\\x1b\\t", "-", "\\u202e\\r\\nforged"])
        self.assertEqual(last.split()[0], "é")

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Launch a shim process by the README's recipe, in a virtual environment."""
        code = readme_example("--handshake").replace(
            '"--pipe", r"\\\\.\\pipe\\my-shim"', ", ".join(map(repr, arguments))
        )
        shims: list[subprocess.Popen[bytes]] = []
        start = subprocess.Popen

        def keep(command: list[str], **options: Any) -> Any:
            command = [command[0], vmshim.__file__, *command[2:]]
            shim = start(command, stderr=subprocess.DEVNULL, **options)
            self.addCleanup(shim.wait, LONG)
            self.addCleanup(shim.kill)
            shims.append(shim)
            return shim

        base = getattr(sys, "_base_executable", sys.executable)
        with mock.patch.multiple(sys, executable="a launcher", _base_executable=base, create=True):
            with mock.patch.object(subprocess, "Popen", keep):
                exec(code, {})
        return shims[0]

    def test_whole_way_from_the_launch_to_the_end_of_the_process(self) -> None:
        guid = self.write_in_vm("c")
        self.enter(mock.patch.object(os, "listdir", return_value=[]))  # Wine lists no pipes
        request = functools.partial(issue_container_request, "c", "unmount", root=self.root)
        shim = self.launch("--vm", guid)
        self.assertIn(guid, self.run_list())
        for _ in range(3):
            request(connect_timeout=LONG, timeout=LONG)
        wait_until(lambda: self.run_for("list")[1][0]["vm_shim"] == "free")
        self.assertIsNone(shim.poll())
        shim.kill()
        shim.wait(LONG)
        self.caught(PipeNotFoundError, request)
        self.assertEqual(self.run_for("list")[1][0]["vm_shim"], "absent")

    def test_launch_that_fails_says_why_and_leaves_no_process(self) -> None:
        error = self.caught(ShimError, self.launch, "--vm", "nope")
        self.assertRegex(str(error), "^invalid GUID")
        self.assertIsNotNone(error.exit_code)

    def test_launched_shim_takes_options_that_are_a_json_object_and_prints_to_stderr(self) -> None:
        for options, launched in (b"[]", False), (b"{}", True):
            arguments = "serve", "--handshake", "--pipe", self.path
            shim = self.enter(start_process(vmshim.__file__, *arguments))
            self.addCleanup(shim.kill)
            assert shim.stdin and shim.stdout and shim.stderr
            shim.stdin.write(options)
            shim.stdin.close()
            out = shim.stdout.read()
            if launched:
                self.assertEqual(out, SHIM_SUCCESS)
                self.issue("c")
                shim.kill()
                _, request = shim.stderr.read().splitlines()
                self.assertEqual(request, b"create c")
            else:
                self.assertEqual(out.strip(), b"the options on stdin must be an object")
                self.assertEqual(shim.wait(LONG), 2)

    def test_quick_start_of_the_readme_and_its_recipes_for_many_requests_work(self) -> None:
        guid = self.write_in_vm("my-container")
        self.write_container("other-container", state_of("other-container", guid))
        requests = self.start_recording()
        with_root = "timeout=60", f"timeout=60, root={self.root!r}"
        for count, part, (text, other) in (
            (1, "except ShimError", with_root),
            (2, "vm_pipe_path", ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", guid)),
            (4, "ThreadPoolExecutor", with_root),
            *[(5, "asyncio", with_root)] * (sys.version_info >= (3, 9)),
        ):
            exec(readme_example(part).replace(text, other), {})
            self.assertEqual(len(requests), count)
        self.assertEqual(requests[:2], [("my-container", "unmount")] * 2)


# ---- Server -------------------------------------------------------------------------------------


UNREADABLE: Any = type("Unreadable", (Exception,), {"__str__": lambda self: 1 / 0})


class ServerTest(ServerCase):
    def test_connection_stays_until_the_client_closes(self) -> None:
        self.start_server(max_clients=1)
        with RawPipe.dial(self.path) as client:
            client.write(wire())
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            self.caught(PipeBusyError, self.issue, connect_timeout=0)
            client.write(b"still there")
        self.issue()

    def test_refusal_is_the_response_and_ends_with_the_connection(self) -> None:
        self.start_server(mock.Mock(side_effect=ShimError("é: no")), request_timeout=None)
        client = self.dial(wire())
        self.assertEqual([client.read(), client.read()], ["é: no".encode(), b""])
        self.assertEqual(winerror(self.caught(OSError, client.write, b"x")), ERROR_NO_DATA)

    def test_text_of_a_failure_is_cut_never_empty_and_never_success(self) -> None:
        failures: list[tuple[Exception, bytes]] = [
            (ValueError(), b"ValueError()"),
            (ShimError("\n"), b"\n"),
            (ShimError(FileNotFoundError(2, "no layer")), b"[Errno 2] no layer"),
            (ShimError("x", b"\xff as another shim said\n"), b"\xff as another shim said\n"),
            (ValueError("a\0b"), b"a\0b"),
            (ValueError("a\ud800b"), b"a\\ud800b"),
            (ValueError("x" * 10 * MEBIBYTE), b"x" * MEBIBYTE),
            (ShimError("", b"x" * 2 * MEBIBYTE), b"x" * MEBIBYTE),
            *((failure, NO_TEXT) for failure in (ShimError(""), UNREADABLE())),
            *((kind(SHIM_SUCCESS.decode()), NO_TEXT) for kind in (ValueError, ShimError)),
            (ShimError("x", SHIM_SUCCESS), NO_TEXT),
        ]
        server = self.start_server()
        with self.assertLogs("vmshim", logging.INFO):
            for failure, text in failures:
                with self.subTest(text=text[:50]):
                    server.handler = mock.Mock(side_effect=failure)
                    self.assertEqual(self.raw_exchange(wire()), text)

    def test_bug_of_the_handler_is_logged_with_traceback_and_a_refusal_as_information(self) -> None:
        self.start_server(mock.Mock(side_effect=[ZeroDivisionError("a bug"), ShimError("no")]))
        with self.assertLogs("vmshim", logging.INFO) as logs:
            self.assertEqual([self.raw_exchange(wire()) for _ in range(2)], [b"a bug", b"no"])
        bug, refused = logs.records
        self.assertEqual((bug.levelname, refused.levelname), ("ERROR", "INFO"))
        self.assertIn("ZeroDivisionError: a bug", logs.output[0])
        self.assertIn("Traceback", logs.output[0])
        self.assertNotIn("Traceback", logs.output[1])

    def test_broken_logging_ends_no_server(self) -> None:
        failures = ShimError("no"), ValueError("a bug"), None
        handler = mock.Mock()

        def issue(err: io.StringIO) -> None:
            handler.side_effect = failures
            responses = [self.raw_exchange(wire()) for _ in failures]
            self.assertEqual(responses, [b"no", b"a bug", SHIM_SUCCESS])
            self.assertRegex(err.getvalue(), "the handler failed at .*ValueError")

        self.start_server(handler)
        self.with_broken_logging(issue)

    def test_handler_that_returns_something_to_await_has_a_bug_and_no_success(self) -> None:
        async def carry_out() -> None:
            pass

        coroutine = carry_out()
        self.addCleanup(coroutine.close)
        server = self.start_server()
        for result in coroutine, type("Awaitable", (), {"__await__": nothing})():
            server.handler = mock.Mock(return_value=result)
            with self.assertLogs("vmshim", logging.ERROR):
                self.assertIn(b"to await", self.raw_exchange(wire()))
        # A proxy has every attribute that one asks it for.
        self.assertTrue(hasattr(mock.call, "__await__"))
        server.handler = lambda request: mock.call
        self.assertEqual(self.raw_exchange(wire()), SHIM_SUCCESS)

    def test_file_is_not_reloaded_and_a_second_copy_works_beside_the_first(self) -> None:
        handler, client = self.start_held()
        self.run_aside(functools.partial(self.issue, "second"))
        with self.assertRaisesRegex(ImportError, "^vmshim can't be reloaded.*$"):
            importlib.reload(vmshim)
        copies = [another_copy("vmshim"), another_copy("pasted")]
        handler.go_on.set()
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        for module in copies:
            server = self.enter(module.VMShimServer(new_pipe_path(), bool))
            self.run_aside(server.serve_forever)
            for path in self.path, server.pipe_path:
                request = module.VMRequest(module.__name__, "create")
                module.issue_vm_request(path, request, connect_timeout=LONG, timeout=LONG)
            server.shutdown()
        self.assertEqual(handler.carried_out, ["first", "second", "vmshim", "pasted"])
        error = self.caught(TypeError, copies[1].issue_vm_request, self.path, REQUEST)
        self.assertRegex(str(error), "VMRequest of this pasted, not a vmshim.VMRequest$")

    def test_log_lines_are_short_and_of_one_line_whatever_others_send(self) -> None:
        id = "\x1b]0;owned\x07\nforged\u202e" + "\U000e0001" * 9999
        failures = ShimError(id), ValueError(id)
        self.start_server(mock.Mock(side_effect=failures))
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.assertEqual([self.refusal(id=id).message for _ in failures], [id, id])
        self.assertEqual(len(logs.records), 4)
        for record in logs.records:
            self.assertTrue(record.getMessage().isprintable())
            self.assertLess(len(record.getMessage()), 11_000)

    def test_what_the_reference_decodes_is_accepted_even_in_many_pieces(self) -> None:
        requests = self.start_recording()
        for data, id, op in DECODED:
            if isinstance(data, bytes) and id and op in ("create", "sync"):
                with self.subTest(data=data[:60]):
                    self.assertEqual(self.raw_exchange(data), b"\0OK\0")
                    self.assertIs(type(requests[0].op), VMRequestOp)
                    self.assertEqual(requests.pop(), (id, op))
        data = b' {"x":[{"y":"}]\\"}"}],"ID":"\xc3\xa9","Op":"create"}'
        self.assertEqual(self.raw_exchange(*(bytes([byte]) for byte in data)), SHIM_SUCCESS)
        self.assertEqual(requests, [("é", "create")])

    def test_data_that_is_no_request_gets_an_error_at_once_and_the_server_goes_on(self) -> None:
        requests = self.start_recording(request_timeout=None)
        for data in (
            *(b"not json\n", b"[]", b"7", b'"text"', b"{'ID':'a'}", b"{nope", b'{"ID":"a\n'),
            *(b'{"ID":"a","Op":7}', b'{"ID":["a"],"Op":"create"}', b'{"ID":"a",}', b"{]", b"}"),
            b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        ):
            with self.subTest(data=data[:20]):
                self.assertNotIn(self.raw_exchange(data), (b"", SHIM_SUCCESS))
        self.assertIn(b"unknown op 'bogus'", self.raw_exchange(wire(op="bogus")))
        for nameless in wire(id=""), b"null":
            self.assertIn(b"ID is empty", self.raw_exchange(nameless))
        # End of file within a request is a message of length zero.
        self.assertNotIn(self.raw_exchange(b'{"ID":"a"', b""), (b"", SHIM_SUCCESS))
        self.issue()
        self.assertEqual(requests, [REQUEST])

    def test_request_of_a_mebibyte_is_read_and_a_longer_one_is_cut_off(self) -> None:
        self.start_server()
        self.assertEqual(self.raw_exchange(wire().rjust(MEBIBYTE)), SHIM_SUCCESS)
        for length in 1, 2, 5:  # whatever its length, the client is told at once
            too_long = "x" * length * MEBIBYTE
            self.assertRegex(str(self.refusal(id=too_long, timeout=5)), "longer than 1048576 bytes")

    def test_data_after_a_request_does_not_cost_the_client_its_response(self) -> None:
        server = self.start_server()
        trailing = b"x" * (MEBIBYTE - 4096)
        for pieces in [wire() + trailing], [wire(), trailing]:
            with self.subTest(pieces=len(pieces)):
                server.handler = handler = HeldHandler()
                client = self.dial()
                self.run_aside(*(functools.partial(client.write, piece) for piece in pieces))
                self.assertTrue(handler.entered.wait(LONG))
                handler.go_on.set()
                self.assertEqual(client.read_all(), SHIM_SUCCESS)
        self.assertNotIn(self.raw_exchange(b"[]", trailing), (b"", SHIM_SUCCESS))

    def test_response_waits_for_a_client_that_reads_late(self) -> None:
        self.start_server(refuse_some, request_timeout=None)
        success, failure = self.dial(wire()), self.dial(wire("no"))
        self.issue()  # comes last, so the two have been carried out
        self.assertEqual(failure.read_all(), b"boom")
        # The zero-length message, not the server's end.
        self.assertEqual([success.read(), success.read()], [SHIM_SUCCESS, b""])
        success.write(b"still there")

    def test_zero_length_message_is_not_written_before_the_response_has_been_read(self) -> None:
        self.start_server()
        with spying("WriteFile") as writes:
            client = self.dial(wire())
            wait_until(lambda: writes)
            self.issue()  # the server has had time for more
            mine = [(handle, size) for handle, _, size, *_ in writes if handle == writes[0][0]]
            self.assertEqual(mine, [(writes[0][0], 4)])
            self.assertEqual(client.read_all(), SHIM_SUCCESS)

    def test_client_that_leaves_after_its_request_does_not_cancel_it(self) -> None:
        handler, client = self.start_held()
        client.close()
        handler.go_on.set()
        self.issue("second")
        self.assertEqual(handler.carried_out, ["first", "second"])

    def test_requests_are_carried_out_one_at_a_time(self) -> None:
        gate = threading.Semaphore(0)
        order, running = [], []

        def handle(request: VMRequest) -> None:
            running.append(request.id)
            self.assertEqual(len(running), 1)
            gate.acquire(timeout=LONG)
            order.append(running.pop())

        self.start_server(handle)
        silent = [self.dial() for _ in range(5)]  # they connect first, and write in another order
        silent[3].write(wire("3"))
        wait_until(lambda: running)
        for number in 1, 4, 0, 2:
            silent[number].write(wire(str(number)))
        for _ in silent:
            gate.release()
        for client in silent:
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
        self.assertEqual((order[0], sorted(order)), ("3", ["0", "1", "2", "3", "4"]))

    def test_name_that_is_taken_is_refused(self) -> None:
        access = PIPE_ACCESS_DUPLEX | FILE_FLAG_FIRST_PIPE_INSTANCE
        self.listen(access=access)
        self.skip_unless_denied(
            lambda: self.listen(access=access),
            "two first instances of a pipe could be created here",
        )
        self.caught(PipeAccessError, VMShimServer, self.path, print)

    def test_name_whose_owner_has_reached_its_limit_is_taken_and_not_busy(self) -> None:
        self.listen(instances=1)
        error = self.caught(PipeAccessError, VMShimServer, self.path, print)
        self.assertEqual(error.winerror, ERROR_PIPE_BUSY)
        self.assertIn("the name is taken by another server", str(error))

    def test_server_that_can_not_be_made_is_an_error_with_its_path_and_leaves_nothing(self) -> None:
        own = "can't connect to its own pipe; its security descriptor must"
        for function, number, kind, text in (
            ("CreateNamedPipeW", ERROR_ACCESS_DENIED, PipeAccessError, ""),
            ("CreateNamedPipeW", 1450, PipeOpenError, ""),
            ("CreateEventW", 1450, PipeOpenError, ""),
            ("CreateFileW", ERROR_ACCESS_DENIED, PipeAccessError, own),
        ):
            with self.subTest(function, number=number), failing(function, number):
                error = self.caught(PipeOpenError, self.make_server)
                self.assertIs(type(error), kind)
                self.assertEqual((error.winerror, error.filename), (number, self.path))
                self.assertIn(text, str(error))
                self.caught(PipeNotFoundError, self.issue)
        server = VMShimServer.__new__(VMShimServer)
        with failing("CreateFileW", ERROR_ACCESS_DENIED), contextlib.suppress(PipeAccessError):
            getattr(server, "__init__")(self.path, bool)
        self.caught(PipeNotFoundError, self.issue)  # although the object is still there

    def test_nothing_is_left_after_many_requests(self) -> None:
        server = self.start_server(request_timeout=None)
        handles = []
        for _ in range(2):
            for _ in range(150):
                self.issue()
            wait_until(lambda: len(server._clients) == 1)
            handles.append(lowest_free_handle())
        self.assertLessEqual(handles[1], handles[0] + 100)

    def test_server_that_is_closed_or_dropped_leaves_nothing(self) -> None:
        self.make_server().close()
        before = lowest_free_handle()
        for _ in range(20):
            server = VMShimServer(self.path, print, security_descriptor="D:(A;;GA;;;WD)")
            server.shutdown()
            server.serve_forever()
            server.close()
            self.assertLessEqual(lowest_free_handle(), before)
            VMShimServer(self.path, print)
        self.caught(PipeNotFoundError, self.issue)

    def test_sixteen_clients_at_once_are_all_served(self) -> None:
        requests = self.start_recording()
        ids = self.issue_from_many_threads(5)
        self.assertEqual(sorted(request.id for request in requests), ids)

    def test_example_of_the_readme_serves(self) -> None:
        code = readme_example("server.serve_forever()")
        code = code.replace(r'r"\\.\pipe\my-shim"', repr(self.path))
        self.assertIn(self.path[9:], code)
        names: dict[str, Any] = {}
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            thread = self.run_aside(lambda: exec(code, names))
            wait_until(lambda: "server" in names)
            self.issue()
            with self.assertRaisesRegex(ShimError, "^Not implemented$"):
                issue_vm_request(self.path, VMRequest("a", "sync"), connect_timeout=LONG)
            names["server"].shutdown()
            self.assert_ends(thread)
        self.assertEqual(out.getvalue(), "create test\n")


class SecurityTest(ServerCase):
    """Who may connect."""

    def test_instances_are_as_the_reference_makes_them_and_the_first_has_a_descriptor(self) -> None:
        with spying("CreateNamedPipeW") as calls:
            self.start_server(security_descriptor="D:(A;;GA;;;WD)")
            self.issue()
        # PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED, and once FILE_FLAG_FIRST_PIPE_INSTANCE
        self.assertEqual(calls[0][1], 0x40080003)
        self.assertEqual({call[1] for call in calls[1:]}, {0x40000003})
        # PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE | PIPE_REJECT_REMOTE_CLIENTS,
        # PIPE_UNLIMITED_INSTANCES, no buffers
        self.assertEqual({call[2:-1] for call in calls}, {(0xE, 255, 0, 0, 0)})
        first, *others = (call[-1] for call in calls)
        self.assertIsInstance(first, vmshim.SECURITY_ATTRIBUTES)
        self.assertTrue(first.lpSecurityDescriptor)
        self.assertFalse(first.bInheritHandle)
        self.assertEqual(first.nLength, ctypes.sizeof(first))
        self.assertEqual(set(others), {None})

    def test_descriptor_is_the_given_one_or_that_of_system_administrators_and_owner(self) -> None:
        advapi32 = windows.WinDLL("advapi32", use_last_error=True)
        size, dacl_only = ctypes.byref(DWORD()), 4
        for given, expected in (
            ("D:(A;;GA;;;WD)(A;;GR;;;BG)", r"\(A;;\*;;;WD\)\(A;;\*;;;BG\)$"),
            (None, r"^D:P\(A;;\*;;;SY\)\(A;;\*;;;BA\)\(A;;\*;;;OW\)$"),
        ):
            buffer, text = ctypes.create_string_buffer(4096), ctypes.c_wchar_p()
            with self.make_server(security_descriptor=given), self.listen() as pipe:
                self.assertTrue(
                    advapi32.GetKernelObjectSecurity(pipe.handle, dacl_only, buffer, 4096, size)
                    and advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW(
                        buffer, 1, dacl_only, ctypes.byref(text), None
                    )
                )
            # The rights are shown by name or number.
            self.assertRegex(re.sub("(?<=;;)[^;]+(?=;;;)", "*", text.value or ""), expected)

    def test_wrong_descriptor_is_refused_before_anything_is_opened(self) -> None:
        with spying("CreateNamedPipeW") as calls:
            for text in (
                *("garbage", "D:(A;;GA;;;nobody)", "D:(A;;??;;;WD)", "\ud800", "", "O:BA"),
                *("D:(A;;GA;;;WD)\0(D;;GA;;;BG)", "D:(A;;GA;;;WD)\0"),  # a NUL would cut it off
            ):
                with self.subTest(text=text):
                    error = self.caught(ValueError, self.make_server, security_descriptor=text)
                    self.assertIn("security_descriptor", str(error))
            with self.assertRaisesRegex(TypeError, "must be a str, not bytes"):
                self.make_server(security_descriptor=b"bytes")
        self.assertEqual(calls, [])

    def test_descriptor_is_enforced(self) -> None:
        with spying("CreateNamedPipeW") as calls, contextlib.suppress(PipeAccessError):
            VMShimServer(self.path, print, security_descriptor="D:").close()
        with RawPipe.listen(self.path, security=ctypes.byref(calls[0][-1])):
            self.skip_unless_denied(
                lambda: RawPipe.dial(self.path, patience=0),
                "a pipe that grants nothing to anybody could be opened here",
            )
        error = self.caught(PipeAccessError, self.make_server, security_descriptor="D:")
        self.assertIn("can't connect to its own pipe", str(error))


class ManyClientsTest(ServerCase):
    """A server that nobody can hold up."""

    def wait_until_busy(self) -> None:
        """Wait until the server offers no instance; unlike a client, this takes none."""
        wait_until(lambda: not kernel32.WaitNamedPipeW(self.path, 1))

    def test_one_client_may_wait_and_others_see_busy_but_never_not_found(self) -> None:
        handler, first = self.start_held()
        second = self.dial()
        self.run_aside(lambda: second.write(wire("second")))  # until the server has read it
        for connect_timeout in [0] * 20 + [0.2]:
            self.caught(PipeBusyError, self.issue, connect_timeout=connect_timeout)
        handler.go_on.set()
        self.issue()
        for client in first, second:
            self.assertEqual(client.read_all(), SHIM_SUCCESS)

    def test_at_most_max_clients_are_connected(self) -> None:
        for limit in 1, 3:
            with VMShimServer(self.path, bool, max_clients=limit, request_timeout=None) as server:
                thread = self.serve_in_thread(server)
                clients = [self.dial() for _ in range(limit)]
                self.wait_until_busy()
                self.caught(PipeBusyError, self.issue, connect_timeout=0)
                clients.pop().close()
                clients.append(self.dial())
                self.wait_until_busy()
                clients.pop().close()
                self.issue()
            self.assert_ends(thread)

    def test_clients_that_are_silent_slow_or_read_no_response_delay_others_by_little(self) -> None:
        self.start_server(request_timeout=None)
        self.dial()
        for data in (b'{"ID":', b'{"ID":"' + b"x" * 1000, b"[]", *[wire()] * 3):
            self.dial(data)
        for _ in range(3):
            began = time.monotonic()
            self.issue()
            self.assertLess(time.monotonic() - began, 1.0)

    def test_client_that_stalls_at_any_point_is_cut_off(self) -> None:
        def handle(request: VMRequest) -> None:
            if request.id == "no":
                raise ShimError("x" * 100_000)

        # The one client that there may be stalls, so the next is served when it has been cut off.
        self.start_server(handle, request_timeout=0.1, max_clients=1)

        def flood(client: RawPipe, data: bytes) -> None:
            client.write(wire())
            while True:
                client.write(data)

        flooded = functools.partial(self.caught, OSError, flood)

        stalls: dict[str, Script] = {
            "silent": bool,
            "half a request": lambda client: client.write(b'{"ID":'),
            "response unread": lambda client: client.write(wire()),
            "refusal unread": lambda client: client.write(wire("no")),
            "refusal half read": lambda client: (client.write(wire("no")), client.read(10)),
            "success half read": lambda client: (client.write(wire()), client.read(2)),
            "never closes": lambda client: (client.write(wire()), client.read_all()),
            "never stops sending": lambda client: flooded(client, b"x" * MEBIBYTE),
            "never stops sending nothing": lambda client: flooded(client, b""),
        }
        for name, stall in stalls.items():
            with self.subTest(name=name), RawPipe.dial(self.path) as client:
                stall(client)
                self.issue()
                self.assertEqual(client.read_all(), b"")
                self.caught(OSError, client.write, b"too late")

    def test_handler_may_take_longer_than_request_timeout(self) -> None:
        handler = HeldHandler()
        self.start_server(handler, request_timeout=0.5)
        others = [self.dial()]
        client = self.dial(wire("first"))
        self.assertTrue(handler.entered.wait(LONG))
        others.append(self.dial())
        time.sleep(0.7)  # the time of neither runs meanwhile
        handler.go_on.set()
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        for other in others:
            other.write(wire())
            self.assertEqual(other.read_all(), SHIM_SUCCESS)

    def test_request_that_came_in_time_is_carried_out_although_the_server_looks_late(self) -> None:
        self.start_server(request_timeout=0.2)
        client, _ = self.dial(), self.dial()  # the second is let in when the first is being read

        def come_and_look_late() -> None:
            client.write(wire())
            time.sleep(0.4)

        with spying("WaitForSingleObject", before=once(come_and_look_late)):
            self.assertEqual(client.read_all(), SHIM_SUCCESS)

    def test_client_is_looked_at_right_before_its_handler_begins(self) -> None:
        requests = self.start_recording()
        for id, act in ("gone", RawPipe.close), ("talks on", writing(b"more")):
            client = self.dial()
            last_moment = mock.Mock(side_effect=once(functools.partial(act, client)))
            with mock.patch.object(VMRequest, "check", last_moment):
                client.write(wire(id))
                wait_until(lambda: last_moment.called)
                self.issue()
        self.assertEqual({request.id for request in requests}, {"talks on", "test"})

    def test_next_handler_begins_once_the_response_is_read_unless_its_client_has_gone(self) -> None:
        handler = HeldHandler()
        order: list[str] = []

        def handle(request: VMRequest) -> None:
            order.append(request.id)
            if request.id == "first":
                held.write(wire("held"))
            elif request.id == "held":
                handler(request)

        self.enter(mock.patch.object(vmshim, "_COURTESY", LONG))
        self.start_server(handle)
        held, gone = self.dial(), self.dial()
        first = self.dial(wire("first"))
        wait_until(lambda: order)
        gone.write(wire("gone"))  # while the response is unread, others are read
        time.sleep(0.05)
        self.assertEqual(order, ["first"])
        self.assertEqual(first.read_all(), SHIM_SUCCESS)
        self.assertTrue(handler.entered.wait(LONG))
        gone.close()
        # Another waits in line, unread.
        error = self.caught(ShimBusyError, self.issue, "in line", timeout=0.2)
        self.assertRegex(str(error), "busy with another request")
        handler.go_on.set()
        self.assertEqual(held.read_all(), SHIM_SUCCESS)
        self.issue("last")
        self.assertEqual(order, ["first", "held", "last"])

    def test_request_is_complete_only_when_the_write_of_it_has_ended(self) -> None:
        # The server reads 4096 bytes at a time: the newline of this request comes in another piece.
        handler = HeldHandler()
        self.start_server(handler)
        id = "x" * (4096 + len(b"\n") - len(wire("")))
        issue = functools.partial(self.issue, id, timeout=0.2)
        waiting = self.run_aside(lambda: self.caught(ResponseTimeoutError, issue))
        self.assertTrue(handler.entered.wait(LONG))
        self.assert_ends(waiting)
        handler.go_on.set()

    def test_client_that_leaves_is_no_failure_and_one_that_fails_is_a_debug_line(self) -> None:
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            server = self.start_server(refuse_some)
            for id in "yes", "no", "yes":
                self.raw_exchange(wire(id))
            with failing("ReadFile", 1450):
                self.assertEqual(self.raw_exchange(), b"")
            server.close()
            self.assert_ends(self.serving)
        self.assertEqual(re.findall("fail.*", "\n".join(logs.output)), ["failed: Win32 error 1450"])

    def test_client_that_sends_no_request_in_time_is_told_so(self) -> None:
        self.start_server(request_timeout=0.1)
        for client in self.dial(), self.dial(b'{"ID":'), self.dial(b'{"ID":"' + b"x" * 1000):
            self.assertEqual(client.read_all(), TOO_LATE)

    def test_client_that_vanishes_at_any_point_costs_nobody_else_anything(self) -> None:
        self.start_server(refuse_some)
        steps: tuple[tuple[bytes, int | None], ...] = (  # what it sends, and how much it reads
            *((data, 0) for data in (b"", b"{", b'{"ID":"a"', wire(), wire("no"), b"[]")),
            *((wire(), 2), (wire("no"), 2), (wire(), 4), (wire(), None)),
        )
        for data, size in steps * 5:
            with RawPipe.dial(self.path) as client:
                if data:
                    client.write(data)
                if size != 0:
                    client.read(size) if size else client.read_all()
        self.issue()

    def fast_clients(self, step: Script) -> None:
        """Have a client connect between CreateNamedPipeW and ConnectNamedPipe, then an honest one.

        The fast client takes that step when it has connected.
        """
        stepped = threading.Event()

        def connect() -> None:
            self.fast = self.dial()
            step(self.fast)
            stepped.set()

        with spying("ConnectNamedPipe", before=once(connect)):
            self.start_server(request_timeout=None)
            self.assertTrue(stepped.wait(LONG))
            self.issue(connect_timeout=5)

    def test_client_that_is_faster_than_connect_named_pipe_is_served(self) -> None:
        self.fast_clients(bool)
        self.fast.write(wire())
        self.assertEqual(self.fast.read_all(), SHIM_SUCCESS)

    def test_client_that_comes_and_goes_before_connect_named_pipe_holds_nobody_up(self) -> None:
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.fast_clients(RawPipe.close)
        self.assertNotRegex("".join(logs.output), "fail|ERROR")

    def test_early_clients_are_served_first_come_first_served(self) -> None:
        early: list[Pipe] = []

        def faster() -> None:
            """Connect before the server's own client does."""
            if len(early) < 3:
                handle = kernel32.CreateFileW(self.path, 0xC0000000, 0, None, 3, 0x40000000, None)
                early.append(self.enter(Pipe(self.path)))
                early[-1]._handle = vmshim._Handle(handle.value)

        with spying("CreateFileW", before=faster):
            server = self.make_server()
        written = threading.Semaphore(0)
        requests: list[VMRequest] = []
        server.handler = requests.append
        with spying("WriteFile", after=written.release):
            for number in 2, 1, 0:
                self.run_aside(functools.partial(early[number].write, wire(str(number))))
                written.acquire(timeout=LONG)
        self.serve_in_thread(server)
        for client in early:
            client.deadline = time.monotonic() + LONG
            self.assertEqual(client.read(), SHIM_SUCCESS)
        self.assertEqual([request.id for request in requests], ["0", "1", "2"])
        self.issue()

    def test_early_client_sees_end_of_file_when_the_server_is_closed_instead(self) -> None:
        early: list[RawPipe] = []
        with spying("CreateFileW", before=once(lambda: early.append(self.dial()))):
            self.make_server().close()
        self.assertEqual([client.read_all() for client in early], [b""])

    def test_early_client_that_can_not_be_served_holds_nobody_up(self) -> None:
        with spying("CreateFileW", before=once(self.dial)):
            server = self.make_server()
        with failing("ConnectNamedPipe", 1450):
            self.serve_in_thread(server)
            self.issue()

    def test_clients_see_busy_while_the_server_does_not_serve(self) -> None:
        with VMShimServer(self.path, bool) as server:
            for end in server.shutdown, server.close:
                self.caught(PipeBusyError, self.issue, connect_timeout=0)
                thread = self.serve_in_thread(server)
                self.issue()
                end()
                self.assert_ends(thread)
        self.caught(PipeNotFoundError, self.issue)

    def test_name_is_found_between_any_two_requests(self) -> None:
        self.start_server()
        self.issue()
        stop = threading.Event()

        def probe() -> None:
            while not stop.is_set():
                with contextlib.suppress(PipeBusyError):
                    dial_pipe(self.path, connect_timeout=0).close()

        self.run_aside(probe)
        for _ in range(25):
            self.issue()
        stop.set()

    def test_failure_to_offer_an_instance_is_logged_as_news_and_tried_again_later(self) -> None:
        functions = "CreateNamedPipeW", "ConnectNamedPipe"
        # A signal's handler may have replaced the error by none.
        failures: tuple[list[int | None], ...] = ([1450, None, 1450], [0, None, 0], [1450] * 1000)
        for function, errors in itertools.product(functions, failures):
            with self.subTest(function), VMShimServer(self.path, bool) as server:
                with self.assertLogs("vmshim", logging.ERROR) as logs:
                    with failing(function, *errors), spying(function) as calls:
                        thread = self.serve_in_thread(server)
                        began = time.monotonic()
                        if None in errors:
                            for _ in range(2):
                                with contextlib.suppress(ConnectionLostError):
                                    self.issue()
                        else:
                            wait_until(lambda: len(calls) > 3)
                            self.assertGreater(time.monotonic() - began, 0.2)
                        server.close()
                        self.assert_ends(thread)
                self.assertEqual(len(logs.output), 2 if None in errors else 1)
                self.assertIn("no client can be let in", logs.output[-1])

    def test_server_needs_one_thread_whatever_the_number_of_clients(self) -> None:
        threads = _thread._count()
        self.start_server(request_timeout=None)
        for _ in range(30):
            self.dial()
        self.assertEqual(_thread._count(), threads + 1)


class LifeCycleTest(ServerCase):
    def test_ctrl_c_in_the_end_of_a_run_keeps_nobody_waiting_for_that_end(self) -> None:
        interrupts = iter([KeyboardInterrupt])

        class Runs(Dict[str, Any]):
            def clear(self) -> None:
                for interrupt in interrupts:
                    raise interrupt
                super().clear()

        server = self.make_server()
        server._runs = Runs()
        self.run_aside(lambda: wait_until(lambda: server._runs), server.shutdown)
        self.caught(KeyboardInterrupt, server.serve_forever)

    def assert_serves(self, server: VMShimServer) -> None:
        """Serve until shutdown() is called from another thread."""
        thread = self.serve_in_thread(server)
        self.issue()
        server.shutdown()
        self.assert_ends(thread)

    def test_shutdown_and_close_return_before_while_and_after_serving(self) -> None:
        def begin(server: VMShimServer) -> None:
            self.serve_in_thread(server)
            self.issue()

        first_steps: tuple[Callable[[VMShimServer], object], ...] = bool, self.assert_serves, begin
        for take_first_step in first_steps:
            server = self.make_server()
            take_first_step(server)
            for call in [server.shutdown] * 2 + [server.close] * 2 + [server.shutdown]:
                call()

    def test_shutdown_wakes_an_idle_server(self) -> None:
        self.enter(mock.patch.object(vmshim, "_LONGEST_WAIT", LONG))
        server = self.start_server()
        self.issue()
        time.sleep(0.05)  # it begins to wait
        began = time.monotonic()
        server.shutdown()
        self.assertLess(time.monotonic() - began, LONG / 2)

    def test_shutdown_and_close_from_two_threads_at_once_return(self) -> None:
        for names in ("shutdown", "shutdown"), ("close", "close"), ("close", "shutdown"):
            self.path = new_pipe_path()
            handler, client = self.start_held()
            callers = [self.run_aside(getattr(self.server, name)) for name in names]
            handler.go_on.set()
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            self.assert_ends(*callers, self.serving)

    def test_shutdown_that_comes_first_ends_serve_forever_at_once(self) -> None:
        server = self.make_server()
        server.shutdown()
        server.serve_forever()
        self.assert_serves(server)

    def test_shutdown_and_close_from_the_handler_end_it_and_the_response_arrives(self) -> None:
        for name, kind in ("shutdown", PipeBusyError), ("close", PipeNotFoundError):
            server = self.start_server(lambda request: getattr(server, name)())
            self.issue()
            self.assert_ends(self.serving)
            self.caught(kind, self.issue, connect_timeout=0)
            server.close()

    def test_server_that_serves_or_is_closed_does_not_serve(self) -> None:
        server = self.start_server()
        self.issue()
        with self.assertRaisesRegex(RuntimeError, "already"):
            server.serve_forever()
        self.issue()
        server.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            server.serve_forever()
        self.caught(PipeNotFoundError, self.issue)

    def test_bug_is_raised_and_keeps_no_handle(self) -> None:
        server = self.make_server()
        handle = lowest_free_handle()
        for name in "WaitForSingleObject", "ConnectNamedPipe":
            with replacing(name, mock.Mock(side_effect=ZeroDivisionError("a bug"))):
                error = self.caught(ZeroDivisionError, server.serve_forever)
            self.assertEqual(lowest_free_handle(), handle)
            del error

    def test_server_that_ends_has_no_run_left_although_a_client_is_slow(self) -> None:
        server = self.make_server(mock.Mock(side_effect=[None, KeyboardInterrupt, None]))

        def be_slow() -> None:
            """Be a client that doesn't take its response, and one that has the server stop."""
            with self.dial(wire()), self.dial(wire()) as client:
                client.read_all()

        self.run_aside(be_slow)
        self.caught(KeyboardInterrupt, server.serve_forever)
        self.assert_serves(server)

    def test_close_in_a_finaliser_that_runs_in_the_serving_thread_waits_for_nothing(self) -> None:
        server = self.start_server()
        self.issue()
        with spying("WaitForSingleObject", before=once(server.close)):
            with contextlib.suppress(OSError):
                self.dial()  # so that the server wakes up
            self.assert_ends(self.serving)
        self.caught(PipeNotFoundError, self.issue)

    def test_shutdown_tells_clients_that_have_not_been_carried_out(self) -> None:
        handler = HeldHandler()
        server = self.start_server(handler, request_timeout=None)
        silent, half, waiting = self.dial(), self.dial(b"{"), self.dial()
        first = self.dial(wire("first"))
        self.assertTrue(handler.entered.wait(LONG))
        waiting.write(wire("waiting"))
        late = self.dial()
        self.run_aside(lambda: late.write(wire("late")))
        stopping = self.run_into("SetEvent", server.shutdown)
        handler.go_on.set()
        self.assertEqual(first.read_all(), SHIM_SUCCESS)
        for client in silent, half, waiting, late:
            self.assertEqual(client.read_all(), STOPPED)
        self.assert_ends(stopping, self.serving)
        self.assertEqual(handler.carried_out, ["first"])

    def test_shutdown_does_not_wait_for_clients_that_never_read_or_leave(self) -> None:
        server = self.start_server(request_timeout=None)
        silent, unread, staying = self.dial(), self.dial(wire()), self.dial(wire())
        self.assertEqual(staying.read_all(), SHIM_SUCCESS)
        server.shutdown()
        self.assertEqual([client.read_all() for client in (silent, unread, staying)], [b""] * 3)

    def test_exception_of_the_handler_that_is_no_exception_stops_the_server(self) -> None:
        # GeneratorExit stands for all the others, such as asyncio.CancelledError.
        for kind in KeyboardInterrupt, SystemExit, GeneratorExit:
            entered, second_is_there = threading.Event(), threading.Event()
            responses: list[bytes] = []

            def stop(request: VMRequest) -> None:
                entered.set()
                second_is_there.wait(LONG)
                raise kind

            def ask() -> None:
                first = self.dial(wire())
                entered.wait(LONG)
                second = self.dial()
                second_is_there.set()
                with contextlib.suppress(OSError):
                    second.write(wire())
                responses.extend([second.read_all(), first.read_all()])

            with VMShimServer(self.path, stop) as server:
                asking = self.run_aside(ask)
                self.caught(kind, server.serve_forever)
                self.assert_ends(asking)
                # Nobody knows what became of the first: it gets end of file, no text.
                self.assertEqual(responses, [STOPPED, b""])
            self.caught(PipeNotFoundError, self.issue)

    def test_signal_handler_may_stop_the_server_between_any_two_bytecodes(self) -> None:
        carried_out: list[str] = []
        told: list[str] = []

        def handle(request: VMRequest) -> None:
            carried_out.append(request.id)
            if request.id == "last":
                server.shutdown()

        def be_client() -> None:
            for id in "first", "second", "last":
                with contextlib.suppress(VMShimError):
                    self.issue(id)
                    told.append(id)

        stops: Iterator[Callable[[VMShimServer], None]]
        stops = itertools.cycle([VMShimServer.shutdown, VMShimServer.close])
        for point, stop in zip(itertools.count(random.randrange(1, 200), 200), stops):
            with self.subTest(point=point, stop=stop.__name__):
                server = VMShimServer(self.path, handle)
                client = self.run_aside(be_client)
                interrupter = Interrupter(point, act=functools.partial(stop, server))
                interrupter.run(server.serve_forever)
                server.close()
                self.assert_ends(client)
                self.assertEqual(carried_out, told, interrupter.place)
                carried_out.clear()
                told.clear()
            if not interrupter.place:
                break

    def test_ctrl_c_ends_an_idle_server(self) -> None:
        server = self.make_server()
        self.run_aside(self.issue, _thread.interrupt_main)
        self.caught(KeyboardInterrupt, server.serve_forever)


# ---- Command line -------------------------------------------------------------------------------


def broken_streams() -> list[Any]:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    full = mock.Mock(**{"write.side_effect": OSError(errno.ENOSPC, "No space left on device")})
    return [None, closed, full, mock.Mock(spec=["write"])]


WRONG_USAGE = (  # the arguments, and part of what is said about them
    ((), "COMMAND"),
    (("--nope",), "COMMAND"),
    (("destroy", "a"), "destroy"),
    (("serve",), "--vm"),
    (("serve", "--pipe", "nope"), "not a pipe path: 'nope'"),
    (("serve", "--pipe", ""), "not a pipe path: ''"),
    (("serve", "--vm", ""), 'invalid GUID ""'),
    (("create", "--pipe", "", "a"), "not a pipe path: ''"),
    (("create", "--vm", "", "a"), 'invalid GUID ""'),
    (("create", "--vm", GUID, "--pipe", "x", "a"), "--pipe"),
    (("create", "--vm", GUID), "ID"),
    (("create", "--vm", GUID, "-n", "a"), "-n"),
    (("create", "--time", "1", "a"), "--time"),
    (("create", "--json=x", "a"), "--json"),
    (("create", "a", "--timeout"), "--timeout"),
    (("create", "--vm", "nope", "a"), 'invalid GUID "nope"'),
    (("create", "--pipe", "nope", "a"), "not a pipe path: 'nope'"),
    (("serve", "--pipe", "\\\\host\\pipe\\a"), "pipe path must begin with"),
    (("create", "--vm", GUID, ""), "ID is empty"),
    (("create", "--vm", GUID, "good", ""), "ID is empty"),
    (("create", "--vm", GUID, "good", "\ud800", "good"), "lone surrogate"),
    (("create", "--vm", GUID, "--timeout", "-1", "a"), "timeout"),
    (("create", "--vm", GUID, "--timeout=nan", "a"), "timeout"),
    (("create", "--vm", GUID, "--connect-timeout", "x", "a"), "float.*: 'x'"),
    (("create", "--vm", GUID, "--connect-timeout", "-1", "a"), "--connect-timeout"),
    (("create", "--root", "", "a"), "root is empty"),
    (("list", "--root", ""), "root is empty"),
    (("list", "a"), "a"),
    (("pipe-path", "nope"), 'invalid GUID "nope"'),
    (("pipe-path",), "GUID"),
    (("pipe-path", GUID, GUID), GUID),
)


@needs_command_line
class CommandLineTest(Case):
    def test_pipe_path_and_version_are_printed(self) -> None:
        self.assertEqual(run_cli("pipe-path", GUID), (0, vm_pipe_path(GUID) + "\n", ""))
        python = ".".join(map(str, sys.version_info[:3]))
        bits = 64 if sys.maxsize > 2**32 else 32
        line = f"vmshim {vmshim.__version__}, Python {python}, {sys.platform}, {bits} bit\n"
        self.assertEqual(run_cli("--version"), (0, line, ""))

    def test_help_has_examples_exit_statuses_and_the_handshake(self) -> None:
        for arguments, parts in (
            (["--help"], ["examples:", "exit status:", "unmount-disk", "demo"]),
            (["serve", "--help"], ["--handshake start like a shim that runhcs launches"]),
            (["list", "--help"], ["--root", "--json-lines"]),
        ):
            # From 3.14 on argparse can colour it.
            with mock.patch.dict(os.environ, PYTHON_COLORS="1", FORCE_COLOR="1"):
                status, out, err = run_cli(*arguments)
                _, _, wrong = run_cli(*arguments[:-1], "--nope")
            self.assertEqual((status, err), (0, ""))
            self.assertNotRegex(out + wrong, r"\\x1b|\x1b")
            for part in parts:
                self.assertIn(part, " ".join(out.split()))

    def test_wrong_usage_is_status_2_says_what_is_wrong_and_sends_nothing(self) -> None:
        for arguments, message in WRONG_USAGE:
            with self.subTest(arguments=arguments), requests_ending() as issue:
                status, out, err = run_cli(*arguments)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err.splitlines()[-1], f"vmshim.* error: .*{message}")
                issue.assert_not_called()

    def test_wrong_usage_with_json_is_one_line_of_json_and_not_to_be_repeated(self) -> None:
        for arguments in (
            ("create", "--json", "--pipe", "", "a"),
            ("create", "--json"),
            ("create", "--json", "--timeout", "x", "a"),
            ("create", "--json", "--vm", "nope", "a"),
            ("create", "--json", "--vm", GUID, "a", "", "b"),
            ("create", "--json", "--vm", GUID, "a", "\ud800", "b"),
        ):
            with self.subTest(arguments=arguments), requests_ending() as issue:
                status, [row], err = run_json(*arguments)
                issue.assert_not_called()
                self.assertEqual((status, row["status"], row["ok"]), (2, 2, False))
                self.assertEqual((row["outcome"], row["retry"]), ("not-sent", False))
                self.assertTrue(row["error"])
                self.assertIn("vmshim", err)

    def test_timeouts_are_passed_on_and_what_comes_after_two_dashes_is_an_id(self) -> None:
        options = "--vm", GUID, "--timeout", "7", "--connect-timeout", "8"
        with requests_ending(None, None) as issue:
            self.assertEqual(run_cli("create", *options, "a", "--", "--json"), (0, "", ""))
        self.assertEqual([call[0][1].id for call in issue.call_args_list], ["a", "--json"])
        self.assertEqual(issue.call_args[1], {"timeout": 7.0, "connect_timeout": 8.0})
        with requests_ending(None), mock.patch.object(sys, "stderr", encoding="utf-8") as terminal:
            cli_status("create", *options, "a")
        self.assertIn("a: waiting for the VM shim, up to 15 s", str(terminal.write.call_args))

    def test_each_end_has_its_status_and_json_line_whatever_the_standard_streams_are(self) -> None:
        # Wrong arguments are known before a request is sent.
        ends = [end for end in failures() if type(end) not in (ValueError, TypeError)]
        for failure in (None, *ends):
            _, status, outcome = ENDS.get(type(failure).__name__, ("", 0, "done"))
            with self.subTest(failure=failure), requests_ending(*[failure] * 9):
                with mock.patch.object(time, "monotonic", side_effect=(0.5, 1.75)):
                    printed, [row], _ = run_json("create", "--vm", GUID, "--json", "a")
                self.assertEqual(row.pop("elapsed_ms"), 1250.0)
                self.assertEqual(row.pop("error") is None, failure is None)
                sent = [os.environ.get("COMPUTERNAME"), "a", "create", vm_pipe_path(GUID)]
                ended = [failure is None, status, outcome, isinstance(failure, NotSentError)]
                self.assertEqual([*row.values()], [*sent, *ended, vmshim.__version__])
                self.assertEqual(printed, status)
                for stream, more in itertools.product(broken_streams(), ([], ["--json"])):
                    with mock.patch.multiple(sys, stdout=stream, stderr=stream):
                        self.assertEqual(cli_status("create", "--vm", GUID, *more, "a"), status)

    def test_status_without_a_request_is_right_whatever_the_standard_streams_are(self) -> None:
        succeeding = ["pipe-path", GUID], ["--version"], ["create", "--help"]
        for arguments, stream in itertools.product((*succeeding, ["create"]), broken_streams()):
            with self.subTest(arguments=arguments, stream=stream):
                with mock.patch.multiple(sys, stdout=stream, stderr=stream):
                    status = 0 if arguments in succeeding else 2
                    self.assertEqual(cli_status(*arguments), status)
        out = io.StringIO()
        with mock.patch.multiple(sys, stdout=out, stderr=None):
            self.assertEqual((cli_status("create"), out.getvalue()), (2, ""))
        with mock.patch.object(sys, "stdout", object()):
            self.assertEqual((cli_status("--version"), sys.stdout), (0, None))

    def test_bug_is_a_traceback_with_a_status_of_its_own(self) -> None:
        for bug in (KeyError("oops"), OSError("oops"), TypeError("oops"), ValueError("oops")):
            for function in "issue_vm_request", "list_containers":
                arguments = ("create", "--vm", GUID, "a") if function[0] == "i" else ("list",)
                with self.subTest(bug=bug), mock.patch.object(vmshim, function, side_effect=bug):
                    status, out, err = run_cli(*arguments)
                    self.assertEqual((status, out), (70, ""))
                    self.assertRegex(err, r"^Traceback ")
                    self.assertRegex(err, rf"{type(bug).__name__}: .*oops.*\n$")

    def test_control_characters_of_a_shim_are_escaped_but_in_json_as_they_came(self) -> None:
        text = "a\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200f\n\té\ud800"
        with requests_ending(ShimError(text)):
            status, out, err = run_cli("create", "--vm", GUID, "--json", "a")
        self.assertEqual(status, 1)
        self.assertEqual(err, r"a\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200f\n\té\ud800" + "\n")
        self.assertEqual(json.loads(out)["error"], text)
        self.assertEqual(ShimError(text).message, text)
        self.assertTrue(out.isascii())

    def test_character_that_the_console_does_not_know_is_escaped(self) -> None:
        written = io.BytesIO()
        err = io.TextIOWrapper(written, encoding="ascii", newline="")
        with requests_ending(ShimError("é")), mock.patch.object(sys, "stderr", err):
            self.assertEqual(cli_status("create", "--vm", GUID, "a"), 1)
        err.flush()
        self.assertEqual(written.getvalue(), b"\\xe9\n")

    def test_byte_order_mark_is_written_once(self) -> None:
        written = type("Pipe", (io.BytesIO,), {"seekable": lambda self: False})()
        out = io.TextIOWrapper(written, encoding="utf-8-sig")
        out.write('{"id": "the host itself"}\n')
        with requests_ending(None, None), mock.patch.object(sys, "stdout", out):
            self.assertEqual(cli_status("create", "--vm", GUID, "--json", "a", "b"), 0)
        lines = written.getvalue().decode("utf-8-sig").splitlines()
        self.assertEqual([json.loads(line)["id"] for line in lines[1:]], ["a", "b"])

    def test_stream_that_can_only_write_gets_the_text(self) -> None:
        host = mock.Mock(spec=["write"])
        ends = [ShimError("no")] * 2
        with requests_ending(*ends), mock.patch.multiple(sys, stdout=host, stderr=host):
            self.assertEqual(cli_status("create", "--vm", GUID, "--json", "a", "b"), 1)
        text = "".join(call[0][0] for call in host.write.call_args_list)
        self.assertRegex(text, r'^(no\n\{.*"outcome": "refused".*\}\n){2}$')
        with requests_ending(None), mock.patch.object(sys, "stdout", host):
            if sys.version_info < (3, 14):  # whose argparse needs one
                del sys.stdout
            self.assertEqual(cli_status("create", "--vm", GUID, "--json", "a"), 0)

    def test_handshake_without_a_stdin_is_wrong_usage(self) -> None:
        for stdin, stdout in (None, None), (io.StringIO("{}"), io.StringIO()):
            err = io.StringIO()
            with mock.patch.multiple(sys, stdin=stdin, stdout=stdout, stderr=err):
                self.assertEqual(cli_status("serve", "--handshake", "--pipe", PATH), 2)
            self.assertRegex(err.getvalue(), r"\n[^\n]*error: --handshake needs a stdin [^\n]*\n$")

    @unittest.skipIf(WINDOWS, "this is Windows")
    def test_other_platform_is_told_in_one_line(self) -> None:
        for arguments, what in (
            (("create", "--vm", GUID, "a"), "a runhcs pipe"),
            (("create", "a"), "runhcs's state"),
            (("list",), "runhcs's state"),
        ):
            status, out, err = run_cli(*arguments)
            self.assertEqual((status, out), (3, ""))
            self.assertRegex(err, rf"^{what} needs Windows, and this is \w+\n$")

    def test_readme_names_the_keys_of_the_json_line_in_their_order(self) -> None:
        table = readme().split("| key | value |")[1].split("\n\n")[0]
        cells = [line.split("|")[1] for line in table.splitlines()[2:]]
        for arguments in ("create", "--vm", GUID, "--json", "a"), ("create", "--json"):
            with requests_ending(None):
                _, [row], _ = run_json(*arguments)
            self.assertEqual([*row], re.findall("`([^`]+)`", "".join(cells)))

    def test_host_is_the_name_of_the_computer(self) -> None:
        for name in "HOST01", "B\u00dcRO":
            with mock.patch.dict(os.environ, {"COMPUTERNAME": name}), requests_ending(None):
                _, out, _ = run_cli("create", "--vm", GUID, "--json", "a")
            self.assertTrue(out.isascii())
            self.assertEqual(json.loads(out)["host"], name)

    def test_failures_do_not_keep_the_others_from_being_tried(self) -> None:
        # In each turn another failure comes first, and success in between changes nothing.
        others = KeyboardInterrupt, ValueError, TypeError
        failed = [failure for failure in failures() if type(failure) not in others]
        for turn in range(len(failed)):
            ends = [None, *failed[turn:], None, *failed[:turn]]
            ids = [f"id{number}" for number in range(len(ends))]
            with self.subTest(first=ends[1]), requests_ending(*ends) as issue:
                status, rows, _ = run_json("unmount", "--vm", GUID, "--json", *ids)
                statuses = [ENDS[type(end).__name__][1] if end else 0 for end in ends]
                self.assertEqual((status, [row["status"] for row in rows]), (statuses[1], statuses))
                self.assertEqual([call[0][1].id for call in issue.call_args_list], ids)
                self.assertEqual([row["id"] for row in rows], ids)

    def test_ctrl_c_stops_and_leaves_no_line_of_what_was_not_tried(self) -> None:
        for first, expected in (None, 130), (ShimError("no"), 1):
            with self.subTest(first=first):
                with requests_ending(first, KeyboardInterrupt(), None) as issue:
                    status, rows, _ = run_json("sync", "--vm", GUID, "--json", "a", "b", "c")
                self.assertEqual((status, issue.call_count), (expected, 2))
                self.assertEqual([row["id"] for row in rows], ["a", "b"])
                self.assertEqual((rows[1]["status"], rows[1]["outcome"]), (130, "unknown"))


@needs_command_line
class CommandLineOnAPipeTest(ServerCase):
    def run_on_pipe(self, *arguments: str) -> tuple[int, str, str]:
        return run_cli("create", "--pipe", self.path, *arguments, "a")

    def test_each_op_is_sent_and_success_is_silent(self) -> None:
        self.path = vm_pipe_path(GUID)
        requests = self.start_recording()
        for op, vm in itertools.product(VMRequestOp, (["--pipe", self.path], ["--vm", GUID])):
            self.assertEqual(run_cli(op.value, *vm, "é"), (0, "", ""))
            self.assertEqual(requests.pop(), ("é", op))

    def test_each_failure_has_its_status_and_its_text(self) -> None:
        cases: tuple[tuple[Step, list[str], int, str], ...] = (
            (lambda: self.start_server(refuse), [], 1, "^no such container\n$"),
            (nothing, [], 3, "^PATH: [^\n]*\n$"),
            (lambda: self.listen(access=PIPE_ACCESS_INBOUND), [], 4, "elevated administrator"),
            (self.make_busy, ["--connect-timeout", "0.1"], 5, "the pipe stayed busy"),
            (self.fake_shim_hanging, ["--timeout", "0.1"], 6, "did not end in time.*is unknown"),
            (lambda: self.fake_shim(RawPipe.read, RawPipe.disconnect), [], 6, "outcome is unknown"),
            (self.fake_shim_responding, [], 6, "outcome is unknown"),
        )
        for arrange, arguments, expected, text in cases:
            self.path = new_pipe_path()
            arrange()
            with self.subTest(text=text):
                status, out, err = self.run_on_pipe(*arguments)
                self.assertEqual((status, out), (expected, ""))
                self.assertRegex(err, text.replace("PATH", re.escape(self.path)))

    def test_ctrl_c_is_status_130_and_with_json_one_line(self) -> None:
        for arguments in [], ["--json", "never-sent"]:
            gone = self.fake_shim_hanging(RawPipe.read, lambda pipe: _thread.interrupt_main())
            status, out, err = self.run_on_pipe(*arguments)
            gone.set()
            self.assertEqual((status, out.count("\n"), err), (130, len(arguments) // 2, ""))
        row = json.loads(out)
        self.assertEqual((row["id"], row["status"]), ("never-sent", 130))
        self.assertEqual((row["outcome"], row["retry"]), ("unknown", False))

    def test_serve_prints_each_request_until_ctrl_c(self) -> None:
        ask = functools.partial(self.issue, "a\x1bb\ncreate c")
        self.once_in("ConnectNamedPipe", ask, _thread.interrupt_main)
        status, out, err = run_cli("serve", "--pipe", self.path)
        self.assertEqual((status, out), (130, "create a\\x1bb\\ncreate c\n"))
        self.assertEqual(err, f"serving {self.path} until Ctrl-C\n")

    def test_serve_that_can_not_have_its_pipe_says_so_in_one_line(self) -> None:
        for number, expected in (5, 4), (231, 4), (1450, 3):
            with failing("CreateNamedPipeW", number):
                status, out, err = run_cli("serve", "--pipe", self.path)
            self.assertEqual((status, out), (expected, ""))
            self.assertTrue(err.startswith(f"{self.path}: "))
            self.assertEqual(err.count("\n"), 1)

    def test_launched_shim_whose_parent_has_gone_ends_with_its_status(self) -> None:
        stdout = mock.Mock(spec=["write"])
        with mock.patch.multiple(sys, stdout=stdout, stdin=stdout):
            with mock.patch.object(os, "write", side_effect=OSError(22, "Invalid argument")):
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    self.assertEqual(cli_status("serve", "--handshake", "--pipe", "nope"), 2)
        self.assertIn("not a pipe path", err.getvalue())

    def test_demo_shows_both_ways_of_success_and_refusal(self) -> None:
        status, out, err = run_cli("demo")
        self.assertEqual((status, err), (0, ""))
        for part in wire("demo"), SHIM_SUCCESS, wire("demo", "sync"), b"Not implemented":
            self.assertIn(repr(part), out)


@needs_command_line
class ProcessTest(Case):
    """The command line as a process of its own, on every platform."""

    def test_usage_errors_and_results_have_their_status_without_any_stream(self) -> None:
        for arguments, expected in (("pipe-path", GUID), 0), (("pipe-path", "nope"), 2):
            code = f"sys.stdin = sys.stdout = sys.stderr = None; sys.exit(vmshim.main({arguments}))"
            with self.subTest(arguments=arguments):
                self.assertEqual(python_says(code), (expected, b"", b""))

    def test_reader_of_stdout_that_has_gone_does_not_change_the_status(self) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        self.addCleanup(os.close, write_end)
        cases = (0, ["pipe-path", GUID]), (0, ["--help"]), (2, ["create", "--json"])
        for status, arguments in cases:
            with self.subTest(arguments=arguments):
                with start_process(vmshim.__file__, *arguments, stdout=write_end) as process:
                    _, err = process.communicate(timeout=LONG)
                self.assertEqual(process.returncode, status)
                self.assertNotRegex(err, b"Exception ignored|Traceback")

    @unittest.skipUnless(os.name == "posix", "a shell closes the streams")
    def test_full_or_closed_stdout_does_not_change_the_status(self) -> None:
        for redirection in ">/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full":
            for arguments, expected in (("pipe-path", GUID), 0), (("create", "--json"), 2):
                with self.subTest(redirection=redirection, arguments=arguments):
                    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable]
                    command += [vmshim.__file__, *arguments]
                    process = subprocess.run(command, stderr=subprocess.PIPE, timeout=LONG)
                    self.assertEqual(process.returncode, expected)
                    self.assertNotIn(b"Traceback", process.stderr)

    def test_file_runs_from_standard_input(self) -> None:
        """As the README's first recipe has it."""
        for status, arguments, out, err in (
            (0, ["--version"], f"^vmshim {vmshim.__version__}", "^$"),
            (2, ["unmount", "--json"], '"status": 2,', "vmshim.* error: .*ID"),
        ):
            with open(vmshim.__file__, "rb") as file:
                with start_process("-I", "-", *arguments) as process:
                    streams = process.communicate(file.read(), timeout=LONG)
            self.assertEqual(process.returncode, status)
            for stream, expected in zip(streams, (out, err)):
                self.assertRegex(stream.decode(), expected)


IMPORTS = """
import __future__, _thread, collections, ctypes, enum, errno, io, math, os, sys, time
class Structure(ctypes.Structure):  # from 3.14 on ctypes loads modules for the first one
    _fields_ = [("field", ctypes.c_int)]
loaded = set(sys.modules)
"""


class ProcessOnAPipeTest(ServerCase):
    def start_vmshim(self, *arguments: str) -> subprocess.Popen[Any]:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        process = start_process(vmshim.__file__, *arguments, encoding="utf-8", env=environment)
        self.enter(process)
        self.addCleanup(process.kill)
        return process

    def start_serving(self, *arguments: str) -> Any:
        """Start `vmshim.py serve`, and wait until it does."""
        process: Any = self.start_vmshim("serve", "--pipe", self.path, *arguments)
        self.assertEqual(process.stderr.readline(), f"serving {self.path} until Ctrl-C\n")
        return process

    @needs_command_line
    def test_serve_prints_each_request_and_refuses_with_the_given_text(self) -> None:
        process = self.start_serving("--fail", "out of disks")
        self.assertEqual(str(self.caught(ShimError, self.issue, "é")), "out of disks")
        self.assertEqual(process.stdout.readline(), "create \\xe9\n")

    @needs_command_line
    def test_serve_goes_on_without_a_reader_and_its_name_ends_with_its_process(self) -> None:
        process = self.start_serving()
        process.stdout.close()
        for _ in range(2):
            self.issue()
        process.kill()
        process.wait(LONG)
        self.caught(PipeNotFoundError, self.issue)

    @needs_command_line
    def test_client_process_that_is_killed_costs_the_server_nothing(self) -> None:
        handler = HeldHandler()
        self.start_server(handler)
        process = self.start_vmshim("create", "--pipe", self.path, "killed")
        self.assertTrue(handler.entered.wait(LONG))
        process.kill()
        process.wait(LONG)
        handler.go_on.set()
        self.issue()
        self.assertEqual(handler.carried_out, ["killed", "test"])

    @needs_command_line
    def test_ids_are_sent_in_turn_and_each_line_is_printed_as_its_request_ends(self) -> None:
        """The file comes by standard input, as the README's first recipe has it."""
        go_on = threading.Event()
        requests: list[VMRequest] = []

        def handle(request: VMRequest) -> None:
            requests.append(request)
            if request.id == "no":
                go_on.wait(LONG)
            refuse_some(request)

        self.start_server(handle)
        ids = "a", "no", "c"
        child = self.enter(start_process("-I", "-", "unmount", "--pipe", self.path, "--json", *ids))
        self.addCleanup(child.kill)
        self.addCleanup(go_on.set)
        assert child.stdin and child.stdout and child.stderr
        with open(vmshim.__file__, "rb") as file:
            child.stdin.write(file.read())
        child.stdin.close()
        rows = [json.loads(child.stdout.readline())]
        go_on.set()  # only now, so the first line has not waited for the second request
        rows += [json.loads(line) for line in child.stdout]
        # The first failure counts.
        self.assertEqual((child.wait(LONG), child.stderr.read().split()), (1, [b"boom"]))
        self.assertEqual([(row["id"], row["status"]) for row in rows], [*zip(ids, (0, 1, 0))])
        self.assertEqual([row["error"] for row in rows], [None, "boom", None])
        self.assertEqual({row["pipe"] for row in rows}, {self.path})
        self.assertTrue(rows[0]["host"])
        self.assertEqual(requests, [(id, "unmount") for id in ids])

    def test_server_that_a_finaliser_closes_while_python_ends_does_not_hold_it_up(self) -> None:
        code = f"""
def serve():
    with vmshim.VMShimServer({self.path!r}, bool) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
class Service:
    def __init__(self):
        self.generator = serve()
        next(self.generator)
    def __del__(self):
        self.generator.close()
holder = %s
vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", "create"), connect_timeout=10)
"""
        # The second outlives the modules.
        for holder in "Service()", "setattr(threading, 'registry', [vmshim, Service()])":
            status, _, err = python_says(code % holder, before="import threading")
            self.assertEqual((status, err), (0, b""))

    def test_program_without_threading_and_queue_ends_although_a_server_serves(self) -> None:
        # Before 3.13 Python never ends if a thread that goes on was the first to import threading.
        code = f"""
import _thread
def fail(request):
    raise ValueError("a bug")
server = vmshim.VMShimServer({self.path!r}, fail)
_thread.start_new_thread(server.serve_forever, ())
try:
    vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", "create"), connect_timeout=30)
except vmshim.ShimError:
    print("refused", *(sys.modules.keys() - loaded) & {{"threading", "queue", "logging"}})
"""
        status, out, err = python_says(code, before=f"{IMPORTS}sys.modules['_queue'] = None")
        self.assertEqual((status, out.split()), (0, [b"refused"]))
        self.assertIn(b"a bug", err)

    def test_library_prints_nothing_and_loads_no_more_modules_than_these(self) -> None:
        self.start_server(refuse_some)
        code = f"""
for id in "yes", "no":
    try:
        vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest(id, "create"))
    except vmshim.ShimError:
        print(id, *set(sys.modules) - loaded)
"""
        status, out, err = python_says(code, before=IMPORTS)
        self.assertEqual((status, out.split(), err), (0, [b"no", b"vmshim"], b""))


# ---- Input at random ----------------------------------------------------------------------------

fuzz_cases = 2000
fuzz_seed = 4

PIECES = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"\\ud83d", b"\\ude00", b"\\u0000"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"0", b"-", b".", b"1e999", b"9" * 19, b"7" * 400),
    *(b"\0", b"\0OK\0", b" ", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf0\x9f\x98"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"ID":"b",', b'"op":"sync",', b'"created":"', b"T24:60:60Z"),
    *("\u017f\u212a\u00df".encode(), b"-9999", b"+23:59", b"0000", b".123456789123"),
    b"T3:04:05,5Z",
]
SEEDS = [
    *(wire for _, _, wire in REQUESTS if len(wire) < 200),
    *((STATE_JSON % text).encode() for text in (*(text for text, _ in CREATED), ZERO_TIME)),
    *(*REFUSALS, SHIM_SUCCESS),
]


def fuzzed(chance: random.Random) -> bytes:
    """Return a good message in which a few places have been deleted, doubled or overwritten."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(6)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.randrange(9))
        noise = bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
        data[start:end] = chance.choice([b"", data[start:end] * 2, noise, chance.choice(PIECES)])
    return bytes(data)


class Trickle(io.BytesIO):
    """A file whose reads return a few bytes each."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        super().__init__(data)
        self.chance = chance

    def read(self, size: int | None = -1) -> bytes:
        most = self.chance.choice([1, 2, 7, 100, 5000])
        return super().read(min(most, size) if size and size > 0 else most)


def read_request(pipe: io.BytesIO) -> VMRequest | None:
    """Read a request as the server does; None if it is none that a handler may see."""
    finder, data, piece = vmshim._object_end(), b"", b"x"
    next(finder)
    has_ended = False
    while piece and not has_ended and len(data) <= vmshim.MAX_REQUEST:
        piece = pipe.read(4096)
        data += piece
        has_ended = finder.send(piece)
    with contextlib.suppress(ValueError):
        request = VMRequest.from_json(data)
        request.check()
        return request
    return None


def bombs(size: int) -> Iterator[tuple[str, bytes]]:
    """Make what others choke on, by name."""
    yield "arrays", b"[" * size
    yield "objects", b'{"ID":' * size
    yield "deep ID", b'{"ID":' + b"[" * size
    yield "deep value", b'{"x":' + b"[" * size + b"]" * size + b"}"
    yield "digits", b'{"pid":' + b"9" * size + b"}"
    yield "fraction", b'{"pid":0.' + b"9" * size + b"}"
    yield "exponent", b'{"pid":1e' + b"9" * size + b"}"
    yield "keys", b"{" + b",".join(b'"%d":0' % key for key in range(size)) + b"}"
    yield "same keys", b"{" + b'"ID":"a",' * size + b'"Op":"create"}'
    yield "annotations", b'{"annotations":{' + b'"":"",' * size + b'"a":"b"}}'
    yield "time", b'{"created":"2022-12-12T20:30:15.' + b"1" * size + b'Z"}'
    yield "escapes", b'{"ID":"' + b"\\ud800" * size + b'"}'
    yield "spaces", b" " * size
    yield "zeros", b"\0" * size


def cases() -> Iterator[tuple[dict[str, Any], bytes, random.Random]]:
    """Yield what a failing case says, its data, and chance for more."""
    for number in range(fuzz_cases):
        chance = random.Random(f"{fuzz_seed} {number}")
        data = fuzzed(chance)
        yield {"seed": fuzz_seed, "number": number, "data": data[:300]}, data, chance


def kinds_of_messages() -> list[Any]:
    return [VMRequest, *([ContainerState] if hasattr(vmshim, "ContainerState") else [])]


class FuzzTest(Case):
    """Only the documented exceptions ever come out. Any other makes a case an error."""

    def test_messages(self) -> None:
        for kind in kinds_of_messages():
            read = 0
            for name, data, _ in cases():
                with self.subTest(**name):
                    try:
                        message = kind.from_json(data)
                    except ValueError:
                        continue
                    self.assertEqual(kind.from_json(message.to_json()), message)
                    read += 1
            self.assertGreater(read, fuzz_cases // 20, "most cases must not be nonsense")

    def test_responses(self) -> None:
        for name, data, chance in cases():
            with self.subTest(**name):
                try:
                    check_shim_response(Trickle(data, chance), max_response=1000)
                except ShimError as error:
                    self.assertNotEqual(data, SHIM_SUCCESS)
                    self.assertEqual(error.response, data[:1001])
                    self.assertTrue(str(error) or not data.strip())
                else:
                    self.assertEqual(data, SHIM_SUCCESS)

    @needs_server
    def test_requests_that_a_server_reads_bit_by_bit(self) -> None:
        for name, data, chance in cases():
            with self.subTest(**name):
                request = read_request(io.BytesIO(data))
                self.assertEqual(read_request(Trickle(data, chance)), request)
                if request:
                    self.assertEqual(VMRequest.from_json(data), request)

    def test_bombs_cost_memory_in_proportion_to_their_size(self) -> None:
        readers: list[Callable[[bytes], object]] = [
            lambda data: check_shim_response(io.BytesIO(data)),
            *(kind.from_json for kind in kinds_of_messages()),
        ]
        if hasattr(vmshim, "VMShimServer"):
            readers.append(lambda data: read_request(io.BytesIO(data)))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for (name, bomb), read in itertools.product(bombs(10**5), readers):
            with self.subTest(bomb=name):
                tracemalloc.clear_traces()
                with contextlib.suppress(ValueError, ShimError):
                    read(bomb)
                self.assertLess(tracemalloc.get_traced_memory()[1], 50 * len(bomb))

    def test_bombs_of_a_million_are_defused_and_none_hangs(self) -> None:
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        for name, bomb in bombs(10**6):
            for kind in kinds_of_messages():
                with self.subTest(bomb=name), contextlib.suppress(ValueError):
                    kind.from_json(bomb)


class FuzzedServerTest(ServerCase):
    def test_server_responds_to_whatever_comes_and_lives_on(self) -> None:
        carried_out = self.start_recording()
        for name, data, _ in itertools.islice(cases(), fuzz_cases // 20):
            expected = read_request(io.BytesIO(data))
            with self.subTest(**name):
                carried_out.clear()
                with RawPipe.dial(self.path) as pipe:
                    with contextlib.suppress(OSError):  # it has heard enough
                        pipe.write(data)
                        pipe.write(b"")
                    response = pipe.read_all()
                self.assertEqual(carried_out, [expected] if expected else [])
                self.assertEqual(response == SHIM_SUCCESS, expected is not None)
                self.assertTrue(response)
        self.assertEqual(self.raw_exchange(wire()), SHIM_SUCCESS)


# ---- Ctrl-C at every point ----------------------------------------------------------------------

TRACED = {"vmshim.py", "threading.py", "queue.py"}

PEER = """
import sys, time, _thread
sys.path.insert(0, sys.argv[1])
import vmshim
def refuse(request):
    raise vmshim.ShimError("no")
handlers = {"ok": bool, "refusing": refuse, "slow": lambda request: time.sleep(0.08)}
for name, handler in handlers.items():
    server = vmshim.VMShimServer(sys.argv[2] + name, handler)
    _thread.start_new_thread(server.serve_forever, ())
busy = vmshim.VMShimServer(sys.argv[2] + "busy", print)
print("ready", flush=True)
sys.stdin.read()
"""


class Peer:
    """The other ends of the interrupted calls, in a process of their own."""

    def __init__(self) -> None:
        self.path = new_pipe_path() + "-"
        folder = os.path.dirname(os.path.abspath(vmshim.__file__))
        self.process = start_process("-c", PEER, folder, self.path, stderr=None)
        assert self.process.stdout
        self.process.stdout.readline()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=LONG)
        finally:
            self.process.kill()


def persist(call: Step) -> None:
    """Call a function again as often as a KeyboardInterrupt comes out of it."""
    while True:
        try:
            call()
            return
        except KeyboardInterrupt:
            pass


def interrupt() -> None:
    raise KeyboardInterrupt


class Interrupter:
    """Acts as a signal's handler before the n-th bytecode of vmshim.py: raises KeyboardInterrupt.

    Bytecodes of threading and queue, as called from there, count too. Each of them is a point at
    which CPython 3.8 looks for signals; later versions do so at some of them. With `twice` a real
    Ctrl-C hits the main thread up to 3 ms later.
    """

    def __init__(self, point: int, *, twice: bool = False, act: Step = interrupt) -> None:
        self.point = point
        self.act = act
        self.twice = twice
        self.count, self.place = 0, ""
        self.raised_at = math.inf
        self.has_interrupted_again = False

    def run(self, call: Step) -> None:
        sys.settrace(self.trace)
        try:
            call()
        finally:
            sys.settrace(None)

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if os.path.basename(frame.f_code.co_filename) not in TRACED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and self.counts(frame):
            self.count += 1
            if self.count == self.point:
                self.place = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                self.raised_at = time.monotonic()
                if self.twice:
                    _thread.start_new_thread(self.interrupt_again, ())
                self.act()
        return self.trace

    def counts(self, frame: Any) -> bool:
        # CPython looks for no signals where a try or a with begins, nor before its own bookkeeping.
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        return name not in ("SETUP_FINALLY", "SETUP_WITH", "RESUME", "NOP", "PUSH_EXC_INFO")

    def interrupt_again(self) -> None:
        time.sleep(random.random() * 0.003)
        _thread.interrupt_main()
        self.has_interrupted_again = True

    def await_second(self) -> None:
        """Wait until the second one has come."""
        while self.twice and self.place and not self.has_interrupted_again:
            time.sleep(0.001)
        time.sleep(0)  # CPython looks for signals after a call


def ask(path: str, *expected: type[Exception], **options: Any) -> None:
    with contextlib.suppress(*expected):
        issue_vm_request(path, REQUEST, **{"connect_timeout": LONG, "timeout": LONG, **options})


def succeeding_request(peer: Peer) -> None:
    ask(peer.path + "ok")


def refused_request(peer: Peer) -> None:
    ask(peer.path + "refusing", ShimError)


def request_that_times_out(peer: Peer) -> None:
    ask(peer.path + "slow", ResponseTimeoutError, ShimBusyError, timeout=0.02)


def busy_dial(peer: Peer) -> None:
    ask(peer.path + "busy", PipeBusyError, connect_timeout=0.03)


def dropped_pipe(peer: Peer) -> None:
    pipe = dial_pipe(peer.path + "ok", connect_timeout=LONG, timeout=LONG)
    pipe.write(REQUEST.to_json())
    pipe.read(10)
    del pipe


def failed_launch(peer: Peer) -> None:
    code = "import os, sys; os.write(1, b'no memory'); os.close(1); sys.stdin.read()"
    with start_process("-c", code) as shim:
        # What comes before the first line of check_shim_response() is the caller's to clean up.
        assert shim.stdout
        try:
            with contextlib.suppress(ShimError):
                check_shim_response(shim.stdout, shim)
        finally:
            shim.kill()


def command_line(peer: Peer) -> None:
    status, *_ = run_cli("create", "--pipe", peer.path + "ok", "--json", "a")
    if status == 130:
        raise KeyboardInterrupt
    assert status == 0


def life_of_a_server(peer: Peer) -> None:
    """Serve clients in all states, until the handler stops the server."""
    path = new_pipe_path()
    kinds = ["silent", "half", "garbage", "gone", "unread", "ok", "refused", "failing", "last"]
    left: list[str] = []

    failures = {"refused": ShimError("no"), "failing": ZeroDivisionError()}

    def handle(request: VMRequest) -> None:
        if request.id in failures:
            raise failures[request.id]
        if request.id == "last" and server:
            server.shutdown()

    def be_client(kind: str) -> None:
        sent = {"silent": b"", "half": b'{"ID":', "garbage": b"[]"}.get(kind, wire(kind))
        try:
            with dial_pipe(path, connect_timeout=LONG, timeout=LONG) as pipe:
                if kind == "gone":
                    return
                pipe.write(sent)
                time.sleep(0.01) if kind == "unread" else pipe.readall()
        except VMShimError:
            pass
        finally:
            left.append(kind)

    begun = []
    server = None
    try:
        with VMShimServer(path, handle) as server:
            for kind in kinds:
                begun.append(kind)
                _thread.start_new_thread(be_client, (kind,))
            server.serve_forever()
    finally:
        sys.settrace(None)
        if server:
            persist(server.close)  # Ctrl-C may have come in the middle of it
        # Every client that has begun gets its end, without help.
        persist(lambda: wait_until(lambda: len(left) >= len(begun)))
        persist(lambda: VMShimServer(path, handle).close())


SCENARIOS = (
    succeeding_request,
    refused_request,
    request_that_times_out,
    busy_dial,
    dropped_pipe,
    failed_launch,
    *([command_line] if hasattr(vmshim, "main") else []),
    life_of_a_server,
)


class Interrupted(NamedTuple):
    """What came of one run of a scenario."""

    ended: bool
    """Whether it ended by itself, because it has fewer points."""
    seconds: float
    """How long KeyboardInterrupt took to come out."""
    wrong: str
    """What went wrong; empty if nothing did."""
    place: str
    """Where it was interrupted."""


class Interruptions:
    """Runs scenarios with a KeyboardInterrupt at a given point and looks at what is left."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.lost: list[str] = []
        self.lowest_handle = 0
        sys.unraisablehook = lambda unraisable: self.lost.append(repr(unraisable))
        logging.getLogger("vmshim").addHandler(logging.NullHandler())
        logging.getLogger("vmshim").propagate = False

    def close(self) -> None:
        vmshim._under_way.clear()  # memory that Ctrl-C has left behind; see leftovers()
        sys.unraisablehook = sys.__unraisablehook__
        logging.getLogger("vmshim").propagate = True

    def run(
        self, scenario: Callable[[Peer], None], point: int, *, twice: bool = False
    ) -> Interrupted:
        interrupter = Interrupter(point, twice=twice)
        raised: list[str] = []
        ended_at = [math.inf]

        def call() -> None:
            try:
                try:
                    interrupter.run(lambda: scenario(self.peer))
                finally:
                    ended_at[0] = time.monotonic()
            except KeyboardInterrupt:
                pass
            except BaseException as error:
                raised.append(f"{error!r} came out")

        threads = _thread._count()
        if twice:
            # Here, because a real Ctrl-C hits the main thread only. If this hangs, it says where.
            faulthandler.dump_traceback_later(4 * LONG, exit=True)
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    call()
                finally:
                    interrupter.await_second()
            persist(faulthandler.cancel_dump_traceback_later)
        else:
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(LONG)
            if thread.is_alive():
                raised.append("hangs")
        wrong = "".join(raised) or self.leftovers(threads, first=point == 0)
        seconds = max(0.0, ended_at[0] - interrupter.raised_at)
        return Interrupted(not interrupter.place, seconds, wrong, interrupter.place)

    def leftovers(self, threads: int, *, first: bool) -> str:
        """Say what is still there; it may take a moment to go."""
        deadline = time.monotonic() + 5.0
        while True:
            gc.collect()
            found = ""
            if _thread._count() > threads:
                found = f"{_thread._count() - threads} threads are left"
            under_way = [overlapped.Internal for overlapped, _ in vmshim._under_way.values()]
            if STATUS_PENDING in under_way:
                found = "an operation is pending"
            if first:
                self.lowest_handle = max(self.lowest_handle, lowest_free_handle())
            if lowest_free_handle() > self.lowest_handle:
                found = f"handle {self.lowest_handle} is left"
            if self.lost:
                return f"lost: {self.lost.pop()}"
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.005)


@needs_pipes
@needs_server
class InterruptionTest(Case):
    """`.ci/interrupt.py` tries all points; here it is every k-th, with a random start."""

    def setUp(self) -> None:
        self.interruptions = Interruptions(self.enter(Peer()))
        self.addCleanup(self.interruptions.close)

    def try_points(self, scenario: Callable[[Peer], None], step: int, *, twice: bool) -> None:
        for _ in range(4):
            self.assertEqual(self.interruptions.run(scenario, 0).wrong, "")
        for point in itertools.count(random.randrange(1, step + 1), step):
            with self.subTest(scenario=scenario.__name__, point=point, twice=twice):
                outcome = self.interruptions.run(scenario, point, twice=twice)
                if outcome.ended:
                    break
                self.assertEqual(outcome.wrong, "", outcome.place)
                self.assertLess(outcome.seconds, 5.0, outcome.place)

    def test_ctrl_c_at_any_point_ends_a_call_and_leaves_nothing(self) -> None:
        for scenario in SCENARIOS:
            slow = scenario in (life_of_a_server, failed_launch, request_that_times_out)
            self.try_points(scenario, 250 if slow else 50, twice=False)

    def test_second_ctrl_c_in_the_clean_up_never_makes_it_hang(self) -> None:
        for scenario in succeeding_request, request_that_times_out, life_of_a_server:
            self.try_points(scenario, 300, twice=True)


# ---- The file itself ----------------------------------------------------------------------------


class FileTest(Case):
    def test_file_is_ascii_so_that_it_can_be_pasted_anywhere(self) -> None:
        with open(vmshim.__file__, "rb") as file:
            self.assertTrue(file.read().isascii())

    def test_examples_in_docstrings_are_true(self) -> None:
        results = doctest.testmod(vmshim, verbose=False)
        self.assertEqual(results.failed, 0)
        self.assertGreaterEqual(results.attempted, 2)

    def test_each_keyword_has_its_documented_default(self) -> None:
        known: dict[str, Any] = {"timeout": None, "security_descriptor": None, "root": "default"}
        known.update(max_response=MEBIBYTE, max_clients=64, request_timeout=10, connect_timeout=2)
        calls: list[Any] = [getattr(vmshim, name) for name in vmshim.__all__]
        for call in calls:
            call = getattr(call, "__init__", call) if inspect.isclass(call) else call
            for name, default in (getattr(call, "__kwdefaults__", None) or {}).items():
                with self.subTest(call=call.__qualname__, name=name):
                    self.assertEqual(default, known[name])
        for limit in "MAX_REQUEST", "MAX_RESPONSE":
            self.assertEqual(getattr(vmshim, limit, MEBIBYTE), MEBIBYTE)

    def test_every_public_name_field_and_member_has_its_text_in_the_help(self) -> None:
        for name in vmshim.__all__:
            value = getattr(vmshim, name)
            with self.subTest(name=name):
                if isinstance(value, (str, bytes, int)):
                    self.assertIn(name, vmshim.__doc__ or "")
                else:
                    self.assertTrue(value.__doc__)
                if inspect.isclass(value):
                    self.assertNotEqual(value.__doc__, value.__mro__[1].__doc__)
                    for member, method in vars(value).items():
                        if inspect.isroutine(method) and not member.startswith("_"):
                            self.assertTrue(method.__doc__, member)
                for field in getattr(value, "_fields", ()):
                    self.assertRegex(value.__doc__, rf"(?m)^ *- .*\b{field}\b.*: |`{field}`")
        for op in VMRequestOp:
            self.assertIn(f'{op.name}, "{op.value}"', VMRequestOp.__doc__ or "")

    def test_every_other_name_is_private_or_that_of_win32(self) -> None:
        for name, value in vars(vmshim).items():
            if name in vmshim.__all__ or name.startswith("_") or name == "main":
                continue
            with self.subTest(name=name):
                is_imported = getattr(value, "__module__", "") != "vmshim"
                # NamedTuple stands for typing's.
                self.assertTrue(is_imported or name.isupper() or name == "NamedTuple")

    def test_readme_never_shows_a_call_that_can_wait_for_ever(self) -> None:
        code = "\n".join(readme_examples())
        calls = re.findall(r"\bissue_\w+\((?:[^()]|\([^()]*\))*\)", code)
        self.assertTrue(calls)
        for call in calls:
            self.assertIn("timeout=", call)

    @needs_command_line
    def test_every_python_example_of_the_readme_imports_what_there_is(self) -> None:
        for example in readme_examples():
            with self.subTest(example=example):
                compile(example, "README.md", "exec")
                for names in re.findall(r"^from vmshim import (.*)$", example, re.MULTILINE):
                    self.assertLessEqual(set(names.split(", ")), set(vmshim.__all__))

    def test_readme_names_every_public_name(self) -> None:
        names = set(re.findall(r"\w+", readme()))
        self.assertEqual([name for name in vmshim.__all__ if name not in names], [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fuzz", type=int, default=fuzz_cases)
    parser.add_argument("--seed", type=int, default=fuzz_seed)
    options, rest = parser.parse_known_args()
    fuzz_cases, fuzz_seed = options.fuzz, options.seed
    unittest.main(argv=[sys.argv[0], *rest])
