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
import ctypes
import doctest
import errno
import faulthandler
import functools
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import unittest
import uuid
from ctypes import wintypes
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterator
from unittest import mock

import vmshim
from vmshim import (
    SHIM_SUCCESS,
    ContainerState,
    Pipe,
    PipeBusyError,
    ResponseTimeoutError,
    ShimError,
    VMRequest,
    VMRequestOp,
    VMShimServer,
    check_shim_response,
    dial_pipe,
    issue_vm_request,
    list_containers,
    read_container,
    request_container,
    safe_pipe_path,
    shim_pipe_path,
    vm_pipe_path,
)

HERE = os.path.dirname(os.path.abspath(__file__))
WINDOWS = sys.platform == "win32"
WINE = WINDOWS and hasattr(ctypes.CDLL("ntdll"), "wine_get_version")

needs_pipes = unittest.skipUnless(
    WINDOWS, "needs named pipes: `.ci/wine-python test_vmshim.py` runs it on Linux"
)

SAFE_PREFIX = "\\\\.\\pipe\\ProtectedPrefix\\Administrators\\"
LONG = 30.0  # seconds; longer than anything here takes, unless it hangs
REQUEST = VMRequest("test", VMRequestOp.CREATE_CONTAINER)
NEVER = datetime(1, 1, 1, tzinfo=timezone.utc)


# ---- The raw ends of a pipe ---------------------------------------------------------------------

ERROR_BROKEN_PIPE = 109
ERROR_PIPE_BUSY = 231
ERROR_NO_DATA = 232
ERROR_PIPE_NOT_CONNECTED = 233
ERROR_MORE_DATA = 234
ERROR_PIPE_CONNECTED = 535
STATUS_PENDING = 0x103

PIPE_ACCESS_INBOUND = 1
PIPE_ACCESS_DUPLEX = 3
PIPE_TYPE_BYTE = 0
PIPE_TYPE_MESSAGE = 4
PIPE_READMODE_MESSAGE = 2

kernel32: Any = None

if sys.platform == "win32":
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    HANDLE, DWORD, LPVOID = wintypes.HANDLE, wintypes.DWORD, wintypes.LPVOID
    kernel32.CreateNamedPipeW.restype = HANDLE
    kernel32.CreateNamedPipeW.argtypes = (wintypes.LPCWSTR, *[DWORD] * 6, LPVOID)
    kernel32.CreateFileW.restype = HANDLE
    kernel32.CreateFileW.argtypes = (
        *(wintypes.LPCWSTR, DWORD, DWORD, LPVOID, DWORD, DWORD, HANDLE),
    )
    kernel32.CreateEventW.restype = HANDLE
    kernel32.ReadFile.argtypes = (HANDLE, LPVOID, DWORD, wintypes.LPDWORD, LPVOID)
    kernel32.WriteFile.argtypes = (HANDLE, LPVOID, DWORD, wintypes.LPDWORD, LPVOID)
    kernel32.ConnectNamedPipe.argtypes = (HANDLE, LPVOID)
    kernel32.SetNamedPipeHandleState.argtypes = (HANDLE, wintypes.LPDWORD, LPVOID, LPVOID)
    kernel32.FlushFileBuffers.argtypes = (HANDLE,)
    kernel32.DisconnectNamedPipe.argtypes = (HANDLE,)
    kernel32.CloseHandle.argtypes = (HANDLE,)


def win_error() -> OSError:
    if sys.platform == "win32":
        return ctypes.WinError(ctypes.get_last_error())
    raise AssertionError("no pipe without Windows")


def winerror(error: BaseException) -> int:
    """Return error.winerror, which only Windows knows."""
    number: int = getattr(error, "winerror", 0)
    return number


class RawPipe:
    """One end of a pipe, blocking and without any care: the other half of each test."""

    def __init__(self, handle: int) -> None:
        if handle in (None, ctypes.c_void_p(-1).value):
            raise win_error()
        self.handle = handle

    @classmethod
    def listen(
        cls,
        path: str,
        *,
        access: int = PIPE_ACCESS_DUPLEX,
        mode: int = PIPE_TYPE_MESSAGE,
        buffers: int = 4096,
    ) -> RawPipe:
        return cls(kernel32.CreateNamedPipeW(path, access, mode, 255, buffers, buffers, 0, None))

    @classmethod
    def dial(cls, path: str) -> RawPipe:
        for _ in range(3000):
            try:
                return cls(kernel32.CreateFileW(path, 0xC0000000, 0, None, 3, 0, None))
            except OSError as error:
                if winerror(error) != ERROR_PIPE_BUSY:
                    raise
            time.sleep(0.01)
        raise AssertionError("the pipe stays busy")

    def connect(self) -> None:
        if not kernel32.ConnectNamedPipe(self.handle, None):
            error = win_error()
            if winerror(error) not in (ERROR_PIPE_CONNECTED, ERROR_NO_DATA):
                raise error

    def read(self, size: int = 65536) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        count = wintypes.DWORD()
        if not kernel32.ReadFile(self.handle, buffer, size, ctypes.byref(count), None):
            error = win_error()
            if winerror(error) == ERROR_BROKEN_PIPE:
                return b""
            raise error
        return buffer.raw[: count.value]

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def write(self, data: bytes) -> None:
        count = wintypes.DWORD()
        if not kernel32.WriteFile(self.handle, data, len(data), ctypes.byref(count), None):
            raise win_error()

    def flush(self) -> None:
        kernel32.FlushFileBuffers(self.handle)

    def disconnect(self) -> None:
        kernel32.DisconnectNamedPipe(self.handle)

    def close(self) -> None:
        if self.handle:
            kernel32.CloseHandle(self.handle)
            self.handle = 0


def new_pipe_path() -> str:
    return rf"\\.\pipe\vmshim-test-{uuid.uuid4()}"


def lowest_free_handle() -> int:
    """Windows and Wine hand out the lowest free handle value: with no leak it does not grow."""
    handle: int = kernel32.CreateEventW(None, True, False, None)
    kernel32.CloseHandle(handle)
    return handle


