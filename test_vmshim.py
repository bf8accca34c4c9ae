# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the vmshim maintainers
"""The tests of vmshim: `python test_vmshim.py`, or on Linux `.ci/wine-python test_vmshim.py`.

What needs no pipe runs on every platform. The other tests use real pipes of the real kernel32,
and stand on both sides: the client is tried against server ends written here, the server against
clients written here, so that the two can't share a mistake.

Besides unittest's options, `--fuzz N` tries N inputs made at random instead of 2000, and `--seed N`
makes others.
"""

from __future__ import annotations

import _thread
import argparse
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
import weakref
from datetime import datetime, timedelta, timezone
from queue import SimpleQueue
from typing import Any, Callable, ContextManager, Iterator, NamedTuple, TypeVar
from unittest import mock

import vmshim
from vmshim import (
    SHIM_SUCCESS,
    ConnectionLostError,
    Container,
    ContainerNotFoundError,
    ContainerState,
    ContainerStateError,
    NotSentError,
    OperationCancelledError,
    OutcomeUnknownError,
    Pipe,
    PipeAccessError,
    PipeBusyError,
    PipeNotFoundError,
    PipeOpenError,
    RegistryError,
    ResponseTimeoutError,
    ShimError,
    VMRequest,
    VMRequestOp,
    VMShimError,
    VMShimServer,
    check_shim_response,
    dial_pipe,
    issue_container_request,
    issue_vm_request,
    list_containers,
    read_container,
    safe_pipe_path,
    shim_pipe_path,
    vm_pipe_path,
)

HERE = os.path.dirname(os.path.abspath(__file__))
WINDOWS = sys.platform == "win32"

needs_pipes = unittest.skipUnless(
    WINDOWS, "needs named pipes: `.ci/wine-python test_vmshim.py` runs it on Linux"
)

LONG = 30.0  # seconds; longer than anything here takes, unless it hangs
MEBIBYTE = 1 << 20
REQUEST = VMRequest("test", VMRequestOp.CREATE_CONTAINER)
NEVER = datetime(1, 1, 1, tzinfo=timezone.utc)
STOPPED = b"the VM shim stopped before it had carried the request out"
TOO_LATE = b"no complete request came in time"

T = TypeVar("T")
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

kernel32: Any = None

if sys.platform == "win32":
    # vmshim's functions with their prototypes, out of reach of what tests put in their place.
    kernel32 = types.SimpleNamespace(**vars(vmshim._kernel32))
    library = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.DisconnectNamedPipe = library.DisconnectNamedPipe
    kernel32.DisconnectNamedPipe.argtypes = (vmshim.HANDLE,)
    kernel32.SetNamedPipeHandleState = library.SetNamedPipeHandleState
    kernel32.SetNamedPipeHandleState.argtypes = (
        *(vmshim.HANDLE, vmshim.LPDWORD, vmshim.LPVOID, vmshim.LPVOID),
    )


def win_error() -> OSError:
    if sys.platform == "win32":
        return ctypes.WinError(ctypes.get_last_error())
    raise AssertionError("no pipe without Windows")


def winerror(error: BaseException) -> int:
    """Return error.winerror, which type checkers know on Windows only."""
    number: int = getattr(error, "winerror", 0)
    return number


def set_last_error(number: int) -> None:
    if sys.platform == "win32":
        ctypes.set_last_error(number)


class RawPipe:
    """One end of a pipe, blocking and without any care: the other half of each test."""

    def __init__(self, handle: Any) -> None:
        if handle.value == vmshim.INVALID_HANDLE_VALUE:
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
        buffer = ctypes.create_string_buffer(size)
        count = vmshim.DWORD()
        if not kernel32.ReadFile(self.handle, buffer, size, count, None):
            error = win_error()
            if winerror(error) == ERROR_BROKEN_PIPE:
                return b""
            raise error
        return buffer.raw[: count.value]

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def write(self, data: bytes) -> int:
        if not kernel32.WriteFile(self.handle, data, len(data), vmshim.DWORD(), None):
            raise win_error()
        return len(data)

    def flush(self) -> None:
        """Wait until the other end has read everything."""
        kernel32.FlushFileBuffers(self.handle)

    def disconnect(self) -> None:
        kernel32.DisconnectNamedPipe(self.handle)

    def close(self) -> None:
        self.handle = None  # the last reference: this closes the handle


def new_pipe_path() -> str:
    return rf"\\.\pipe\vmshim-test-{uuid.uuid4()}"


def wire(id: str = "test", op: str = "create") -> bytes:
    return VMRequest(id, op).to_json()


def lowest_free_handle() -> int:
    """Windows and Wine hand out the lowest free handle value: with no leak it does not grow."""
    value: int = kernel32.CreateEventW(None, True, False, None).value
    return value


def nothing() -> None:
    pass


def pickled(value: Any, protocol: int) -> Any:
    return pickle.loads(pickle.dumps(value, protocol))


@contextlib.contextmanager
def spying(
    name: str,
    *,
    before: Callable[[], object] = nothing,
    after: Callable[[], object] = nothing,
) -> Iterator[list[tuple[Any, ...]]]:
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
        error = vmshim._last_error()
        after()
        set_last_error(error)
        return result

    with mock.patch.object(vmshim._kernel32, name, spy):
        yield calls


@contextlib.contextmanager
def failing(name: str, *errors: int) -> Iterator[None]:
    """Have a Win32 function fail with these errors, one a call; 0 is none, as afterwards."""
    function = getattr(vmshim._kernel32, name)
    left = list(errors)

    def fail(*arguments: Any) -> Any:
        error = left.pop(0) if left else 0
        if not error:
            return function(*arguments)
        set_last_error(error)
        failure = vmshim.INVALID_HANDLE_VALUE if name.endswith(("FileW", "PipeW")) else None
        return vmshim._Handle(failure) if name.startswith("Create") else 0

    with mock.patch.object(vmshim._kernel32, name, fail):
        yield


# ---- What this platform can do ------------------------------------------------------------------
# Each probe returns why a test must be skipped, or nothing.


@functools.lru_cache(maxsize=None)
def why_first_instances_are_many() -> str:
    path = new_pipe_path()
    access = PIPE_ACCESS_DUPLEX | FILE_FLAG_FIRST_PIPE_INSTANCE
    with RawPipe.listen(path, access=access):
        try:
            RawPipe.listen(path, access=access).close()
        except PermissionError:
            return ""
    return "two first instances of a pipe could be created here"


@functools.lru_cache(maxsize=None)
def why_everybody_may_connect() -> str:
    path = new_pipe_path()
    with RawPipe.listen(path, security=vmshim._parse_security("D:")):
        try:
            RawPipe.dial(path, patience=0).close()
        except PermissionError:
            return ""
    return "a pipe that grants nothing to anybody could be opened here"


def skip_if(reason: str) -> None:
    if reason:
        raise unittest.SkipTest(reason)


# ---- Helpers of the tests -----------------------------------------------------------------------


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

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what no event tells."""
        give_up = time.monotonic() + LONG
        while not condition():
            self.assertLess(time.monotonic(), give_up, "it doesn't come true")
            time.sleep(0.001)


class PipeCase(Case):
    """Runs the other half of a test in a thread, and sees to it that no thread is left."""

    def setUp(self) -> None:
        # A test that hangs says where.
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        self.path = new_pipe_path()
        threads = _thread._count()
        self.addCleanup(self.wait_until, lambda: _thread._count() <= threads)

    def run_aside(self, target: Callable[[], object]) -> threading.Thread:
        failures = []

        def run() -> None:
            try:
                target()
            except BaseException as error:
                failures.append(error)

        def end() -> None:
            thread.join(LONG)
            self.assertFalse(thread.is_alive(), "the other half hangs")
            self.assertEqual(failures, [])

        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(end)
        return thread

    def listen(self, **options: Any) -> RawPipe:
        return self.enter(RawPipe.listen(self.path, **options))

    def dial(self) -> RawPipe:
        return self.enter(RawPipe.dial(self.path))

    def dial_and_write(self, data: bytes) -> RawPipe:
        client = self.dial()
        client.write(data)
        return client

    def make_busy(self) -> RawPipe:
        """Make a pipe whose one instance is taken; return its server's end."""
        server = self.listen()
        self.dial()
        return server

    def fake_shim(self, script: Callable[[RawPipe], object], **options: Any) -> None:
        """Be the server end for one client: connect, run the script, close."""
        pipe = RawPipe.listen(self.path, **options)

        def serve() -> None:
            with pipe:
                pipe.connect()
                script(pipe)

        self.run_aside(serve)

    def fake_shim_responding(self, *pieces: bytes, **options: Any) -> None:
        """Be a shim that reads the request and responds in these pieces."""

        def script(pipe: RawPipe) -> None:
            pipe.read()
            for piece in pieces:
                pipe.write(piece)

        self.fake_shim(script, **options)

    def fake_shim_hanging(
        self, script: Callable[[RawPipe], object] = RawPipe.read, **options: Any
    ) -> threading.Event:
        """Be a shim that keeps the connection after the script until the event is set."""
        gone = threading.Event()

        def hang(pipe: RawPipe) -> None:
            script(pipe)
            gone.wait(LONG)

        self.fake_shim(hang, **options)
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

        self.run_aside(serve)
        return ids

    def issue(self, id: str = "test", **options: Any) -> None:
        issue_vm_request(self.path, VMRequest(id, "create"), **{"timeout": LONG, **options})

    def refusal(self, **options: Any) -> ShimError:
        return self.caught(ShimError, self.issue, **options)

    def issue_from_many_threads(self, turns: int) -> list[str]:
        """Issue requests from 16 threads at once; return all IDs, sorted."""

        def client(number: int) -> None:
            for turn in range(turns):
                self.issue(f"{number}.{turn}", connect_timeout=LONG)

        for thread in [self.run_aside(functools.partial(client, number)) for number in range(16)]:
            thread.join(LONG)
        return sorted(f"{number}.{turn}" for number in range(16) for turn in range(turns))


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


class ServerCase(PipeCase):
    def make_server(
        self, handler: Callable[[VMRequest], object] = bool, **options: Any
    ) -> VMShimServer:
        """Make a server that is closed at the test's end."""
        return self.enter(VMShimServer(self.path, handler, **options))

    def serve_in_thread(self, server: VMShimServer) -> threading.Thread:
        thread = self.run_aside(server.serve_forever)
        self.addCleanup(server.close)
        return thread

    def start_server(
        self, handler: Callable[[VMRequest], object] = bool, **options: Any
    ) -> VMShimServer:
        server = self.make_server(handler, **options)
        self.serve_in_thread(server)
        return server

    def raw_exchange(self, *pieces: bytes) -> bytes:
        """Send raw bytes and read the response to its end."""
        with RawPipe.dial(self.path) as client:
            for piece in pieces:
                client.write(piece)
            return client.read_all()

    def wait_until_busy(self) -> None:
        """Wait until the server offers no instance; unlike a client, this takes none."""
        self.wait_until(lambda: not kernel32.WaitNamedPipeW(self.path, 1))

    def assert_ends(self, thread: threading.Thread) -> None:
        thread.join(LONG)
        self.assertFalse(thread.is_alive())


def refuse(request: VMRequest) -> None:
    raise ShimError("no such container\n")


def start_python(code: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python of our own kind that runs `code`."""
    return start_process("-c", code, **options)


def start_process(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *arguments]
    try:
        return subprocess.Popen(command, **{**streams, **options})
    except OSError as error:
        # Wine says so once in some thousand times, if the machine is busy.
        if winerror(error) != ERROR_INTERNAL_ERROR:
            raise
    return subprocess.Popen(command, **{**streams, **options})


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """Run the command line; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli_status(*arguments)
    return status, out.getvalue(), err.getvalue()


def cli_status(*arguments: str) -> int:
    try:
        return vmshim.main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


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
SAFE_NAMES = {
    "": "",
    "test with spaces": "test%20with%20spaces",
    "test.with..dots...": "test.with..dots...",
    "é": "%C3%A9",
    "\U0001f600": "%F0%9F%98%80",
    "100%": "100%25",
    "a+b": "a+b",
    "CON": "CON",
    "x:y": "x:y",
    "a/b\\c": "a%2Fb%5Cc",
}
# The ASCII characters that the reference leaves as they are; it escapes all others.
SAFE_ASCII = "$&+-.0123456789:=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"
NOT_PIPE_PATHS = (
    "",
    "pipe",
    r"C:\pipe\x",
    r"\\.\pipe",
    "\\\\.\\pipe\\",
    r"\\.\mailslot\x",
    r"\\.\x\pipe\y",
    r"\\\pipe\x",
    "\\\\?\\pipe\\",
    r"a\b\.\pipe\x",
    "//./pipe/x",
    "\\\\.\\pipe\\a\0b",
    "\\\\.\\pipe\\a\ud800",
)
# Windows would resolve these before it looks for the pipe.
CHANGING_PATHS = (
    r"\\.\pipe\.",
    r"\\.\pipe\..\C:\x",
    r"\\.\pipe\a\.\b",
    r"\\.\pipe\a\..\b",
    r"\\.\pipe\a/b",
    r"\\.\pipe\a.",
    r"\\.\pipe\a ",
    r"\\.\pipe\a.\b",
    r"\\.\pipe\a\\b",
    "\\\\.\\pipe\\a\\",
    r"\\host\pipe\a.",
)


class NamesTest(Case):
    def test_safe_path_escapes_as_the_reference_does(self) -> None:
        for name, escaped in SAFE_NAMES.items():
            with self.subTest(name=name):
                self.assertEqual(safe_pipe_path(name), SAFE_PREFIX + escaped)
        for char in map(chr, range(128)):
            with self.subTest(char=char):
                escaped = char if char in SAFE_ASCII else f"%{ord(char):02X}"
                self.assertEqual(safe_pipe_path(char), SAFE_PREFIX + escaped)

    def test_prefix_is_that_of_the_reference(self) -> None:
        self.assertEqual(vmshim.SAFE_PIPE_PREFIX, SAFE_PREFIX)

    def test_name_with_a_lone_surrogate_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "lone surrogate"):
            safe_pipe_path("a\ud800")

    def test_pipe_path_of_a_guid(self) -> None:
        for text in "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff":
            self.assertEqual(vm_pipe_path(text), SAFE_PREFIX + "runhcs-vm-" + text)
            self.assertEqual(vm_pipe_path(text.upper()), SAFE_PREFIX + "runhcs-vm-" + text)
            self.assertEqual(vm_pipe_path(uuid.UUID(text)), SAFE_PREFIX + "runhcs-vm-" + text)
            self.assertEqual(shim_pipe_path(text), SAFE_PREFIX + "runhcs-shim-" + text)

    def test_text_that_is_not_a_guid_is_refused(self) -> None:
        for text in (
            "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}",
            "6ba7b8109dad11d180b400c04fd430c8",
            "urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "6ba7b810-9dad-11d1-80b4-00c04fd430c",
            " 6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "not-a-guid",
            "",
        ):
            for path in vm_pipe_path, shim_pipe_path:
                with self.subTest(text=text):
                    self.assertEqual(
                        str(self.caught(ValueError, path, text)), f'invalid GUID "{text}"'
                    )

    def test_unescaping_is_the_inverse_and_refuses_what_the_reference_refuses(self) -> None:
        for name, escaped in SAFE_NAMES.items():
            self.assertEqual(vmshim._path_unescape(escaped), name)
        for broken in "%", "100%", "%2", "%zz", "%FF":
            with self.subTest(broken=broken), self.assertRaises(ValueError):
                vmshim._path_unescape(broken)


class BadInputTest(Case):
    """Refused before anything is opened: on every platform alike."""

    def assert_refused(self, path: str, reason: str) -> None:
        for call in (
            lambda: dial_pipe(path),
            lambda: issue_vm_request(path, REQUEST),
            lambda: VMShimServer(path, print),
        ):
            with self.subTest(path=path), self.assertRaisesRegex(ValueError, reason):
                call()

    def test_path_that_is_not_a_pipe_path_is_refused(self) -> None:
        for path in NOT_PIPE_PATHS:
            self.assert_refused(path, "not a pipe path|lone surrogate")

    def test_path_that_windows_would_change_is_refused(self) -> None:
        for path in CHANGING_PATHS:
            self.assert_refused(path, "Windows would change")

    def test_path_that_windows_takes_as_it_is_is_accepted(self) -> None:
        for path in r"\\?\pipe\a.", r"\\?\pipe\a/b ", r"\\.\PIPE\a\.b", r"\\host\pipe\a":
            vmshim._check_pipe_path(path)

    def test_pipe_of_another_host_can_not_be_served(self) -> None:
        for path in r"\\host\pipe\a", r"\\localhost\pipe\a", r"\\?\pipe\a":
            with self.subTest(path=path), self.assertRaisesRegex(ValueError, "only be served on"):
                VMShimServer(path, print)

    def test_wrong_number_is_refused_by_the_name_of_its_parameter(self) -> None:
        path = new_pipe_path()
        Call = Callable[..., object]
        dial: Call = functools.partial(dial_pipe, path)
        serve: Call = functools.partial(VMShimServer, path, print)
        check: Call = functools.partial(check_shim_response, io.BytesIO(b"\0OK\0boom"))
        issuers: list[Call] = [
            functools.partial(issue_vm_request, path, REQUEST),
            functools.partial(issue_container_request, "a", "create"),
        ]
        seconds = -1, -0.001, math.nan, -math.inf
        cases: list[tuple[str, list[Call], tuple[float, ...]]] = [
            ("connect_timeout", [dial, *issuers], seconds),
            ("timeout", [dial, *issuers], seconds),
            ("request_timeout", [serve], seconds),
            ("max_response", [check, *issuers], (3, 0, -1)),
            ("max_clients", [serve], (0, -1, math.nan)),
        ]
        for name, calls, wrongs in cases:
            for call, wrong in itertools.product(calls, wrongs):
                with self.subTest(name=name, call=call, wrong=wrong):
                    error = self.caught(ValueError, call, **{name: wrong})
                    self.assertRegex(str(error), f"^{name} must be ")
        for name, calls, _ in cases[:-1]:
            for call, odd in itertools.product(calls, ("1", decimal.Decimal(60), 5j)):
                with self.subTest(name=name, call=call, odd=odd):
                    text = str(self.caught(TypeError, call, **{name: odd}))
                    self.assertRegex(text, f"^{name} must be ")
        self.assertRegex(str(self.caught(TypeError, check, max_response=100.0)), "^max_response")
        self.caught(ValueError, serve, request_timeout=0)
        self.caught(TypeError, VMShimServer, path, None)
        self.caught(TypeError, issue_vm_request, path, ("a", "create"))

    def test_timeout_of_any_length_is_a_deadline(self) -> None:
        for seconds in 1e300, 10**400, math.inf:
            self.assertGreater(vmshim._deadline(seconds), time.monotonic() + 1e8)

    def test_request_that_no_shim_may_see_is_refused(self) -> None:
        for id, op, reason in (
            ("a", "bogus", "unknown op 'bogus'; a VM shim knows create, sync, unmount, unmount-"),
            ("a", "", "unknown op"),
            ("a", "CREATE", "unknown op"),
            ("", "create", "the container ID is empty"),
            ("\ud800", "create", "lone surrogate"),
        ):
            with self.subTest(id=id, op=op):
                with self.assertRaisesRegex(ValueError, reason):
                    issue_vm_request(new_pipe_path(), VMRequest(id, op))
                with self.assertRaisesRegex(ValueError, reason):
                    issue_container_request(id, op)

    def test_bytes_instead_of_a_text_are_refused(self) -> None:
        wrong: Any = b"bytes"
        calls: tuple[Callable[[], object], ...] = (
            lambda: dial_pipe(wrong),
            lambda: safe_pipe_path(wrong),
            lambda: vm_pipe_path(wrong),
            lambda: issue_vm_request(new_pipe_path(), VMRequest(wrong, "create")),
            lambda: VMShimServer(new_pipe_path(), print, security_descriptor=wrong),
        )
        for call in calls:
            with self.assertRaisesRegex(TypeError, "must be a str, not bytes"):
                call()

    def test_empty_id_or_root_is_refused(self) -> None:
        for call in (
            lambda: read_container(""),
            lambda: read_container("x", root=""),
            lambda: list_containers(root=""),
            lambda: issue_container_request("x", "create", root=""),
        ):
            with self.assertRaisesRegex(ValueError, "is empty"):
                call()

    @unittest.skipIf(WINDOWS, "this is Windows")
    def test_call_that_needs_windows_says_so_in_one_line(self) -> None:
        path = new_pipe_path()
        calls: tuple[Callable[[], object], ...] = (
            lambda: dial_pipe(path),
            lambda: issue_vm_request(path, REQUEST),
            lambda: VMShimServer(path, print),
            lambda: read_container("a"),
            list_containers,
            lambda: issue_container_request("a", "create"),
        )
        for call in calls:
            error = self.caught(vmshim.NeedsWindowsError, call)
            self.assertIsInstance(error, NotSentError)
            self.assertEqual(error.errno, errno.ENOSYS)
            self.assertRegex(str(error), r"^[^\n]* needs Windows, and this is \w+$")


# ---- Errors -------------------------------------------------------------------------------------