def readme_example(part: str) -> str:
    """Return the README's Python example with this part."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as readme:
        [example] = [code for code in readme.read().split("```")[1::2] if part in code]
    language, _, code = example.partition("\n")
    assert language == "python", language
    return code


class PipeCase(unittest.TestCase):
    """Runs the other half of a test in a thread, and sees to it that no thread is left."""

    def setUp(self) -> None:
        self.path = new_pipe_path()
        threads = threading.active_count()
        self.addCleanup(lambda: self.assertEqual(threading.active_count(), threads))

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

    def shim(self, script: Callable[[RawPipe], object], **options: int) -> None:
        """Be the server end for one client: connect, run the script, close."""
        pipe = RawPipe.listen(self.path, **options)

        def serve() -> None:
            try:
                pipe.connect()
                script(pipe)
            finally:
                pipe.close()

        self.run_aside(serve)

    def answering(self, *pieces: bytes, **options: int) -> None:
        """Be a shim that reads the request and answers in these pieces."""

        def script(pipe: RawPipe) -> None:
            pipe.read()
            for piece in pieces:
                pipe.write(piece)

        self.shim(script, **options)

    def request(self, **options: Any) -> None:
        issue_vm_request(self.path, REQUEST, **{"timeout": LONG, **options})


# ---- Names and paths ----------------------------------------------------------------------------

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


class NamesTest(unittest.TestCase):
    def test_safe_path_escapes_as_the_reference_does(self) -> None:
        for name, escaped in SAFE_NAMES.items():
            with self.subTest(name=name):
                self.assertEqual(safe_pipe_path(name), SAFE_PREFIX + escaped)
        for char in map(chr, range(128)):
            with self.subTest(char=char):
                escaped = char if char in SAFE_ASCII else f"%{ord(char):02X}"
                self.assertEqual(safe_pipe_path(char), SAFE_PREFIX + escaped)

    def test_prefix_is_the_reference_s(self) -> None:
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

    def test_what_is_no_guid_is_refused(self) -> None:
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
                with self.subTest(text=text), self.assertRaises(ValueError) as caught:
                    path(text)
                self.assertEqual(str(caught.exception), f'invalid GUID "{text}"')


# ---- Messages -----------------------------------------------------------------------------------

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
    b'{"ID":{},"Op":"create"}',
    b'{"ID":true,"Op":"create"}',
    b'{"ID":"a"',
    b"{'ID':'a'}",
    b'{"ID":"a",}',
    b'{"ID":"a\n","Op":"create"}',
    b'{"ID":NaN}',
    b'{"x":-Infinity}',
    b'\xef\xbb\xbf{"ID":"a","Op":"create"}',
    b'{"x":' + b"[" * 100_000,
]


class RequestTest(unittest.TestCase):
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
        self.assertIs(VMRequest("a", "create").op, VMRequestOp.CREATE_CONTAINER)
        self.assertEqual(
            [op.value for op in VMRequestOp], ["create", "sync", "unmount", "unmount-disk"]
        )

    def test_request_is_immutable(self) -> None:
        with self.assertRaises(AttributeError):
            setattr(REQUEST, "id", "other")
        with self.assertRaises(AttributeError):
            setattr(REQUEST, "other", 1)

    def test_request_survives_pickling(self) -> None:
        self.assertEqual(pickle.loads(pickle.dumps(REQUEST)), REQUEST)

    def test_id_with_a_lone_surrogate_is_not_encoded(self) -> None:
        with self.assertRaises(ValueError):
            VMRequest("\ud800", "create").to_json()


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
EMPTY_STATE = '{"ociVersion":"","id":"","pid":%s,"status":"","bundle":"","rootfs":"",' + (
    '"created":"%s","owner":""}'
)
STATES = [  # JSON, pid, created as the reference writes them again
    ("{}", 0, "0001-01-01T00:00:00Z"),
    ("null", 0, "0001-01-01T00:00:00Z"),
    ('{"pid":-1}', -1, "0001-01-01T00:00:00Z"),
    ('{"created":"2019-05-01T01:02:03.1234567890123Z"}', 0, "2019-05-01T01:02:03.123456789Z"),
    ('{"created":"2019-05-01T01:02:03.100+00:00"}', 0, "2019-05-01T01:02:03.1Z"),
    ('{"created":null,"pid":null,"PID":7}', 7, "0001-01-01T00:00:00Z"),
]
NO_STATES = [
    '{"created":"2019-05-01T01:02:03"}',
    '{"created":"2019-05-01t01:02:03z"}',
    '{"created":""}',
    '{"created":"2019-05-01T24:00:00Z"}',
    '{"created":"2019-02-30T00:00:00Z"}',
    '{"created":"2019-05-01T01:02:03.Z"}',
    '{"created":"2019-05-01T01:02:03Z\\n"}',
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


class ContainerStateTest(unittest.TestCase):
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

    def test_indented_json_is_read(self) -> None:
        text = json.dumps(json.loads(STATE_JSON % "2022-12-12T20:30:15Z"), indent=2)
        created = datetime(2022, 12, 12, 20, 30, 15, tzinfo=timezone.utc)
        self.assertEqual(ContainerState.from_json(text), STATE._replace(created=created))

    def test_annotations_are_sorted_and_stand_before_the_owner(self) -> None:
        wire = (EMPTY_STATE % (0, "0001-01-01T00:00:00Z")).replace(
            ',"owner"', ',"annotations":{"A":"<","b":"","é":"2"},"owner"'
        )
        wire = wire.replace("<", "\\u003c")
        state = ContainerState(annotations={"é": "2", "b": "", "A": "<"})
        self.assertEqual(state.to_json().decode(), wire)
        self.assertEqual(ContainerState.from_json(wire), state)
        self.assertEqual(ContainerState.from_json(wire.replace('"b":""', '"b":null')), state)

    def test_naive_time_or_a_nanosecond_out_of_range_is_not_encoded(self) -> None:
        for state in (
            ContainerState(created=datetime(2022, 12, 12)),
            ContainerState(created_nanosecond=1000),
            ContainerState(created_nanosecond=-1),
            ContainerState(id="\ud800"),
        ):
            with self.subTest(state=state), self.assertRaises(ValueError):
                state.to_json()


# ---- Errors and the answer ----------------------------------------------------------------------

ERRORS = [
    b"\0OK",
    b"\0OK\0\0",
    b"\0OK\0\0OK\0",
    b"OK\0",
    b"boom\n",
    b"\xff\xfe bad utf8",
    b"\0",
]


def child(code: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python of our own kind that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


class ResponseTest(unittest.TestCase):
    def child(self, code: str) -> subprocess.Popen[bytes]:
        process = child(code)
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        return process

    def refusal(self, *arguments: Any, **options: Any) -> ShimError:
        with self.assertRaises(ShimError) as caught:
            check_shim_response(*arguments, **options)
        return caught.exception

    def test_the_four_bytes_are_success(self) -> None:
        check_shim_response(io.BytesIO(b"\0OK\0"))

    def test_anything_else_is_the_error_s_text(self) -> None:
        for response in ERRORS:
            with self.subTest(response=response):
                error = self.refusal(io.BytesIO(response))
                self.assertEqual(error.response, response)
                self.assertEqual(error.message, response.decode("utf-8", "replace"))
                self.assertIsNone(error.exit_code)

    def test_error_s_str_has_no_trailing_newline(self) -> None:
        self.assertEqual(str(self.refusal(io.BytesIO(b"boom\r\n"))), "boom")

    def test_empty_answer_is_an_unknown_failure(self) -> None:
        error = self.refusal(io.BytesIO())
        self.assertEqual((str(error), error.response), ("unknown shim failure", b""))

    def test_answer_in_pieces_is_put_together(self) -> None:
        pieces = iter([b"\0", b"OK", b"\0"])
        pipe = mock.Mock(read=lambda size: next(pieces, b""))
        check_shim_response(pipe)

    def test_answer_beyond_the_limit_is_an_error_and_is_not_read_to_its_end(self) -> None:
        pipe = io.BytesIO(b"x" * (1 << 21))
        error = self.refusal(pipe)
        self.assertRegex(str(error), r"^the answer is longer than 1048576 bytes; .* x{200}$")
        self.assertEqual(pipe.tell(), (1 << 20) + 1)
        self.assertEqual(self.refusal(io.BytesIO(b"x" * (1 << 20))).message, "x" * (1 << 20))
        self.assertRegex(str(self.refusal(io.BytesIO(b"boom"), max_response=3)), "longer than 3")
        self.assertEqual(self.refusal(io.BytesIO(b"boom"), max_response=4).message, "boom")

    def test_pipe_that_would_block_is_an_error_and_no_end_of_file(self) -> None:
        with self.assertRaises(BlockingIOError):
            check_shim_response(mock.Mock(read=lambda size: None))

    def test_error_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(ShimError("boom\n", b"boom\n", 5)))
        self.assertEqual((error.message, error.response, error.exit_code), ("boom\n", b"boom\n", 5))

    def test_child_that_succeeds_lives_on(self) -> None:
        process = self.child(
            "import os, sys; os.write(1, b'\\0OK\\0'); os.close(1); sys.stdin.read(); sys.exit(7)"
        )
        assert process.stdout and process.stdin
        check_shim_response(process.stdout, process)
        self.assertIsNone(process.poll())
        process.stdin.close()
        self.assertEqual(process.wait(LONG), 7)

    def test_child_that_fails_is_killed_and_reaped(self) -> None:
        process = self.child(
            "import os, sys; os.write(1, b'no memory\\n'); os.close(1); sys.stdin.read()"
        )
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "no memory")
        self.assertIsNotNone(process.returncode)
        self.assertEqual(error.exit_code, process.returncode)

    def test_child_that_dies_without_a_word_tells_its_exit_code(self) -> None:
        process = self.child("import sys; sys.exit(3)")
        process.wait(LONG)
        error = self.refusal(process.stdout, process)
        self.assertEqual(str(error), "unknown shim failure, exit code 3")
        self.assertEqual((error.exit_code, error.response), (3, b""))

    def test_child_is_killed_when_reading_fails_or_is_interrupted(self) -> None:
        for failure in OSError("broken"), KeyboardInterrupt():
            process = self.child("import sys; sys.stdin.read()")
            with self.subTest(failure=failure), self.assertRaises(type(failure)):
                check_shim_response(mock.Mock(read=mock.Mock(side_effect=failure)), process)
            self.assertIsNotNone(process.returncode)


# ---- A pipe as a file ---------------------------------------------------------------------------


class BadInputTest(unittest.TestCase):
    """Refused before anything is opened: on every platform alike."""

    def test_path_that_is_no_pipe_path_is_refused(self) -> None:
        for path in (
            "",
            "pipe",
            r"C:\pipe\x",
            r"\\.\pipe",
            "\\\\.\\pipe\\",
            r"\\.\mailslot\x",
            r"\\.\x\pipe\y",
            "//./pipe/x",
            "\\\\.\\pipe\\a\0b",
            "\\\\.\\pipe\\a\ud800",
        ):
            for call in (
                lambda: dial_pipe(path),
                lambda: issue_vm_request(path, REQUEST),
                lambda: VMShimServer(path, print),
            ):
                with self.subTest(path=path), self.assertRaises(ValueError):
                    call()

    def test_timeout_that_is_negative_or_nan_is_refused(self) -> None:
        path = new_pipe_path()
        for seconds in -1, -0.001, math.nan, -math.inf:
            for call in (
                lambda: dial_pipe(path, timeout=seconds),
                lambda: issue_vm_request(path, REQUEST, connect_timeout=seconds),
                lambda: issue_vm_request(path, REQUEST, timeout=seconds),
                lambda: VMShimServer(path, print, request_timeout=seconds),
            ):
                with self.subTest(seconds=seconds), self.assertRaises(ValueError):
                    call()

    def test_request_that_no_shim_may_see_is_refused(self) -> None:
        for id, op, reason in (
            ("a", "bogus", "unknown op 'bogus'; a VM shim knows create, sync, unmount, unmount-"),
            ("a", "", "unknown op"),
            ("a", "CREATE", "unknown op"),
            ("", "create", "the container ID is empty"),
            ("\ud800", "create", "lone surrogate"),
        ):
            with self.subTest(id=id, op=op), self.assertRaisesRegex(ValueError, reason):
                issue_vm_request(new_pipe_path(), VMRequest(id, op))

    def test_what_is_no_text_is_refused(self) -> None:
        wrong: Any = b"bytes"
        for call in (
            lambda: dial_pipe(wrong),
            lambda: safe_pipe_path(wrong),
            lambda: issue_vm_request(new_pipe_path(), VMRequest(wrong, "create")),
        ):
            with self.assertRaisesRegex(TypeError, "is a str, not bytes"):
                call()

    @unittest.skipIf(WINDOWS, "this is Windows")
    def test_call_that_needs_a_pipe_says_in_one_line_that_it_needs_windows(self) -> None:
        path = new_pipe_path()
        for call in (
            lambda: dial_pipe(path),
            lambda: issue_vm_request(path, REQUEST),
            lambda: VMShimServer(path, print),
        ):
            with self.assertRaises(OSError) as caught:
                call()
            self.assertEqual(caught.exception.errno, errno.ENOSYS)
            self.assertRegex(str(caught.exception), r"needs Windows, and this is \w+$")


@needs_pipes
class DialTest(PipeCase):
    def check_error(self, error: OSError, kind: type[OSError], number: int, advice: str) -> None:
        self.assertIs(type(error), kind)
        self.assertEqual(winerror(error), number)
        self.assertEqual(error.filename, self.path)
        self.assertRegex(str(error), advice)

    def test_opens_as_the_reference_does(self) -> None:
        self.addCleanup(RawPipe.listen(self.path).close)
        create_file = vmshim._kernel32.CreateFileW
        with mock.patch.object(vmshim._kernel32, "CreateFileW", wraps=create_file) as spy:
            dial_pipe(self.path).close()
        # GENERIC_READ | GENERIC_WRITE, share 0, OPEN_EXISTING, and
        # FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS
        spy.assert_called_once_with(self.path, 0xC0000000, 0, None, 3, 0x40100000, None)

    def test_nobody_listening_is_told_at_once(self) -> None:
        with self.assertRaises(FileNotFoundError) as caught:
            dial_pipe(self.path, timeout=None)
        self.check_error(caught.exception, FileNotFoundError, 2, "no shim listens there")

    def test_access_denied_is_told_at_once_and_takes_an_administrator(self) -> None:
        pipe = RawPipe.listen(self.path, access=PIPE_ACCESS_INBOUND)
        self.addCleanup(pipe.close)
        with self.assertRaises(PermissionError) as caught:
            dial_pipe(self.path, timeout=None)
        self.check_error(caught.exception, PermissionError, 5, "elevated administrator")

    def busy(self) -> RawPipe:
        """Make a pipe whose one instance is taken; return that instance."""
        pipe = RawPipe.listen(self.path)
        client = RawPipe.dial(self.path)
        self.addCleanup(client.close)
        self.addCleanup(pipe.close)
        return pipe

    def test_busy_pipe_is_given_up_after_the_timeout(self) -> None:
        self.busy()
        for timeout in 0, 0.05, 0.25:
            started = time.monotonic()
            with self.assertRaises(PipeBusyError) as caught:
                dial_pipe(self.path, timeout=timeout)
            self.assertGreater(time.monotonic() - started, timeout - 0.001)
            self.check_error(caught.exception, PipeBusyError, 231, "nothing was sent; try again")
            self.assertIsInstance(caught.exception, TimeoutError)

    def test_timeout_of_zero_is_one_attempt(self) -> None:
        self.busy()
        create_file = vmshim._kernel32.CreateFileW
        with mock.patch.object(vmshim._kernel32, "CreateFileW", wraps=create_file) as spy:
            with self.assertRaises(PipeBusyError):
                dial_pipe(self.path, timeout=0)
        self.assertEqual(spy.call_count, 1)

    def test_busy_pipe_is_connected_to_when_an_instance_comes_free(self) -> None:
        self.busy()
        dialled = threading.Event()
        wait = vmshim._kernel32.WaitNamedPipeW

        def tell(*arguments: Any) -> Any:
            dialled.set()
            return wait(*arguments)

        def free() -> None:
            dialled.wait(LONG)
            self.addCleanup(RawPipe.listen(self.path).close)

        self.run_aside(free)
        with mock.patch.object(vmshim._kernel32, "WaitNamedPipeW", tell):
            dial_pipe(self.path, timeout=None).close()

    def test_wait_that_fails_at_once_decides_nothing(self) -> None:
        self.busy()
        tries = itertools.count()

        def no_such_pipe(path: str, milliseconds: int) -> int:
            self.assertGreater(milliseconds, 0)  # 0 is the server's default
            if next(tries) == 3:
                self.addCleanup(RawPipe.listen(self.path).close)
            return 2  # ERROR_FILE_NOT_FOUND, as in some containers

        with mock.patch.object(vmshim._kernel32, "WaitNamedPipeW", no_such_pipe):
            dial_pipe(self.path, timeout=LONG).close()

    def test_wait_is_never_for_0_which_is_the_server_s_default(self) -> None:
        self.busy()
        wait = vmshim._kernel32.WaitNamedPipeW
        with mock.patch.object(vmshim._kernel32, "WaitNamedPipeW", wraps=wait) as spy:
            while not spy.called:  # the time may be over before it comes to that
                with self.assertRaises(PipeBusyError):
                    dial_pipe(self.path, timeout=0.0009)
        self.assertEqual({call.args[1] for call in spy.call_args_list}, {1})

    def test_any_other_error_has_its_number_its_text_and_the_path(self) -> None:
        path = "\\\\.\\pipe\\" + "x" * 300
        with self.assertRaises(OSError) as caught:
            dial_pipe(path)
        self.assertTrue(winerror(caught.exception))
        self.assertEqual(caught.exception.filename, path)
        self.assertTrue(caught.exception.strerror)


@needs_pipes
class PipeTest(PipeCase):
    def pair(self, **options: int) -> tuple[Pipe, RawPipe]:
        """Return the two ends of a pipe: ours, and the raw server's."""
        server = RawPipe.listen(self.path, **options)
        client = dial_pipe(self.path)
        server.connect()
        self.addCleanup(client.close)
        self.addCleanup(server.close)
        client.deadline = time.monotonic() + LONG
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
        with client:
            pass
        self.assertTrue(client.closed)
        client.close()
        for call in lambda: client.read(1), lambda: client.write(b"x"), client.close_write:
            with self.assertRaises(ValueError):
                call()

    def test_what_is_no_bytes_is_not_written(self) -> None:
        client, server = self.pair()
        for wrong in "text", 5, 0, None:
            with self.assertRaises(TypeError):
                client.write(wrong)
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

    def test_disconnecting_is_an_error_and_no_end_of_file(self) -> None:
        client, server = self.pair()
        server.write(b"\0OK\0")
        server.disconnect()
        with self.assertRaises(BrokenPipeError) as caught:
            client.read(10)
        self.assertEqual(winerror(caught.exception), ERROR_PIPE_NOT_CONNECTED)
        self.assertEqual(caught.exception.errno, errno.EPIPE)
        self.assertRegex(str(caught.exception), "outcome is unknown")

    def test_empty_read_and_empty_write_do_nothing(self) -> None:
        client, server = self.pair()
        self.assertEqual((client.read(0), client.write(b"")), (b"", 0))
        server.write(b"data")
        self.assertEqual(client.read(10), b"data")
        client.write(b"x")
        self.assertEqual(server.read(), b"x")

    def test_close_write_is_end_of_file_to_the_reader(self) -> None:
        client, server = self.pair()
        client.close_write()
        self.assertEqual(server.read(), b"")

    @unittest.skipIf(WINE, "Wine hands out partial messages with a count of 0")
    def test_message_that_does_not_fit_is_read_in_parts(self) -> None:
        client, server = self.pair()
        mode = wintypes.DWORD(PIPE_READMODE_MESSAGE)
        kernel32.SetNamedPipeHandleState(client._handle.value, ctypes.byref(mode), None, None)
        server.write(b"message")
        self.assertEqual([client.read(4), client.read(4)], [b"mess", b"age"])

    def test_deadline_ends_a_read(self) -> None:
        client, server = self.pair()
        client.deadline = time.monotonic() + 0.15
        with self.assertRaises(ResponseTimeoutError) as caught:
            client.read(10)
        self.assertGreaterEqual(time.monotonic(), client.deadline)
        self.assertIsInstance(caught.exception, TimeoutError)
        self.assertEqual(winerror(caught.exception), 258)
        self.assertEqual(caught.exception.filename, self.path)
        client.deadline = math.inf
        server.write(b"late")
        self.assertEqual(client.read(10), b"late")

    def test_deadline_ends_a_write(self) -> None:
        for buffers in 0, 4096:
            client, server = self.pair(buffers=buffers)
            client.deadline = time.monotonic() + 0.15
            with self.assertRaises(ResponseTimeoutError):
                client.write(b"x" * (1 << 20))
            client.close()

    def test_deadline_in_the_past_still_takes_what_is_there(self) -> None:
        client, server = self.pair()
        server.write(b"data")
        client.deadline = 0.0
        self.assertEqual(client.read(10), b"data")

    def test_pending_read_does_not_hold_up_a_write(self) -> None:
        client, server = self.pair()
        reading = threading.Event()
        read_file = vmshim._kernel32.ReadFile

        def tell(*arguments: Any) -> Any:
            error = read_file(*arguments)
            reading.set()
            return error

        with mock.patch.object(vmshim._kernel32, "ReadFile", tell):
            reader = self.run_aside(lambda: self.assertEqual(client.read(10), b"answer"))
            self.assertTrue(reading.wait(LONG))
        client.write(b"request")
        self.assertEqual(server.read(), b"request")
        server.write(b"answer")
        reader.join(LONG)

    def test_overlapped_is_laid_out_as_win32_has_it(self) -> None:
        size = ctypes.sizeof(ctypes.c_void_p)
        self.assertEqual(vmshim.OVERLAPPED.hEvent.offset, 2 * size + 8)
        self.assertEqual(ctypes.sizeof(vmshim.OVERLAPPED), 3 * size + 8)

    def test_every_function_has_its_prototype(self) -> None:
        self.assertIsNot(vmshim._kernel32, getattr(ctypes, "windll").kernel32)
        functions = [f for f in vars(vmshim._kernel32).values() if hasattr(f, "argtypes")]
        self.assertGreater(len(functions), 10)
        for function in functions:
            self.assertTrue(function.argtypes, function.__name__)

    def test_operation_that_ended_before_it_was_cancelled_counts(self) -> None:
        client, server = self.pair()
        cancel = vmshim._kernel32.CancelIoEx

        def too_late(handle: Any, operation: Any) -> Any:
            server.write(b"data")
            return cancel(handle, operation)

        client.deadline = 0.0
        with mock.patch.object(vmshim._kernel32, "CancelIoEx", too_late):
            self.assertEqual(client.read(10), b"data")

    def test_nothing_is_pending_after_the_deadline(self) -> None:
        client, _ = self.pair()
        client.deadline = 0.0
        operation = self.read_in_vain(client, ResponseTimeoutError)
        self.assertNotEqual(operation.Internal, STATUS_PENDING)

    def test_nothing_is_pending_after_ctrl_c(self) -> None:
        client, _ = self.pair()
        wait = vmshim._kernel32.WaitForSingleObject
        presses = itertools.chain([KeyboardInterrupt], itertools.repeat(mock.DEFAULT))
        with mock.patch.object(
            vmshim._kernel32, "WaitForSingleObject", wraps=wait, side_effect=presses
        ):
            operation = self.read_in_vain(client, KeyboardInterrupt)
        self.assertNotEqual(operation.Internal, STATUS_PENDING)

    def read_in_vain(self, client: Pipe, ends_in: type[BaseException]) -> Any:
        """Read until that is raised, with a cancellation that takes its time; return the read."""
        read_file, cancel = vmshim._kernel32.ReadFile, vmshim._kernel32.CancelIoEx

        def cancel_late(handle: Any, operation: Any) -> int:
            def late() -> None:
                time.sleep(0.05)
                cancel(handle, operation)

            self.run_aside(late)
            return 0

        with mock.patch.object(vmshim._kernel32, "ReadFile", wraps=read_file) as spy:
            with mock.patch.object(vmshim._kernel32, "CancelIoEx", cancel_late):
                with self.assertRaises(ends_in):
                    client.read(10)
        return spy.call_args.args[-1]

    def test_byte_counts_come_from_get_overlapped_result_alone(self) -> None:
        client, server = self.pair()
        server.write(b"answer")
        calls: dict[str, Callable[[], object]] = {
            "WriteFile": lambda: client.write(b"request"),
            "ReadFile": lambda: client.read(10),
        }
        for name, call in calls.items():
            function = getattr(vmshim._kernel32, name)
            with mock.patch.object(vmshim._kernel32, name, wraps=function) as spy:
                call()
            self.assertIsNone(spy.call_args.args[3])

    def test_pipe_that_is_dropped_is_closed(self) -> None:
        client, server = self.pair()
        before = lowest_free_handle()
        for _ in range(20):
            another = RawPipe.listen(self.path)
            dial_pipe(self.path)
            another.close()
        self.assertLessEqual(lowest_free_handle(), before + 16)