# Each public exception, its public bases, and the exit status that it has on the command line.
HIERARCHY: dict[type[VMShimError], tuple[tuple[type[BaseException], ...], int]] = {
    VMShimError: ((Exception,), 70),
    ShimError: ((VMShimError,), 1),
    NotSentError: ((VMShimError,), 3),
    OutcomeUnknownError: ((VMShimError,), 6),
    vmshim.NeedsWindowsError: ((NotSentError, OSError), 3),
    PipeOpenError: ((NotSentError, OSError), 3),
    PipeNotFoundError: ((PipeOpenError, FileNotFoundError), 3),
    PipeAccessError: ((PipeOpenError, PermissionError), 4),
    PipeBusyError: ((PipeOpenError, TimeoutError), 5),
    vmshim.RegistryError: ((NotSentError, OSError), 3),
    ContainerNotFoundError: ((NotSentError, LookupError), 3),
    ContainerStateError: ((NotSentError, ValueError), 3),
    ResponseTimeoutError: ((OutcomeUnknownError, TimeoutError), 6),
    ConnectionLostError: ((OutcomeUnknownError, BrokenPipeError), 6),
    OperationCancelledError: ((OutcomeUnknownError, ConnectionAbortedError), 6),
}
PATH = r"\\.\pipe\x"
OPEN_ERRORS = {
    2: (PipeNotFoundError, errno.ENOENT, "no shim listens there"),
    5: (PipeAccessError, errno.EACCES, "run this as an elevated administrator"),
    87: (PipeOpenError, errno.EIO, "."),
    231: (PipeBusyError, errno.ETIMEDOUT, "nothing was sent; try again later"),
}
SERVE_ERRORS = {
    5: (PipeAccessError, errno.EACCES, "the name is taken by another server, or needs an elev"),
    87: (PipeOpenError, errno.EIO, "."),
    231: (PipeAccessError, errno.EACCES, "the name is taken by another server"),
}
EXCHANGE_ERRORS = {
    64: (ConnectionLostError, errno.EPIPE, "the connection to the shim was lost"),
    87: (ConnectionLostError, errno.EIO, "."),
    109: (ConnectionLostError, errno.EPIPE, "the connection to the shim was lost"),
    232: (ConnectionLostError, errno.EPIPE, "the connection to the shim was lost"),
    233: (ConnectionLostError, errno.EPIPE, "the connection to the shim was lost"),
    258: (ResponseTimeoutError, errno.ETIMEDOUT, "did not end in time"),
    995: (OperationCancelledError, errno.ECONNABORTED, "was cancelled"),
}
LOOK_FIRST = "so the outcome is unknown; look at the container before you repeat the request"


class ErrorsTest(Case):
    def errors(self) -> list[Exception]:
        """Return exceptions of all kinds, as this module makes them."""
        return [
            ShimError("boom\n", b"boom\n", 5),
            NotSentError("x"),
            OutcomeUnknownError("x"),
            vmshim.NeedsWindowsError(errno.ENOSYS, "needs Windows"),
            vmshim.RegistryError(errno.EACCES, "denied", "HKEY_LOCAL_MACHINE\\X", 5),
            ContainerNotFoundError("x"),
            ContainerStateError("x"),
            *(vmshim._open_error(number, PATH) for number in OPEN_ERRORS),
            *(vmshim._serve_error(number, PATH) for number in SERVE_ERRORS),
            *(vmshim._exchange_error(number, PATH) for number in EXCHANGE_ERRORS),
        ]

    def test_hierarchy_tells_whether_a_request_may_be_repeated(self) -> None:
        public = [getattr(vmshim, name) for name in vmshim.__all__]
        kinds = [kind for kind in public if inspect.isclass(kind) and issubclass(kind, Exception)]
        self.assertEqual(set(kinds), set(HIERARCHY))
        answers = {ShimError, NotSentError, OutcomeUnknownError}
        for kind, (bases, _) in HIERARCHY.items():
            with self.subTest(kind=kind.__name__):
                for base in bases:
                    self.assertTrue(issubclass(kind, base))
                given = [answer for answer in answers if issubclass(kind, answer)]
                self.assertEqual(len(given), 0 if kind is VMShimError else 1)
                if issubclass(kind, OSError):
                    self.assertIs(kind.__str__, vmshim._PipeError.__str__)

    def test_each_win32_error_has_its_exception_and_says_what_to_do(self) -> None:
        for make, table in (
            (vmshim._open_error, OPEN_ERRORS),
            (vmshim._serve_error, SERVE_ERRORS),
            (vmshim._exchange_error, EXCHANGE_ERRORS),
        ):
            for number, (kind, errno_, text) in table.items():
                with self.subTest(make=make.__name__, number=number):
                    error = make(number, PATH)
                    self.assertIs(type(error), kind)
                    self.assertEqual((error.errno, error.winerror), (errno_, number))
                    self.assertEqual(error.filename, PATH)
                    self.assertRegex(str(error.strerror), text)
                    self.assertEqual(str(error), f"[WinError {number}] {error.strerror}: {PATH!r}")

    def test_no_text_says_try_again_where_the_outcome_is_unknown(self) -> None:
        for error in self.errors():
            with self.subTest(error=error):
                if isinstance(error, vmshim._PipeError) and isinstance(error, OutcomeUnknownError):
                    self.assertIn("look at the container before you repeat", str(error))
                if not isinstance(error, PipeBusyError):
                    self.assertNotIn("try again", str(error))

    def test_every_error_survives_pickling_and_copying(self) -> None:
        copies: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copies.append(functools.partial(pickled, protocol=protocol))
        names = "args", "errno", "strerror", "filename", "winerror", "__dict__"
        for error in self.errors():
            for make in copies:
                with self.subTest(error=error):
                    other = make(error)
                    self.assertIs(type(other), type(error))
                    self.assertEqual((str(other), repr(other)), (str(error), repr(error)))
                    for name in names:
                        self.assertEqual(getattr(other, name, 0), getattr(error, name, 0), name)

    def test_repr_of_an_error_reads_well(self) -> None:
        self.assertEqual(repr(ContainerNotFoundError("x")), "ContainerNotFoundError('x')")
        self.assertEqual(repr(ShimError("x", b"x")), "ShimError('x', b'x', None)")
        self.assertRegex(repr(vmshim._open_error(2, PATH)), r"^PipeNotFoundError\(2, 'no shim ")

    def test_each_exception_has_its_exit_status(self) -> None:
        for kind, (_, status) in HIERARCHY.items():
            with self.subTest(kind=kind.__name__):
                error = kind(5, "text") if issubclass(kind, OSError) else kind("text")
                self.assertEqual(vmshim._outcome_of(error).status, status)
        others: dict[type[BaseException], int] = {
            ValueError: 2,
            TypeError: 2,
            KeyboardInterrupt: 130,
            ZeroDivisionError: 70,
            OSError: 70,
            LookupError: 70,
        }
        for other, status in others.items():
            with self.subTest(kind=other.__name__):
                self.assertEqual(vmshim._outcome_of(other()).status, status)
        self.assertEqual(vmshim._outcome_of(None).status, 0)

    def test_outcome_is_what_the_exception_says(self) -> None:
        for outcome in vmshim._OUTCOMES:
            for kind in outcome.errors:
                with self.subTest(kind=kind.__name__):
                    expected = (
                        "not-sent" if issubclass(kind, (ValueError, TypeError)) else "unknown"
                    )
                    if issubclass(kind, ShimError):
                        expected = "refused"
                    elif issubclass(kind, NotSentError):
                        expected = "not-sent"
                    self.assertEqual(outcome.outcome, expected)
        self.assertEqual(vmshim._OUTCOMES[0].outcome, "done")

    def test_readme_and_help_tell_each_exit_status_as_the_code_does(self) -> None:
        rows = re.findall(r"^\| *(\d+) *\|(.*)\|$", readme(), re.MULTILINE)
        outcomes = {outcome.status: outcome for outcome in vmshim._OUTCOMES}
        self.assertEqual([int(status) for status, _ in rows], sorted(outcomes))
        for status, row in rows:
            outcome = outcomes[int(status)]
            with self.subTest(status=status):
                row = row.replace("`", "")
                self.assertIn(outcome.meaning, row)
                self.assertIn(outcome.advice, row)
                for kind in outcome.errors:
                    if kind is not BaseException:
                        self.assertIn(kind.__name__, row)
                self.assertIn(f"  {status:<3}  {outcome.meaning}\n", vmshim._epilog())


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
DECODED = [  # wire, ID, op
    (b'{"ID":"a","Op":"create"}\n', "a", "create"),
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
    (b'{"x":' + b"[" * 500 + b"]" * 500 + b',"ID":"a","Op":"sync"}', "a", "sync"),
]
NOT_DECODED = [
    b"",
    b" ",
    b"[]",
    b"1",
    b'"ID"',
    b"true",
    b'{"ID":"a","Op":7}',
    b'{"ID":["a"],"Op":"create"}',
    b'{"ID":7,"ID":"a","Op":"create"}',
    b'{"ID":{},"Op":"create"}',
    b'{"ID":true,"Op":"create"}',
    b'{"ID":"a"',
    b"{'ID':'a'}",
    b'{"ID":"a",}',
    b'{"ID":"a\n","Op":"create"}',
    b'{"ID":NaN}',
    b'{"x":-Infinity}',
    b'\xef\xbb\xbf{"ID":"a","Op":"create"}',
    b'\x0b{"ID":"a","Op":"create"}',
    b'{"x":' + b"[" * 100_000,
]


class RequestTest(Case):
    def test_encodes_as_the_reference_does(self) -> None:
        for id, op, wire in REQUESTS:
            with self.subTest(id=id):
                self.assertEqual(VMRequest(id, op).to_json(), wire)

    def test_decodes_as_the_reference_does(self) -> None:
        for wire, id, op in DECODED:
            with self.subTest(wire=wire[:60]):
                self.assertEqual(VMRequest.from_json(wire), (id, op))

    def test_decoding_refuses_what_the_reference_refuses(self) -> None:
        for wire in NOT_DECODED:
            with self.subTest(wire=wire[:60]), self.assertRaises(ValueError):
                VMRequest.from_json(wire)

    def test_every_encoded_request_decodes_to_itself(self) -> None:
        for id, op, wire in REQUESTS:
            self.assertEqual(VMRequest.from_json(wire), VMRequest(id, op))

    def test_text_is_decoded_like_bytes(self) -> None:
        self.assertEqual(VMRequest.from_json('{"ID":"é","Op":"sync"}'), ("é", "sync"))

    def test_op_given_as_its_wire_text_becomes_the_member(self) -> None:
        self.assertEqual(
            [op.value for op in VMRequestOp], ["create", "sync", "unmount", "unmount-disk"]
        )
        request = VMRequest("a", "create")
        self.assertIs(request.op, VMRequestOp.CREATE_CONTAINER)
        self.assertIs(request._replace(op="sync").op, VMRequestOp.SYNC_NAMESPACE)
        self.assertIs(VMRequest._make(["a", "unmount"]).op, VMRequestOp.UNMOUNT_CONTAINER)
        request._replace(op="sync").check()
        unknown = request._replace(op="bogus")
        self.assertEqual(unknown, ("a", "bogus"))
        self.assertIs(type(unknown.op), str)

    def test_op_is_its_wire_text_in_every_kind_of_format(self) -> None:
        op = VMRequestOp.CREATE_CONTAINER
        texts = [str(op), f"{op}", f"{op!s}", format(op), op + ""]
        self.assertEqual(texts, ["create"] * 5)
        self.assertEqual(f"{op:>8}", "  create")

    def test_request_is_immutable(self) -> None:
        for name in "id", "other":
            with self.assertRaises(AttributeError):
                setattr(REQUEST, name, "other")

    def test_repr_reads_well(self) -> None:
        self.assertEqual(
            repr(REQUEST), "VMRequest(id='test', op=<VMRequestOp.CREATE_CONTAINER: 'create'>)"
        )

    def test_id_with_a_lone_surrogate_is_not_encoded(self) -> None:
        self.caught(ValueError, VMRequest("\ud800", "create").to_json)


STATE = ContainerState(
    version="1.0.2",
    id="test",
    init_process_pid=1234,
    status="running",
    bundle="C:\\bundles\\test",
    rootfs="\\\\?\\Volume{6ba7b810-9dad-11d1-80b4-00c04fd430c8}\\",
    owner="runhcs.exe",
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
    ("0001-01-01T00:00:00Z", None),
]
ZERO_TIME = "0001-01-01T00:00:00Z"
EMPTY_STATE = '{"ociVersion":"","id":"","pid":%s,"status":"","bundle":"","rootfs":"",' + (
    '"created":"%s","owner":""}'
)
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
NO_STATES = [
    '{"created":"2019-05-01T01:02:03"}',
    '{"created":"2019-05-01t01:02:03Z"}',
    '{"created":"2019-05-01T01:02:03z"}',
    '{"created":""}',
    '{"created":"2019-05-01T24:00:00Z"}',
    '{"created":"2019-05-01T01:60:00Z"}',
    '{"created":"2019-05-01T01:02:60Z"}',
    '{"created":"2019-05-01T01:2:03Z"}',
    '{"created":"2019-5-01T01:02:03Z"}',
    '{"created":"2019-05-1T01:02:03Z"}',
    '{"created":"2019-02-30T00:00:00Z"}',
    '{"created":"2019-05-01T01:02:03.Z"}',
    '{"created":"2019-05-01T01:02:03Z\\n"}',
    '{"created":"2019-05-01T01:02:03+1:00"}',
    '{"created":"2019-05-01T01:02:0\u0663Z"}',
    '{"created":"x","created":"2019-05-01T01:02:03Z"}',
    '{"\u017ftatus":5}',
    '{"created":5}',
    '{"pid":"5"}',
    '{"pid":1.0}',
    '{"pid":true}',
    '{"pid":9223372036854775808}',
    '{"pid":' + "9" * 100_000 + "}",
    '{"annotations":{"a":1}}',
    '{"annotations":["a"]}',
    '{"id":7}',
    "[]",
    "{} {}",
    "",
]


class ContainerStateTest(Case):
    def test_every_time_round_trips_byte_for_byte(self) -> None:
        for text, nanoseconds in CREATED:
            with self.subTest(text=text):
                wire = (STATE_JSON % text).encode()
                state = ContainerState.from_json(wire)
                self.assertEqual(state.to_json(), wire)
                if nanoseconds is None:
                    self.assertEqual(state, STATE)
                    self.assertEqual(state.created, NEVER)
                    continue
                since_1970 = state.created - datetime(1970, 1, 1, tzinfo=timezone.utc)
                microseconds = since_1970 // timedelta(microseconds=1)
                self.assertEqual(microseconds * 1000 + state.created_nanosecond, nanoseconds)
                self.assertEqual(
                    state._replace(created=NEVER, created_nanosecond=0), STATE, "the other fields"
                )

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
        for offset in "+24:00", "+23:60":
            self.caught(
                ValueError, ContainerState.from_json, f'{{"created":"2020-01-02T03:04:05{offset}"}}'
            )
        self.assertIn("an offset of 24 hours", text)
        state = ContainerState.from_json('{"created":"\\u0032024-01-02T03:04:05Z"}')
        self.assertEqual(state.created.year, 2024)
        self.assertIn("refuses a time that is written with escapes", text)
        state = ContainerState.from_json('{"annotations":{"a":"b"},"annotations":{"c":"d"}}')
        self.assertEqual(state.annotations, {"c": "d"})
        state = ContainerState.from_json('{"annotations":{"a":"b"},"annotations":null}')
        self.assertEqual(state.annotations, {"a": "b"})
        self.assertIn("merges the annotations if that key comes twice", text)

    def test_indented_json_is_read(self) -> None:
        text = json.dumps(json.loads(STATE_JSON % "2022-12-12T20:30:15Z"), indent=2)
        created = datetime(2022, 12, 12, 20, 30, 15, tzinfo=timezone.utc)
        self.assertEqual(ContainerState.from_json(text), STATE._replace(created=created))

    def test_annotations_are_sorted_and_stand_before_the_owner(self) -> None:
        wire = (EMPTY_STATE % (0, ZERO_TIME)).replace(
            ',"owner"', ',"annotations":{"A":"\\u003c","b":"","é":"2"},"owner"'
        )
        state = ContainerState(annotations={"é": "2", "b": "", "A": "<"})
        self.assertEqual(state.to_json().decode(), wire)
        self.assertEqual(ContainerState.from_json(wire), state)
        self.assertEqual(ContainerState.from_json(wire.replace('"b":""', '"b":null')), state)

    def test_state_that_json_can_not_hold_is_not_encoded(self) -> None:
        for state in (
            ContainerState(created=datetime(2022, 12, 12)),
            ContainerState(created_nanosecond=1000),
            ContainerState(created_nanosecond=-1),
            ContainerState(id="\ud800"),
        ):
            with self.subTest(state=state), self.assertRaises(ValueError):
                state.to_json()

    def test_example_of_the_readme_reads_what_runhcs_prints(self) -> None:
        state = ContainerState(id="my-container", status="running")
        outputs = {"state": state.to_json(), "list": b"[" + state.to_json() + b"]\n"}
        out = io.StringIO()
        with mock.patch.object(subprocess, "check_output", lambda command: outputs[command[1]]):
            with contextlib.redirect_stdout(out):
                exec(readme_example("runhcs"), {})
        self.assertEqual(
            out.getvalue(), "running 0001-01-01 00:00:00+00:00\nmy-container running\n"
        )


class RecordsTest(Case):
    def test_every_record_survives_pickling_and_copying(self) -> None:
        annotated = STATE._replace(annotations={"a": "b"})
        for record in REQUEST, VMRequest("", "x"), ContainerState(), annotated, Container("a"):
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                other = pickled(record, protocol)
                self.assertEqual((other, type(other)), (record, type(record)))
            for other in copy.copy(record), copy.deepcopy(record), record._replace():
                self.assertEqual((other, type(other)), (record, type(record)))
            self.assertEqual(repr(other).partition("(")[0], type(record).__name__)
        self.assertEqual(ContainerState(), ContainerState())
        self.assertNotEqual(ContainerState(), STATE)

    def test_default_annotations_can_not_be_changed_for_everybody(self) -> None:
        annotations: Any = ContainerState().annotations
        annotations["a"] = "b"
        self.assertEqual(ContainerState().annotations, {})

    def test_no_key_is_taken_that_go_would_not_take(self) -> None:
        read = functools.partial(vmshim._read_members, fields=vmshim._CONTAINER_FIELDS)
        for key, taken in (
            ("isHost", True),
            ("ISHOST", True),
            ("i\u017fHo\u017ft", True),
            ("isHo\ufb06", False),
            ("isHo\ufb05", False),
            ("i\u0307sHost", False),
            ("\u0130sHost", False),
            ("\u0131sHost", False),
        ):
            with self.subTest(key=key):
                members = read(vmshim._decode_only(json.dumps({key: True})))
                self.assertEqual(members, {"is_host": True} if taken else {})


# ---- The response -------------------------------------------------------------------------------

REFUSALS = [
    b"\0OK",
    b"\0OK\0\0",
    b"\0OK\0\0OK\0",
    b"OK\0",
    b"boom\n",
    b"\xff\xfe bad utf8",
    b"\0",
]


class ResponseTest(Case):
    def start(self, code: str) -> subprocess.Popen[bytes]:
        process = self.enter(start_python(code))
        self.addCleanup(process.kill)
        return process

    def refusal(self, *arguments: Any, **options: Any) -> ShimError:
        return self.caught(ShimError, check_shim_response, *arguments, **options)

    def test_the_four_bytes_are_success(self) -> None:
        check_shim_response(io.BytesIO(b"\0OK\0"))

    def test_anything_else_is_the_text_of_an_error(self) -> None:
        for response in REFUSALS:
            with self.subTest(response=response):
                error = self.refusal(io.BytesIO(response))
                self.assertEqual(error.response, response)
                self.assertEqual(error.message, response.decode("utf-8", "replace"))
                self.assertIsNone(error.exit_code)

    def test_str_of_an_error_has_no_trailing_newline(self) -> None:
        self.assertEqual(str(self.refusal(io.BytesIO(b"boom\r\n"))), "boom")

    def test_empty_response_is_an_unknown_failure(self) -> None:
        error = self.refusal(io.BytesIO())
        self.assertEqual((str(error), error.response), ("unknown shim failure", b""))

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
        process = self.start(
            "import os, sys; os.write(1, b'\\0OK\\0'); os.close(1); sys.stdin.read(); sys.exit(7)"
        )
        assert process.stdout and process.stdin
        check_shim_response(process.stdout, process)
        self.assertIsNone(process.poll())
        process.stdin.close()
        self.assertEqual(process.wait(LONG), 7)

    def test_process_that_fails_is_killed_and_reaped(self) -> None:
        process = self.start(
            "import os, sys; os.write(1, b'no memory\\n'); os.close(1); sys.stdin.read()"
        )
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "no memory")
        self.assertIsNotNone(process.returncode)
        self.assertEqual(error.exit_code, process.returncode)

    def test_process_that_dies_without_a_word_tells_its_exit_code(self) -> None:
        process = self.start("import sys; sys.exit(3)")
        process.wait(LONG)
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "unknown shim failure, exit code 3")
        self.assertEqual((error.exit_code, error.response), (3, b""))

    def test_process_is_killed_when_reading_fails_or_is_interrupted(self) -> None:
        for failure in OSError("broken"), KeyboardInterrupt():
            process = self.start("import sys; sys.stdin.read()")
            pipe = mock.Mock(read=mock.Mock(side_effect=failure))
            with self.subTest(failure=failure):
                self.caught(type(failure), check_shim_response, pipe, process)
                self.assertIsNotNone(process.returncode)


# ---- Win32 --------------------------------------------------------------------------------------


@needs_pipes
class Win32Test(PipeCase):
    def test_structures_are_laid_out_as_win32_has_them(self) -> None:
        size = ctypes.sizeof(ctypes.c_void_p)
        self.assertEqual(vmshim.OVERLAPPED.hEvent.offset, 2 * size + 8)
        self.assertEqual(ctypes.sizeof(vmshim.OVERLAPPED), 3 * size + 8)
        self.assertEqual(vmshim.SECURITY_ATTRIBUTES.lpSecurityDescriptor.offset, size)
        self.assertEqual(ctypes.sizeof(vmshim.SECURITY_ATTRIBUTES), 3 * size)

    def test_every_function_has_its_prototype(self) -> None:
        for library in vmshim._kernel32, vmshim._advapi32:
            self.assertIsNot(library, getattr(getattr(ctypes, "windll"), library._name))
            functions = [f for f in vars(library).values() if hasattr(f, "argtypes")]
            self.assertTrue(functions)
            for function in functions:
                self.assertTrue(function.argtypes, function.__name__)

    def test_handle_is_closed_once_when_its_last_reference_goes(self) -> None:
        handle = kernel32.CreateEventW(None, True, False, None)
        value, other = handle.value, handle
        del handle
        self.assertNotEqual(lowest_free_handle(), value)
        del other
        self.assertEqual(lowest_free_handle(), value)

    def test_finalisers_are_no_python_code_that_ctrl_c_could_cut_short(self) -> None:
        for kind in vmshim._Handle, vmshim._SecurityDescriptor, Pipe:
            finaliser = getattr(kind, "__del__")
            self.assertFalse(hasattr(finaliser, "__code__"), kind)

    def test_closing_a_handle_leaves_the_last_error_alone(self) -> None:
        set_last_error(4711)
        vmshim._Handle(12345676)  # there is none of this value
        self.assertEqual(vmshim._last_error(), 4711)


# ---- Pipe ---------------------------------------------------------------------------------------