# ---- One request --------------------------------------------------------------------------------

ALL_KINDS = [
    {"mode": mode, "buffers": buffers}
    for mode in (PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE)
    for buffers in (0, 4096)
]


@needs_pipes
class RequestOnAPipeTest(PipeCase):
    def refusal(self, **options: Any) -> ShimError:
        with self.assertRaises(ShimError) as caught:
            self.request(**options)
        return caught.exception

    def test_request_is_one_write_of_the_reference_s_bytes(self) -> None:
        requests = []

        def script(pipe: RawPipe) -> None:
            requests.append(pipe.read())
            pipe.write(SHIM_SUCCESS)

        self.shim(script, mode=PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE)
        self.request()
        self.assertEqual(requests, [b'{"ID":"test","Op":"create"}\n'])

    def test_success_on_every_kind_of_pipe(self) -> None:
        for options in ALL_KINDS:
            with self.subTest(options=options):
                self.answering(SHIM_SUCCESS, **options)
                self.request()

    def test_success_ends_with_a_zero_length_message_and_our_closing(self) -> None:
        def reference(pipe: RawPipe) -> None:
            pipe.read()
            pipe.write(SHIM_SUCCESS)
            pipe.flush()
            pipe.write(b"")
            self.assertEqual(pipe.read_all(), b"")  # it serves nobody until we close

        for buffers in 0, 4096:
            self.shim(reference, buffers=buffers)
            self.request()

    def test_error_text_on_every_kind_of_pipe(self) -> None:
        for options in ALL_KINDS:
            with self.subTest(options=options):
                self.answering("é: boom\n".encode(), **options)
                error = self.refusal()
                self.assertEqual((str(error), error.response), ("é: boom", "é: boom\n".encode()))
                self.assertIsNone(error.exit_code)

    def test_answer_that_is_not_exactly_the_four_bytes_is_an_error(self) -> None:
        for answer in ERRORS:
            with self.subTest(answer=answer):
                self.answering(answer)
                self.assertEqual(self.refusal().response, answer)

    def test_empty_answer_is_an_unknown_failure(self) -> None:
        self.answering()
        self.assertEqual(str(self.refusal()), "unknown shim failure")
        self.answering(b"")
        self.assertEqual(str(self.refusal()), "unknown shim failure")

    def test_answer_in_many_pieces_is_put_together(self) -> None:
        for options in ALL_KINDS:
            with self.subTest(options=options):
                self.answering(b"\0", b"O", b"K", b"\0", **options)
                self.request()
                self.answering(*[b"piece "] * 500, **options)
                self.assertEqual(self.refusal().message, "piece " * 500)

    def test_answer_of_a_mebibyte_is_read_and_a_longer_one_is_cut_off(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.read()
            with contextlib.suppress(OSError):
                for _ in range(size // 4096):
                    pipe.write(b"x" * 4096)
                pipe.write(b"x" * (size % 4096))

        for size in (1 << 20), (1 << 20) + 1, 1 << 22:
            for mode in PIPE_TYPE_BYTE, PIPE_TYPE_MESSAGE:
                self.shim(script, mode=mode) if size % 4096 else self.shim(
                    lambda pipe: self.long_answer(pipe, size), mode=mode
                )
                error = self.refusal()
                self.assertEqual(len(error.response), min(size, (1 << 20) + 1))
                self.assertEqual("is longer than" in str(error), size > 1 << 20)
        self.answering(b"boom")
        self.assertRegex(str(self.refusal(max_response=3)), "longer than 3 bytes")

    def long_answer(self, pipe: RawPipe, size: int) -> None:
        pipe.read()
        with contextlib.suppress(OSError):
            pipe.write(b"x" * size)

    def test_server_that_closes_before_reading_is_a_broken_pipe(self) -> None:
        closed = threading.Event()
        dialled = threading.Event()

        def script(pipe: RawPipe) -> None:
            dialled.wait(LONG)
            pipe.close()
            closed.set()

        self.shim(script)
        write_file = vmshim._kernel32.WriteFile

        def late(*arguments: Any) -> Any:
            dialled.set()
            closed.wait(LONG)
            return write_file(*arguments)

        with mock.patch.object(vmshim._kernel32, "WriteFile", late):
            with self.assertRaises(BrokenPipeError) as caught:
                self.request()
        self.assertIn(winerror(caught.exception), (ERROR_NO_DATA, ERROR_BROKEN_PIPE))
        self.assertEqual(caught.exception.filename, self.path)
        self.assertRegex(str(caught.exception), "check that the shim is running")

    def test_server_that_closes_while_reading_is_a_broken_pipe(self) -> None:
        self.shim(lambda pipe: pipe.read(5), mode=PIPE_TYPE_BYTE, buffers=0)
        with self.assertRaises((BrokenPipeError, ShimError)) as caught:
            self.request()
        if isinstance(caught.exception, ShimError):  # the request fitted into a buffer
            self.assertEqual(str(caught.exception), "unknown shim failure")

    def test_server_that_closes_while_writing_is_an_error(self) -> None:
        self.answering(b"\0O")
        self.assertEqual(self.refusal().response, b"\0O")

    def test_server_that_disconnects_is_a_broken_pipe_with_unknown_outcome(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.read()
            pipe.write(b"\0")
            pipe.flush()
            pipe.disconnect()

        self.shim(script)
        with self.assertRaises(BrokenPipeError) as caught:
            self.request()
        self.assertRegex(str(caught.exception), "outcome is unknown")

    def test_server_that_never_answers_is_a_timeout_with_unknown_outcome(self) -> None:
        for answer in b"", b"\0OK\0":
            gone = threading.Event()

            def script(pipe: RawPipe, answer: bytes = answer, gone: Any = gone) -> None:
                pipe.read()
                if answer:
                    pipe.write(answer)  # but no end of file
                gone.wait(LONG)

            self.shim(script)
            with self.assertRaises(ResponseTimeoutError) as caught:
                self.request(timeout=0.2)
            gone.set()
            self.assertRegex(str(caught.exception), "outcome is unknown")

    def test_server_that_never_reads_is_a_timeout_too(self) -> None:
        gone = threading.Event()
        self.shim(lambda pipe: gone.wait(LONG), buffers=0)
        with self.assertRaises(ResponseTimeoutError):
            issue_vm_request(self.path, VMRequest("x" * 100_000, "create"), timeout=0.2)
        gone.set()

    def test_server_that_never_frees_an_instance_is_busy_and_nothing_is_sent(self) -> None:
        pipe = RawPipe.listen(self.path)
        client = RawPipe.dial(self.path)
        for connect_timeout in 0, 0.2:
            with self.assertRaises(PipeBusyError):
                self.request(connect_timeout=connect_timeout)
        client.close()
        self.assertEqual(pipe.read(), b"")
        pipe.close()

    def test_nobody_listening_is_file_not_found(self) -> None:
        with self.assertRaises(FileNotFoundError):
            self.request(connect_timeout=None)

    def test_ctrl_c_ends_the_wait_for_an_answer(self) -> None:
        interrupted = []
        gone = threading.Event()

        def script(pipe: RawPipe) -> None:
            pipe.read()
            interrupted.append(time.monotonic())
            _thread.interrupt_main()
            gone.wait(LONG)

        before = lowest_free_handle()
        self.shim(script)
        with self.assertRaises(KeyboardInterrupt):
            self.request()
        self.assertLess(time.monotonic() - interrupted[0], 1.0)  # 0.2 s, on a machine at leisure
        gone.set()
        self.doCleanups()
        self.assertLessEqual(lowest_free_handle(), before)

    def test_ctrl_c_ends_the_wait_for_an_instance(self) -> None:
        pipe = RawPipe.listen(self.path)
        client = RawPipe.dial(self.path)
        interrupted = []
        waiting = threading.Event()
        wait = vmshim._kernel32.WaitNamedPipeW

        def tell(*arguments: Any) -> Any:
            waiting.set()
            return wait(*arguments)

        def interrupt() -> None:
            waiting.wait(LONG)
            interrupted.append(time.monotonic())
            _thread.interrupt_main()

        self.run_aside(interrupt)
        with mock.patch.object(vmshim._kernel32, "WaitNamedPipeW", tell):
            with self.assertRaises(KeyboardInterrupt):
                self.request(connect_timeout=None)
        self.assertLess(time.monotonic() - interrupted[0], 1.0)
        client.close()
        pipe.close()

    def test_one_debug_line_a_request(self) -> None:
        self.answering(SHIM_SUCCESS)
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.request()
        self.assertEqual(len(logs.output), 1)
        for part in self.path, "'test'", " create: ", " done ", " ms":
            self.assertIn(part, logs.output[0])
        self.answering(b"boom")
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            self.refusal()
        self.assertEqual(len(logs.output), 1)
        self.assertIn("ShimError: boom", logs.output[0])

    def test_container_shim_is_sent_nothing_and_answers_on_a_byte_pipe(self) -> None:
        def script(pipe: RawPipe) -> None:
            pipe.write(SHIM_SUCCESS)
            pipe.flush()

        self.shim(script, mode=PIPE_TYPE_BYTE)
        with dial_pipe(self.path) as pipe:
            check_shim_response(pipe)

    def test_nothing_is_left_after_a_thousand_requests(self) -> None:
        first = RawPipe.listen(self.path)

        def serve() -> None:
            pipe = first
            for _ in range(1000):
                pipe.connect()
                pipe.read()
                pipe.write(SHIM_SUCCESS)
                following = RawPipe.listen(self.path)
                pipe.close()
                pipe = following
            pipe.close()

        self.run_aside(serve)
        for _ in range(10):
            self.request()
        handle = lowest_free_handle()
        for _ in range(990):
            self.request()
        self.assertLessEqual(lowest_free_handle(), handle + 8)  # the server's two come and go

    def test_sixteen_threads_at_once_are_all_served(self) -> None:
        first = RawPipe.listen(self.path)
        requests = []

        def serve() -> None:
            pipe = first
            for _ in range(160):
                pipe.connect()
                requests.append(VMRequest.from_json(pipe.read()).id)
                pipe.write(SHIM_SUCCESS)
                following = RawPipe.listen(self.path)
                pipe.close()
                pipe = following
            pipe.close()

        def client(number: int) -> None:
            for turn in range(10):
                request = VMRequest(f"{number}.{turn}", "create")
                issue_vm_request(self.path, request, connect_timeout=LONG, timeout=LONG)

        self.run_aside(serve)
        threads = [self.run_aside(functools.partial(client, number)) for number in range(16)]
        for thread in threads:
            thread.join(LONG)
        expected = [f"{number}.{turn}" for number in range(16) for turn in range(10)]
        self.assertEqual(sorted(requests), sorted(expected))


# ---- Server -------------------------------------------------------------------------------------


class ServerCase(PipeCase):
    def start(self, handler: Callable[[VMRequest], object], **options: Any) -> VMShimServer:
        """Start a server that is closed at the test's end, and wait until it serves."""
        server = VMShimServer(self.path, handler, **options)
        self.addCleanup(server.close)
        self.serve(server)
        return server

    def serve(self, server: VMShimServer) -> threading.Thread:
        thread = self.run_aside(server.serve_forever)
        self.addCleanup(server.close)
        return thread

    def ask(self, data: bytes) -> bytes:
        """Send raw bytes and read the answer to its end."""
        client = RawPipe.dial(self.path)
        try:
            client.write(data)
            return client.read_all()
        finally:
            client.close()

    def client_threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "vmshim client"]

    def join_clients(self) -> None:
        """Wait until the server is done with every client that it has."""
        for thread in self.client_threads():
            thread.join(LONG)
            self.assertFalse(thread.is_alive())


def wire(id: str = "test", op: str = "create") -> bytes:
    return VMRequest(id, op).to_json()


@needs_pipes
class ServerTest(ServerCase):
    def test_request_reaches_the_handler_and_success_comes_back(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append)
        self.request()
        self.assertEqual(requests, [REQUEST])
        self.assertIs(requests[0].op, VMRequestOp.CREATE_CONTAINER)

    def test_success_is_the_four_bytes_and_then_a_zero_length_message(self) -> None:
        self.start(lambda request: None)
        client = RawPipe.dial(self.path)
        client.write(wire())
        self.assertEqual(client.read(), b"\0OK\0")
        self.assertEqual(client.read(), b"")
        client.write(b"still there")
        client.close()

    def test_connection_stays_until_the_client_closes(self) -> None:
        self.start(lambda request: None)
        client = RawPipe.dial(self.path)
        client.write(wire())
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        [serving] = self.client_threads()
        serving.join(0.1)
        self.assertTrue(serving.is_alive())
        client.close()
        serving.join(LONG)
        self.assertFalse(serving.is_alive())

    def test_exception_s_text_is_the_answer_and_ends_with_the_connection(self) -> None:
        def refuse(request: VMRequest) -> None:
            raise RuntimeError("é: Not implemented")

        self.start(refuse, request_timeout=None)
        client = RawPipe.dial(self.path)
        client.write(wire())
        self.assertEqual(client.read(), "é: Not implemented".encode())
        self.join_clients()
        with self.assertRaises(OSError):
            client.write(b"nobody there")
        client.close()

    def test_answer_of_a_failure_is_never_empty_and_never_the_four_bytes(self) -> None:
        failures = [ValueError(), ValueError("\0OK\0"), ValueError("\ud800")]

        def refuse(request: VMRequest) -> None:
            raise failures[int(request.id)]

        self.start(refuse)
        self.assertEqual(self.ask(wire("0")), b"ValueError()")
        self.assertEqual(self.ask(wire("1")), b"ValueError('\\x00OK\\x00')")
        self.assertEqual(self.ask(wire("2")), b"\\ud800")

    def test_long_error_text_arrives_whole(self) -> None:
        def refuse(request: VMRequest) -> None:
            raise RuntimeError("x" * 300_000)

        self.start(refuse)
        with self.assertRaises(ShimError) as caught:
            self.request()
        self.assertEqual(len(caught.exception.response), 300_000)

    def test_what_the_reference_decodes_is_accepted(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append)
        accepted = [row for row in DECODED if row[1] and row[2] in ("create", "sync")]
        for data, id, op in accepted:
            with self.subTest(data=data[:60]):
                self.assertEqual(self.ask(data), SHIM_SUCCESS)
                self.assertEqual(requests.pop(), (id, op))

    def test_request_in_many_pieces_is_put_together(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append)
        client = RawPipe.dial(self.path)
        for byte in b' {"x":[{"y":"}]\\"}"}],"ID":"\xc3\xa9","Op":"create"}':
            client.write(bytes([byte]))
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        client.close()
        self.assertEqual(requests, [("é", "create")])

    def test_what_is_no_request_gets_an_error_at_once_and_the_server_goes_on(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append, request_timeout=LONG)
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
                self.assertNotIn(self.ask(data), (b"", SHIM_SUCCESS))
        self.assertIn(b"unknown op 'bogus'", self.ask(wire(op="bogus")))
        self.assertIn(b"ID is empty", self.ask(wire(id="")))
        self.assertIn(b"ID is empty", self.ask(b"null"))
        self.request()
        self.assertEqual(requests, [REQUEST])

    def test_client_that_closes_within_a_request_is_forgotten(self) -> None:
        self.start(lambda request: None)
        for data in b"", b"{", b'{"ID":"a"':
            client = RawPipe.dial(self.path)
            if data:
                client.write(data)
            client.close()
        self.request()

    def test_end_of_file_within_a_request_is_answered_with_an_error(self) -> None:
        self.start(lambda request: None, request_timeout=LONG)
        client = RawPipe.dial(self.path)
        client.write(b'{"ID":"a"')
        client.write(b"")
        self.assertNotIn(client.read_all(), (b"", SHIM_SUCCESS))
        client.close()

    def test_silent_or_slow_client_costs_nobody_else_anything_and_is_cut_off(self) -> None:
        self.start(lambda request: None, request_timeout=0.6)
        clients = [RawPipe.dial(self.path) for _ in range(4)]
        clients[1].write(b'{"ID":')
        clients[2].write(b'{"ID":"' + b"x" * 1000)
        self.request(timeout=0.5)
        self.request(timeout=0.5)
        for client in clients:
            self.assertEqual(client.read_all(), b"no complete request came in time")
            client.close()

    def test_request_without_an_end_is_cut_off_after_64_kib(self) -> None:
        self.start(lambda request: None)
        whole = b'{"ID":"a","x":"' + b"x" * 65_504 + b'","Op":"create"}'
        self.assertEqual(len(whole), 65_535)
        self.assertEqual(self.ask(whole), SHIM_SUCCESS)
        client = RawPipe.dial(self.path)
        with contextlib.suppress(BrokenPipeError):  # the server reads no further
            client.write(whole[:40] + b"x" * 70_000)
        self.assertEqual(client.read_all(), b"the request is longer than 65536 bytes")
        client.close()

    def test_client_that_never_closes_holds_nobody_up_and_is_cut_off(self) -> None:
        self.start(lambda request: None, request_timeout=0.4)
        client = RawPipe.dial(self.path)
        client.write(wire())
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        self.request(timeout=LONG)
        self.join_clients()
        with self.assertRaises(OSError):
            client.write(b"too late")
        client.close()

    def test_client_that_never_stops_sending_is_cut_off(self) -> None:
        self.start(lambda request: None, request_timeout=0.3)
        client = RawPipe.dial(self.path)
        client.write(wire())
        with self.assertRaises(OSError):
            while True:
                client.write(b"x" * 4096)
        client.close()

    def test_client_that_never_reads_holds_nobody_up_and_is_cut_off(self) -> None:
        def carry_out(request: VMRequest) -> None:
            if request.id == "fail":
                raise RuntimeError("x" * 100_000)

        self.start(carry_out, request_timeout=0.3)
        clients = [RawPipe.dial(self.path) for _ in range(2)]
        clients[0].write(wire())
        clients[1].write(wire("fail"))
        self.request(timeout=LONG)
        self.join_clients()
        for client in clients:
            client.close()

    def test_answer_waits_for_a_client_that_reads_late(self) -> None:
        def carry_out(request: VMRequest) -> None:
            if request.id == "fail":
                raise RuntimeError("boom")

        self.start(carry_out, request_timeout=None)
        success, failure = dial_pipe(self.path), RawPipe.dial(self.path)
        success.deadline = time.monotonic() + LONG
        success.write(wire())
        failure.write(wire("fail"))
        self.request()  # comes last, so the two have been carried out
        self.assertEqual(failure.read_all(), b"boom")
        self.assertEqual(success.read(100), SHIM_SUCCESS)
        self.assertEqual(success.read(100), b"")  # the zero-length message, not the server's end
        success.close()
        failure.close()

    def test_zero_length_message_is_not_written_before_the_answer_has_been_read(self) -> None:
        written = threading.Event()
        close_write = Pipe.close_write

        def tell(pipe: Pipe) -> None:
            written.set()
            close_write(pipe)

        with mock.patch.object(Pipe, "close_write", tell):
            self.start(lambda request: None)
            client = RawPipe.dial(self.path)
            client.write(wire())
            self.assertFalse(written.wait(0.2))
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            self.assertTrue(written.is_set())
        client.close()

    def test_answer_can_be_read_after_the_server_has_closed(self) -> None:
        self.start(lambda request: None, request_timeout=0.2)
        client, garbage = RawPipe.dial(self.path), RawPipe.dial(self.path)
        client.write(wire())
        garbage.write(b"[]")
        self.request()
        self.join_clients()
        self.assertEqual(client.read_all(), SHIM_SUCCESS)
        self.assertIn(b"must be an object", garbage.read_all())
        client.close()
        garbage.close()

    def test_client_that_leaves_after_its_request_does_not_cancel_it(self) -> None:
        entered, done = threading.Event(), threading.Event()
        carried_out = []

        def carry_out(request: VMRequest) -> None:
            entered.set()
            done.wait(LONG)
            carried_out.append(request.id)

        self.start(carry_out)
        clients = []
        for id in "first", "second":
            clients.append(RawPipe.dial(self.path))
            clients[-1].write(wire(id))
            clients[-1].flush()  # until the server has read it
            self.assertTrue(entered.wait(LONG))
        for client in clients:
            client.close()
        done.set()
        issue_vm_request(self.path, VMRequest("third", "create"), timeout=LONG)
        self.assertEqual(carried_out, ["first", "second", "third"])

    def test_requests_are_carried_out_one_at_a_time_in_the_order_of_their_arrival(self) -> None:
        gate = threading.Semaphore(0)
        order, running = [], []

        def carry_out(request: VMRequest) -> None:
            running.append(request.id)
            self.assertEqual(len(running), 1)
            gate.acquire(timeout=LONG)
            order.append(running.pop())

        self.start(carry_out)
        clients = []
        for number in range(2):  # one under way, one waiting
            clients.append(RawPipe.dial(self.path))
            clients[-1].write(wire(str(number)))
        for _ in range(2):
            gate.release()
        for client in clients:
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            client.close()
        self.assertEqual(order, ["0", "1"])

    def test_one_client_may_wait_and_others_see_busy_but_never_not_found(self) -> None:
        entered, done = threading.Event(), threading.Event()

        def carry_out(request: VMRequest) -> None:
            entered.set()
            done.wait(LONG)

        self.start(carry_out)
        first = RawPipe.dial(self.path)
        first.write(wire("first"))
        self.assertTrue(entered.wait(LONG))
        second = RawPipe.dial(self.path)
        second.write(wire("second"))
        for _ in range(20):
            with self.assertRaises(PipeBusyError):
                self.request(connect_timeout=0)
        with self.assertRaises(PipeBusyError):
            self.request(connect_timeout=0.2)
        done.set()
        self.request(connect_timeout=LONG)
        for client in first, second:
            self.assertEqual(client.read_all(), SHIM_SUCCESS)
            client.close()

    def test_clients_see_busy_while_the_server_does_not_serve(self) -> None:
        server = VMShimServer(self.path, lambda request: None)
        with server:
            with self.assertRaises(PipeBusyError):
                self.request(connect_timeout=0)
            self.serve(server)
            self.request(connect_timeout=LONG)
            server.shutdown()
            with self.assertRaises(PipeBusyError):
                self.request(connect_timeout=0)
            thread = self.serve(server)
            self.request(connect_timeout=LONG)
            server.close()
            thread.join(LONG)
        with self.assertRaises(FileNotFoundError):
            self.request()

    def test_name_is_found_between_any_two_requests(self) -> None:
        self.start(lambda request: None)
        self.request()
        stop = threading.Event()
        missing = []

        def probe() -> None:
            while not stop.is_set():
                try:
                    dial_pipe(self.path, timeout=0).close()
                except PipeBusyError:
                    pass
                except FileNotFoundError as error:
                    missing.append(error)

        prober = self.run_aside(probe)
        for _ in range(25):
            self.request(connect_timeout=LONG)
        stop.set()
        prober.join(LONG)
        self.assertEqual(missing, [])

    def test_instances_are_made_as_the_reference_makes_them(self) -> None:
        create = vmshim._kernel32.CreateNamedPipeW
        with mock.patch.object(vmshim._kernel32, "CreateNamedPipeW", wraps=create) as spy:
            self.start(lambda request: None)
            self.request()
        modes = [call.args[1] for call in spy.call_args_list]
        # PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED, and once FILE_FLAG_FIRST_PIPE_INSTANCE
        self.assertEqual(modes[0], 0x40080003)
        self.assertEqual(set(modes[1:]), {0x40000003})
        # PIPE_TYPE_MESSAGE | PIPE_REJECT_REMOTE_CLIENTS, PIPE_UNLIMITED_INSTANCES, 4 KiB buffers
        rest = {call.args[2:] for call in spy.call_args_list}
        self.assertEqual(rest, {(0xC, 255, 4096, 4096, 0, None)})

    @unittest.skipIf(WINE, "Wine does not enforce FILE_FLAG_FIRST_PIPE_INSTANCE")
    def test_name_that_is_taken_is_refused(self) -> None:
        with VMShimServer(self.path, print), self.assertRaises(PermissionError):
            VMShimServer(self.path, print)

    def test_pipe_that_can_t_be_made_is_an_error_with_its_path(self) -> None:
        path = self.path + "x" * 300
        with self.assertRaises(OSError) as caught:
            VMShimServer(path, print)
        self.assertEqual(caught.exception.filename, path)

    def test_client_that_is_faster_than_the_server_s_own_is_served(self) -> None:
        early: list[RawPipe] = []
        dial = vmshim.dial_pipe

        def faster(path: str, **options: Any) -> Pipe:
            if not early:
                early.append(RawPipe.dial(path))
            return dial(path, **options)

        with mock.patch.object(vmshim, "dial_pipe", faster):
            server = VMShimServer(self.path, lambda request: None)
        early[0].write(wire())
        self.serve(server)
        self.assertEqual(early[0].read_all(), SHIM_SUCCESS)
        early[0].close()
        self.request()

    def test_clients_that_come_and_go_are_survived(self) -> None:
        self.start(lambda request: None)
        for _ in range(50):
            RawPipe.dial(self.path).close()
        self.request()

    def test_failure_to_accept_is_logged_and_survived(self) -> None:
        create = vmshim._kernel32.CreateNamedPipeW
        failures = iter([ERROR_NO_DATA, 8])  # a client came and went; out of memory

        def fail(*arguments: Any) -> Any:
            error = next(failures, 0)
            if not error:
                return create(*arguments)
            handle = vmshim._Handle()
            handle.error = error
            return handle

        server = VMShimServer(self.path, lambda request: None)
        with self.assertLogs("vmshim", logging.DEBUG) as logs:
            with mock.patch.object(vmshim._kernel32, "CreateNamedPipeW", fail):
                self.serve(server)
                self.request(connect_timeout=LONG)
        self.assertIn("came and went", logs.output[0])
        self.assertIn("no client accepted", logs.output[1])

    def test_handler_s_exception_is_logged(self) -> None:
        self.start(lambda request: 1 / 0)
        with self.assertLogs("vmshim", logging.INFO) as logs:
            self.assertEqual(self.ask(wire()), b"division by zero")
        self.assertIn("ZeroDivisionError", logs.output[0])

    def test_sixteen_clients_at_once_are_all_served(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append)

        def client(number: int) -> None:
            for turn in range(5):
                request = VMRequest(f"{number}.{turn}", "create")
                issue_vm_request(self.path, request, connect_timeout=LONG, timeout=LONG)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        expected = [f"{number}.{turn}" for number in range(16) for turn in range(5)]
        self.assertEqual(sorted(request.id for request in requests), sorted(expected))

    def test_nothing_is_left_after_many_requests(self) -> None:
        server = VMShimServer(self.path, lambda request: None)
        thread = self.serve(server)
        handles = []
        for _ in range(2):
            for _ in range(150):
                self.request(connect_timeout=LONG)
            self.join_clients()
            handles.append(lowest_free_handle())
        self.assertLessEqual(handles[1], handles[0] + 100)
        server.close()
        thread.join(LONG)


@needs_pipes
class ServerLifeCycleTest(ServerCase):
    def server(self, handler: Callable[[VMRequest], object] = bool, **options: Any) -> VMShimServer:
        server = VMShimServer(self.path, handler, **options)
        self.addCleanup(server.close)
        return server

    def test_shutdown_from_another_thread_ends_serve_forever(self) -> None:
        server = self.server()
        thread = self.serve(server)
        self.request(connect_timeout=LONG)
        server.shutdown()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_shutdown_twice_and_close_twice_return(self) -> None:
        server = self.server()
        thread = self.serve(server)
        self.request(connect_timeout=LONG)
        for call in server.shutdown, server.shutdown, server.close, server.close, server.shutdown:
            call()
        thread.join(LONG)

    def test_shutdown_and_close_return_with_no_accept_under_way(self) -> None:
        server = self.server()
        server.shutdown()
        server.close()
        server.close()

    def test_shutdown_that_comes_first_ends_serve_forever_at_once(self) -> None:
        server = self.server()
        server.shutdown()
        server.serve_forever()
        thread = self.serve(server)
        self.request(connect_timeout=LONG)
        server.shutdown()
        thread.join(LONG)

    def test_shutdown_and_close_from_the_handler_end_it_and_the_answer_arrives(self) -> None:
        for name in "shutdown", "close":
            server = self.server(lambda request: getattr(server, name)())
            thread = self.serve(server)
            self.request(connect_timeout=LONG)
            thread.join(LONG)
            self.assertFalse(thread.is_alive())
            server.close()

    def test_closed_server_does_not_serve(self) -> None:
        server = self.server()
        server.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            server.serve_forever()
        with self.assertRaises(FileNotFoundError):
            self.request()

    def test_server_that_serves_does_not_serve_twice(self) -> None:
        server = self.server()
        self.serve(server)
        self.request(connect_timeout=LONG)
        with self.assertRaisesRegex(RuntimeError, "already"):
            server.serve_forever()

    def test_shutdown_cuts_off_idle_clients_and_tells_the_waiting_one(self) -> None:
        entered, done = threading.Event(), threading.Event()

        def carry_out(request: VMRequest) -> None:
            entered.set()
            done.wait(LONG)

        server = self.server(carry_out, request_timeout=LONG)
        thread = self.serve(server)
        silent = RawPipe.dial(self.path)
        first = RawPipe.dial(self.path)
        first.write(wire("first"))
        self.assertTrue(entered.wait(LONG))
        second = RawPipe.dial(self.path)
        second.write(wire("second"))
        with server._changed:
            self.assertTrue(server._changed.wait_for(lambda: server._waiting, LONG))
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        self.assertEqual(silent.read_all(), b"no complete request came in time")
        self.assertIn(b"stopped before", second.read_all())
        done.set()
        self.assertEqual(first.read_all(), SHIM_SUCCESS)
        stopping.join(LONG)
        thread.join(LONG)
        self.assertFalse(thread.is_alive())
        for client in silent, first, second:
            client.close()

    def test_keyboard_interrupt_and_system_exit_of_the_handler_stop_the_server(self) -> None:
        for kind in KeyboardInterrupt, SystemExit:

            def stop(request: VMRequest, kind: type[BaseException] = kind) -> None:
                raise kind

            server = self.server(stop)
            answers = []
            self.run_aside(lambda: answers.append(self.ask(wire())))
            with self.assertRaises(kind):
                server.serve_forever()
            server.close()
            self.doCleanups()
            self.assertIn(b"stopped before", answers[0])

    def test_ctrl_c_ends_an_idle_server(self) -> None:
        server = self.server()

        def interrupt() -> None:
            self.request(connect_timeout=LONG)
            _thread.interrupt_main()

        self.run_aside(interrupt)
        with self.assertRaises(KeyboardInterrupt):
            server.serve_forever()


# ---- Command line -------------------------------------------------------------------------------

GUID = str(uuid.uuid4())  # another each time, so that two runs of this suite don't meet


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command line; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = vmshim.main(arguments)
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, out.getvalue(), err.getvalue()


class CommandLineTest(unittest.TestCase):
    def test_pipe_path_is_printed(self) -> None:
        self.assertEqual(run("pipe-path", GUID), (0, vm_pipe_path(GUID) + "\n", ""))

    def test_version_is_printed(self) -> None:
        self.assertEqual(run("--version"), (0, f"vmshim {vmshim.__version__}\n", ""))

    def test_help_has_examples_and_exit_statuses(self) -> None:
        status, out, _ = run("--help")
        self.assertEqual(status, 0)
        for part in "examples:", "exit status:", "unmount-disk", "demo":
            self.assertIn(part, out)

    def test_wrong_usage_is_status_2_with_one_clear_line(self) -> None:
        for arguments, message in (
            ((), "required"),
            (("serve",), "--vm"),
            (("create", "--root", "", "a"), "root is empty"),
            (("create", "--vm", GUID, "--pipe", "x", "a"), "not allowed with"),
            (("create", "--vm", GUID), "ID"),
            (("create", "--vm", "nope", "a"), 'invalid GUID "nope"'),
            (("create", "--pipe", "nope", "a"), "'nope' is no pipe path"),
            (("create", "--vm", GUID, ""), "ID is empty"),
            (("create", "--vm", GUID, "--timeout", "-1", "a"), "timeout"),
            (("create", "--vm", GUID, "--timeout", "nan", "a"), "timeout"),
            (("create", "--vm", GUID, "--connect-timeout", "x", "a"), "invalid float value"),
            (("pipe-path", "nope"), 'invalid GUID "nope"'),
            (("destroy", "a"), "invalid choice"),
        ):
            with self.subTest(arguments=arguments):
                status, out, err = run(*arguments)
                self.assertEqual((status, out), (2, ""))
                self.assertIn(message, err.splitlines()[-1])

    @unittest.skipIf(WINDOWS, "this is Windows")
    def test_other_platform_is_told_in_one_line(self) -> None:
        for arguments, what in (
            (("create", "--vm", GUID, "a"), "a runhcs pipe"),
            (("create", "a"), "runhcs's state"),
            (("list",), "runhcs's state"),
        ):
            status, out, err = run(*arguments)
            self.assertEqual((status, out), (3, ""))
            self.assertRegex(err, rf"^{what} needs Windows, and this is \w+\n$")


@needs_pipes
class CommandLineOnAPipeTest(ServerCase):
    def test_each_op_is_sent_and_success_is_silent(self) -> None:
        requests: list[VMRequest] = []
        self.start(requests.append)
        for op in VMRequestOp:
            self.assertEqual(run(op.value, "--pipe", self.path, "é"), (0, "", ""))
            self.assertEqual(requests.pop(), ("é", op))

    def test_vm_is_found_by_its_guid(self) -> None:
        guid = str(uuid.uuid4())
        self.path = vm_pipe_path(guid)
        self.start(lambda request: None)
        self.assertEqual(run("create", "--vm", guid, "a"), (0, "", ""))

    def refuse(self, request: VMRequest) -> None:
        raise RuntimeError("no such container\n")

    def test_refusal_is_status_1_with_its_text(self) -> None:
        self.start(self.refuse)
        self.assertEqual(run("create", "--pipe", self.path, "a"), (1, "", "no such container\n"))

    def test_nobody_listening_is_status_3(self) -> None:
        status, out, err = run("create", "--pipe", self.path, "a")
        self.assertEqual((status, out), (3, ""))
        self.assertEqual(err.count("\n"), 1)
        self.assertIn(self.path, err)

    def test_access_denied_is_status_4(self) -> None:
        self.addCleanup(RawPipe.listen(self.path, access=PIPE_ACCESS_INBOUND).close)
        status, _, err = run("create", "--pipe", self.path, "a")
        self.assertEqual(status, 4)
        self.assertIn("elevated administrator", err)

    def test_busy_is_status_5(self) -> None:
        self.addCleanup(RawPipe.listen(self.path).close)
        self.addCleanup(RawPipe.dial(self.path).close)
        status, _, err = run("create", "--pipe", self.path, "--connect-timeout", "0.1", "a")
        self.assertEqual(status, 5)
        self.assertIn("nothing was sent", err)

    def test_no_answer_in_time_or_a_cut_connection_is_status_6(self) -> None:
        gone = threading.Event()
        self.shim(lambda pipe: gone.wait(LONG))
        status, _, err = run("create", "--pipe", self.path, "--timeout", "0.1", "a")
        gone.set()
        self.assertEqual(status, 6)
        self.assertIn("outcome is unknown", err)

        def cut(pipe: RawPipe) -> None:
            pipe.read()
            pipe.disconnect()

        self.shim(cut)
        self.assertEqual(run("create", "--pipe", self.path, "a")[0], 6)

    def test_ctrl_c_is_status_130(self) -> None:
        gone = threading.Event()

        def script(pipe: RawPipe) -> None:
            pipe.read()
            _thread.interrupt_main()
            gone.wait(LONG)

        self.shim(script)
        self.assertEqual(run("create", "--pipe", self.path, "a"), (130, "", ""))
        gone.set()

    def test_serve_prints_each_request_until_ctrl_c(self) -> None:
        serving = threading.Event()
        serve_forever = VMShimServer.serve_forever

        def tell(server: VMShimServer) -> None:
            serving.set()
            serve_forever(server)

        def ask() -> None:
            serving.wait(LONG)
            self.request()
            _thread.interrupt_main()

        self.run_aside(ask)
        with mock.patch.object(VMShimServer, "serve_forever", tell):
            status, out, err = run("serve", "--pipe", self.path)
        self.assertEqual((status, out), (130, "create test\n"))
        self.assertEqual(err, f"serving {self.path} until Ctrl-C\n")

    def test_serve_that_cannot_have_its_pipe_says_so_in_one_line(self) -> None:
        path = self.path + "x" * 300
        status, out, err = run("serve", "--pipe", path)
        self.assertEqual((status, out), (3, ""))
        self.assertTrue(err.startswith(f"{path}: "))
        self.assertEqual(err.count("\n"), 1)

    def test_json_is_one_object_for_success_and_for_failure(self) -> None:
        server = self.start(lambda request: None)
        status, out, err = run("unmount", "--pipe", self.path, "--json", "é")
        self.assertEqual((status, err), (0, ""))
        outcome = json.loads(out)
        self.assertGreaterEqual(outcome.pop("elapsed_ms"), 0)
        expected = {"id": "é", "op": "unmount", "pipe": self.path, "ok": True, "error": None}
        self.assertEqual(outcome, expected)
        server.handler = self.refuse
        status, out, err = run("unmount", "--pipe", self.path, "--json", "é")
        self.assertEqual((status, err), (1, "no such container\n"))
        outcome = json.loads(out)
        del outcome["elapsed_ms"]
        self.assertEqual(outcome, {**expected, "ok": False, "error": "no such container"})

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

        self.shim(script)
        with mock.patch.object(sys, "stderr", Terminal()) as terminal:
            self.assertEqual(vmshim.main(["create", "--pipe", self.path, "a"]), 0)
        line = "waiting for the VM shim: 1 s"
        self.assertEqual(terminal.getvalue(), f"\r{line}\r{' ' * len(line)}\r")

    def test_demo_shows_both_ways_of_success_and_refusal(self) -> None:
        status, out, err = run("demo")
        self.assertEqual((status, err), (0, ""))
        for part in (
            r"""b'{"ID":"demo","Op":"create"}\n'""",
            r"b'\x00OK\x00'",
            r"""b'{"ID":"demo","Op":"sync"}\n'""",
            "b'Not implemented'",
        ):
            self.assertIn(part, out)


@needs_pipes
class ProcessTest(ServerCase):
    """The command line as a process of its own."""

    def start_process(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, vmshim.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        return process

    def test_verbose_request_logs_one_line_to_stderr(self) -> None:
        self.start(lambda request: None)
        process = self.start_process("create", "--pipe", self.path, "-v", "a")
        out, err = process.communicate(timeout=LONG)
        self.assertEqual((process.returncode, out), (0, ""))
        self.assertRegex(err, r"^vmshim: .*: 'a' create: done \(\d+\.\d ms\)\n$")

    def test_serve_prints_each_request_and_refuses_with_the_given_text(self) -> None:
        process = self.start_process("serve", "--pipe", self.path, "--fail", "out of disks")
        assert process.stdout and process.stderr
        self.assertEqual(process.stderr.readline(), f"serving {self.path} until Ctrl-C\n")
        with self.assertRaisesRegex(ShimError, "^out of disks$"):
            issue_vm_request(self.path, VMRequest("é", "unmount"), connect_timeout=LONG)
        self.assertEqual(process.stdout.readline(), "unmount \\xe9\n")

    def test_server_s_name_is_gone_with_its_process(self) -> None:
        process = self.start_process("serve", "--pipe", self.path)
        assert process.stderr
        process.stderr.readline()
        self.request(connect_timeout=LONG)
        process.kill()
        process.wait(LONG)
        with self.assertRaises(FileNotFoundError):
            self.request()

    def test_library_prints_nothing_and_imports_no_logging(self) -> None:
        def refuse(request: VMRequest) -> None:
            raise RuntimeError("no")

        self.start(refuse)
        process = child(
            f"""
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
        )
        self.addCleanup(process.__exit__, None, None, None)
        self.assertEqual(process.communicate(timeout=LONG), (b"", b""))
        self.assertEqual(process.returncode, 0)


# ---- runhcs's own state -------------------------------------------------------------------------

RUNHCS = r"SOFTWARE\Microsoft\runhcs"
NO_GUID = "00000000-0000-0000-0000-000000000000"


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
        had_runhcs = self.exists(RUNHCS)
        try:
            self.create(self.root_key)
        except PermissionError:
            self.skipTest("needs an elevated administrator to write to the registry")
        if not had_runhcs:
            self.addCleanup(self.delete_runhcs)
        self.addCleanup(self.delete_root)

    def exists(self, path: str) -> bool:
        try:
            self.winreg.OpenKey(self.winreg.HKEY_LOCAL_MACHINE, path, 0, 0x20119).Close()
        except FileNotFoundError:
            return False
        return True

    def create(self, path: str) -> Any:
        access = self.winreg.KEY_ALL_ACCESS | self.winreg.KEY_WOW64_64KEY
        return self.winreg.CreateKeyEx(self.winreg.HKEY_LOCAL_MACHINE, path, 0, access)

    def delete(self, path: str) -> None:
        access = self.winreg.KEY_WOW64_64KEY
        self.winreg.DeleteKeyEx(self.winreg.HKEY_LOCAL_MACHINE, path, access, 0)

    def delete_runhcs(self) -> None:
        with contextlib.suppress(OSError):  # another run of this suite may be using it
            self.delete(RUNHCS)

    def delete_root(self) -> None:
        with self.create(self.root_key) as key:
            names = vmshim._subkeys(key)
        for name in names:
            self.delete(f"{self.root_key}\\{name}")
        self.delete(self.root_key)

    def write(self, name: str, state: Any = None, kind: str = "REG_BINARY", **values: int) -> None:
        """Write a container's key: its state (JSON of a dict, or as it is), and QWORDs."""
        if isinstance(state, dict):
            state = json.dumps(state).encode()
        with self.create(f"{self.root_key}\\{name}") as key:
            if state is not None:
                self.winreg.SetValueEx(key, "state", 0, getattr(self.winreg, kind), state)
            for value, number in values.items():
                self.winreg.SetValueEx(key, value, 0, self.winreg.REG_QWORD, number)

    def state(self, id: str, guid: str = NO_GUID, **more: Any) -> dict[str, Any]:
        vm = {} if guid == NO_GUID else {"HostID": f"vm of {id}"}
        return {
            "ID": id,
            "Created": "2019-05-01T01:02:03.1234567Z",
            "UniqueID": GUID,
            "HostUniqueID": guid,
            **vm,
            **more,
        }

    def read(self, id: str) -> vmshim.Container:
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
        }
        more["Spec"] = {"x": [1.5, None]}
        more["RequestedNetNS"] = ""
        self.write("c", self.state("c", guid, **more), shim=4711, pid=5)
        self.assertEqual(
            self.read("c"),
            vmshim.Container(
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
            ),
        )

    def test_what_may_be_absent_has_a_default(self) -> None:
        self.write("c", {"Created": "2019-05-01T01:02:03Z", "UniqueID": GUID, "HostUniqueID": GUID})
        container = self.read("c")
        self.assertEqual((container.id, container.owner, container.host_id), ("c", "", ""))
        self.assertEqual((container.is_host, container.shim_pid), (False, -1))
        self.write("c", shim=0)
        self.assertEqual(self.read("c").shim_pid, 0)
        self.write("empty", {})
        self.assertEqual(self.read("empty"), vmshim.Container("empty"))

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
            self.write(key, self.state(id))
            self.assertEqual(self.read(id).id, id)
        listed = list_containers(root=self.root)
        self.assertEqual({container.id for container in listed}, set(keys))

    def test_unknown_id_is_told_as_the_reference_tells_it(self) -> None:
        for root in self.root, "no-such-root":
            with self.assertRaises(LookupError) as caught:
                read_container("x", root=root)
            self.assertEqual(str(caught.exception), "ID 'x' was not found")
        self.assertEqual(list_containers(root="no-such-root"), [])

    def test_empty_id_or_root_is_refused(self) -> None:
        with self.assertRaises(ValueError):
            self.read("")
        with self.assertRaises(ValueError):
            read_container("x", root="")
        with self.assertRaises(ValueError):
            list_containers(root="")

    BROKEN = (
        b"{",
        b"[]",
        b"{} {}",
        b'{"Owner":5}',
        b'{"IsHost":1}',
        b'{"UniqueID":"x"}',
        b'{"Created":"x"}',
    )

    def test_broken_state_is_a_clear_error(self) -> None:
        for state in self.BROKEN:
            self.write("c", state)
            with self.assertRaisesRegex(ValueError, "^the state of ID 'c' is broken: ."):
                self.read("c")
        self.write("none", shim=1)
        self.write("text", "{}", kind="REG_SZ")
        for id in "none", "text":
            with self.assertRaisesRegex(LookupError, f"'state' is not present for ID '{id}'"):
                self.read(id)

    def test_broken_entries_are_logged_and_hide_no_others(self) -> None:
        for number, state in enumerate(self.BROKEN):
            self.write(f"broken{number}", state)
        self.write("none")
        self.write("100%", self.state("x"))
        self.write("%FF", self.state("x"))
        self.write("good", self.state("good"))
        with self.assertLogs("vmshim", logging.WARNING) as logs:
            self.assertEqual([c.id for c in list_containers(root=self.root)], ["good"])
        self.assertEqual(len(logs.output), len(self.BROKEN) + 3)
        for name in "'none'", "'100%'", "'%FF'", "'broken0'":
            self.assertEqual(sum(name in line for line in logs.output), 1)

    def test_registry_is_only_read_and_in_its_64_bit_view(self) -> None:
        self.write("c", self.state("c"))
        open_key = self.winreg.OpenKey
        with mock.patch.object(self.winreg, "OpenKey", wraps=open_key) as spy:
            self.read("c")
            list_containers(root=self.root)
        self.assertEqual(spy.call_count, 3)
        for call in spy.call_args_list:
            self.assertEqual(call.args[3], 0x20019 | 0x100)  # KEY_READ | KEY_WOW64_64KEY
        self.assertFalse(self.exists(f"{RUNHCS}\\no-such-root"))

    def test_error_of_the_registry_names_the_key(self) -> None:
        with mock.patch.object(self.winreg, "OpenKey", side_effect=PermissionError(13, "denied")):
            with self.assertRaises(PermissionError) as caught:
                self.read("c")
        self.assertEqual(caught.exception.filename, f"HKEY_LOCAL_MACHINE\\{self.root_key}\\c")

    def test_list_that_breaks_off_is_no_list(self) -> None:
        self.write("c", self.state("c"))
        with mock.patch.object(self.winreg, "EnumKey", side_effect=PermissionError(13, "denied")):
            with self.assertRaises(PermissionError):
                list_containers(root=self.root)


@needs_pipes
class RequestContainerTest(RegistryCase):
    def request_container(self, id: str, **options: Any) -> None:
        request_container(id, "unmount", root=self.root, **options)

    def test_request_goes_to_the_container_s_vm(self) -> None:
        guid = str(uuid.uuid4())
        self.write("a%20b", self.state("a b", guid))
        requests: list[VMRequest] = []
        self.path = vm_pipe_path(guid)
        self.start(requests.append)
        self.request_container("a b", connect_timeout=LONG, timeout=LONG)
        self.assertEqual(requests, [("a b", "unmount")])
        self.assertIs(requests[0].op, VMRequestOp.UNMOUNT_CONTAINER)

    def test_container_without_a_vm_is_told_and_the_zero_guid_is_never_dialled(self) -> None:
        self.write("c", self.state("c"))
        with mock.patch.object(vmshim, "dial_pipe") as spy:
            with self.assertRaisesRegex(LookupError, "^container 'c' runs in no VM"):
                self.request_container("c")
        spy.assert_not_called()

    def test_vm_that_isn_t_there_cannot_be_contacted(self) -> None:
        guid = str(uuid.uuid4())
        self.write("c", self.state("c", guid))
        with self.assertRaises(FileNotFoundError) as caught:
            self.request_container("c")
        self.assertEqual(caught.exception.strerror, "VM vm of c cannot be contacted")
        self.assertEqual(caught.exception.filename, vm_pipe_path(guid))
        self.assertEqual(winerror(caught.exception), 2)

    def test_unknown_container_or_op_is_refused(self) -> None:
        with self.assertRaisesRegex(LookupError, "ID 'x' was not found"):
            self.request_container("x")
        with self.assertRaisesRegex(ValueError, "unknown op"):
            request_container("x", "bogus", root=self.root)

    def test_command_line_finds_the_vm_by_itself(self) -> None:
        guid = str(uuid.uuid4())
        self.write("c", self.state("c", guid))
        self.write("bare", self.state("bare"))
        arguments = ("--root", self.root, "--json", "c")
        status, out, err = run("unmount", *arguments)
        self.assertEqual(
            (status, err), (3, vm_pipe_path(guid) + ": VM vm of c cannot be contacted\n")
        )
        self.path = vm_pipe_path(guid)
        self.start(lambda request: None)
        status, out, err = run("unmount", *arguments)
        self.assertEqual((status, err), (0, ""))
        outcome = json.loads(out)
        self.assertEqual((outcome["pipe"], outcome["ok"]), (self.path, True))
        status, out, err = run("unmount", "--root", self.root, "--json", "bare")
        self.assertEqual(status, 3)
        self.assertIn("runs in no VM", err)
        self.assertIsNone(json.loads(out)["pipe"])
        self.assertEqual(
            run("unmount", "--root", self.root, "x"), (3, "", "ID 'x' was not found\n")
        )

    def test_list_tells_whether_each_shim_listens_and_takes_no_instance(self) -> None:
        free, busy, absent = (str(uuid.uuid4()) for _ in range(3))
        for id, guid in {"f": free, "b": busy, "a": absent, "none": NO_GUID}.items():
            self.write(id, self.state(id, guid, Owner="me"))
        instance = RawPipe.listen(vm_pipe_path(free))
        self.addCleanup(instance.close)
        self.addCleanup(RawPipe.listen(vm_pipe_path(busy)).close)
        self.addCleanup(RawPipe.dial(vm_pipe_path(busy)).close)
        created = "2019-05-01 01:02:03+00:00"
        status, out, err = run("list", "--root", self.root)
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
        status, out, err = run("list", "--root", self.root, "--json")
        rows = json.loads(out)
        self.assertEqual([row["vm_shim"] for row in rows], ["absent", "busy", "free", None])
        self.assertEqual(rows[0]["created"], "2019-05-01T01:02:03.123456Z")
        self.assertEqual(rows[0]["host_unique_id"], absent)
        client = RawPipe.dial(vm_pipe_path(free))  # nobody has taken it
        client.close()

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Launch a shim process by the README's recipe."""
        code = readme_example("--handshake").replace(
            '"--pipe", r"\\\\.\\pipe\\my-shim"', ", ".join(map(repr, arguments))
        )
        names: dict[str, Any] = {}
        start = subprocess.Popen

        def keep(command: list[str], **options: Any) -> Any:
            command = [command[0], vmshim.__file__, *command[2:]]
            shim = start(command, stderr=subprocess.DEVNULL, **options)
            self.addCleanup(shim.wait, LONG)
            self.addCleanup(shim.kill)
            shims.append(shim)
            return shim

        shims: list[subprocess.Popen[bytes]] = []
        with mock.patch.object(subprocess, "Popen", keep):
            exec(code, names)
        return shims[0]

    def test_whole_way_from_the_launch_to_the_end_of_the_child(self) -> None:
        guid = str(uuid.uuid4())
        self.write("c", self.state("c", guid))
        shim = self.launch("--vm", guid)
        self.assertIn(guid, run("list", "--root", self.root)[1])
        self.assertEqual(
            json.loads(run("list", "--root", self.root, "--json")[1])[0]["vm_shim"], "free"
        )
        for _ in range(3):
            self.request_container("c", connect_timeout=LONG, timeout=LONG)
        self.assertIsNone(shim.poll())
        shim.kill()
        shim.wait(LONG)
        with self.assertRaises(FileNotFoundError):
            self.request_container("c")
        self.assertEqual(
            json.loads(run("list", "--root", self.root, "--json")[1])[0]["vm_shim"], "absent"
        )

    def test_launch_that_fails_says_why_and_leaves_no_process(self) -> None:
        with self.assertRaisesRegex(ShimError, "^invalid GUID") as caught:
            self.launch("--vm", "nope")
        self.assertIsNotNone(caught.exception.exit_code)

    def test_options_that_are_no_json_object_fail_the_launch(self) -> None:
        shim = subprocess.Popen(
            [sys.executable, vmshim.__file__, "serve", "--handshake", "--pipe", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        out, _ = shim.communicate(b"[]", timeout=LONG)
        self.assertEqual(out, b"the options on stdin must be an object")
        self.assertNotEqual(shim.returncode, 0)

    def test_container_s_process_is_started_by_connecting(self) -> None:
        """The README's recipe."""
        self.path = shim_pipe_path(GUID)
        code = readme_example("shim_pipe_path")
        for answer in SHIM_SUCCESS, b"no such program":
            self.shim(functools.partial(RawPipe.write, data=answer), mode=PIPE_TYPE_BYTE)
            with child("import sys; sys.stdin.read()") as process:
                names = {"process": process, "unique_id": GUID}
                if answer == SHIM_SUCCESS:
                    exec(code, names)
                    self.assertIsNone(process.poll())
                else:
                    with self.assertRaisesRegex(ShimError, "^no such program$"):
                        exec(code, names)
                    self.assertIsNotNone(process.returncode)

    def test_quick_start_of_the_readme_works(self) -> None:
        requests: list[VMRequest] = []
        self.path = vm_pipe_path(GUID)
        self.start(requests.append)
        self.write("my-container", self.state("my-container", GUID))
        code = readme_example("request_container")
        exec(code.replace("timeout=60", f"timeout=60, root={self.root!r}"), {})
        code = readme_example("vm_pipe_path")
        exec(code.replace("6ba7b810-9dad-11d1-80b4-00c04fd430c8", GUID), {})
        self.assertEqual(requests, [("my-container", "unmount")] * 2)


# ---- Input at random ----------------------------------------------------------------------------

fuzz_cases = 2000
fuzz_seed = 4

PIECES = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"\\ud83d", b"\\ude00", b"\\u0000"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"0", b"-", b".", b"1e999", b"9" * 19, b"7" * 400),
    *(b"\0", b"\0OK\0", b" ", b"\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xf0\x9f\x98"),
    *(b"[" * 3000, b'{"a":' * 3000, b'"ID":"b",', b'"op":"sync",', b'"created":"', b"T24:60:60Z"),
    *("\u017f\u212a\u00df".encode(), b"-9999", b"+23:59", b"0000", b".123456789123"),
]
SEEDS = [
    *(wire for _, _, wire in REQUESTS if len(wire) < 200),
    *((STATE_JSON % text).encode() for text, _ in CREATED),
    *ERRORS,
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


class FuzzTest(unittest.TestCase):
    """Only the documented exceptions ever come out. Any other makes a case an error."""

    def cases(self) -> Iterator[tuple[bytes, random.Random]]:
        for number in range(fuzz_cases):
            chance = random.Random(f"{fuzz_seed} {number}")
            data = fuzzed(chance)
            with self.subTest(seed=fuzz_seed, number=number, data=data[:300]):
                yield data, chance

    def test_messages(self) -> None:
        kinds: tuple[Any, ...] = (VMRequest, ContainerState)
        for kind in kinds:
            read = 0
            for data, _ in self.cases():
                try:
                    message = kind.from_json(data)
                except ValueError:
                    continue
                self.assertEqual(kind.from_json(message.to_json()), message)
                read += 1
            self.assertGreater(read, fuzz_cases // 20, "most cases must not be nonsense")

    def test_answers(self) -> None:
        for data, chance in self.cases():
            try:
                check_shim_response(Trickle(data, chance), max_response=1000)
            except ShimError as error:
                self.assertNotEqual(data, SHIM_SUCCESS)
                self.assertEqual(error.response, data[:1001])
                self.assertTrue(str(error) or not data.strip())
            else:
                self.assertEqual(data, SHIM_SUCCESS)

    def test_requests_that_a_server_reads_bit_by_bit(self) -> None:
        for data, chance in self.cases():
            outcomes: list[VMRequest | None] = []
            for pipe in (io.BytesIO(data), Trickle(data, chance)):
                try:
                    request = vmshim._read_request(pipe)
                    request.check()
                    outcomes.append(request)
                except ValueError:
                    outcomes.append(None)
            self.assertEqual(outcomes[0], outcomes[1])
            if outcomes[0]:
                self.assertEqual(VMRequest.from_json(data), outcomes[0])

    def test_bombs_cost_memory_in_proportion_to_their_size(self) -> None:
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for name, bomb in bombs(10**5):
            pipe = Trickle(bomb, random.Random(name))
            for read in (
                VMRequest.from_json,
                ContainerState.from_json,
                lambda data: check_shim_response(io.BytesIO(data)),
                lambda data: vmshim._read_request(pipe),
            ):
                with self.subTest(bomb=name):
                    tracemalloc.clear_traces()
                    with contextlib.suppress(ValueError, ShimError):
                        read(bomb)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 50 * len(bomb))
            self.assertLess(pipe.taken, vmshim.MAX_REQUEST + 5000)

    def test_bombs_of_a_million_are_defused_and_none_hangs(self) -> None:
        faulthandler.dump_traceback_later(LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        for name, bomb in bombs(10**6):
            with self.subTest(bomb=name), contextlib.suppress(ValueError):
                VMRequest.from_json(bomb)
            with self.subTest(bomb=name), contextlib.suppress(ValueError):
                ContainerState.from_json(bomb)


@needs_pipes
class FuzzedServerTest(ServerCase):
    def test_server_answers_whatever_comes_and_lives_on(self) -> None:
        carried_out: list[VMRequest] = []
        self.start(carried_out.append)
        for number in range(fuzz_cases // 20):
            data = fuzzed(random.Random(f"{fuzz_seed} {number}"))
            expected = None
            with contextlib.suppress(ValueError):
                request = vmshim._read_request(io.BytesIO(data))
                request.check()
                expected = request
            with self.subTest(seed=fuzz_seed, number=number, data=data[:300]):
                carried_out.clear()
                with dial_pipe(self.path) as pipe:
                    pipe.deadline = time.monotonic() + LONG
                    with contextlib.suppress(BrokenPipeError):  # it has heard enough
                        pipe.write(data)
                        pipe.close_write()
                    answer = pipe.readall()
                self.assertEqual(carried_out, [expected] if expected else [])
                self.assertEqual(answer == SHIM_SUCCESS, expected is not None)
                self.assertTrue(answer)
        self.assertEqual(self.ask(wire()), SHIM_SUCCESS)


# ---- The file itself ----------------------------------------------------------------------------


class FileTest(unittest.TestCase):
    def test_file_is_ascii_so_that_it_can_be_pasted_anywhere(self) -> None:
        with open(vmshim.__file__, "rb") as file:
            self.assertTrue(file.read().isascii())

    def test_examples_in_docstrings_are_true(self) -> None:
        results = doctest.testmod(vmshim)
        self.assertEqual(results.failed, 0)
        self.assertGreaterEqual(results.attempted, 2)

    def test_timeouts_are_by_default_two_seconds_to_connect_and_none_to_answer(self) -> None:
        self.assertEqual(dial_pipe.__kwdefaults__, {"timeout": 2.0})
        for call in issue_vm_request, vmshim.request_container:
            with self.subTest(call=call.__name__):
                self.assertEqual(call.__kwdefaults__["connect_timeout"], 2.0)
                self.assertIsNone(call.__kwdefaults__["timeout"])

    def test_every_public_name_has_a_docstring(self) -> None:
        for name in vmshim.__all__:
            value = getattr(vmshim, name)
            with self.subTest(name=name):
                self.assertTrue(isinstance(value, (str, bytes)) or value.__doc__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fuzz", type=int, default=fuzz_cases)
    parser.add_argument("--seed", type=int, default=fuzz_seed)
    options, rest = parser.parse_known_args()
    fuzz_cases, fuzz_seed = options.fuzz, options.seed
    unittest.main(argv=[sys.argv[0], *rest])