@needs_pipes
class PipeTest(PipeCase):
    def pair(self, **options: Any) -> tuple[Pipe, RawPipe]:
        """Return the two ends of a pipe: ours, and the raw server's."""
        server = self.listen(**options)
        client = self.enter(dial_pipe(self.path, timeout=LONG))
        server.connect()
        return client, server

    def assert_nothing_is_under_way(self) -> None:
        self.assertEqual(vmshim._under_way, {})

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
        with client:
            pass
        self.assertTrue(client.closed)
        client.close()
        for call in lambda: client.read(1), lambda: client.write(b"x"), client.close_write:
            self.caught(ValueError, call)
        client.cancel()

    def test_read_without_a_size_reads_to_end_of_file(self) -> None:
        for size in None, -1:
            client, server = self.pair()
            server.write(b"one")
            server.write(b"two")
            server.close()
            self.assertEqual(client.read(size), b"onetwo")
            client.close()

    def test_only_bytes_are_written(self) -> None:
        client, server = self.pair()
        for wrong in "text", 5, 0, None:
            self.caught(TypeError, client.write, wrong)
        self.assertEqual(client.write(b""), 0)  # which would be end of file
        client.write(b"data")
        self.assertEqual(server.read(), b"data")

    def test_buffered_reader_stands_on_it(self) -> None:
        client, server = self.pair()
        server.write(b"one\ntwo\n")
        self.assertEqual(io.BufferedReader(client).readline(), b"one\n")

    def test_zero_length_message_is_end_of_file_and_stays_it(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")
        server.write(b"")
        self.assertEqual(client.read(10), b"")
        server.write(b"late")
        self.assertEqual(client.read(10), b"")

    def test_closing_is_end_of_file_after_the_data(self) -> None:
        for mode in PIPE_TYPE_MESSAGE, PIPE_TYPE_BYTE:
            client, server = self.pair(mode=mode)
            server.write(b"data")
            server.close()
            self.assertEqual(client.read(2), b"da")
            self.assertEqual(client.read(10), b"ta")
            self.assertEqual([client.read(10), client.read(10)], [b"", b""])
            client.close()

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
            self.assertEqual(client.write(b""), 0)
        self.assertEqual(calls, [])
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")
        client.write(b"x")
        self.assertEqual(server.read(), b"x")

    def test_closed_pipe_raises_value_error_whatever_is_asked_of_it(self) -> None:
        client, server = self.pair()
        server.close()
        self.assertEqual(client.read(10), b"")
        client.close()
        for call in (
            lambda: client.read(10),
            lambda: client.read(0),
            lambda: client.write(b"x"),
            lambda: client.write(b""),
            client.close_write,
        ):
            with self.assertRaisesRegex(ValueError, "closed"):
                call()

    def test_message_that_does_not_fit_is_read_in_parts(self) -> None:
        client, server = self.pair()
        mode = vmshim.DWORD(PIPE_READMODE_MESSAGE)
        kernel32.SetNamedPipeHandleState(client._handle, mode, None, None)
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

    def test_readinto_of_what_can_not_be_written_to_is_an_error_that_loses_no_data(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        released = memoryview(bytearray(8))
        released.release()
        self.caught(ValueError, client.readinto, released)
        self.caught(TypeError, client.readinto, "text")
        self.caught(TypeError, client.readinto, b"read-only")
        self.assertEqual(client.read(10), b"data")

    def test_deadline_ends_a_read(self) -> None:
        client, server = self.pair()
        client.deadline = time.monotonic() + 0.15
        error = self.caught(ResponseTimeoutError, client.read, 10)
        self.assertGreaterEqual(time.monotonic(), client.deadline)
        self.assertIsInstance(error, TimeoutError)
        self.assertEqual((error.winerror, error.filename), (258, self.path))
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
            client.close()

    def test_deadline_in_the_past_still_takes_what_is_there(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        client.deadline = 0.0
        self.assertEqual(client.read(10), b"data")

    def test_pending_read_does_not_hold_up_a_write(self) -> None:
        client, server = self.pair()
        reading = threading.Event()
        with spying("ReadFile", after=reading.set):
            reader = self.run_aside(lambda: self.assertEqual(client.read(10), b"response"))
            self.assertTrue(reading.wait(LONG))
        client.write(b"request")
        self.assertEqual(server.read(), b"request")
        server.write(b"response")
        reader.join(LONG)

    def while_another_thread(
        self, function: str, call: Callable[[], object], kind: type[BaseException]
    ) -> threading.Thread:
        """Have another thread make this call, which will raise that; return once it waits."""
        started = threading.Event()
        with spying(function, after=started.set):
            thread = self.run_aside(lambda: self.caught(kind, call))
            self.assertTrue(started.wait(LONG))
        return thread

    def test_error_that_a_signal_handler_replaces_changes_no_end_of_an_operation(self) -> None:
        client, server = self.pair()
        wait = vmshim._kernel32.GetOverlappedResultEx
        waiting = threading.Event()

        def wait_and_replace(*arguments: Any) -> Any:
            waiting.set()
            result = wait(*arguments)
            set_last_error(0)
            return result

        def respond() -> None:
            waiting.wait(LONG)
            server.write(b"data")
            server.close()

        self.run_aside(respond)
        with mock.patch.object(vmshim._kernel32, "GetOverlappedResultEx", wait_and_replace):
            self.assertEqual([client.read(10), client.read(10)], [b"data", b""])

    def test_failure_whose_error_is_replaced_by_none_is_still_a_failure(self) -> None:
        client, server = self.pair()
        server.close()
        with mock.patch.object(vmshim, "_last_error", lambda: 0):
            self.caught(OutcomeUnknownError, client.write, b"x")
            self.caught(OutcomeUnknownError, client.read, 10)

    def test_close_gives_back_the_event_of_an_operation_whose_end_ctrl_c_cut_short(self) -> None:
        client, _ = self.pair()
        self.while_another_thread("ReadFile", lambda: client.read(10), ValueError)
        with mock.patch.object(vmshim._Operation, "end", mock.Mock(side_effect=KeyboardInterrupt)):
            self.caught(KeyboardInterrupt, client.write, b"x")
        event = weakref.ref(getattr(client._operations[-1], "event"))
        self.assertIsNotNone(event())
        client.close()
        self.assertIsNone(event())

    def test_pipe_is_neither_copied_nor_pickled(self) -> None:
        client, server = self.pair()
        self.caught(TypeError, copy.deepcopy, client)
        self.caught(TypeError, pickle.dumps, client)
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")

    def test_operation_whose_error_a_signal_handler_has_replaced_is_not_let_go(self) -> None:
        client, _ = self.pair()
        operations: list[object] = []

        def replaced() -> int:
            operations.extend(client._operations)
            return ERROR_NO_DATA

        with mock.patch.object(vmshim, "_last_error", replaced):
            self.caught(OutcomeUnknownError, client.read, 10)
        self.assertFalse(getattr(operations[0], "is_pending")())
        self.assertEqual(getattr(operations[0], "overlapped").Internal, STATUS_CANCELLED)

    def test_memory_is_kept_before_an_operation_starts(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        kept: list[int] = []
        with spying("ReadFile", before=lambda: kept.append(len(vmshim._under_way))):
            client.read(10)
        self.assertEqual((kept, client._operations), ([1], []))

    def test_memory_that_ctrl_c_leaves_behind_is_kept_until_its_operation_has_ended(self) -> None:
        client, server = self.pair()
        other, _ = self.pair()
        client.deadline = other.deadline = 0.0
        with mock.patch.object(vmshim._kernel32, "CancelIoEx", side_effect=KeyboardInterrupt):
            self.caught(KeyboardInterrupt, client.read, 1)
        [address] = vmshim._under_way
        self.caught(ResponseTimeoutError, other.read, 1)
        self.assertEqual(list(vmshim._under_way), [address])
        server.write(b"x")
        self.caught(ResponseTimeoutError, other.read, 1)
        self.assert_nothing_is_under_way()

    def test_finaliser_runs_no_python_code_that_ctrl_c_could_cut_short(self) -> None:
        self.listen()
        pipe = dial_pipe(self.path)
        calls: list[str] = []

        def note_call(frame: types.FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename == Pipe.read.__code__.co_filename:
                calls.append(frame.f_code.co_name)

        sys.setprofile(note_call)
        del pipe
        sys.setprofile(None)
        self.assertEqual(calls, [])

    def test_close_from_another_thread_makes_a_blocked_read_raise(self) -> None:
        client, server = self.pair()
        reader = self.while_another_thread("ReadFile", lambda: client.read(10), ValueError)
        client.close()
        reader.join(LONG)
        self.assert_nothing_is_under_way()
        self.assertEqual(server.read(), b"")

    def test_operation_that_begins_while_another_thread_closes_the_pipe_ends_at_once(self) -> None:
        client, _ = self.pair()
        client.deadline = math.inf
        with spying("ReadFile", before=lambda: self.run_aside(client.close).join(LONG)):
            self.caught(ValueError, client.read, 10)
        self.assert_nothing_is_under_way()

    def test_close_waits_for_a_pending_write_of_another_thread(self) -> None:
        client, server = self.pair(buffers=0)
        writer = self.while_another_thread("WriteFile", lambda: client.write(b"x"), ValueError)
        [operation] = client._operations
        kept = [overlapped for overlapped, _ in vmshim._under_way.values()]
        self.assertEqual(kept, [getattr(operation, "overlapped")])  # this keeps its memory
        client.close()
        self.assertFalse(getattr(operation, "is_pending")())
        writer.join(LONG)
        self.assert_nothing_is_under_way()
        self.assertEqual(server.read(), b"")

    def test_close_from_another_thread_makes_a_blocked_close_write_raise(self) -> None:
        client, _ = self.pair()
        client.write(b"data")
        flushing = threading.Event()
        waiting = set()

        def get(*arguments: Any, really: Callable[..., Any] = vmshim._get) -> Any:
            waiting.add(_thread.get_ident())
            return really(*arguments)

        with spying("FlushFileBuffers", before=flushing.set), mock.patch.object(
            vmshim, "_get", get
        ):
            waiter = self.run_aside(lambda: self.caught(ValueError, client.close_write))
            self.assertTrue(flushing.wait(LONG))
            client.close()
            waiter.join(LONG)
        # Of two that wait for one item, the second may wait for ever (see _get()).
        self.assertNotIn(_thread.get_ident(), waiting)

    def test_queue_is_asked_in_vain_before_it_is_waited_for(self) -> None:
        queue = mock.Mock(wraps=SimpleQueue())
        self.assertIsNone(vmshim._get(queue, 0.01))
        self.assertEqual(queue.get.mock_calls, [mock.call(False, 0), mock.call(True, 0.01)])

    def test_cancel_ends_a_close_write_and_sends_nothing_that_would_be_lost(self) -> None:
        client, server = self.pair()
        client.write(b"data")
        flushing = threading.Event()
        with spying("FlushFileBuffers", before=flushing.set), spying("WriteFile") as writes:
            waiter = self.run_aside(
                lambda: self.caught(OperationCancelledError, client.close_write)
            )
            self.assertTrue(flushing.wait(LONG))
            while waiter.is_alive():
                # The thread may not have called FlushFileBuffers yet.
                client.cancel()
                waiter.join(0.01)
        self.assertEqual(writes, [])
        self.assertTrue(client.closed)

    def test_cancel_ends_what_other_threads_do(self) -> None:
        client, server = self.pair(buffers=0)
        calls: dict[str, Callable[[], object]] = {
            "ReadFile": lambda: client.read(10),
            "WriteFile": lambda: client.write(b"x"),
        }
        for function, call in calls.items():
            thread = self.while_another_thread(function, call, OperationCancelledError)
            client.cancel()
            thread.join(LONG)
        self.assert_nothing_is_under_way()
        reader = self.run_aside(lambda: self.assertEqual(server.read(), b"goes on"))
        client.write(b"goes on")
        reader.join(LONG)

    def test_close_write_is_end_of_file_to_the_reader(self) -> None:
        client, server = self.pair()
        client.close_write()
        self.assertEqual(server.read(), b"")

    def test_close_write_waits_until_the_reader_has_read_everything(self) -> None:
        # On Windows, unlike Wine, an earlier zero-length message would be lost.
        client, server = self.pair()
        flushing = threading.Event()
        client.write(b"data")
        with spying("WriteFile") as writes, spying("FlushFileBuffers", before=flushing.set):
            closing = self.run_aside(client.close_write)
            self.assertTrue(flushing.wait(LONG))
            self.assertEqual(writes, [])
            self.assertEqual([server.read(), server.read()], [b"data", b""])
            closing.join(LONG)
            self.assertEqual([call[2] for call in writes], [0])
        self.assertEqual(client._operations, [])

    def test_close_write_that_is_not_read_in_time_closes_instead(self) -> None:
        client, server = self.pair()
        client.write(b"data")
        client.deadline = time.monotonic() + 0.15
        handle = getattr(client._handle, "value")
        with spying("WriteFile") as writes:
            self.caught(ResponseTimeoutError, client.close_write)
        self.assertEqual(writes, [])
        self.assertTrue(client.closed)
        self.assertLessEqual(lowest_free_handle(), handle)
        self.assertEqual([server.read(), server.read()], [b"data", b""])
        self.assert_nothing_is_under_way()

    def test_flush_whose_thread_begins_only_after_the_deadline_is_not_begun(self) -> None:
        client, _ = self.pair()
        client.write(b"unread")
        client.deadline = 0.0
        with mock.patch.object(_thread, "start_new_thread") as start:
            self.caught(ResponseTimeoutError, client.close_write)
        flush, _ = start.call_args[0]
        with spying("FlushFileBuffers") as calls:
            flush()
        self.assertEqual(calls, [])

    def test_operation_that_ended_before_it_was_cancelled_counts(self) -> None:
        client, server = self.pair()
        client.deadline = 0.0
        with spying("CancelIoEx", before=lambda: server.write(b"data")):
            self.assertEqual(client.read(10), b"data")

    def test_nothing_is_pending_after_the_deadline(self) -> None:
        client, _ = self.pair()
        client.deadline = 0.0
        self.read_and_cancel_late(client, ResponseTimeoutError)

    def test_nothing_is_pending_after_ctrl_c(self) -> None:
        client, _ = self.pair()
        wait = vmshim._kernel32.GetOverlappedResultEx
        presses = itertools.chain([KeyboardInterrupt], itertools.repeat(mock.DEFAULT))
        with mock.patch.object(
            vmshim._kernel32, "GetOverlappedResultEx", mock.Mock(wraps=wait, side_effect=presses)
        ):
            self.read_and_cancel_late(client, KeyboardInterrupt)

    def read_and_cancel_late(self, client: Pipe, kind: type[BaseException]) -> None:
        """Read until that is raised, and cancel only while vmshim waits for the cancelled read."""
        cancel = vmshim._kernel32.CancelIoEx
        cancelled, waiting = threading.Event(), threading.Event()

        def cancel_late(handle: Any, operation: Any) -> int:
            def late() -> None:
                waiting.wait(LONG)
                cancel(handle, operation)

            self.run_aside(late)
            cancelled.set()
            return 1

        def note_wait() -> None:
            if cancelled.is_set():
                waiting.set()

        with spying("ReadFile") as calls, spying("GetOverlappedResultEx", before=note_wait):
            with mock.patch.object(vmshim._kernel32, "CancelIoEx", cancel_late):
                self.caught(kind, client.read, 10)
        self.assertTrue(waiting.is_set(), "it didn't wait for the cancelled read")
        self.assertNotEqual(calls[0][-1].Internal, STATUS_PENDING)
        self.assert_nothing_is_under_way()

    def test_operation_that_fails_at_once_is_never_waited_for(self) -> None:
        # Windows leaves it looking as if it were pending, for ever.
        client, server = self.pair()
        server.close()
        with spying("GetOverlappedResultEx") as waits:
            self.assertEqual(client.read(10), b"")
            self.caught(ConnectionLostError, client.write, b"x")
        self.assertEqual(waits, [])
        self.assert_nothing_is_under_way()

    def test_failure_that_ctrl_c_hides_is_not_waited_for_either(self) -> None:
        client, server = self.pair()
        server.close()
        read_file = vmshim._kernel32.ReadFile

        def read_and_press(*arguments: Any) -> None:
            read_file(*arguments)
            raise KeyboardInterrupt

        with mock.patch.object(vmshim._kernel32, "ReadFile", read_and_press):
            self.caught(KeyboardInterrupt, client.read, 10)
        self.assert_nothing_is_under_way()

    def test_byte_counts_come_from_overlapped_alone(self) -> None:
        client, server = self.pair()
        server.write(b"response")
        with spying("WriteFile") as writes, spying("ReadFile") as reads:
            client.write(b"request")
            client.read(10)
        self.assertEqual([call[3] for call in (*writes, *reads)], [None, None])

    def test_waits_are_short_so_that_ctrl_c_is_seen(self) -> None:
        client, _ = self.pair()
        client.deadline = time.monotonic() + 0.25
        with spying("GetOverlappedResultEx") as calls:
            self.caught(ResponseTimeoutError, client.read, 10)
        self.assertLessEqual({milliseconds for _, _, _, milliseconds, _ in calls}, set(range(101)))

    def test_second_operation_at_a_time_that_can_have_no_event_says_so(self) -> None:
        client, _ = self.pair()
        reader = self.while_another_thread("ReadFile", lambda: client.read(10), ValueError)
        with failing("CreateEventW", 8):
            self.assertEqual(winerror(self.caught(OSError, client.write, b"x")), 8)
        client.close()
        reader.join(LONG)

    def test_pipe_that_is_dropped_is_closed(self) -> None:
        self.pair()
        before = lowest_free_handle()
        for _ in range(20):
            with RawPipe.listen(self.path) as another:
                dial_pipe(self.path)
                self.assertEqual(another.read(), b"")
        self.assertLessEqual(lowest_free_handle(), before)


# ---- Client -------------------------------------------------------------------------------------


@needs_pipes
class DialTest(PipeCase):
    def dial_in_vain(
        self, kind: type[PipeOpenError], number: int, advice: str, **options: Any
    ) -> None:
        error = self.caught(PipeOpenError, dial_pipe, self.path, **options)
        self.assertIs(type(error), kind)
        self.assertEqual((error.winerror, error.filename), (number, self.path))
        self.assertRegex(str(error), advice)

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
        server = self.make_busy()
        waiting = threading.Event()

        def free_it() -> None:
            waiting.wait(LONG)
            time.sleep(0.2)  # how long it stayed busy must not count
            self.enter(RawPipe.listen(self.path))

        self.run_aside(free_it)
        with spying("WaitNamedPipeW", before=waiting.set):
            with dial_pipe(self.path, connect_timeout=LONG, timeout=1.0) as pipe:
                self.assertGreater(pipe.deadline - time.monotonic(), 0.9)
        server.close()

    def test_wait_that_fails_at_once_is_no_busy_loop(self) -> None:
        self.make_busy()
        with failing("WaitNamedPipeW", *[2] * 1000), spying("CreateFileW") as calls:
            self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0.2)
        self.assertLess(len(calls), 50)

    def test_nobody_listening_is_told_at_once(self) -> None:
        self.dial_in_vain(PipeNotFoundError, 2, "no shim listens there", connect_timeout=None)

    def test_access_denied_is_told_at_once_and_takes_an_administrator(self) -> None:
        self.listen(access=PIPE_ACCESS_INBOUND)
        self.dial_in_vain(PipeAccessError, 5, "elevated administrator", connect_timeout=None)

    def test_busy_pipe_is_given_up_after_the_timeout(self) -> None:
        self.make_busy()
        for timeout in 0, 0.05, 0.25:
            self.dial_in_vain(PipeBusyError, 231, "nothing was sent", connect_timeout=timeout)
        with spying("WaitNamedPipeW") as waits, mock.patch.object(time, "sleep", self.fail):
            self.dial_in_vain(PipeBusyError, 231, "nothing was sent", connect_timeout=0.25)
        self.assertGreater(sum(milliseconds for _, milliseconds in waits), 100)
        self.assertLessEqual({milliseconds for _, milliseconds in waits}, set(range(101)))

    def test_timeout_of_zero_is_one_attempt(self) -> None:
        self.make_busy()
        with spying("CreateFileW") as calls:
            self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0)
        self.assertEqual(len(calls), 1)

    def test_busy_pipe_is_connected_to_when_an_instance_comes_free(self) -> None:
        self.make_busy()
        waiting = threading.Event()

        def free() -> None:
            waiting.wait(LONG)
            self.listen()

        thread = self.run_aside(free)
        with spying("WaitNamedPipeW", before=waiting.set):
            dial_pipe(self.path, connect_timeout=None).close()
        thread.join(LONG)

    def test_wait_that_fails_at_once_decides_nothing(self) -> None:
        self.make_busy()
        tries = itertools.count()

        def free() -> None:
            if next(tries) == 3:
                self.listen()

        # ERROR_FILE_NOT_FOUND, as in some containers
        with failing("WaitNamedPipeW", *[2] * 9), spying("WaitNamedPipeW", before=free):
            dial_pipe(self.path, connect_timeout=LONG).close()

    def test_client_that_lost_an_instance_to_another_stands_back_for_a_random_while(self) -> None:
        self.make_busy()
        waits: list[int] = []
        pauses: list[float] = []

        def wait(path: str, milliseconds: int) -> int:
            waits.append(milliseconds)
            return 1  # and make_busy() has another client have the instance

        def sleep(seconds: float, really: Callable[[float], None] = time.sleep) -> None:
            pauses.append(seconds)
            really(seconds)

        with mock.patch.object(vmshim._kernel32, "WaitNamedPipeW", wait):
            with mock.patch.object(time, "sleep", sleep):
                self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0.5)
        self.assertIn(len(waits) - len(pauses), (0, 1))
        self.assertGreater(len(set(pauses)), 2)
        self.assertLess(max(pauses), 0.033)

    def test_wait_is_never_for_0_which_is_the_default_of_the_server(self) -> None:
        self.make_busy()
        with spying("WaitNamedPipeW") as calls:
            while not calls:  # the time may be over before it comes to that
                self.caught(PipeBusyError, dial_pipe, self.path, connect_timeout=0.0009)
        self.assertEqual({milliseconds for _, milliseconds in calls}, {1})

    def test_any_other_error_has_its_number_its_text_and_the_path(self) -> None:
        with failing("CreateFileW", 1450):
            error = self.caught(PipeOpenError, dial_pipe, self.path)
        self.assertEqual((error.winerror, error.filename), (1450, self.path))
        self.assertEqual(error.strerror, getattr(ctypes, "FormatError")(1450).strip())


ALL_KINDS_OF_PIPES = [
    {"mode": mode, "buffers": buffers}
    for mode in (PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE)
    for buffers in (0, 4096)
]


@needs_pipes
class ExchangeTest(PipeCase):
    def test_request_is_one_write_of_the_bytes_that_the_reference_writes(self) -> None:
        requests = []

        def script(pipe: RawPipe) -> None:
            requests.append(pipe.read())
            pipe.write(SHIM_SUCCESS)

        self.fake_shim(script, mode=PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE)
        self.issue()
        self.assertEqual(requests, [b'{"ID":"test","Op":"create"}\n'])

    def test_success_on_every_kind_of_pipe(self) -> None:
        for options in ALL_KINDS_OF_PIPES:
            with self.subTest(options=options):
                self.fake_shim_responding(SHIM_SUCCESS, **options)
                self.issue()

    def test_success_ends_with_a_zero_length_message_and_our_closing(self) -> None:
        def reference(pipe: RawPipe) -> None:
            pipe.read()
            pipe.write(SHIM_SUCCESS)
            pipe.flush()
            pipe.write(b"")
            self.assertEqual(pipe.read_all(), b"")  # it serves nobody until we close

        for buffers in 0, 4096:
            self.fake_shim(reference, buffers=buffers)
            self.issue()

    def test_error_text_on_every_kind_of_pipe(self) -> None:
        text = "é: boom\n".encode()
        for options in ALL_KINDS_OF_PIPES:
            with self.subTest(options=options):
                self.fake_shim_responding(text, **options)
                error = self.refusal()
                self.assertEqual((str(error), error.response), ("é: boom", text))
                self.assertIsNone(error.exit_code)

    def test_response_that_is_not_exactly_the_four_bytes_is_an_error(self) -> None:
        for response in REFUSALS:
            with self.subTest(response=response):
                self.fake_shim_responding(response)
                self.assertEqual(self.refusal().response, response)

    def test_empty_response_leaves_the_outcome_unknown(self) -> None:
        for pieces in (), (b"",):
            self.fake_shim_responding(*pieces)
            error = self.caught(OutcomeUnknownError, self.issue)
            self.assertIs(type(error), OutcomeUnknownError)
            self.assertRegex(str(error), "^unknown shim failure: .*outcome is unknown")

    def test_response_in_many_pieces_is_put_together(self) -> None:
        for options in ALL_KINDS_OF_PIPES:
            with self.subTest(options=options):
                self.fake_shim_responding(b"\0", b"O", b"K", b"\0", **options)
                self.issue()
                self.fake_shim_responding(*[b"piece "] * 500, **options)
                self.assertEqual(self.refusal().message, "piece " * 500)

    def test_response_of_a_mebibyte_is_read_and_a_longer_one_is_cut_off(self) -> None:
        def respond(pipe: RawPipe, size: int, step: int) -> None:
            pipe.read()
            with contextlib.suppress(OSError):
                for begin in range(0, size, step):
                    pipe.write(b"x" * min(step, size - begin))

        for size in MEBIBYTE, MEBIBYTE + 1, 4 * MEBIBYTE:
            for mode in PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE:
                for step in 4096, size:
                    self.fake_shim(functools.partial(respond, size=size, step=step), mode=mode)
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
        dialled, closed = threading.Event(), threading.Event()

        def script(pipe: RawPipe) -> None:
            dialled.wait(LONG)
            pipe.close()
            closed.set()

        def close_first() -> None:
            dialled.set()
            closed.wait(LONG)

        self.fake_shim(script)
        with spying("WriteFile", before=close_first):
            error = self.caught(ConnectionLostError, self.issue)
        self.assertIn(error.winerror, (ERROR_NO_DATA, ERROR_BROKEN_PIPE))
        self.assertEqual(error.filename, self.path)
        self.assertRegex(str(error), LOOK_FIRST)

    def test_server_that_closes_while_reading_leaves_the_outcome_unknown(self) -> None:
        self.fake_shim(lambda pipe: pipe.read(5), mode=PIPE_TYPE_BYTE, buffers=0)
        error = self.caught(ConnectionLostError, self.issue)
        self.assertEqual(error.winerror, ERROR_BROKEN_PIPE)

    def test_refusal_that_comes_before_the_whole_request_was_read_is_told(self) -> None:
        def refuse_early(pipe: RawPipe) -> None:
            pipe.read(5)
            pipe.write(b"too long")

        for mode in PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE:
            self.fake_shim(refuse_early, mode=mode, buffers=4096, inbound=0)
            with spying("WriteFile") as writes:
                self.assertEqual(str(self.refusal()), "too long")
            self.assertEqual(len(writes), 1)

    def test_server_that_closes_while_writing_is_an_error(self) -> None:
        self.fake_shim_responding(b"\0O")
        self.assertEqual(self.refusal().response, b"\0O")

    def test_server_that_disconnects_leaves_the_outcome_unknown(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.read()
            pipe.write(b"\0")
            pipe.flush()
            pipe.disconnect()

        self.fake_shim(script)
        self.assertRegex(str(self.caught(ConnectionLostError, self.issue)), LOOK_FIRST)

    def test_server_that_never_responds_is_a_timeout_with_unknown_outcome(self) -> None:
        def respond_without_an_end(pipe: RawPipe) -> None:
            pipe.read()
            pipe.write(b"\0OK\0")

        for script in RawPipe.read, respond_without_an_end:
            gone = self.fake_shim_hanging(script)
            error = self.caught(ResponseTimeoutError, self.issue, timeout=0.2)
            self.assertRegex(str(error), LOOK_FIRST)
            gone.set()

    def test_server_that_never_reads_is_a_timeout_too(self) -> None:
        self.fake_shim_hanging(bool, buffers=0)
        self.caught(ResponseTimeoutError, self.issue, "x" * 100_000, timeout=0.2)

    def test_server_that_never_frees_an_instance_is_busy_and_nothing_is_sent(self) -> None:
        with RawPipe.listen(self.path) as server:
            with RawPipe.dial(self.path):
                for connect_timeout in 0, 0.2:
                    self.caught(PipeBusyError, self.issue, connect_timeout=connect_timeout)
            self.assertEqual(server.read(), b"")

    def test_nobody_listening_is_file_not_found(self) -> None:
        self.caught(FileNotFoundError, self.issue, connect_timeout=None)

    def test_ctrl_c_ends_the_wait_for_a_response(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.read()
            _thread.interrupt_main()

        before = lowest_free_handle()
        self.fake_shim_hanging(script)
        self.caught(KeyboardInterrupt, self.issue, timeout=None)
        self.doCleanups()
        self.assertLessEqual(lowest_free_handle(), before)

    def test_ctrl_c_ends_the_wait_for_an_instance(self) -> None:
        self.make_busy()
        waiting = threading.Event()

        def interrupt() -> None:
            waiting.wait(LONG)
            _thread.interrupt_main()

        thread = self.run_aside(interrupt)
        with spying("WaitNamedPipeW", before=waiting.set):
            self.caught(KeyboardInterrupt, self.issue, connect_timeout=None)
        thread.join(LONG)

    def test_one_debug_line_a_request(self) -> None:
        self.fake_shim_responding(SHIM_SUCCESS)
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.issue()
        self.assertEqual([record.levelname for record in logs.records], ["DEBUG"])
        for part in self.path, "'test'", " create: ", " done ", " ms":
            self.assertIn(part, logs.output[0])
        self.fake_shim_responding(b"boom")
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.refusal()
        self.assertEqual(len(logs.output), 1)
        self.assertIn("ShimError: boom", logs.output[0])

    def test_debug_lines_that_nobody_reads_import_no_logging(self) -> None:
        with mock.patch.dict(sys.modules):
            del sys.modules["logging"]
            vmshim._log("debug", "nobody reads this")
            self.assertNotIn("logging", sys.modules)

    def test_log_handler_that_raises_hides_no_outcome(self) -> None:
        logger = logging.getLogger("vmshim")
        handler = logging.Handler()
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.setLevel, logger.level)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        with mock.patch.object(handler, "emit", side_effect=ZeroDivisionError("disk full")):
            with mock.patch.object(sys, "excepthook") as excepthook:
                self.fake_shim_responding(SHIM_SUCCESS)
                self.issue()
        self.assertIs(excepthook.call_args[0][0], ZeroDivisionError)

    def test_container_shim_is_sent_nothing_and_responds_on_a_byte_pipe(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.write(SHIM_SUCCESS)
            pipe.flush()

        self.fake_shim(script, mode=PIPE_TYPE_BYTE)
        with dial_pipe(self.path) as pipe:
            check_shim_response(pipe)

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
GUID = str(uuid.uuid4())  # another each time, so that two runs of this suite don't meet
ZERO_GUID = "00000000-0000-0000-0000-000000000000"
BROKEN_STATES = (
    b'{"ID":""}',
    b"{",
    b"[]",
    b"{} {}",
    b'{"Owner":5}',
    b'{"IsHost":1}',
    b'{"UniqueID":"x"}',
    b'{"Created":"x"}',
)


def state_of(id: str, guid: str = ZERO_GUID, **more: Any) -> dict[str, Any]:
    """Return what runhcs stores of a container in the VM with this GUID."""
    vm = {} if guid == ZERO_GUID else {"HostID": f"vm of {id}"}
    return {
        "ID": id,
        "Created": "2019-05-01T01:02:03.1234567Z",
        "UniqueID": GUID,
        "HostUniqueID": guid,
        **vm,
        **more,
    }


class RegistryCase(ServerCase):
    """Writes containers as runhcs does, below a root of its own that is gone afterwards."""

    winreg: Any = None

    def setUp(self) -> None:
        super().setUp()
        if sys.platform == "win32":
            import winreg

            self.winreg = winreg
        self.root = f"vmshim test/{uuid.uuid4()}"
        self.root_key = f"{RUNHCS}\\{self.root.replace(' ', '%20').replace('/', '%2F')}"
        had_runhcs = self.key_exists(RUNHCS)
        error = self.create_key(self.root_key)
        skip_if("the registry can't be written to here: Win32 error 5" if error == 5 else "")
        self.assertEqual(error, 0)
        if not had_runhcs:
            self.addCleanup(self.delete_runhcs)
        self.addCleanup(self.delete_root)

    def open_key(self, path: str) -> Any:
        access = self.winreg.KEY_ALL_ACCESS | self.winreg.KEY_WOW64_64KEY
        return self.winreg.OpenKey(self.winreg.HKEY_LOCAL_MACHINE, path, 0, access)

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
        error, key = 0, ctypes.c_void_p()
        if sys.platform == "win32":
            local_machine = ctypes.c_void_p(self.winreg.HKEY_LOCAL_MACHINE)
            access = self.winreg.KEY_ALL_ACCESS | self.winreg.KEY_WOW64_64KEY
            volatile = self.winreg.REG_OPTION_VOLATILE
            advapi32 = ctypes.WinDLL("advapi32")
            error = advapi32.RegCreateKeyExW(
                *(local_machine, path, 0, None, volatile, access, None, ctypes.byref(key), None)
            )
            advapi32.RegCloseKey(key)
        return error

    def delete_key(self, path: str) -> None:
        access = self.winreg.KEY_WOW64_64KEY
        self.winreg.DeleteKeyEx(self.winreg.HKEY_LOCAL_MACHINE, path, access, 0)

    def delete_runhcs(self) -> None:
        with contextlib.suppress(OSError):  # another run of this suite may be using it
            self.delete_key(RUNHCS)

    def delete_root(self) -> None:
        with self.open_key(self.root_key) as key:
            names = vmshim._subkey_names(key)
        for name in names:
            self.delete_key(f"{self.root_key}\\{name}")
        self.delete_key(self.root_key)

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
                self.winreg.SetValueEx(key, "state", 0, getattr(self.winreg, kind), state)
            for value, number in values.items():
                self.winreg.SetValueEx(key, value, 0, self.winreg.REG_QWORD, number)

    def read(self, id: str) -> Container:
        return read_container(id, root=self.root)


@needs_pipes
class ContainerTest(RegistryCase):
    def test_container_is_read_as_runhcs_wrote_it(self) -> None:
        guid = str(uuid.uuid4())
        more = {
            "Owner": "me",
            "SandboxID": "s",
            "Bundle": "C:\\b",
            "Rootfs": "C:\\r",
            "IsHost": True,
            "Spec": {"x": [1.5, None]},
            "RequestedNetNS": "",
        }
        self.write_container("c", state_of("c", guid, **more), shim=4711, pid=5)
        self.assertEqual(
            self.read("c"),
            Container(
                id="c",
                owner="me",
                sandbox_id="s",
                host_id="vm of c",
                bundle="C:\\b",
                created=datetime(2019, 5, 1, 1, 2, 3, 123456, timezone.utc),
                rootfs="C:\\r",
                is_host=True,
                unique_id=uuid.UUID(GUID),
                host_unique_id=uuid.UUID(guid),
                shim_pid=4711,
                created_nanosecond=700,
            ),
        )

    def test_what_may_be_absent_has_a_default(self) -> None:
        state = {"Created": "2019-05-01T01:02:03Z", "UniqueID": GUID, "HostUniqueID": GUID}
        self.write_container("c", state)
        container = self.read("c")
        self.assertEqual((container.id, container.owner, container.host_id), ("c", "", ""))
        self.assertEqual((container.is_host, container.shim_pid), (False, -1))
        self.write_container("c", shim=0)
        self.assertEqual(self.read("c").shim_pid, 0)
        self.write_container("empty", {})
        self.assertEqual(self.read("empty"), Container("empty"))

    def test_odd_ids_are_found_and_listed(self) -> None:
        keys = {
            "a b": "a%20b",
            "a/b": "a%2Fb",
            "é": "%C3%A9",
            "..": "..",
            "a\\b": "a%5Cb",
            "%": "%25",
        }
        for id, key in keys.items():
            self.write_container(key, state_of(id))
            self.assertEqual(self.read(id).id, id)
        listed = list_containers(root=self.root)
        self.assertEqual({container.id for container in listed}, set(keys))

    def test_unknown_id_is_told_as_the_reference_tells_it(self) -> None:
        for root in self.root, "no-such-root":
            error = self.caught(ContainerNotFoundError, read_container, "x", root=root)
            self.assertEqual(str(error), "ID 'x' was not found")
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
        self.write_container("100%", state_of("x"))
        self.write_container("%FF", state_of("x"))
        self.write_container("good", state_of("good"))
        with self.assertLogs("vmshim", logging.WARNING) as logs:
            self.assertEqual([c.id for c in list_containers(root=self.root)], ["good"])
        self.assertEqual(len(logs.output), len(BROKEN_STATES) + 3)
        for name in "'none'", "'100%'", "'%FF'", "'broken0'":
            self.assertEqual(sum(name in line for line in logs.output), 1)

    def test_container_that_is_deleted_meanwhile_is_not_found_and_hides_no_others(self) -> None:
        self.write_container("c", state_of("c"))
        query = self.winreg.QueryValueEx

        def delete_first(*arguments: Any) -> Any:
            with contextlib.suppress(OSError):
                self.delete_key(f"{self.root_key}\\c")
            return query(*arguments)

        with mock.patch.object(self.winreg, "QueryValueEx", delete_first):
            error = self.caught(ContainerNotFoundError, self.read, "c")
            self.assertEqual(str(error), "ID 'c' was not found")
            self.write_container("c", state_of("c"))
            with self.assertLogs("vmshim", logging.WARNING):
                self.assertEqual(list_containers(root=self.root), [])

    def test_value_that_can_not_be_read_is_an_error_of_the_registry(self) -> None:
        self.write_container("c", state_of("c"))
        denied = PermissionError(13, "denied", None, 5)
        with mock.patch.object(self.winreg, "QueryValueEx", side_effect=denied):
            self.assertIn("'state'", str(self.caught(RegistryError, self.read, "c")))

    def test_registry_is_only_read_and_in_its_64_bit_view(self) -> None:
        self.write_container("c", state_of("c"))
        open_key = self.winreg.OpenKey
        with mock.patch.object(self.winreg, "OpenKey", wraps=open_key) as spy:
            self.read("c")
            list_containers(root=self.root)
        self.assertEqual(spy.call_count, 3)
        for call in spy.call_args_list:
            self.assertEqual(call.args[3], 0x20019 | 0x100)  # KEY_READ | KEY_WOW64_64KEY
        self.assertFalse(self.key_exists(f"{RUNHCS}\\no-such-root"))

    def test_error_of_the_registry_names_the_key_and_says_that_nothing_was_sent(self) -> None:
        denied = PermissionError(13, "denied", None, 5)
        with mock.patch.object(self.winreg, "OpenKey", side_effect=denied):
            error = self.caught(vmshim.RegistryError, self.read, "c")
        self.assertIsInstance(error, NotSentError)
        self.assertEqual(error.filename, f"HKEY_LOCAL_MACHINE\\{self.root_key}\\c")
        self.assertEqual((error.errno, error.winerror), (errno.EACCES, 5))

    def test_list_that_breaks_off_is_no_list(self) -> None:
        self.write_container("c", state_of("c"))
        with mock.patch.object(self.winreg, "EnumKey", side_effect=PermissionError(13, "denied")):
            self.caught(vmshim.RegistryError, list_containers, root=self.root)


@needs_pipes
class ContainerRequestTest(RegistryCase):
    def issue_for(self, id: str, **options: Any) -> None:
        issue_container_request(id, "unmount", root=self.root, **{"timeout": LONG, **options})

    def run_cli_as_json(self, *arguments: str) -> tuple[int, Any, str]:
        status, out, err = run_cli(*arguments, "--json", "--root", self.root)
        return status, json.loads(out), err

    def test_request_goes_to_the_vm_of_the_container(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("a%20b", state_of("a b", guid))
        requests: list[VMRequest] = []
        self.path = vm_pipe_path(guid)
        self.start_server(requests.append)
        self.issue_for("a b", connect_timeout=LONG)
        self.assertEqual(requests, [("a b", "unmount")])
        self.assertIs(requests[0].op, VMRequestOp.UNMOUNT_CONTAINER)

    def test_container_without_a_vm_is_told_and_the_zero_guid_is_never_dialled(self) -> None:
        self.write_container("c", state_of("c"))
        with mock.patch.object(vmshim, "dial_pipe") as spy:
            error = self.caught(ContainerNotFoundError, self.issue_for, "c")
        self.assertRegex(str(error), "^container 'c' runs in no VM")
        spy.assert_not_called()

    def test_vm_that_is_not_there_cannot_be_contacted(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("c", state_of("c", guid))
        error = self.caught(PipeNotFoundError, self.issue_for, "c")
        self.assertEqual(error.strerror, "VM vm of c cannot be contacted")
        self.assertEqual((error.filename, error.winerror), (vm_pipe_path(guid), 2))
        self.assertEqual(repr(pickled(error, 4)), repr(error))

    def test_limits_are_passed_on(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("c", state_of("c", guid))
        self.path = vm_pipe_path(guid)
        self.fake_shim_responding(b"boom!")
        error = self.caught(ShimError, self.issue_for, "c", max_response=4)
        self.assertRegex(str(error), "longer than 4 bytes")
        gone = self.fake_shim_hanging()
        self.caught(ResponseTimeoutError, self.issue_for, "c", timeout=0.1)
        self.caught(PipeBusyError, self.issue_for, "c", connect_timeout=0)
        gone.set()

    def test_unknown_container_is_refused(self) -> None:
        error = self.caught(ContainerNotFoundError, self.issue_for, "x")
        self.assertEqual(str(error), "ID 'x' was not found")

    def test_command_line_finds_the_vm_by_itself(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("c", state_of("c", guid))
        self.write_container("bare", state_of("bare"))
        self.path = vm_pipe_path(guid)
        status, row, err = self.run_cli_as_json("unmount", "c")
        self.assertEqual((status, err), (3, f"{self.path}: VM vm of c cannot be contacted\n"))
        self.start_server()
        status, row, err = self.run_cli_as_json("unmount", "c")
        self.assertEqual((status, err), (0, ""))
        self.assertEqual((row["pipe"], row["ok"]), (self.path, True))
        status, row, err = self.run_cli_as_json("unmount", "bare")
        self.assertEqual((status, row["pipe"]), (3, None))
        self.assertIn("runs in no VM", err)
        self.assertEqual(
            run_cli("unmount", "--root", self.root, "x"), (3, "", "ID 'x' was not found\n")
        )

    def test_broken_entry_is_no_wrong_usage(self) -> None:
        self.write_container("c", b"{")
        status, row, err = self.run_cli_as_json("unmount", "c")
        self.assertEqual((status, row["outcome"]), (3, "not-sent"))
        self.assertRegex(err, r"^the state of ID 'c' is broken: [^\n]*\n$")

    def test_list_tells_whether_each_shim_listens_and_takes_no_instance(self) -> None:
        free, busy, absent = (str(uuid.uuid4()) for _ in range(3))
        for id, guid in {"f": free, "b": busy, "a": absent, "none": ZERO_GUID}.items():
            self.write_container(id, state_of(id, guid, Owner="me"))
        self.enter(RawPipe.listen(vm_pipe_path(free)))
        self.path = vm_pipe_path(busy)
        self.make_busy()
        created = "2019-05-01 01:02:03+00:00"
        status, out, err = run_cli("list", "--root", self.root)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(
            [line.split(None, 3) for line in out.splitlines()],
            [
                ["ID", "VM", "OWNER", "CREATED                    VM SHIM"],
                ["a", absent, "me", f"{created}  absent"],
                ["b", busy, "me", f"{created}  busy"],
                ["f", free, "me", f"{created}  free"],
                ["none", "-", "me", f"{created}  -"],
            ],
        )
        _, rows, _ = self.run_cli_as_json("list")
        self.assertEqual([row["vm_shim"] for row in rows], ["absent", "busy", "free", None])
        self.assertEqual(rows[0]["created"], "2019-05-01T01:02:03.1234567Z")
        self.assertEqual(rows[0]["host_unique_id"], absent)
        RawPipe.dial(vm_pipe_path(free), patience=0).close()  # nobody has taken it

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Launch a shim process by the README's recipe."""
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

        with mock.patch.object(subprocess, "Popen", keep):
            exec(code, {})
        return shims[0]

    def test_whole_way_from_the_launch_to_the_end_of_the_process(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("c", state_of("c", guid))
        shim = self.launch("--vm", guid)
        self.assertIn(guid, run_cli("list", "--root", self.root)[1])
        for _ in range(3):
            self.issue_for("c", connect_timeout=LONG)
        self.wait_until(lambda: self.run_cli_as_json("list")[1][0]["vm_shim"] == "free")
        self.assertIsNone(shim.poll())
        shim.kill()
        shim.wait(LONG)
        self.caught(PipeNotFoundError, self.issue_for, "c")
        self.assertEqual(self.run_cli_as_json("list")[1][0]["vm_shim"], "absent")

    def test_launch_that_fails_says_why_and_leaves_no_process(self) -> None:
        error = self.caught(ShimError, self.launch, "--vm", "nope")
        self.assertRegex(str(error), "^invalid GUID")
        self.assertIsNotNone(error.exit_code)

    def start_shim(self) -> subprocess.Popen[bytes]:
        arguments = "serve", "--handshake", "--pipe", self.path
        shim = self.enter(start_process(vmshim.__file__, *arguments))
        self.addCleanup(shim.kill)
        return shim

    def test_options_that_are_no_json_object_fail_the_launch(self) -> None:
        shim = self.start_shim()
        out, _ = shim.communicate(b"[]", timeout=LONG)
        self.assertEqual(out, b"the options on stdin must be an object")
        self.assertEqual(shim.returncode, 2)

    def test_launched_shim_prints_to_stderr(self) -> None:
        shim = self.start_shim()
        assert shim.stdin and shim.stdout and shim.stderr
        shim.stdin.write(b"{}")
        shim.stdin.close()
        self.assertEqual(shim.stdout.read(), SHIM_SUCCESS)
        issue_vm_request(self.path, VMRequest("c", "unmount"), connect_timeout=LONG, timeout=LONG)
        shim.kill()
        _, request = shim.stderr.read().splitlines()
        self.assertEqual(request, b"unmount c")

    def test_process_of_a_container_is_started_by_connecting(self) -> None:
        """The README's recipe."""
        self.path = shim_pipe_path(GUID)
        code = readme_example("shim_pipe_path")
        for response in SHIM_SUCCESS, b"no such program":
            respond = functools.partial(RawPipe.write, data=response)
            self.fake_shim(respond, mode=PIPE_TYPE_BYTE)
            with start_python("import sys; sys.stdin.read()") as process:
                names = {"process": process, "unique_id": GUID}
                if response == SHIM_SUCCESS:
                    exec(code, names)
                    self.assertIsNone(process.poll())
                else:
                    with self.assertRaisesRegex(ShimError, "^no such program$"):
                        exec(code, names)
                    self.assertIsNotNone(process.returncode)

    def test_quick_start_of_the_readme_works(self) -> None:
        requests: list[VMRequest] = []
        self.path = vm_pipe_path(GUID)
        self.start_server(requests.append)
        self.write_container("my-container", state_of("my-container", GUID))
        code = readme_example("issue_container_request")
        exec(code.replace("timeout=60", f"timeout=60, root={self.root!r}"), {})
        code = readme_example("vm_pipe_path")
        exec(code.replace("6ba7b810-9dad-11d1-80b4-00c04fd430c8", GUID), {})
        self.assertEqual(requests, [("my-container", "unmount")] * 2)


# ---- Server -------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """An exception whose text can't be had."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        raise ZeroDivisionError


class StrOnlyReprError(Exception):
    """An exception of which only repr() can be had."""

    def __str__(self) -> str:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        return "StrOnlyReprError of no text"


@needs_pipes
class ServerTest(ServerCase):
    def test_request_reaches_the_handler_and_success_comes_back(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append)
        self.issue()
        self.assertEqual(requests, [REQUEST])
        self.assertIs(requests[0].op, VMRequestOp.CREATE_CONTAINER)

    def test_success_is_the_four_bytes_and_then_a_zero_length_message(self) -> None:
        self.start_server()
        client = self.dial_and_write(wire())
        self.assertEqual(client.read(), b"\0OK\0")
        self.assertEqual(client.read(), b"")
        client.write(b"still there")

    def test_connection_stays_until_the_client_closes(self) -> None:
        self.start_server(max_clients=1)
        with RawPipe.dial(self.path) as client:
            client.write(wire())
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            self.caught(PipeBusyError, self.issue, connect_timeout=0)
            client.write(b"still there")
        self.issue(connect_timeout=LONG)

    def test_refusal_is_the_response_and_ends_with_the_connection(self) -> None:
        def refuse(request: VMRequest) -> None:
            raise ShimError("é: Not implemented")

        self.start_server(refuse, request_timeout=None)
        client = self.dial_and_write(wire())
        self.assertEqual(client.read(), "é: Not implemented".encode())
        self.assertEqual(client.read(), b"")
        self.assertEqual(winerror(self.caught(OSError, client.write, b"x")), ERROR_NO_DATA)

    def test_text_of_a_failure_is_cut_never_empty_and_never_success(self) -> None:
        failures: dict[str, tuple[Exception, bytes]] = {
            "empty": (ValueError(), b"ValueError()"),
            "success": (ValueError("\0OK\0"), b"ValueError('\\x00OK\\x00')"),
            "empty refusal": (ShimError(""), b"ShimError('', b'', None)"),
            "newline": (ShimError("\n"), b"ShimError('\\n', b'', None)"),
            "NUL": (ValueError("a\0b"), b"a\0b"),
            "surrogate": (ValueError("a\ud800b"), b"a\\ud800b"),
            "long": (ValueError("x" * 100_000_000), b"x" * 65536),
            "cut at a character": (ValueError("x" + "é" * 100_000), b"x" + "é".encode() * 32767),
            "no str": (StrOnlyReprError(), b"StrOnlyReprError of no text"),
            "unreadable": (
                UnreadableError(),
                b"the handler failed, and so did the text of its exception",
            ),
        }

        def fail(request: VMRequest) -> None:
            raise failures[request.id][0]

        self.start_server(fail)
        with self.assertLogs("vmshim", logging.INFO):
            for id, (_, text) in failures.items():
                with self.subTest(id=id):
                    self.assertEqual(self.raw_exchange(wire(id)), text)

    def test_bug_of_the_handler_is_logged_with_its_traceback_and_a_refusal_as_information(
        self,
    ) -> None:
        failures = {"bug": ZeroDivisionError("a bug"), "refused": ShimError("no")}

        def fail(request: VMRequest) -> None:
            raise failures[request.id]

        self.start_server(fail)
        with self.assertLogs("vmshim", logging.INFO) as logs:
            self.assertEqual(self.raw_exchange(wire("bug")), b"a bug")
            self.assertEqual(self.raw_exchange(wire("refused")), b"no")
        bug, refused = logs.records
        self.assertEqual((bug.levelname, refused.levelname), ("ERROR", "INFO"))
        self.assertIn("ZeroDivisionError: a bug", logs.output[0])
        self.assertIn("Traceback", logs.output[0])
        self.assertNotIn("Traceback", logs.output[1])

    def test_handler_that_returns_something_to_await_has_a_bug_and_no_success(self) -> None:
        awaitable = types.SimpleNamespace(__await__=nothing)  # as a coroutine function does
        self.start_server(lambda request: awaitable)
        with self.assertLogs("vmshim", logging.ERROR):
            self.assertIn(b"to await", self.raw_exchange(wire()))

    def test_what_the_reference_decodes_is_accepted(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append)
        accepted = [row for row in DECODED if row[1] and row[2] in ("create", "sync")]
        for data, id, op in accepted:
            with self.subTest(data=data[:60]):
                self.assertEqual(self.raw_exchange(data), SHIM_SUCCESS)
                self.assertEqual(requests.pop(), (id, op))

    def test_request_nested_too_deep_is_read_no_further(self) -> None:
        # Where Python's recursion limit has been raised, parsing one could crash the process.
        reader = vmshim._RequestReader()
        self.assertFalse(reader.feed(b"[" * 1000))
        self.assertTrue(reader.feed(b"["))
        self.assertRaises(ValueError, reader.request)

    def test_request_in_many_pieces_is_put_together(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append)
        data = b' {"x":[{"y":"}]\\"}"}],"ID":"\xc3\xa9","Op":"create"}'
        self.assertEqual(self.raw_exchange(*(bytes([byte]) for byte in data)), SHIM_SUCCESS)
        self.assertEqual(requests, [("é", "create")])

    def test_data_that_is_no_request_gets_an_error_at_once_and_the_server_goes_on(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append, request_timeout=None)
        for data in (
            b"not json\n",
            b"[]",
            b"7",
            b'"text"',
            b"{'ID':'a'}",
            b"{nope",
            b'{"ID":"a\n',
            b'{"ID":"a","Op":7}',
            b'{"ID":["a"],"Op":"create"}',
            b'{"ID":"a",}',
            b"{]",
            b"}",
            b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        ):
            with self.subTest(data=data[:20]):
                self.assertNotIn(self.raw_exchange(data), (b"", SHIM_SUCCESS))
        self.assertIn(b"unknown op 'bogus'", self.raw_exchange(wire(op="bogus")))
        self.assertIn(b"ID is empty", self.raw_exchange(wire(id="")))
        self.assertIn(b"ID is empty", self.raw_exchange(b"null"))
        self.issue()
        self.assertEqual(requests, [REQUEST])

    def test_end_of_file_within_a_request_gets_an_error(self) -> None:
        self.start_server(request_timeout=None)
        self.assertNotIn(self.raw_exchange(b'{"ID":"a"', b""), (b"", SHIM_SUCCESS))

    def test_request_of_a_mebibyte_is_read_and_a_longer_one_is_cut_off(self) -> None:
        self.start_server()
        whole = b'{"ID":"a","x":"' + b"x" * (MEBIBYTE - 32) + b'","Op":"create"}'
        self.assertEqual(len(whole), MEBIBYTE - 1)
        self.assertEqual(self.raw_exchange(whole), SHIM_SUCCESS)
        client = self.dial()
        with contextlib.suppress(OSError):  # the server reads no further
            client.write(whole[:40] + b"x" * (MEBIBYTE + MEBIBYTE // 2))
        self.assertEqual(client.read_all(), b"the request is longer than 1048576 bytes")

    def test_data_after_a_request_does_not_cost_the_client_its_response(self) -> None:
        handler = HeldHandler()
        self.start_server(handler)
        trailing = b"x" * (MEBIBYTE - 4096)
        for pieces in (wire() + trailing,), (wire(), trailing), (b"[]", trailing):
            with self.subTest(pieces=len(pieces)):
                client = self.dial()
                for piece in pieces:
                    client.write(piece)
                handler.go_on.set()
                response = client.read_all()
                self.assertEqual(response == SHIM_SUCCESS, pieces[0] != b"[]")
                self.assertTrue(response)

    def test_response_waits_for_a_client_that_reads_late(self) -> None:
        def handle(request: VMRequest) -> None:
            if request.id == "fail":
                raise ShimError("boom")

        self.start_server(handle, request_timeout=None)
        success, failure = self.dial_and_write(wire()), self.dial_and_write(wire("fail"))
        self.issue()  # comes last, so the two have been carried out
        self.assertEqual(failure.read_all(), b"boom")
        self.assertEqual(success.read(), SHIM_SUCCESS)
        self.assertEqual(success.read(), b"")  # the zero-length message, not the server's end
        success.write(b"still there")

    def test_zero_length_message_is_not_written_before_the_response_has_been_read(self) -> None:
        self.start_server()
        with spying("WriteFile") as writes:
            client = self.dial_and_write(wire())
            self.wait_until(lambda: writes)
            self.issue()  # the server has had time for more
            mine = [(handle, size) for handle, _, size, *_ in writes if handle == writes[0][0]]
            self.assertEqual(mine, [(writes[0][0], 4)])
            self.assertEqual(client.read_all(), SHIM_SUCCESS)

    def test_client_that_leaves_after_its_request_does_not_cancel_it(self) -> None:
        handler = HeldHandler()
        self.start_server(handler)
        for id in "first", "second":
            with RawPipe.dial(self.path) as client:
                client.write(wire(id))  # until the server has read it
                self.assertTrue(handler.entered.wait(LONG))
        handler.go_on.set()
        self.issue("third", connect_timeout=LONG)
        self.assertEqual(handler.carried_out, ["first", "second", "third"])

    def test_requests_are_carried_out_one_at_a_time_in_the_order_of_their_arrival(self) -> None:
        gate = threading.Semaphore(0)
        order, running = [], []

        def handle(request: VMRequest) -> None:
            running.append(request.id)
            self.assertEqual(len(running), 1)
            gate.acquire(timeout=LONG)
            order.append(running.pop())

        server = self.start_server(handle)
        silent = [self.dial() for _ in range(5)]  # they connect first, and write in another order
        [service] = server._serving.values()
        for waiting, number in enumerate((3, 1, 4, 0, 2), 1):
            silent[number].write(wire(str(number)))
            self.wait_until(lambda: len(service._at_handler) == waiting)
        for _ in silent:
            gate.release()
        for client in silent:
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
        self.assertEqual(order, ["3", "1", "4", "0", "2"])

    def test_instances_are_made_as_the_reference_makes_them(self) -> None:
        with spying("CreateNamedPipeW") as calls:
            self.start_server()
            self.issue()
        # PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED, and once FILE_FLAG_FIRST_PIPE_INSTANCE
        self.assertEqual(calls[0][1], 0x40080003)
        self.assertEqual({call[1] for call in calls[1:]}, {0x40000003})
        # PIPE_TYPE_MESSAGE | PIPE_REJECT_REMOTE_CLIENTS, PIPE_UNLIMITED_INSTANCES, no buffers
        self.assertEqual({call[2:] for call in calls}, {(0xC, 255, 0, 0, 0, None)})

    def test_name_that_is_taken_is_refused(self) -> None:
        skip_if(why_first_instances_are_many())
        self.make_server()
        self.caught(PipeAccessError, VMShimServer, self.path, print)

    def test_name_whose_owner_has_reached_its_limit_is_taken_and_not_busy(self) -> None:
        self.listen(instances=1)
        error = self.caught(PipeAccessError, VMShimServer, self.path, print)
        self.assertEqual(error.winerror, ERROR_PIPE_BUSY)
        self.assertIn("the name is taken by another server", str(error))

    def test_pipe_that_can_not_be_made_is_an_error_with_its_path(self) -> None:
        for number, kind in (5, PipeAccessError), (1450, PipeOpenError):
            with failing("CreateNamedPipeW", number):
                error = self.caught(PipeOpenError, VMShimServer, self.path, print)
            self.assertIs(type(error), kind)
            self.assertEqual((error.winerror, error.filename), (number, self.path))

    def test_nothing_is_left_after_many_requests(self) -> None:
        server = self.start_server()
        handles = []
        for _ in range(2):
            for _ in range(150):
                self.issue(connect_timeout=LONG)
            [service] = server._serving.values()
            self.wait_until(lambda: len(service._clients) == 1)
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
            VMShimServer(self.path, print)
        self.assertLessEqual(lowest_free_handle(), before)
        self.caught(PipeNotFoundError, self.issue)

    def test_sixteen_clients_at_once_are_all_served(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append)
        ids = self.issue_from_many_threads(5)
        self.assertEqual(sorted(request.id for request in requests), ids)

    def test_example_of_the_readme_serves(self) -> None:
        code = readme_example("server.serve_forever()").replace(
            r'r"\\.\pipe\my-shim"', repr(self.path)
        )
        self.assertIn(self.path[9:], code)
        names: dict[str, Any] = {}
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            thread = self.run_aside(lambda: exec(code, names))
            self.wait_until(lambda: "server" in names)
            self.issue(connect_timeout=LONG)
            with self.assertRaisesRegex(ShimError, "^Not implemented$"):
                issue_vm_request(self.path, VMRequest("a", "sync"), connect_timeout=LONG)
            names["server"].shutdown()
            self.assert_ends(thread)
        self.assertEqual(out.getvalue(), "create test\n")


@needs_pipes
class SecurityTest(ServerCase):
    """Who may connect."""

    def test_descriptor_is_given_to_the_first_instance_alone(self) -> None:
        with spying("CreateNamedPipeW") as calls:
            self.start_server(security_descriptor="D:(A;;GA;;;WD)")
            self.issue()
        first, *others = (call[-1] for call in calls)
        self.assertIsInstance(first, vmshim.SECURITY_ATTRIBUTES)
        self.assertTrue(first.lpSecurityDescriptor)
        self.assertFalse(first.bInheritHandle)
        self.assertEqual(first.nLength, ctypes.sizeof(first))
        self.assertEqual(set(others), {None})

    def test_descriptor_is_that_of_the_pipe(self) -> None:
        self.make_server(security_descriptor="D:(A;;GA;;;WD)(A;;GR;;;BG)")
        sddl = self.descriptor_of(self.listen())
        self.assertRegex(sddl, r"\(A;;[^;]*;;;WD\)\(A;;[^;]*;;;BG\)$")

    def descriptor_of(self, pipe: RawPipe) -> str:
        """Return the SDDL of who may connect to a pipe."""
        buffer, text = ctypes.create_string_buffer(4096), ctypes.c_wchar_p()
        if sys.platform == "win32":
            advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
            handle = ctypes.c_void_p(pipe.handle.value)
            dacl_only, needed = 4, vmshim.DWORD()
            self.assertTrue(
                advapi32.GetKernelObjectSecurity(
                    handle, dacl_only, buffer, 4096, ctypes.byref(needed)
                )
            )
            self.assertTrue(
                advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW(
                    buffer, 1, dacl_only, ctypes.byref(text), None
                )
            )
        return text.value or ""

    def test_wrong_descriptor_is_refused_before_anything_is_opened(self) -> None:
        with spying("CreateNamedPipeW") as calls:
            for text in "garbage", "D:(A;;GA;;;nobody)", "D:(A;;??;;;WD)", "\ud800":
                with self.subTest(text=text):
                    error = self.caught(
                        ValueError, VMShimServer, self.path, print, security_descriptor=text
                    )
                    self.assertIn("security_descriptor", str(error))
        self.assertEqual(calls, [])

    def test_server_that_may_not_connect_itself_says_so(self) -> None:
        with failing("CreateFileW", ERROR_ACCESS_DENIED):
            error = self.caught(PipeAccessError, VMShimServer, self.path, print)
        self.assertIn("can't connect to its own pipe; its security descriptor must", str(error))
        self.caught(PipeNotFoundError, self.issue)

    def test_descriptor_is_enforced(self) -> None:
        skip_if(why_everybody_may_connect())
        error = self.caught(
            PipeAccessError, VMShimServer, self.path, print, security_descriptor="D:"
        )
        self.assertIn("can't connect to its own pipe", str(error))


@needs_pipes
class ManyClientsTest(ServerCase):
    """A server that nobody can hold up."""

    def test_one_client_may_wait_and_others_see_busy_but_never_not_found(self) -> None:
        handler = HeldHandler()
        server = self.start_server(handler)
        first = self.dial_and_write(wire("first"))
        self.assertTrue(handler.entered.wait(LONG))
        second = self.dial_and_write(wire("second"))
        service = server._serving["service"]
        self.wait_until(lambda: len(service._at_handler) == 2 and not service._offered)
        for connect_timeout in [0] * 20 + [0.2]:
            self.caught(PipeBusyError, self.issue, connect_timeout=connect_timeout)
        handler.go_on.set()
        self.issue(connect_timeout=LONG)
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
                self.issue(connect_timeout=LONG)
            self.assert_ends(thread)

    def test_silent_and_slow_clients_hold_nobody_up(self) -> None:
        self.start_server(request_timeout=None)
        for data in b"", b'{"ID":', b'{"ID":"' + b"x" * 1000, b"[]", wire():
            client = self.dial()
            if data:
                client.write(data)
        for _ in range(3):
            self.issue()

    def test_client_that_stalls_at_any_point_is_cut_off(self) -> None:
        def handle(request: VMRequest) -> None:
            if request.id == "fail":
                raise ShimError("x" * 100_000)

        # The one client that there may be stalls, so the next is served when it has been cut off.
        self.start_server(handle, request_timeout=0.1, max_clients=1)
        long = b"x" * 2 * MEBIBYTE
        stalls: dict[str, Callable[[RawPipe], object]] = {
            "silent": bool,
            "half a request": lambda client: client.write(b'{"ID":'),
            "response unread": lambda client: client.write(wire()),
            "refusal unread": lambda client: client.write(wire("fail")),
            "refusal half read": lambda client: (client.write(wire("fail")), client.read(10)),
            "success half read": lambda client: (client.write(wire()), client.read(2)),
            "never closes": lambda client: (client.write(wire()), client.read_all()),
            "never stops sending": lambda client: self.write_in_vain(client, wire() + long),
        }
        for name, stall in stalls.items():
            with self.subTest(name=name), RawPipe.dial(self.path) as client:
                stall(client)
                self.issue(connect_timeout=LONG)
                self.assertEqual(client.read_all(), b"")
                self.caught(OSError, client.write, b"too late")

    def write_in_vain(self, client: RawPipe, data: bytes) -> None:
        self.caught(OSError, client.write, data)

    def test_handler_may_take_longer_than_request_timeout(self) -> None:
        handler = HeldHandler()
        self.start_server(handler, request_timeout=0.1)
        client = self.dial_and_write(wire())
        self.assertTrue(handler.entered.wait(LONG))
        # A client that came later has run out of time, so the first one's would have, too.
        self.assertEqual(self.raw_exchange(), TOO_LATE)
        handler.go_on.set()
        self.assertEqual(client.read_all(), SHIM_SUCCESS)

    def test_client_that_has_left_is_forgotten(self) -> None:
        server = self.start_server(request_timeout=None)
        for _ in range(3):
            self.assertEqual(self.raw_exchange(wire()), SHIM_SUCCESS)
        [service] = server._serving.values()
        self.wait_until(lambda: not service._deadlines)

    def test_clients_that_leave_and_an_instance_that_is_used_up_are_no_failures(self) -> None:
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            server = self.make_server(
                lambda request: refuse(request) if request.id == "no" else None
            )
            thread = self.serve_in_thread(server)
            for id in "yes", "no", "yes":
                self.raw_exchange(wire(id))
            server.close()
            self.assert_ends(thread)
        self.assertNotIn("fail", "".join(logs.output))

    def test_client_that_sends_no_request_in_time_is_told_so(self) -> None:
        self.start_server(request_timeout=0.1)
        clients = [self.dial() for _ in range(3)]
        clients[1].write(b'{"ID":')
        clients[2].write(b'{"ID":"' + b"x" * 1000)
        for client in clients:
            self.assertEqual(client.read_all(), TOO_LATE)

    def test_client_that_vanishes_at_any_point_costs_nobody_else_anything(self) -> None:
        self.start_server(lambda request: refuse(request) if request.id == "fail" else None)
        vanish: list[Callable[[RawPipe], object]] = [
            bool,
            lambda client: client.write(b"{"),
            lambda client: client.write(b'{"ID":"a"'),
            lambda client: client.write(wire()),
            lambda client: client.write(wire("fail")),
            lambda client: client.write(b"[]"),
            lambda client: (client.write(wire()), client.read(2)),
            lambda client: (client.write(wire("fail")), client.read(2)),
            lambda client: (client.write(wire()), client.read(4)),
            lambda client: (client.write(wire()), client.read_all()),
        ]
        for step in vanish * 5:
            with RawPipe.dial(self.path) as client:
                step(client)
        self.issue(connect_timeout=LONG)

    def test_client_that_is_faster_than_connect_named_pipe_is_served(self) -> None:
        self.fast_clients(lambda client: self.assertEqual(client.read_all(), SHIM_SUCCESS))

    def test_client_that_comes_and_goes_before_connect_named_pipe_holds_nobody_up(self) -> None:
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.fast_clients(None)
        self.assertNotIn("fail", "".join(logs.output))

    def test_silent_client_that_is_faster_than_connect_named_pipe_holds_nobody_up(self) -> None:
        self.fast_clients(bool)

    def fast_clients(self, step: Callable[[RawPipe], object] | None) -> None:
        """Have a client connect between CreateNamedPipeW and ConnectNamedPipe, then an honest one.

        The fast client takes that step at the end; without one it closes at once.
        """
        fast: list[RawPipe] = []

        def connect_first() -> None:
            if not fast:
                fast.append(RawPipe.dial(self.path))
                if step is None:
                    fast[0].close()

        server = self.make_server(request_timeout=None)
        with spying("ConnectNamedPipe", before=connect_first):
            self.serve_in_thread(server)
            self.wait_until(lambda: fast)
            self.issue(connect_timeout=5)
        if step:
            if step is not bool:
                fast[0].write(wire())
            step(fast[0])
            fast[0].close()

    def test_early_clients_are_served_first_come_first_served(self) -> None:
        early: list[Pipe] = []

        def faster() -> None:
            """Connect before the server's own client does."""
            if len(early) < 3:
                handle = kernel32.CreateFileW(self.path, 0xC0000000, 0, None, 3, 0x40000000, None)
                early.append(self.enter(Pipe(handle, self.path)))

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
        self.issue(connect_timeout=LONG)

    def test_early_client_sees_end_of_file_when_the_server_is_closed_instead(self) -> None:
        with spying("CreateFileW", before=self.dial_once()):
            server = self.make_server()
        server.close()
        [client] = self.early
        self.assertEqual(client.read_all(), b"")

    def test_early_client_that_can_not_be_served_holds_nobody_up(self) -> None:
        with spying("CreateFileW", before=self.dial_once()):
            server = self.make_server()
        with self.assertLogs("vmshim", logging.ERROR) as logs:
            with failing("CreateIoCompletionPort", 0, 1450):  # 0: the port itself
                self.serve_in_thread(server)
                self.issue(connect_timeout=LONG)
        self.assertIn("a client can't be let in", logs.output[0])

    def dial_once(self) -> Callable[[], None]:
        """Return a function that connects a client, when it is called first."""
        self.early: list[RawPipe] = []

        def dial() -> None:
            if not self.early:
                self.early.append(self.dial())

        return dial

    def test_clients_see_busy_while_the_server_does_not_serve(self) -> None:
        with VMShimServer(self.path, bool) as server:
            self.caught(PipeBusyError, self.issue, connect_timeout=0)
            self.serve_in_thread(server)
            self.issue(connect_timeout=LONG)
            server.shutdown()
            self.caught(PipeBusyError, self.issue, connect_timeout=0)
            thread = self.serve_in_thread(server)
            self.issue(connect_timeout=LONG)
            server.close()
            self.assert_ends(thread)
        self.caught(PipeNotFoundError, self.issue)

    def test_name_is_found_between_any_two_requests(self) -> None:
        self.start_server()
        self.issue()
        stop = threading.Event()
        missing = []

        def probe() -> None:
            while not stop.is_set():
                try:
                    dial_pipe(self.path, connect_timeout=0).close()
                except PipeBusyError:
                    pass
                except PipeNotFoundError as error:
                    missing.append(error)

        prober = self.run_aside(probe)
        for _ in range(25):
            self.issue(connect_timeout=LONG)
        stop.set()
        prober.join(LONG)
        self.assertEqual(missing, [])

    def test_failure_to_offer_an_instance_is_logged_and_survived(self) -> None:
        for function, errors, line in (
            ("CreateNamedPipeW", [1450], "no client can be let in"),
            ("CreateIoCompletionPort", [0, 1450], "no client can be let in"),  # 0: the port itself
            ("ConnectNamedPipe", [1450], ""),
        ):
            with self.subTest(function=function), VMShimServer(self.path, bool) as server:
                with self.assertLogs("vmshim", logging.DEBUG) as logs:
                    with failing(function, *errors), spying(function) as calls:
                        thread = self.serve_in_thread(server)
                        self.wait_until(lambda: len(calls) > len(errors))
                        self.issue(connect_timeout=LONG)
                        server.shutdown()
                        self.assert_ends(thread)
                self.assertIn(line, "\n".join(logs.output))

    def test_server_needs_two_threads_whatever_the_number_of_clients(self) -> None:
        threads = _thread._count()
        self.start_server(request_timeout=None)
        for _ in range(30):
            self.dial()
        self.assertEqual(_thread._count(), threads + 2)


@needs_pipes
class LifeCycleTest(ServerCase):
    def test_shutdown_from_another_thread_ends_serve_forever(self) -> None:
        server = self.make_server()
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        server.shutdown()
        self.assert_ends(thread)

    def test_shutdown_twice_and_close_twice_return(self) -> None:
        server = self.make_server()
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        for call in server.shutdown, server.shutdown, server.close, server.close, server.shutdown:
            call()
        self.assert_ends(thread)

    def test_shutdown_and_close_return_before_and_after_serving(self) -> None:
        for serves in False, True:
            server = self.make_server()
            if serves:
                thread = self.serve_in_thread(server)
                self.issue(connect_timeout=LONG)
                server.shutdown()
                self.assert_ends(thread)
            for call in server.shutdown, server.shutdown, server.close, server.close:
                call()

    def test_shutdown_and_close_from_two_threads_at_once_return(self) -> None:
        for names in ("shutdown", "shutdown"), ("close", "close"), ("close", "shutdown"):
            handler = HeldHandler()
            server = self.make_server(handler)
            thread = self.serve_in_thread(server)
            client = self.dial_and_write(wire())
            self.assertTrue(handler.entered.wait(LONG))
            callers = [self.run_aside(getattr(server, name)) for name in names]
            handler.go_on.set()
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            for caller in (*callers, thread):
                self.assert_ends(caller)
            server.close()

    def test_shutdown_that_comes_first_ends_serve_forever_at_once(self) -> None:
        server = self.make_server()
        server.shutdown()
        server.serve_forever()
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        server.shutdown()
        self.assert_ends(thread)

    def test_shutdown_and_close_from_the_handler_end_it_and_the_response_arrives(self) -> None:
        for name in "shutdown", "close":
            server = self.make_server(lambda request: getattr(server, name)())
            thread = self.serve_in_thread(server)
            self.issue(connect_timeout=LONG)
            self.assert_ends(thread)
            kind = PipeBusyError if name == "shutdown" else PipeNotFoundError
            self.caught(kind, self.issue, connect_timeout=0)
            server.close()

    def test_closed_server_does_not_serve(self) -> None:
        server = self.make_server()
        server.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            server.serve_forever()
        self.caught(PipeNotFoundError, self.issue)

    def test_server_that_serves_does_not_serve_twice(self) -> None:
        server = self.start_server()
        self.issue(connect_timeout=LONG)
        with self.assertRaisesRegex(RuntimeError, "already"):
            server.serve_forever()
        self.issue(connect_timeout=LONG)

    def test_server_whose_thread_can_not_start_gives_everything_back(self) -> None:
        server = self.make_server()
        handle = lowest_free_handle()

        def fail(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        with mock.patch.object(_thread, "start_new_thread", fail):
            with self.assertRaisesRegex(RuntimeError, "can't start new thread"):
                server.serve_forever()
        server.shutdown()
        self.assertEqual(lowest_free_handle(), handle)
        server.serve_forever()  # because of that shutdown(), it returns at once
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        server.close()
        self.assert_ends(thread)
        self.caught(PipeNotFoundError, self.issue)

    def test_thread_that_begins_only_after_ctrl_c_serves_nobody(self) -> None:
        server = self.make_server()
        threads = []

        def start_late(function: Callable[[], object], _: object) -> None:
            threads.append(function)
            raise KeyboardInterrupt

        with mock.patch.object(_thread, "start_new_thread", start_late):
            self.caught(KeyboardInterrupt, server.serve_forever)
        server.shutdown()
        [run_io] = threads
        run_io()
        server.serve_forever()  # because of that shutdown(), it returns at once

    def test_bug_in_the_io_thread_is_logged_raised_and_keeps_no_handle(self) -> None:
        server = self.make_server()
        handle = lowest_free_handle()
        create_port = vmshim._kernel32.CreateIoCompletionPort

        def fail(*arguments: Any) -> Any:
            raise ZeroDivisionError("a bug")

        def fail_for_an_instance(*arguments: Any) -> Any:
            return (fail if arguments[1] else create_port)(*arguments)

        for name, bug in {
            "GetQueuedCompletionStatus": fail,
            "CreateIoCompletionPort": fail_for_an_instance,
        }.items():
            with self.assertLogs("vmshim", logging.ERROR) as logs:
                with mock.patch.object(vmshim._kernel32, name, bug):
                    error = self.caught(ZeroDivisionError, server.serve_forever)
            self.assertIn("Traceback", logs.output[-1])
            # The I/O thread may still be on its way out.
            self.wait_until(lambda: lowest_free_handle() == handle)
            del error

    def test_server_that_ends_has_no_thread_left_although_a_client_is_slow(self) -> None:
        def interrupt(request: VMRequest) -> None:
            if request.id == "stop":
                raise KeyboardInterrupt

        server = self.make_server(interrupt)
        self.run_aside(self.slow_clients)
        self.caught(KeyboardInterrupt, server.serve_forever)
        self.assertEqual(server._serving, {})

    def slow_clients(self) -> None:
        """Be a client that doesn't take its response, and one that has the server stop."""
        with self.dial_and_write(wire()), self.dial_and_write(wire("stop")) as client:
            client.read_all()

    def test_close_in_a_finaliser_that_runs_in_the_io_thread_does_not_wait_for_itself(self) -> None:
        server = self.make_server()
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        [service] = server._serving.values()
        real = service._milliseconds
        closed: list[int] = []

        def close_first() -> int:
            if not closed:
                closed.append(_thread.get_ident())
                server.close()
            return real()

        with mock.patch.object(service, "_milliseconds", close_first):
            self.wait_until(self.server_is_gone)
        self.assert_ends(thread)
        self.assertEqual(closed, [service._io_thread])

    def server_is_gone(self) -> bool:
        try:
            self.issue(connect_timeout=0)
        except PipeNotFoundError:
            return True
        except VMShimError:
            pass
        return False

    def test_server_lets_go_of_the_memory_of_each_operation(self) -> None:
        server = self.make_server()
        thread = self.serve_in_thread(server)
        self.assertEqual(self.raw_exchange(VMRequest("a", "create").to_json()), SHIM_SUCCESS)
        server.close()
        self.assert_ends(thread)
        self.assertEqual(vmshim._under_way, {})

    def test_server_that_can_have_no_completion_port_says_so(self) -> None:
        server = self.make_server()
        with failing("CreateIoCompletionPort", 1450):
            self.caught(OSError, server.serve_forever)
        thread = self.serve_in_thread(server)
        self.issue(connect_timeout=LONG)
        server.close()
        self.assert_ends(thread)

    def test_shutdown_tells_clients_that_have_not_been_carried_out(self) -> None:
        handler = HeldHandler()
        server = self.make_server(handler, request_timeout=None)
        thread = self.serve_in_thread(server)
        silent, half = self.dial(), self.dial_and_write(b"{")
        first = self.dial_and_write(wire("first"))
        self.assertTrue(handler.entered.wait(LONG))
        second = self.dial_and_write(wire("second"))
        stopping = self.run_aside(server.shutdown)
        for client in silent, half, second:
            self.assertEqual(client.read_all(), STOPPED)
        handler.go_on.set()
        self.assertEqual(first.read_all(), SHIM_SUCCESS)
        for ending in stopping, thread:
            self.assert_ends(ending)
        self.assertEqual(handler.carried_out, ["first"])

    def test_shutdown_does_not_wait_for_clients_that_never_read_or_leave(self) -> None:
        server = self.start_server(request_timeout=None)
        silent, unread, staying = self.dial(), self.dial_and_write(wire()), self.dial()
        staying.write(wire())
        self.assertEqual(staying.read_all(), SHIM_SUCCESS)
        server.shutdown()
        self.assertEqual([client.read_all() for client in (silent, unread, staying)], [b""] * 3)

    def test_keyboard_interrupt_and_system_exit_of_the_handler_stop_the_server(self) -> None:
        for kind in KeyboardInterrupt, SystemExit:
            entered = threading.Event()
            second_is_there = threading.Event()

            def stop(request: VMRequest) -> None:
                entered.set()
                second_is_there.wait(LONG)
                raise kind

            def ask() -> None:
                with RawPipe.dial(self.path) as first:
                    first.write(wire())
                    entered.wait(LONG)
                    with RawPipe.dial(self.path) as second:
                        second.write(wire())
                        second_is_there.set()
                        responses.append(second.read_all())
                    responses.append(first.read_all())

            with VMShimServer(self.path, stop) as server:
                responses: list[bytes] = []
                asking = self.run_aside(ask)
                self.caught(kind, server.serve_forever)
                self.assert_ends(asking)
                # Nobody knows what became of the first: it gets end of file, no text.
                self.assertEqual(responses, [STOPPED, b""])
            self.caught(PipeNotFoundError, self.issue)

    def test_ctrl_c_ends_an_idle_server(self) -> None:
        server = self.make_server()

        def interrupt() -> None:
            self.issue(connect_timeout=LONG)
            _thread.interrupt_main()

        self.run_aside(interrupt)
        self.caught(KeyboardInterrupt, server.serve_forever)


# ---- Command line -------------------------------------------------------------------------------


class FullStream(io.TextIOWrapper):
    """A stream like Python's own stdout, to a device that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def reconfigure(self, **options: Any) -> None:
        # It flushes first.
        raise OSError(errno.ENOSPC, "No space left on device")


def closed_stream() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream.close()
    return stream


class CommandLineTest(Case):
    def test_pipe_path_is_printed(self) -> None:
        self.assertEqual(run_cli("pipe-path", GUID), (0, vm_pipe_path(GUID) + "\n", ""))

    def test_unknown_command_gets_a_suggestion(self) -> None:
        status, out, err = run_cli("umount", "a")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("unknown command 'umount'; did you mean 'unmount'?", err)
        self.assertIn("invalid choice: 'xyzzy'", run_cli("xyzzy")[2])

    def test_version_is_printed(self) -> None:
        status, out, err = run_cli("--version")
        self.assertEqual((status, err), (0, ""))
        python = ".".join(map(str, sys.version_info[:3]))
        bits = 64 if sys.maxsize > 2**32 else 32
        self.assertEqual(
            out, f"vmshim {vmshim.__version__}, Python {python}, {sys.platform}, {bits} bit\n"
        )

    def test_help_has_examples_and_exit_statuses(self) -> None:
        status, out, _ = run_cli("--help")
        self.assertEqual(status, 0)
        for part in "examples:", "exit status:", "unmount-disk", "demo":
            self.assertIn(part, out)
        for outcome in vmshim._OUTCOMES:
            self.assertIn(f"\n  {outcome.status:<3}  {outcome.meaning}\n", out)

    def test_help_explains_the_handshake(self) -> None:
        _, out, _ = run_cli("serve", "--help")
        text = " ".join(out.split())
        self.assertIn("read a JSON object from stdin (ignored)", text)
        self.assertIn("write the success bytes to stdout when the pipe exists", text)

    def test_no_arguments_print_the_help_and_are_wrong_usage(self) -> None:
        status, out, _ = run_cli()
        self.assertEqual((status, out), (2, run_cli("--help")[1]))

    def test_wrong_usage_is_status_2_with_the_usage_of_its_command(self) -> None:
        for arguments, message in (
            (("--nope",), "required"),
            (("serve",), "--vm"),
            (("serve", "--pipe", "nope"), "not a pipe path: 'nope'"),
            (("serve", "--pipe", ""), "not a pipe path: ''"),
            (("serve", "--vm", ""), 'invalid GUID ""'),
            (("create", "--root", "", "a"), "root is empty"),
            (("create", "--pipe", "", "a"), "not a pipe path: ''"),
            (("create", "--vm", "", "a"), 'invalid GUID ""'),
            (("create", "--vm", GUID, "--pipe", "x", "a"), "not allowed with"),
            (("create", "--vm", GUID), "ID"),
            (("create", "--vm", "nope", "a"), 'invalid GUID "nope"'),
            (("create", "--pipe", "nope", "a"), "not a pipe path: 'nope'"),
            (("create", "--vm", GUID, ""), "ID is empty"),
            (("create", "--vm", GUID, "good", ""), "ID is empty"),
            (("create", "--vm", GUID, "--timeout", "-1", "a"), "timeout"),
            (("create", "--vm", GUID, "--timeout", "nan", "a"), "timeout"),
            (("create", "--vm", GUID, "--connect-timeout", "x", "a"), "invalid float value"),
            (("list", "--root", ""), "root is empty"),
            (("pipe-path", "nope"), 'invalid GUID "nope"'),
            (("destroy", "a"), "invalid choice"),
        ):
            with self.subTest(arguments=arguments):
                status, out, err = run_cli(*arguments)
                self.assertEqual((status, out), (2, ""))
                command = arguments[0] if arguments[0] not in ("--nope", "destroy") else "[-h]"
                self.assertRegex(err, rf"^usage: vmshim.py {re.escape(command)}")
                self.assertRegex(err.splitlines()[-1], "^vmshim.py.*: error: ")
                self.assertIn(message, err.splitlines()[-1])

    def test_wrong_usage_with_json_is_one_line_of_json(self) -> None:
        for arguments in (
            ("create", "--json", "--pipe", "", "a"),
            ("create", "--json"),
            ("create", "--json", "--timeout", "x", "a"),
        ):
            with self.subTest(arguments=arguments):
                status, out, err = run_cli(*arguments)
                self.assertEqual((status, out.count("\n")), (2, 1))
                row = json.loads(out)
                self.assertEqual((row["ok"], row["status"]), (False, 2))
                self.assertEqual((row["outcome"], row["retry"]), ("not-sent", False))
                self.assertTrue(row["error"])
                self.assertIn("usage:", err)

    def test_bug_is_a_traceback_with_a_status_of_its_own(self) -> None:
        for bug in KeyError("oops"), OSError("oops"), AssertionError("oops"):
            with self.subTest(bug=bug), mock.patch.object(
                vmshim, "issue_vm_request", side_effect=bug
            ):
                status, out, err = run_cli("create", "--vm", GUID, "--json", "a")
                self.assertEqual(status, 70)
                self.assertRegex(err, r"^Traceback ")
                self.assertRegex(err, rf"{type(bug).__name__}: .*oops.*\n$")
                row = json.loads(out)
                self.assertEqual((row["status"], row["outcome"]), (70, "unknown"))
        with mock.patch.object(vmshim, "list_containers", side_effect=KeyError("oops")):
            self.assertEqual(run_cli("list")[0], 70)

    def test_control_characters_of_a_shim_are_escaped_but_in_json_as_they_came(self) -> None:
        text = "a\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200f\n\té\ud800"
        with mock.patch.object(vmshim, "issue_vm_request", side_effect=ShimError(text)):
            status, out, err = run_cli("create", "--vm", GUID, "--json", "a")
        self.assertEqual(status, 1)
        escaped = r"a\x1b[2J\r\x07\x7f\x9b\u202e\u2066\u200f"
        self.assertEqual(err, f"{escaped}\n\té\\ud800\n")
        self.assertEqual(json.loads(out)["error"], text)
        self.assertEqual(ShimError(text).message, text)
        self.assertTrue(out.isascii())

    def test_exit_status_is_right_whatever_the_standard_streams_are(self) -> None:
        failures: list[tuple[Any, int]] = [
            (None, 0),
            (ShimError("no"), 1),
            (ValueError("x"), 2),
            (PipeNotFoundError(2, "x"), 3),
            (PipeAccessError(5, "x"), 4),
            (PipeBusyError(231, "x"), 5),
            (OutcomeUnknownError("x"), 6),
            (KeyError("x"), 70),
            (KeyboardInterrupt(), 130),
        ]
        streams: list[Callable[[], Any]] = [
            lambda: None,
            closed_stream,
            lambda: FullStream(io.BytesIO()),
        ]
        for failure, expected in failures:
            for make in streams:
                for more in (), ("--json",):
                    with self.subTest(failure=failure, stream=make, more=more):
                        with mock.patch.object(vmshim, "issue_vm_request", side_effect=failure):
                            with mock.patch.multiple(sys, stdout=make(), stderr=make()):
                                status = cli_status("create", "--vm", GUID, *more, "a")
                        self.assertEqual(status, expected)
        out = io.StringIO()
        with mock.patch.multiple(sys, stdout=out, stderr=None):
            self.assertEqual(cli_status("create"), 2)
        self.assertEqual(out.getvalue(), "")
        for arguments, expected in (
            (("pipe-path", GUID), 0),
            (("--version",), 0),
            (("create", "--help"), 0),
            (("create",), 2),
        ):
            for make in streams:
                with self.subTest(arguments=arguments, stream=make):
                    with mock.patch.multiple(sys, stdout=make(), stderr=make()):
                        status = cli_status(*arguments)
                    self.assertEqual(status, expected)

    def test_character_that_the_console_does_not_know_is_escaped(self) -> None:
        written = io.BytesIO()
        err = io.TextIOWrapper(written, encoding="ascii", newline="")
        with mock.patch.object(vmshim, "issue_vm_request", side_effect=ShimError("é")):
            with mock.patch.object(sys, "stderr", err):
                self.assertEqual(cli_status("create", "--vm", GUID, "a"), 1)
        err.flush()
        self.assertEqual(written.getvalue(), b"\\xe9\n")

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


@needs_pipes
class CommandLineOnAPipeTest(ServerCase):
    def run_on_pipe(self, *arguments: str) -> tuple[int, str, str]:
        return run_cli("create", "--pipe", self.path, *arguments, "a")

    def test_each_op_is_sent_and_success_is_silent(self) -> None:
        requests: list[VMRequest] = []
        self.start_server(requests.append)
        for op in VMRequestOp:
            self.assertEqual(run_cli(op.value, "--pipe", self.path, "é"), (0, "", ""))
            self.assertEqual(requests.pop(), ("é", op))

    def test_several_ids_are_sent_one_after_the_other_and_the_first_failure_counts(self) -> None:
        requests: list[VMRequest] = []

        def handle(request: VMRequest) -> None:
            requests.append(request)
            if request.id == "b":
                raise ShimError("no b")

        self.start_server(handle)
        status, out, err = run_cli("create", "--pipe", self.path, "--json", "a", "b", "c")
        self.assertEqual((status, err), (1, "no b\n"))
        self.assertEqual([request.id for request in requests], ["a", "b", "c"])
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([(row["id"], row["status"]) for row in rows], [*zip("abc", (0, 1, 0))])

    def test_vm_is_found_by_its_guid(self) -> None:
        guid = str(uuid.uuid4())
        self.path = vm_pipe_path(guid)
        self.start_server()
        self.assertEqual(run_cli("create", "--vm", guid, "a"), (0, "", ""))

    def test_refusal_is_status_1_with_its_text(self) -> None:
        self.start_server(refuse)
        self.assertEqual(self.run_on_pipe(), (1, "", "no such container\n"))

    def test_nobody_listening_is_status_3(self) -> None:
        status, out, err = self.run_on_pipe()
        self.assertEqual((status, out, err.count("\n")), (3, "", 1))
        self.assertIn(self.path, err)

    def test_access_denied_is_status_4(self) -> None:
        self.listen(access=PIPE_ACCESS_INBOUND)
        status, _, err = self.run_on_pipe()
        self.assertEqual(status, 4)
        self.assertIn("elevated administrator", err)

    def test_busy_is_status_5(self) -> None:
        self.make_busy()
        status, _, err = self.run_on_pipe("--connect-timeout", "0.1")
        self.assertEqual(status, 5)
        self.assertIn("nothing was sent", err)

    def test_unknown_outcome_is_status_6(self) -> None:
        def cut(pipe: RawPipe) -> None:
            pipe.read()
            pipe.disconnect()

        gone = self.fake_shim_hanging()
        results = [self.run_on_pipe("--timeout", "0.1")]
        gone.set()
        self.fake_shim(cut)
        results.append(self.run_on_pipe())
        self.fake_shim_responding()
        results.append(self.run_on_pipe())
        self.assertIn("did not end in time", results[0][2])
        for status, _, err in results:
            self.assertEqual(status, 6)
            self.assertIn("outcome is unknown", err)

    def test_timeouts_are_passed_on(self) -> None:
        with mock.patch.object(vmshim, "issue_vm_request") as issue:
            self.run_on_pipe("--timeout", "7", "--connect-timeout", "8")
        self.assertEqual(issue.call_args[1], {"timeout": 7.0, "connect_timeout": 8.0})

    def test_ctrl_c_is_status_130_and_with_json_one_line(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.read()
            _thread.interrupt_main()

        gone = self.fake_shim_hanging(script)
        self.assertEqual(self.run_on_pipe(), (130, "", ""))
        gone.set()
        gone = self.fake_shim_hanging(script)
        status, out, err = self.run_on_pipe("--json", "never-sent")
        gone.set()
        self.assertEqual((status, out.count("\n"), err), (130, 1, ""))
        row = json.loads(out)
        self.assertEqual((row["id"], row["status"]), ("never-sent", 130))
        self.assertEqual((row["outcome"], row["retry"]), ("unknown", False))

    def test_serve_prints_each_request_until_ctrl_c(self) -> None:
        serving = threading.Event()
        serve_forever = VMShimServer.serve_forever

        def serve(server: VMShimServer) -> None:
            serving.set()
            serve_forever(server)

        def ask() -> None:
            serving.wait(LONG)
            self.issue("a\x1bb")
            _thread.interrupt_main()

        self.run_aside(ask)
        with mock.patch.object(VMShimServer, "serve_forever", serve):
            status, out, err = run_cli("serve", "--pipe", self.path)
        self.assertEqual((status, out), (130, "create a\\x1bb\n"))
        self.assertEqual(err, f"serving {self.path} until Ctrl-C\n")

    def test_serve_that_can_not_have_its_pipe_says_so_in_one_line(self) -> None:
        for number, expected in (5, 4), (231, 4), (1450, 3):
            with failing("CreateNamedPipeW", number):
                status, out, err = run_cli("serve", "--pipe", self.path)
            self.assertEqual((status, out), (expected, ""))
            self.assertTrue(err.startswith(f"{self.path}: "))
            self.assertEqual(err.count("\n"), 1)

    def test_json_is_one_object_for_success_and_for_failure(self) -> None:
        server = self.start_server()
        status, out, err = run_cli("unmount", "--pipe", self.path, "--json", "é")
        self.assertEqual((status, err), (0, ""))
        row = json.loads(out)
        self.assertGreaterEqual(row.pop("elapsed_ms"), 0)
        self.assertTrue(row.pop("host"))
        expected = {
            "id": "é",
            "op": "unmount",
            "pipe": self.path,
            "ok": True,
            "status": 0,
            "error": None,
            "outcome": "done",
            "retry": False,
            "version": vmshim.__version__,
        }
        self.assertEqual(row, expected)
        server.handler = refuse
        status, out, err = run_cli("unmount", "--pipe", self.path, "--json", "é")
        self.assertEqual((status, err), (1, "no such container\n"))
        row = json.loads(out)
        del row["elapsed_ms"], row["host"]
        failed = {"ok": False, "status": 1, "error": "no such container", "outcome": "refused"}
        self.assertEqual(row, {**expected, **failed})
        server.close()
        row = json.loads(self.run_on_pipe("--json")[1])
        self.assertEqual((row["status"], row["outcome"], row["retry"]), (3, "not-sent", True))

    def test_wait_of_over_a_second_is_shown_on_a_terminal_and_gone_afterwards(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

            def write(self, text: str) -> int:
                if "waiting" in text:
                    shown.set()
                return super().write(text)

        shown = threading.Event()

        def script(pipe: RawPipe) -> None:
            pipe.read()
            shown.wait(LONG)
            pipe.write(SHIM_SUCCESS)

        self.fake_shim(script)
        with mock.patch.object(sys, "stderr", Terminal()) as terminal:
            self.assertEqual(vmshim.main(["create", "--pipe", self.path, "a"]), 0)
        line = r"\rwaiting for the VM shim: \d+ s"
        self.assertRegex(terminal.getvalue(), rf"^({line})+\r {{28,}}\r$")

    def test_demo_shows_both_ways_of_success_and_refusal(self) -> None:
        status, out, err = run_cli("demo")
        self.assertEqual((status, err), (0, ""))
        for part in (
            r"""b'{"ID":"demo","Op":"create"}\n'""",
            r"b'\x00OK\x00'",
            r"""b'{"ID":"demo","Op":"sync"}\n'""",
            "b'Not implemented'",
        ):
            self.assertIn(part, out)


class ProcessTest(Case):
    """The command line as a process of its own, on every platform."""

    def test_usage_errors_and_results_have_their_status_without_any_stream(self) -> None:
        for arguments, expected in (("pipe-path", GUID), 0), (("pipe-path", "nope"), 2):
            with self.subTest(arguments=arguments):
                code = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(vmshim.__file__))!r})
import vmshim
sys.stdin = sys.stdout = sys.stderr = None
sys.exit(vmshim.main({arguments!r}))
"""
                with start_python(code) as process:
                    self.assertEqual(process.communicate(timeout=LONG), (b"", b""))
                self.assertEqual(process.returncode, expected)

    def test_reader_of_stdout_that_has_gone_does_not_change_the_status(self) -> None:
        for arguments, expected in (
            (("pipe-path", GUID), 0),
            (("--help",), 0),
            (("create", "--json"), 2),
        ):
            with self.subTest(arguments=arguments):
                process = start_process(
                    "-c", f"import sys; sys.stdin.read(); {self.main_of(arguments)}"
                )
                assert process.stdin and process.stdout and process.stderr
                with process:
                    process.stdout.close()
                    process.stdin.close()
                    err = process.stderr.read()
                self.assertEqual(process.returncode, expected)
                self.assertNotIn(b"Exception ignored", err)
                self.assertNotIn(b"Traceback", err)

    def main_of(self, arguments: tuple[str, ...]) -> str:
        folder = os.path.dirname(os.path.abspath(vmshim.__file__))
        return (
            f"sys.path.insert(0, {folder!r}); import vmshim; "
            f"sys.argv[1:] = {arguments!r}; sys.exit(vmshim.main())"
        )

    @unittest.skipUnless(os.name == "posix", "a shell closes the streams")
    def test_full_or_closed_stdout_does_not_change_the_status(self) -> None:
        for redirection in ">/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full":
            for arguments, expected in (("pipe-path", GUID), 0), (("create", "--json"), 2):
                with self.subTest(redirection=redirection, arguments=arguments):
                    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable]
                    process = subprocess.run(
                        [*command, vmshim.__file__, *arguments],
                        stderr=subprocess.PIPE,
                        timeout=LONG,
                    )
                    self.assertEqual(process.returncode, expected)
                    self.assertNotIn(b"Traceback", process.stderr)


@needs_pipes
class ProcessOnAPipeTest(ServerCase):
    def start_vmshim(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        process: Any = start_process(vmshim.__file__, *arguments, encoding="utf-8", env=environment)
        self.enter(process)
        self.addCleanup(process.kill)
        text_process: subprocess.Popen[str] = process
        return text_process

    def test_verbose_request_logs_one_line_to_stderr(self) -> None:
        self.start_server()
        process = self.start_vmshim("create", "--pipe", self.path, "-v", "a")
        out, err = process.communicate(timeout=LONG)
        self.assertEqual((process.returncode, out), (0, ""))
        self.assertRegex(err, r"^vmshim: .*: 'a' create: done \(\d+\.\d ms\)\n$")

    def test_serve_prints_each_request_and_refuses_with_the_given_text(self) -> None:
        process = self.start_vmshim("serve", "--pipe", self.path, "--fail", "out of disks")
        assert process.stdout and process.stderr
        self.assertEqual(process.stderr.readline(), f"serving {self.path} until Ctrl-C\n")
        with self.assertRaisesRegex(ShimError, "^out of disks$"):
            issue_vm_request(self.path, VMRequest("é", "unmount"), connect_timeout=LONG)
        self.assertEqual(process.stdout.readline(), "unmount \\xe9\n")

    def test_server_that_a_finaliser_closes_while_python_ends_does_not_hold_it_up(self) -> None:
        code = f"""
import sys, threading
sys.path.insert(0, {os.path.dirname(os.path.abspath(vmshim.__file__))!r})
import vmshim

def serve():
    with vmshim.VMShimServer({self.path!r}, bool) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield

generator = serve()
next(generator)
vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", "create"), connect_timeout=10)
"""
        process = self.enter(start_python(code))
        self.addCleanup(process.kill)
        _, err = process.communicate(timeout=LONG)
        self.assertEqual((process.returncode, err), (0, b""))

    def test_serve_goes_on_when_the_reader_of_its_stdout_has_gone(self) -> None:
        process = self.start_vmshim("serve", "--pipe", self.path)
        assert process.stdout and process.stderr
        process.stderr.readline()
        process.stdout.close()
        for _ in range(2):
            self.issue(connect_timeout=LONG)

    def test_name_of_a_server_is_gone_with_its_process(self) -> None:
        process = self.start_vmshim("serve", "--pipe", self.path)
        assert process.stderr
        process.stderr.readline()
        self.issue(connect_timeout=LONG)
        process.kill()
        process.wait(LONG)
        self.caught(PipeNotFoundError, self.issue)

    def test_client_process_that_is_killed_costs_the_server_nothing(self) -> None:
        handler = HeldHandler()
        self.start_server(handler)
        process = self.start_vmshim("create", "--pipe", self.path, "killed")
        self.assertTrue(handler.entered.wait(LONG))
        process.kill()
        process.wait(LONG)
        handler.go_on.set()
        self.issue(connect_timeout=LONG)
        self.assertEqual(handler.carried_out, ["killed", "test"])

    def test_program_ends_although_a_server_serves_in_a_thread(self) -> None:
        code = f"""
import _thread, sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(vmshim.__file__))!r})
import vmshim
def fail(request):
    raise ValueError("a bug")
server = vmshim.VMShimServer({self.path!r}, fail)
_thread.start_new_thread(server.serve_forever, ())
try:
    vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", "create"), connect_timeout=30)
except vmshim.ShimError:
    print("refused")
"""
        process = self.enter(start_python(code))
        self.addCleanup(process.kill)
        out, err = process.communicate(timeout=LONG)
        self.assertEqual((out.split(), process.returncode), ([b"refused"], 0))
        self.assertIn(b"a bug", err)

    def test_library_prints_nothing_and_imports_no_logging(self) -> None:
        self.start_server(refuse)
        code = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(vmshim.__file__))!r})
import vmshim
for op in "create", "sync":
    try:
        vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", op))
    except vmshim.ShimError:
        pass
assert "logging" not in sys.modules
"""
        with start_python(code) as process:
            self.assertEqual(process.communicate(timeout=LONG), (b"", b""))
        self.assertEqual(process.returncode, 0)

    def test_import_and_one_request_load_no_more_modules_than_these(self) -> None:
        self.start_server(lambda request: None)
        code = f"""
import __future__, _thread, collections, ctypes, enum, errno, io, math, os, sys, time
class Structure(ctypes.Structure):  # from 3.14 on ctypes loads modules for the first one
    _fields_ = [("field", ctypes.c_int)]

loaded = set(sys.modules)
sys.path.insert(0, {HERE!r})
import vmshim
vmshim.issue_vm_request({self.path!r}, vmshim.VMRequest("a", "create"))
print(*set(sys.modules) - loaded)
"""
        with start_python(code) as process:
            output, errors = process.communicate(timeout=LONG)
        self.assertEqual((output.split(), errors), ([b"vmshim"], b""))


# ---- The JSON line -------------------------------------------------------------------------------

# How a request may end: the exception, the exit status, the outcome, and `retry`.
ENDS: list[tuple[BaseException | None, int, str, bool]] = [
    (None, 0, "done", False),
    (ShimError("no"), 1, "refused", False),
    (ContainerNotFoundError("x"), 3, "not-sent", True),
    (ContainerStateError("x"), 3, "not-sent", True),
    (PipeNotFoundError(2, "x"), 3, "not-sent", True),
    (RegistryError(5, "x"), 3, "not-sent", True),
    (PipeAccessError(13, "x"), 4, "not-sent", True),
    (PipeBusyError(231, "x"), 5, "not-sent", True),
    (OutcomeUnknownError("x"), 6, "unknown", False),
    (ResponseTimeoutError(110, "x"), 6, "unknown", False),
    (ConnectionLostError(32, "x"), 6, "unknown", False),
    (OperationCancelledError(103, "x"), 6, "unknown", False),
    (KeyError("x"), 70, "unknown", False),
    (KeyboardInterrupt(), 130, "unknown", False),
]


class JsonLineTest(Case):
    def rows_of(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        status, out, _ = run_cli(*arguments, "--json")
        return status, [json.loads(line) for line in out.splitlines()]

    def test_json_line_of_each_end(self) -> None:
        for failure, expected, outcome, retry in ENDS:
            with self.subTest(failure=failure):
                with mock.patch.object(vmshim, "issue_vm_request", side_effect=[failure]):
                    status, [row] = self.rows_of("create", "--vm", GUID, "a")
                self.assertEqual((status, row["status"]), (expected, expected))
                self.assertEqual((row["outcome"], row["retry"]), (outcome, retry))
                self.assertIs(row["ok"], failure is None)
                self.assertEqual(row["error"] is None, failure is None)
                self.assertEqual((row["id"], row["op"]), ("a", "create"))
                self.assertEqual(row["pipe"], vm_pipe_path(GUID))
                self.assertEqual(row["version"], vmshim.__version__)
                self.assertIsInstance(row["elapsed_ms"], float)

    def test_ends_cover_each_exit_status(self) -> None:
        statuses = {outcome.status for outcome in vmshim._OUTCOMES}
        # 2, wrong arguments, comes before any request.
        self.assertEqual({2, *(status for _, status, *_ in ENDS)}, statuses)

    def test_wrong_arguments_are_not_to_be_repeated(self) -> None:
        status, [row] = self.rows_of("create", "--vm", "nope", "a")
        self.assertEqual((status, row["status"]), (2, 2))
        self.assertEqual((row["outcome"], row["retry"]), ("not-sent", False))

    def test_readme_names_the_keys_of_the_json_line_in_their_order(self) -> None:
        table = readme().split("| key | value |")[1].split("\n\n")[0]
        keys = [
            key
            for line in table.splitlines()[2:]
            for key in re.findall("`([^`]+)`", line.split("|")[1])
        ]
        with mock.patch.object(vmshim, "issue_vm_request"):
            _, [row] = self.rows_of("create", "--vm", GUID, "a")
        self.assertEqual([*row], keys)
        _, [row] = self.rows_of("create")
        self.assertEqual([*row], keys)

    def test_host_is_the_name_of_the_computer(self) -> None:
        for name in "HOST01", "B\u00dcRO":
            with mock.patch.dict(os.environ, {"COMPUTERNAME": name}):
                with mock.patch.object(vmshim, "issue_vm_request"):
                    _, out, _ = run_cli("create", "--vm", GUID, "--json", "a")
            self.assertTrue(out.isascii())
            self.assertEqual(json.loads(out)["host"], name)

    def test_failures_do_not_keep_the_others_from_being_tried(self) -> None:
        # In each turn another failure comes first, and success in between changes nothing.
        ends = [end for end in ENDS if end[1] not in (0, 130)]
        for turn in range(len(ends)):
            turned = [ENDS[0], *ends[turn:], ENDS[0], *ends[:turn]]
            ids = [f"id{number}" for number in range(len(turned))]
            with self.subTest(first=turned[1][0]):
                failures = [failure for failure, *_ in turned]
                with mock.patch.object(vmshim, "issue_vm_request", side_effect=failures) as spy:
                    status, rows = self.rows_of("unmount", "--vm", GUID, *ids)
                self.assertEqual(status, turned[1][1])
                self.assertEqual([call[0][1].id for call in spy.call_args_list], ids)
                self.assertEqual([row["id"] for row in rows], ids)
                self.assertEqual([row["status"] for row in rows], [end[1] for end in turned])

    def test_ctrl_c_stops_and_leaves_no_line_of_what_was_not_tried(self) -> None:
        for first, expected in (None, 130), (ShimError("no"), 1):
            with self.subTest(first=first):
                failures = [first, KeyboardInterrupt(), None]
                with mock.patch.object(vmshim, "issue_vm_request", side_effect=failures) as spy:
                    status, rows = self.rows_of("unmount", "--vm", GUID, "a", "b", "c")
                self.assertEqual((status, spy.call_count), (expected, 2))
                self.assertEqual([row["id"] for row in rows], ["a", "b"])
                self.assertEqual((rows[1]["status"], rows[1]["outcome"]), (130, "unknown"))

    def test_one_wrong_id_among_several_sends_nothing(self) -> None:
        for wrong in "", "\ud800":
            with self.subTest(wrong=wrong):
                with mock.patch.object(vmshim, "issue_vm_request") as spy:
                    status, [row] = self.rows_of("unmount", "--vm", GUID, "a", wrong, "b")
                self.assertEqual((status, row["retry"]), (2, False))
                spy.assert_not_called()


@needs_pipes
class JsonLinesOfContainersTest(RegistryCase):
    def test_list_json_lines_is_the_array_line_by_line_with_the_host(self) -> None:
        guid = str(uuid.uuid4())
        self.write_container("c", state_of("c", guid, Owner="\u00e9"))
        self.write_container("bare", state_of("bare"))
        self.enter(RawPipe.listen(vm_pipe_path(guid)))
        _, out, _ = run_cli("list", "--root", self.root, "--json")
        array = json.loads(out)
        status, out, err = run_cli("list", "--root", self.root, "--json-lines")
        self.assertEqual((status, err), (0, ""))
        self.assertTrue(out.isascii())
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([row["id"] for row in rows], ["bare", "c"])
        self.assertEqual([row["vm_shim"] for row in rows], [None, "free"])
        host = os.environ["COMPUTERNAME"]
        self.assertEqual(rows, [{"host": host, **row} for row in array])

    def test_list_json_lines_of_no_containers_is_nothing(self) -> None:
        self.assertEqual(run_cli("list", "--root", self.root, "--json-lines"), (0, "", ""))

    def test_list_json_and_json_lines_exclude_each_other(self) -> None:
        status, _, err = run_cli("list", "--json", "--json-lines")
        self.assertEqual(status, 2)
        self.assertIn("not allowed with", err)


class FileOnStdinTest(Case):
    """The file comes by standard input, as the README's first recipe has it."""

    def run_from_stdin(self, *arguments: str) -> tuple[int, bytes, bytes]:
        with open(vmshim.__file__, "rb") as file:
            data = file.read()
        with start_process("-I", "-", *arguments) as process:
            out, err = process.communicate(data, timeout=LONG)
        return process.returncode, out, err

    def test_file_runs_from_standard_input(self) -> None:
        status, out, err = self.run_from_stdin("--version")
        self.assertEqual((status, err), (0, b""))
        self.assertTrue(out.startswith(f"vmshim {vmshim.__version__}".encode()))
        status, out, err = self.run_from_stdin("unmount", "--json")
        self.assertEqual((status, json.loads(out)["status"]), (2, 2))
        self.assertIn(b"vmshim.py unmount: error: ", err)


@needs_pipes
class FileOnStdinOnAPipeTest(ServerCase):
    def test_file_from_standard_input_sends_and_prints_each_line_as_its_request_ends(self) -> None:
        go_on = threading.Event()
        requests: list[VMRequest] = []

        def handle(request: VMRequest) -> None:
            requests.append(request)
            if request.id == "b":
                go_on.wait(LONG)
                raise ShimError("no b")

        self.start_server(handle)
        arguments = ("unmount", "--pipe", self.path, "--json", "a", "b", "c")
        process = self.enter(start_process("-I", "-", *arguments))
        self.addCleanup(process.kill)
        self.addCleanup(go_on.set)
        assert process.stdin and process.stdout
        with open(vmshim.__file__, "rb") as file:
            process.stdin.write(file.read())
        process.stdin.close()
        rows = [json.loads(process.stdout.readline())]
        go_on.set()  # only now, so the first line has not waited for the second request
        rows += [json.loads(line) for line in process.stdout]
        self.assertEqual(process.wait(LONG), 1)
        self.assertEqual([(row["id"], row["status"]) for row in rows], [*zip("abc", (0, 1, 0))])
        self.assertEqual(requests, [("a", "unmount"), ("b", "unmount"), ("c", "unmount")])


# ---- Input at random ----------------------------------------------------------------------------

fuzz_cases = 2000
fuzz_seed = 4

PIECES = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"\\ud83d", b"\\ude00", b"\\u0000"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"0", b"-", b".", b"1e999", b"9" * 19, b"7" * 400),
    *(b"\0", b"\0OK\0", b" ", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf0\x9f\x98"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"ID":"b",', b'"op":"sync",', b'"created":"', b"T24:60:60Z"),
    *(
        "\u017f\u212a\u00df".encode(),
        b"-9999",
        b"+23:59",
        b"0000",
        b".123456789123",
        b"T3:04:05,5Z",
    ),
]
SEEDS = [
    *(wire for _, _, wire in REQUESTS if len(wire) < 200),
    *((STATE_JSON % text).encode() for text, _ in CREATED),
    *REFUSALS,
    SHIM_SUCCESS,
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


class Trickle(io.RawIOBase):
    """A file whose reads return a few bytes each, and which counts them."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self.rest = data
        self.chance = chance
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.chance.choice([1, 2, 7, 100, 5000]))
        piece, self.rest = self.rest[:size], self.rest[size:]
        buffer[: len(piece)] = piece
        self.taken += len(piece)
        return len(piece)


def read_request(pipe: io.BytesIO | Trickle) -> VMRequest | None:
    """Read a request as the server does; None if it is none that a handler may see."""
    reader = vmshim._RequestReader()
    try:
        while not reader.feed(pipe.read(4096)):
            pass
        return reader.request()
    except ValueError:
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


class FuzzTest(Case):
    """Only the documented exceptions ever come out. Any other makes a case an error."""

    def test_messages(self) -> None:
        kinds: tuple[Any, ...] = (VMRequest, ContainerState)
        for kind in kinds:
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

    def test_requests_that_a_server_reads_bit_by_bit(self) -> None:
        for name, data, chance in cases():
            with self.subTest(**name):
                request = read_request(io.BytesIO(data))
                self.assertEqual(read_request(Trickle(data, chance)), request)
                if request:
                    self.assertEqual(VMRequest.from_json(data), request)

    def test_bombs_cost_memory_in_proportion_to_their_size(self) -> None:
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for name, bomb in bombs(10**5):
            pipe = Trickle(bomb, random.Random(name))
            readers: tuple[Callable[[bytes], object], ...] = (
                VMRequest.from_json,
                ContainerState.from_json,
                lambda data: check_shim_response(io.BytesIO(data)),
                lambda data: read_request(pipe),
            )
            for read in readers:
                with self.subTest(bomb=name):
                    tracemalloc.clear_traces()
                    with contextlib.suppress(ValueError, ShimError):
                        read(bomb)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 50 * len(bomb))
            self.assertLess(pipe.taken, vmshim.MAX_REQUEST + 5000)

    def test_bombs_of_a_million_are_defused_and_none_hangs(self) -> None:
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        kinds: tuple[Any, ...] = (VMRequest, ContainerState)
        for name, bomb in bombs(10**6):
            for kind in kinds:
                with self.subTest(bomb=name), contextlib.suppress(ValueError):
                    kind.from_json(bomb)


@needs_pipes
class FuzzedServerTest(ServerCase):
    def test_server_responds_to_whatever_comes_and_lives_on(self) -> None:
        carried_out: list[VMRequest] = []
        self.start_server(carried_out.append)
        for name, data, _ in itertools.islice(cases(), fuzz_cases // 20):
            expected = read_request(io.BytesIO(data))
            with self.subTest(**name):
                carried_out.clear()
                with dial_pipe(self.path, timeout=LONG) as pipe:
                    pipe.write(data)
                    with contextlib.suppress(ConnectionLostError):  # it has heard enough
                        pipe.close_write()
                    response = pipe.readall()
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
        command = [sys.executable, "-c", PEER, folder, self.path]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        self.process.stdout.readline()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=LONG)
        finally:
            self.process.kill()


def persist(call: Callable[[], object]) -> None:
    """Call a function again as often as a KeyboardInterrupt comes out of it."""
    while True:
        try:
            call()
            return
        except KeyboardInterrupt:
            pass


class Interrupter:
    """Raises KeyboardInterrupt in the calling thread before the n-th bytecode of vmshim.py.

    Bytecodes of threading and queue, as called from there, count too. Each of them is a point at
    which CPython 3.8 looks for signals; later versions do so at some of them. With `twice` a real
    Ctrl-C hits the main thread up to 3 ms later.
    """

    def __init__(self, point: int, *, twice: bool = False) -> None:
        self.point = point
        self.twice = twice
        self.count = 0
        self.place = ""
        self.raised_at = math.inf
        self.has_interrupted_again = False

    def run(self, call: Callable[[], object]) -> None:
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
                raise KeyboardInterrupt
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


def wait_for(condition: Callable[[], object], deadline: float) -> None:
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def succeeding_request(peer: Peer) -> None:
    issue_vm_request(peer.path + "ok", REQUEST, connect_timeout=LONG, timeout=LONG)


def refused_request(peer: Peer) -> None:
    with contextlib.suppress(ShimError):
        issue_vm_request(peer.path + "refusing", REQUEST, connect_timeout=LONG, timeout=LONG)


def request_that_times_out(peer: Peer) -> None:
    with contextlib.suppress(ResponseTimeoutError):
        issue_vm_request(peer.path + "slow", REQUEST, connect_timeout=LONG, timeout=0.02)


def busy_dial(peer: Peer) -> None:
    with contextlib.suppress(PipeBusyError):
        dial_pipe(peer.path + "busy", connect_timeout=0.03)


def dropped_pipe(peer: Peer) -> None:
    pipe = dial_pipe(peer.path + "ok", connect_timeout=LONG, timeout=LONG)
    pipe.write(REQUEST.to_json())
    pipe.read(10)
    del pipe


def end_of_a_half_request(peer: Peer) -> None:
    with dial_pipe(peer.path + "ok", connect_timeout=LONG, timeout=LONG) as pipe:
        pipe.write(b'{"ID":')
        pipe.close_write()
        pipe.read(10)


def failed_launch(peer: Peer) -> None:
    code = "import os, sys; os.write(1, b'no memory'); os.close(1); sys.stdin.read()"
    with start_python(code) as shim:
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

    def handle(request: VMRequest) -> None:
        if request.id == "refused":
            raise ShimError("no")
        if request.id == "failing":
            raise ZeroDivisionError
        if request.id == "last" and server:
            server.shutdown()

    def be_client(kind: str) -> None:
        sent = {"silent": b"", "half": b'{"ID":', "garbage": b"[]"}.get(kind, wire(kind))
        try:
            with dial_pipe(path, connect_timeout=LONG, timeout=LONG) as pipe:
                if kind == "gone":
                    return
                pipe.write(sent)
                if kind != "unread":
                    pipe.readall()
                else:
                    time.sleep(0.01)
        except vmshim.VMShimError:
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
        deadline = time.monotonic() + LONG
        persist(lambda: wait_for(lambda: len(left) >= len(begun), deadline))
        persist(lambda: VMShimServer(path, handle).close())


SCENARIOS = (
    succeeding_request,
    refused_request,
    request_that_times_out,
    busy_dial,
    dropped_pipe,
    end_of_a_half_request,
    failed_launch,
    command_line,
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

        threads = self.count_threads()
        if twice:
            # Here, because a real Ctrl-C hits the main thread only. If this hangs, it says where.
            faulthandler.dump_traceback_later(4 * LONG, exit=True)
            try:
                try:
                    call()
                finally:
                    interrupter.await_second()
            except KeyboardInterrupt:
                pass
            persist(faulthandler.cancel_dump_traceback_later)
            has_ended = True
        else:
            thread = threading.Thread(target=call, daemon=True)
            thread.start()
            thread.join(LONG)
            has_ended = not thread.is_alive()
        wrong = "hangs"
        if has_ended:
            wrong = "".join(raised) or self.leftovers(threads, first=point == 0)
        seconds = max(0.0, ended_at[0] - interrupter.raised_at)
        return Interrupted(not interrupter.place, seconds, wrong, interrupter.place)

    def leftovers(self, threads: int, *, first: bool) -> str:
        """Say what is still there; it may take a moment to go."""
        deadline = time.monotonic() + 5.0
        while True:
            gc.collect()
            found = ""
            if self.count_threads() > threads:
                found = f"{self.count_threads() - threads} threads are left"
            if any(
                overlapped.Internal == STATUS_PENDING
                for overlapped, _ in list(vmshim._under_way.values())
            ):
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

    def count_threads(self) -> int:
        count: int = getattr(_thread, "_count")()
        return count


@needs_pipes
class InterruptionTest(unittest.TestCase):
    """`.ci/interrupt.py` tries all points; here it is every k-th, with a random start."""

    def setUp(self) -> None:
        peer = Peer()
        self.addCleanup(peer.__exit__)
        self.interruptions = Interruptions(peer)
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
        defaults: dict[str, object] = {
            "connect_timeout": 2.0,
            "timeout": None,
            "max_response": MEBIBYTE,
            "request_timeout": 10.0,
            "max_clients": 64,
            "security_descriptor": None,
            "root": "default",
        }
        calls: tuple[Any, ...] = (
            dial_pipe,
            check_shim_response,
            issue_vm_request,
            issue_container_request,
            VMShimServer.__init__,
        )
        for call in calls:
            for name, default in call.__kwdefaults__.items():
                with self.subTest(call=call.__qualname__, name=name):
                    self.assertEqual(default, defaults[name])
        self.assertEqual((vmshim.MAX_REQUEST, vmshim.MAX_RESPONSE), (MEBIBYTE, MEBIBYTE))

    def test_every_public_name_has_its_text_in_the_help(self) -> None:
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

    def test_every_field_and_member_has_its_text_in_the_help(self) -> None:
        records: tuple[Any, ...] = (VMRequest, ContainerState, Container)
        for record in records:
            for field in record._fields:
                with self.subTest(record=record.__name__, field=field):
                    self.assertNotRegex(getattr(record, field).__doc__, "^Alias for field")
        for op in VMRequestOp:
            self.assertIn(f'{op.name}, "{op.value}"', VMRequestOp.__doc__ or "")

    def test_every_other_name_is_private_or_that_of_win32(self) -> None:
        for name, value in vars(vmshim).items():
            if name in vmshim.__all__ or name.startswith("_") or name == "main":
                continue
            with self.subTest(name=name):
                is_imported = inspect.ismodule(value) or (
                    getattr(value, "__module__", "") != "vmshim"
                )
                # NamedTuple stands for typing's.
                self.assertTrue(is_imported or name.isupper() or name == "NamedTuple")

    def test_readme_never_shows_a_call_that_can_wait_for_ever(self) -> None:
        calls = [
            call
            for example in readme_examples()
            for call in re.findall(r"\bissue_\w+\((?:[^()]|\([^()]*\))*\)", example)
        ]
        self.assertTrue(calls)
        for call in calls:
            self.assertIn("timeout=", call)

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
