# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the vmshim maintainers
"""Talk to a runhcs VM shim from Python, with nothing to install.

On Windows, Microsoft's hcsshim runs containers inside utility VMs. Each VM is owned by a VM shim,
a process that listens on a named pipe, takes one JSON request a connection and answers with four
bytes for success or with an error's text. This module is both ends of that protocol in one file:

    from vmshim import VMRequest, VMRequestOp, issue_vm_request, vm_pipe_path

    pipe_path = vm_pipe_path("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
    issue_vm_request(pipe_path, VMRequest("my-container", VMRequestOp.UNMOUNT_CONTAINER))

The names are those of hcsshim's internal/runhcs (v0.9.6). It imports on every platform; a call
that needs a pipe needs Windows. `python vmshim.py --help` tells about the command line.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import math
import os
import re
import sys
import time
import uuid
from collections import deque
from datetime import datetime, timezone
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, List, Mapping, NamedTuple, Tuple

# What a request doesn't need is imported where it is used: it takes longer than all of the above.
if TYPE_CHECKING:
    import argparse
    import subprocess
    import threading
    from types import TracebackType
    from typing import Callable, ContextManager, Iterator, Protocol, Sequence

    class Readable(Protocol):
        """What check_shim_response() reads: a pipe, a file, a BytesIO."""

        def read(self, size: int, /) -> bytes | None: ...


__version__ = "0.1.0"
__all__ = [
    "Container",
    "ContainerState",
    "Pipe",
    "PipeBusyError",
    "ResponseTimeoutError",
    "SAFE_PIPE_PREFIX",
    "SHIM_SUCCESS",
    "ShimError",
    "VMRequest",
    "VMRequestOp",
    "VMShimServer",
    "check_shim_response",
    "dial_pipe",
    "issue_vm_request",
    "list_containers",
    "read_container",
    "request_container",
    "safe_pipe_path",
    "shim_pipe_path",
    "vm_pipe_path",
]


# ---- Names and paths --------------------------------------------------------------------------

SAFE_PIPE_PREFIX = "\\\\.\\pipe\\ProtectedPrefix\\Administrators\\"
"""Where only an elevated administrator can create pipes (hcsshim: SafePipePrefix)."""

_UNESCAPED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+=:@")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PIPE_PATH = re.compile(r"\\\\[^\\]+\\pipe\\[^\0]+", re.IGNORECASE)


def safe_pipe_path(name: str) -> str:
    """Return the path of the protected pipe `name` (hcsshim: SafePipePath).

    The name is escaped byte for byte as by Go's url.PathEscape. Raises ValueError if it holds a
    lone surrogate.

    >>> safe_pipe_path("a b")
    '\\\\\\\\.\\\\pipe\\\\ProtectedPrefix\\\\Administrators\\\\a%20b'
    """
    return SAFE_PIPE_PREFIX + _path_escape("pipe name", name)


def vm_pipe_path(host_unique_id: uuid.UUID | str) -> str:
    """Return the path of the pipe on which a VM's shim listens (hcsshim: VMPipePath).

    `host_unique_id` is the VM's GUID, or its text in the form 8-4-4-4-12 without braces. Raises
    ValueError for any other text.
    """
    return safe_pipe_path(f"runhcs-vm-{_parse_guid(host_unique_id)}")


def shim_pipe_path(unique_id: uuid.UUID | str) -> str:
    """Return the path of the pipe of a container's own shim (hcsshim: runhcs-shim-<UniqueID>).

    `unique_id` is as in vm_pipe_path(). Connecting to that pipe starts the container's process.
    """
    return safe_pipe_path(f"runhcs-shim-{_parse_guid(unique_id)}")


def _path_escape(what: str, name: str) -> str:
    """Escape a name as Go's url.PathEscape does."""
    _check_text(what, name)
    return "".join(chr(byte) if byte in _UNESCAPED else f"%{byte:02X}" for byte in name.encode())


def _parse_guid(guid: uuid.UUID | str) -> uuid.UUID:
    if isinstance(guid, uuid.UUID):
        return guid
    try:
        parsed = uuid.UUID(guid)
    except ValueError:
        parsed = None
    # uuid.UUID also takes braces, a urn: and dashes anywhere.
    if parsed is None or str(parsed) != guid.lower():
        raise ValueError(f'invalid GUID "{guid}"')
    return parsed


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a {what} is a str, not {type(text).__name__}")
    if _SURROGATE.search(text):
        raise ValueError(f"{what} {text!a} holds a lone surrogate, which UTF-8 can't carry")


def _check_pipe_path(path: str) -> None:
    _check_text("pipe path", path)
    if not _PIPE_PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no pipe path (\\\\.\\pipe\\NAME or \\\\SERVER\\pipe\\NAME)")


# ---- Messages ---------------------------------------------------------------------------------

SHIM_SUCCESS = b"\0OK\0"
"""The whole of a successful answer (hcsshim: ShimSuccess)."""

# What Go's encoder escapes in a string, in the form in which it does.
_GO_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *b"<>&", 0x2028, 0x2029)}
_GO_ESCAPES.update({ord(char): f"\\{as_}" for char, as_ in zip('\t\n\r"\\', 'tnr"\\')})


class VMRequestOp(str, Enum):
    """What a VM shim can do to a container (hcsshim: VMRequestOp)."""

    CREATE_CONTAINER = "create"
    """Create the container in the VM (OpCreateContainer)."""
    SYNC_NAMESPACE = "sync"
    """Sync its network namespace (OpSyncNamespace); the reference answers "Not implemented"."""
    UNMOUNT_CONTAINER = "unmount"
    """Take its file systems out of the VM (OpUnmountContainer)."""
    UNMOUNT_CONTAINER_DISK_ONLY = "unmount-disk"
    """Take only its disks out of the VM (OpUnmountContainerDiskOnly)."""


class VMRequest(NamedTuple("VMRequest", [("id", str), ("op", str)])):
    """One request to a VM shim: a container's ID and what to do to it (hcsshim: VMRequest).

    `op` is a VMRequestOp or its wire text. Like the reference's, a VMRequest can hold an unknown
    op (it stays a plain str) or an empty ID; neither is ever sent or handed to a handler.
    """

    __slots__ = ()

    def __new__(cls, id: str, op: str) -> VMRequest:
        """Make a request; the wire text of a known op becomes its VMRequestOp."""
        try:
            op = VMRequestOp(op)
        except ValueError:
            pass
        return super().__new__(cls, id, op)

    def check(self) -> None:
        """Raise ValueError if the ID is empty or has a lone surrogate, or if the op is unknown."""
        _check_text("container ID", self.id)
        if not self.id:
            raise ValueError("the container ID is empty")
        if not isinstance(self.op, VMRequestOp):
            known = ", ".join(op.value for op in VMRequestOp)
            raise ValueError(f"unknown op {self.op!r}; a VM shim knows {known}")

    def to_json(self) -> bytes:
        """Return the request as it goes over the wire, newline included.

        >>> VMRequest("a<b", "create").to_json()
        b'{"ID":"a\\\\u003cb","Op":"create"}\\n'
        """
        return f'{{"ID":{_go_string(self.id)},"Op":{_go_string(self.op)}}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> VMRequest:
        """Read a request as Go's decoder does: its first JSON value, keys in any case.

        Raises ValueError if that value isn't an object, is broken, or has a member of a wrong type.
        """
        members = _read_members(_go_value(data)[0], {"id": ("id", str), "op": ("op", str)})
        return cls(members.get("id", ""), members.get("op", ""))


_NEVER = datetime(1, 1, 1, tzinfo=timezone.utc)
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)", re.ASCII)


class ContainerState(NamedTuple):
    """What `runhcs state` and `runhcs list` tell of a container (hcsshim: ContainerState)."""

    version: str = ""
    """The OCI version, ociVersion in JSON."""
    id: str = ""
    """The container's ID."""
    init_process_pid: int = 0
    """The pid of its init process, pid in JSON; -1 if unknown."""
    status: str = ""
    """created, running, paused, stopped, unknown, or empty."""
    bundle: str = ""
    """The path of its bundle."""
    rootfs: str = ""
    """The path of its root file system."""
    created: datetime = _NEVER
    """When it was created, an aware datetime; 0001-01-01T00:00:00Z is "never"."""
    annotations: Mapping[str, str] = MappingProxyType({})
    """Its annotations."""
    owner: str = ""
    """Who created it, such as runhcs.exe."""
    created_nanosecond: int = 0
    """The nanoseconds below a microsecond of `created`, 0 to 999."""

    def to_json(self) -> bytes:
        """Return the state as compact JSON, byte for byte as the reference writes it.

        Raises ValueError for a naive `created`, a `created_nanosecond` that isn't from 0 to 999,
        or a lone surrogate.
        """
        if self.created.tzinfo is None:
            raise ValueError("created has no time zone")
        if not 0 <= self.created_nanosecond <= 999:
            raise ValueError(f"created_nanosecond is {self.created_nanosecond}, not 0 to 999")
        annotations = {key: _go_string(text) for key, text in sorted(self.annotations.items())}
        members = {
            "ociVersion": _go_string(self.version),
            "id": _go_string(self.id),
            "pid": str(int(self.init_process_pid)),
            "status": _go_string(self.status),
            "bundle": _go_string(self.bundle),
            "rootfs": _go_string(self.rootfs),
            "created": _go_string(_format_time(self.created, self.created_nanosecond)),
            "annotations": _go_object(annotations),
            "owner": _go_string(self.owner),
        }
        if not annotations:
            del members["annotations"]
        return _go_object(members).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> ContainerState:
        """Read one container's state as Go's decoder does.

        Raises ValueError if it is broken, has a member of a wrong type, or a time that isn't
        RFC 3339 or that a datetime can't hold.
        """
        fields = _read_members(
            _whole_go_value(data),
            {
                "ociversion": ("version", str),
                "id": ("id", str),
                "pid": ("init_process_pid", int),
                "status": ("status", str),
                "bundle": ("bundle", str),
                "rootfs": ("rootfs", str),
                "created": ("created", str),
                "annotations": ("annotations", _Object),
                "owner": ("owner", str),
            },
        )
        if "created" in fields:
            fields["created"], fields["created_nanosecond"] = _parse_time(fields["created"])
        if "annotations" in fields:
            fields["annotations"] = {
                _clean(key): "" if text is None else _expect(str, "an annotation", text)
                for key, text in fields["annotations"]
            }
        return cls(**fields)


def _format_time(time: datetime, nanosecond: int) -> str:
    text = time.isoformat(timespec="seconds")
    whole, zone = text[:19], text[19:]
    fraction = f"{time.microsecond:06}{nanosecond:03}".rstrip("0")
    return whole + (f".{fraction}" if fraction else "") + ("Z" if zone == "+00:00" else zone)


def _parse_time(text: str) -> tuple[datetime, int]:
    match = _RFC3339.fullmatch(text)
    if not match:
        raise ValueError(f"{text[:40]!r} is no RFC 3339 time")
    whole, fraction, zone = match.groups()
    digits = (fraction or "").ljust(9, "0")
    # strptime rather than fromisoformat, which takes hour 24 from Python 3.13 on.
    time = datetime.strptime(whole + zone, "%Y-%m-%dT%H:%M:%S%z")
    return time.replace(microsecond=int(digits[:6])), int(digits[6:9])


# JSON as Go's encoding/json writes and reads it. What Python's json module does otherwise: other
# characters are escaped, duplicate keys and their order are lost, and NaN is a number.

_JSON_SPACE = " \t\r\n"


class _Object(List[Tuple[str, Any]]):
    """A JSON object's members, in order and with duplicates: pairs of key and value."""


def _go_string(text: str) -> str:
    return f'"{text.translate(_GO_ESCAPES)}"'


def _go_object(members: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{_go_string(key)}:{value}" for key, value in members.items()) + "}"


def _go_int(digits: str) -> float:
    # An int64 has 19 digits at the most; int() takes quadratic time over a million of them.
    return int(digits) if len(digits) <= 20 else float(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(
    object_pairs_hook=_Object, parse_int=_go_int, parse_constant=_no_constant
)


def _go_value(data: bytes | str) -> tuple[Any, str]:
    """Return the first JSON value in `data` and the text after it."""
    # Go puts a U+FFFD for each byte that isn't UTF-8; surrogateescape marks them for _clean().
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    text = text.lstrip(_JSON_SPACE)
    try:
        value, end = _decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return value, text[end:]


def _whole_go_value(data: bytes | str) -> Any:
    """Return the JSON value that `data` is."""
    value, rest = _go_value(data)
    if rest.strip(_JSON_SPACE):
        raise ValueError(f"unexpected {rest[:20]!r} after the JSON value")
    return value


def _read_members(value: Any, known: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's known members, by the name that `known` has for each in lower case.

    Go ignores the case of a key, unknown keys, and a null, and takes the last of several.
    """
    members = {}
    for key, member in [] if value is None else _expect(_Object, "the JSON value", value):
        name, kind = known.get(key.casefold(), ("", None))
        if name and member is not None:
            members[name] = _expect(kind, key, member)
    return members


_JSON_NAMES = {str: "a string", int: "a 64-bit integer", bool: "a bool", _Object: "an object"}


def _expect(kind: Any, key: str, value: Any) -> Any:
    # A bool is an int to Python, and an object a list; neither is to Go.
    if type(value) is not kind or (kind is int and not -(2**63) <= value < 2**63):
        raise ValueError(f"{key} must be {_JSON_NAMES[kind]}")
    return _clean(value) if kind is str else value


def _clean(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


# ---- Errors and the answer --------------------------------------------------------------------

MAX_RESPONSE = 1 << 20
"""The longest answer that is read unless a call says otherwise, in bytes."""


class ShimError(Exception):
    """The shim answered, and not with success: str() is the error's text.

    `message` is that text as it came, `response` the answer's bytes, and `exit_code` that of the
    shim's process where check_shim_response() was given one, otherwise None.
    """

    def __init__(self, message: str, response: bytes = b"", exit_code: int | None = None) -> None:
        super().__init__(message, response, exit_code)
        self.message = message
        self.response = response
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message.rstrip("\r\n")


class PipeBusyError(TimeoutError):
    """No instance of the pipe came free in time: nothing was sent, and trying again is safe.

    A VM's pipe exists before the VM has booted, so this may also mean "still booting".
    """


class ResponseTimeoutError(TimeoutError):
    """The exchange didn't end in time: the request may or may not be carried out, now or later.

    Don't repeat it blindly; look at the container's state first.
    """


def check_shim_response(
    pipe: Readable,
    process: subprocess.Popen[Any] | None = None,
    *,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Read a shim's answer to the end and return if it is success (hcsshim: GetErrorFromPipe).

    `pipe` is anything with read(); `max_response` limits the answer, in bytes. Raises ShimError
    for any other answer, also for none and for one beyond the limit, and whatever reading raises.
    In all these cases `process`, if given, is killed and reaped first.
    """
    try:
        response = _read_response(pipe, max_response)
        if response == SHIM_SUCCESS:
            return
    except BaseException:
        if process is not None:
            _kill(process)
        raise
    exit_code = _kill(process) if process is not None else None
    message = response.decode("utf-8", "replace")
    if not response:
        message = "unknown shim failure"
        if exit_code is not None:
            message += f", exit code {exit_code}"
    elif len(response) > max_response:
        message = f"the answer is longer than {max_response} bytes; it begins: {message[:200]}"
    raise ShimError(message, response, exit_code)


def _read_response(pipe: Readable, limit: int) -> bytes:
    """Read to end of file, or to the first byte beyond the limit."""
    response = bytearray()
    while len(response) <= limit:
        chunk = pipe.read(min(limit + 1 - len(response), 65536))
        if chunk is None:
            raise BlockingIOError(errno.EAGAIN, "the pipe is non-blocking")
        if not chunk:
            break
        response += chunk
    return bytes(response)


def _kill(process: subprocess.Popen[Any]) -> int:
    process.kill()
    return process.wait()


# ---- Win32 ------------------------------------------------------------------------------------
# https://learn.microsoft.com/windows/win32/ipc/named-pipes

# As in ctypes.wintypes, whose import would add a third to that of this file.
BOOL = ctypes.c_long
DWORD = ctypes.c_ulong
HANDLE = LPVOID = LPCVOID = ctypes.c_void_p
LPDWORD = ctypes.POINTER(DWORD)
LPCWSTR = ctypes.c_wchar_p

ERROR_FILE_NOT_FOUND = 2
ERROR_ACCESS_DENIED = 5
ERROR_BROKEN_PIPE = 109
ERROR_SEM_TIMEOUT = 121
ERROR_PIPE_BUSY = 231
ERROR_NO_DATA = 232
ERROR_PIPE_NOT_CONNECTED = 233
ERROR_MORE_DATA = 234
ERROR_NO_MORE_ITEMS = 259
ERROR_PIPE_CONNECTED = 535
ERROR_OPERATION_ABORTED = 995
ERROR_IO_INCOMPLETE = 996
ERROR_IO_PENDING = 997

GENERIC_READ = 0x80000000
GENERIC_WRITE = 0x40000000
OPEN_EXISTING = 3
SECURITY_SQOS_PRESENT = 0x00100000
SECURITY_ANONYMOUS = 0x00000000
FILE_FLAG_OVERLAPPED = 0x40000000

PIPE_ACCESS_DUPLEX = 0x00000003
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
PIPE_TYPE_MESSAGE = 0x00000004
PIPE_READMODE_BYTE = 0x00000000
PIPE_REJECT_REMOTE_CLIENTS = 0x00000008
PIPE_UNLIMITED_INSTANCES = 255

INVALID_HANDLE_VALUE = ctypes.c_void_p(-1).value
WAIT_TIMEOUT = 0x00000102

_SLICE = 0.1  # seconds; a wait inside Windows doesn't see Ctrl-C, so none lasts longer


class OVERLAPPED(ctypes.Structure):
    """The kernel's record of one operation under way."""

    _fields_ = [
        ("Internal", ctypes.c_size_t),
        ("InternalHigh", ctypes.c_size_t),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", HANDLE),
    ]


class _Handle(ctypes.c_void_p):
    """A kernel handle, closed by close() or with the last reference to it."""

    error = 0  # Win32's reason why there is no handle

    def close(self) -> None:
        if not self.error and self.value is not None:
            _kernel32.CloseHandle(self)
        self.value = None

    __del__ = close


if sys.platform == "win32":
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)

    def _error(succeeded: bool, function: Any, arguments: Any) -> int:
        return 0 if succeeded else ctypes.get_last_error()

    def _handle(handle: _Handle, function: Any, arguments: Any) -> _Handle:
        if handle.value in (None, INVALID_HANDLE_VALUE):
            handle.error = ctypes.get_last_error()
        return handle

    def _prototype(name: str, restype: Any, *argtypes: Any) -> None:
        """Declare a function: instead of a BOOL it returns the Win32 error, 0 for none."""
        function = getattr(_kernel32, name)
        function.restype = restype
        function.argtypes = argtypes
        if restype is BOOL:
            function.errcheck = _error
        elif restype is _Handle:
            function.errcheck = _handle

    _prototype(
        "CreateFileW",
        _Handle,
        LPCWSTR,  # lpFileName
        DWORD,  # dwDesiredAccess
        DWORD,  # dwShareMode
        LPVOID,  # lpSecurityAttributes
        DWORD,  # dwCreationDisposition
        DWORD,  # dwFlagsAndAttributes
        HANDLE,  # hTemplateFile
    )
    _prototype(
        "WaitNamedPipeW",
        BOOL,
        LPCWSTR,  # lpNamedPipeName
        DWORD,  # nTimeOut, in milliseconds
    )
    _prototype(
        "CreateNamedPipeW",
        _Handle,
        LPCWSTR,  # lpName
        DWORD,  # dwOpenMode
        DWORD,  # dwPipeMode
        DWORD,  # nMaxInstances
        DWORD,  # nOutBufferSize
        DWORD,  # nInBufferSize
        DWORD,  # nDefaultTimeOut
        LPVOID,  # lpSecurityAttributes
    )
    _prototype(
        "ConnectNamedPipe",
        BOOL,
        HANDLE,  # hNamedPipe
        ctypes.POINTER(OVERLAPPED),  # lpOverlapped
    )
    _prototype(
        "ReadFile",
        BOOL,
        HANDLE,  # hFile
        LPVOID,  # lpBuffer
        DWORD,  # nNumberOfBytesToRead
        LPDWORD,  # lpNumberOfBytesRead
        ctypes.POINTER(OVERLAPPED),  # lpOverlapped
    )
    _prototype(
        "WriteFile",
        BOOL,
        HANDLE,  # hFile
        LPCVOID,  # lpBuffer
        DWORD,  # nNumberOfBytesToWrite
        LPDWORD,  # lpNumberOfBytesWritten
        ctypes.POINTER(OVERLAPPED),  # lpOverlapped
    )
    _prototype(
        "FlushFileBuffers",
        BOOL,
        HANDLE,  # hFile
    )
    _prototype(
        "CreateEventW",
        _Handle,
        LPVOID,  # lpEventAttributes
        BOOL,  # bManualReset
        BOOL,  # bInitialState
        LPCWSTR,  # lpName
    )
    _prototype(
        "WaitForSingleObject",
        DWORD,
        HANDLE,  # hHandle
        DWORD,  # dwMilliseconds
    )
    _prototype(
        "GetOverlappedResult",
        BOOL,
        HANDLE,  # hFile
        ctypes.POINTER(OVERLAPPED),  # lpOverlapped
        LPDWORD,  # lpNumberOfBytesTransferred
        BOOL,  # bWait
    )
    _prototype(
        "CancelIoEx",
        BOOL,
        HANDLE,  # hFile
        ctypes.POINTER(OVERLAPPED),  # lpOverlapped
    )
    _prototype(
        "CloseHandle",
        BOOL,
        HANDLE,  # hObject
    )
else:

    class _NeedsWindows:
        def __getattr__(self, function: str) -> Any:
            if function.startswith("__"):  # somebody looks what this is
                raise AttributeError(function)
            raise OSError(errno.ENOSYS, f"a runhcs pipe needs Windows, and this is {sys.platform}")

    _kernel32 = _NeedsWindows()


_PIPE_ERRORS: Mapping[int, tuple[type[OSError], int, str]] = {
    ERROR_FILE_NOT_FOUND: (
        FileNotFoundError,
        errno.ENOENT,
        "no shim listens there; check the ID, and that the VM is running",
    ),
    ERROR_ACCESS_DENIED: (
        PermissionError,
        errno.EACCES,
        "access denied; it takes an elevated administrator, and to serve, a name that is free",
    ),
    ERROR_PIPE_BUSY: (
        PipeBusyError,
        errno.ETIMEDOUT,
        "the pipe stayed busy, so nothing was sent; try again later, the VM may still be booting",
    ),
    WAIT_TIMEOUT: (
        ResponseTimeoutError,
        errno.ETIMEDOUT,
        "no answer in time, so the outcome is unknown; look at the container before you try again",
    ),
    ERROR_BROKEN_PIPE: (
        BrokenPipeError,
        errno.EPIPE,
        "the other end is gone; check that the shim is running, and try again",
    ),
    ERROR_NO_DATA: (
        BrokenPipeError,
        errno.EPIPE,
        "the other end left without reading; check that the shim is running, and try again",
    ),
    ERROR_PIPE_NOT_CONNECTED: (
        BrokenPipeError,
        errno.EPIPE,
        "the other end cut the connection and its answer is lost, so the outcome is unknown; "
        "look at the container before you try again",
    ),
}


def _pipe_error(winerror: int, path: str) -> OSError:
    """Return the exception for a Win32 error on a pipe."""
    if winerror in _PIPE_ERRORS:
        kind, number, text = _PIPE_ERRORS[winerror]
        error = kind(number, text, path, winerror)
        error.errno = number  # Windows' Python derives one from winerror, EINVAL for half of these
        return error
    text = "the pipe failed"
    if sys.platform == "win32":
        text = ctypes.FormatError(winerror).strip()
    return OSError(None, text, path, winerror)


def _deadline(timeout: float | None) -> float:
    """Return the monotonic time at which a timeout in seconds is over."""
    if timeout is None:
        return math.inf
    if not timeout >= 0:
        raise ValueError(f"a timeout is a number of seconds from 0 up, or None, not {timeout!r}")
    return time.monotonic() + timeout


class Pipe(io.RawIOBase):
    """One end of a named pipe, as a raw binary file (go-winio: the net.Conn of DialPipe).

    Reads and writes may go on at the same time in two threads. Each raises ResponseTimeoutError
    once time.monotonic() is past `deadline` (math.inf, as at first, is no limit) and
    BrokenPipeError when the other end has gone; where that only closed its end, read() gets the
    rest of the data and then end of file.
    """

    deadline = math.inf

    def __init__(self, handle: _Handle, path: str) -> None:
        self.name = path
        self._handle = handle
        self._idle_signals = [handle]
        self._at_end = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is, or wait for the first of it; 0 is end of file."""
        view = memoryview(buffer).cast("B")
        if self._at_end or not view:
            return 0
        target = (ctypes.c_char * len(view)).from_buffer(view)
        error, count = self._run(_kernel32.ReadFile, target, len(view), None)
        if error in (0, ERROR_MORE_DATA):
            # A zero-length message reads as 0 bytes and is the end, like the other end's closing.
            self._at_end = error == 0 and count == 0
            return count
        if error == ERROR_BROKEN_PIPE:
            self._at_end = True
            return 0
        raise _pipe_error(error, self.name)

    def write(self, data: Any) -> int:
        """Write all of `data`, as one message where the pipe has messages."""
        message = bytes(memoryview(data))
        return self._send(message) if message else 0

    def close_write(self) -> None:
        """Write a zero-length message: end of file to the reader of a message-type pipe."""
        self._send(b"")

    def close(self) -> None:
        """Close the handle; what was written before can still be read at the other end."""
        if not self.closed:
            super().close()
            self._handle.close()
            self._idle_signals.clear()

    def _send(self, message: bytes) -> int:
        error, count = self._run(_kernel32.WriteFile, message, len(message), None)
        if error:
            raise _pipe_error(error, self.name)
        return count

    def _connect(self) -> None:
        """Wait for a client. Raises BrokenPipeError for one that has left already."""
        error, _ = self._run(_kernel32.ConnectNamedPipe)
        if error not in (0, ERROR_PIPE_CONNECTED):
            raise _pipe_error(error, self.name)

    def _flush(self) -> None:
        """Wait until the other end has read all that was written, has gone, or is out of time."""
        import threading

        # FlushFileBuffers has no timeout, but like all I/O it can be cancelled from outside.
        flushing = threading.Thread(target=_kernel32.FlushFileBuffers, args=(self._handle,))
        flushing.start()
        flushing.join(_SLICE)
        while flushing.is_alive():
            if time.monotonic() >= self.deadline:
                _kernel32.CancelIoEx(self._handle, None)
            flushing.join(_SLICE)

    def _run(self, start: Any, *arguments: Any) -> tuple[int, int]:
        """Run an overlapped operation to its end; return its Win32 error and count of bytes.

        However it ends, by the deadline or by Ctrl-C (seen within 100 ms) too, nothing is pending
        afterwards. Raises ResponseTimeoutError if the deadline came first.
        """
        if self.closed:
            raise ValueError("I/O operation on a closed pipe")
        signal = self._take_signal()
        overlapped = OVERLAPPED(hEvent=None if signal is self._handle else signal.value)
        count = DWORD()
        error = ERROR_IO_PENDING  # for all we know: Ctrl-C may come before the call has told
        try:
            error = start(self._handle, *arguments, overlapped)
            if error in (0, ERROR_MORE_DATA, ERROR_IO_PENDING):
                error = self._result(overlapped, count, signal)
        finally:
            # Until the operation has ended the kernel may write to the buffer and to overlapped.
            if error in (ERROR_IO_PENDING, ERROR_IO_INCOMPLETE):
                _kernel32.CancelIoEx(self._handle, overlapped)
                error = self._result(overlapped, count, signal, cancelled=True)
        self._idle_signals.append(signal)
        if error == ERROR_OPERATION_ABORTED:
            raise _pipe_error(WAIT_TIMEOUT, self.name)
        return error, count.value

    def _take_signal(self) -> _Handle:
        """Return what Windows shall set when an operation ends.

        One operation at a time may use the pipe's own handle, which saves it an event.
        """
        try:
            return self._idle_signals.pop()
        except IndexError:
            event: _Handle = _kernel32.CreateEventW(None, True, False, None)
            if event.error:
                raise _pipe_error(event.error, self.name) from None
            return event

    def _result(
        self,
        overlapped: OVERLAPPED,
        count: DWORD,
        signal: _Handle,
        *,
        cancelled: bool = False,
    ) -> int:
        """Wait for an operation's end; return its Win32 error.

        ERROR_IO_INCOMPLETE is that the deadline came first; a cancelled one ends without it.
        """
        while True:
            # The signal is only an alarm clock: another operation's start may reset the handle.
            error: int = _kernel32.GetOverlappedResult(self._handle, overlapped, count, False)
            seconds = _SLICE if cancelled else min(_SLICE, self.deadline - time.monotonic())
            if error != ERROR_IO_INCOMPLETE or seconds <= 0:
                return error
            _kernel32.WaitForSingleObject(signal, math.ceil(seconds * 1000))


# ---- Client -----------------------------------------------------------------------------------


def dial_pipe(path: str, *, timeout: float | None = 2.0) -> Pipe:
    """Connect to a named pipe (go-winio: DialPipe).

    While all instances are busy it tries again for `timeout` seconds: 0 is one attempt, None no
    limit. Raises ValueError for a path that is no pipe path, FileNotFoundError if nobody listens
    there, PermissionError, PipeBusyError, or another OSError.
    """
    _check_pipe_path(path)
    deadline = _deadline(timeout)
    while True:
        handle = _kernel32.CreateFileW(
            path,
            GENERIC_READ | GENERIC_WRITE,
            0,
            None,
            OPEN_EXISTING,
            # Without these the server could impersonate us.
            FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS,
            None,
        )
        if not handle.error:
            return Pipe(handle, path)
        seconds = min(_SLICE, deadline - time.monotonic())
        if handle.error != ERROR_PIPE_BUSY or seconds <= 0:
            raise _pipe_error(handle.error, path)
        # Only an alarm clock, whatever it says: another client may be faster, and in some
        # containers it fails at once. 0 would mean the server's default.
        milliseconds = max(1, int(seconds * 1000))
        if _kernel32.WaitNamedPipeW(path, milliseconds) not in (0, ERROR_SEM_TIMEOUT):
            time.sleep(min(0.01, seconds))


def issue_vm_request(
    pipe_path: str,
    request: VMRequest,
    *,
    connect_timeout: float | None = 2.0,
    timeout: float | None = None,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Send a request to a VM's shim and return when it is carried out (hcsshim: IssueVMRequest).

    `connect_timeout` is how long to try while the pipe is busy, `timeout` how long the exchange
    may take from then on, both in seconds: 0 is one attempt, None no limit. `max_response` limits
    the answer, in bytes. Raises

    - ValueError, before anything is opened: an unknown op, an empty ID, no pipe path ...;
    - ShimError: the shim refused;
    - FileNotFoundError, PermissionError: nobody listens there, or not to us;
    - PipeBusyError: never connected, nothing sent, safe to repeat;
    - ResponseTimeoutError, BrokenPipeError: the outcome is unknown.
    """
    request.check()
    message = request.to_json()
    _deadline(timeout)  # a wrong one must be refused before anything is opened
    started = time.monotonic()
    outcome = "done"
    try:
        with dial_pipe(pipe_path, timeout=connect_timeout) as pipe:
            pipe.deadline = _deadline(timeout)
            pipe.write(message)
            check_shim_response(pipe, max_response=max_response)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
        raise
    finally:
        milliseconds = (time.monotonic() - started) * 1000
        _log(
            "debug",
            "%s: %r %s: %s (%.1f ms)",
            pipe_path,
            request.id,
            VMRequestOp(request.op).value,
            outcome,
            milliseconds,
        )


def _log(level: str, message: str, *arguments: object, exc_info: bool = False) -> None:
    # Importing logging takes half as long as all other imports. Who listens has imported it; who
    # doesn't is told of warnings and errors all the same.
    if "logging" in sys.modules or level in ("warning", "error"):
        import logging

        getattr(logging.getLogger("vmshim"), level)(message, *arguments, exc_info=exc_info)


# ---- runhcs's own state -------------------------------------------------------------------------

_NO_VM = uuid.UUID(int=0)


class Container(NamedTuple):
    """What runhcs keeps of a container in the registry (hcsshim: persistedState in cmd/runhcs)."""

    id: str
    """The container's ID."""
    owner: str = ""
    """Who created it."""
    sandbox_id: str = ""
    """The ID of the sandbox that it belongs to."""
    host_id: str = ""
    """The ID of the VM that it runs in; empty if it runs in none."""
    bundle: str = ""
    """The path of its bundle."""
    created: datetime = _NEVER
    """When it was created, an aware datetime."""
    rootfs: str = ""
    """The path of its root file system."""
    is_host: bool = False
    """Whether it was created together with its VM."""
    unique_id: uuid.UUID = _NO_VM
    """What its own shim's pipe is named by."""
    host_unique_id: uuid.UUID = _NO_VM
    """What its VM's shim's pipe is named by; the zero GUID if it runs in no VM."""
    shim_pid: int = -1
    """The pid of its own shim; 0 if that has exited, -1 if unknown."""

    def vm_pipe_path(self) -> str:
        """Return the path of its VM's shim's pipe. Raises LookupError if it runs in no VM."""
        if self.host_unique_id == _NO_VM:
            raise LookupError(f"container '{self.id}' runs in no VM, so no VM shim can be asked")
        return vm_pipe_path(self.host_unique_id)


def read_container(container_id: str, *, root: str = "default") -> Container:
    """Return what runhcs keeps of a container (hcsshim: getContainer in cmd/runhcs).

    `root` is what runhcs was given as --root. Raises LookupError if there is no such container,
    ValueError if its state is broken or the ID is empty, and OSError if the registry can't be
    read.
    """
    if not container_id:
        raise ValueError("the container ID is empty")
    try:
        with _open_key(root, _path_escape("container ID", container_id)) as key:
            state = _query(key, "state", "REG_BINARY")
            shim_pid = _query(key, "shim", "REG_QWORD")
    except FileNotFoundError:
        raise LookupError(f"ID '{container_id}' was not found") from None
    if state is None:
        raise LookupError(f"state 'state' is not present for ID '{container_id}'")
    try:
        fields = _read_members(
            _whole_go_value(state),
            {
                "id": ("id", str),
                "owner": ("owner", str),
                "sandboxid": ("sandbox_id", str),
                "hostid": ("host_id", str),
                "bundle": ("bundle", str),
                "created": ("created", str),
                "rootfs": ("rootfs", str),
                "ishost": ("is_host", bool),
                "uniqueid": ("unique_id", str),
                "hostuniqueid": ("host_unique_id", str),
            },
        )
        for guid in fields.keys() & {"unique_id", "host_unique_id"}:
            fields[guid] = _parse_guid(fields[guid])
        if "created" in fields:
            fields["created"], _ = _parse_time(fields["created"])
    except ValueError as error:
        raise ValueError(f"the state of ID '{container_id}' is broken: {error}") from None
    if shim_pid is not None:
        fields["shim_pid"] = shim_pid
    return Container(**{"id": container_id, **fields})


def list_containers(*, root: str = "default") -> list[Container]:
    """Return what runhcs keeps of each container on this host; none if it has never run.

    Broken entries are logged as warnings and left out. Raises OSError if the registry can't be
    read.
    """
    try:
        with _open_key(root) as key:
            names = _subkeys(key)
    except FileNotFoundError:
        return []
    containers = []
    for name in names:
        try:
            containers.append(read_container(_path_unescape(name), root=root))
        except (LookupError, ValueError) as error:
            _log("warning", "registry key %r of root %r left out: %s", name, root, error)
    return containers


def request_container(
    container_id: str,
    op: str,
    *,
    root: str = "default",
    connect_timeout: float | None = 2.0,
    timeout: float | None = None,
) -> None:
    """Look a container up and have its VM's shim carry a request out for it.

    hcsshim does this in cmd/runhcs, in issueVMRequest. `op` is a VMRequestOp or its wire text, all
    else is as in read_container() and issue_vm_request(), and so is what is raised; where the VM's
    pipe isn't there, FileNotFoundError says that the VM cannot be contacted.
    """
    VMRequest(container_id, op).check()
    container = read_container(container_id, root=root)
    _ask_vm(container, op, connect_timeout=connect_timeout, timeout=timeout)


def _ask_vm(container: Container, op: str, **timeouts: Any) -> None:
    """Issue a request to a container's VM, and name the VM if its pipe isn't there."""
    try:
        issue_vm_request(container.vm_pipe_path(), VMRequest(container.id, op), **timeouts)
    except FileNotFoundError as error:
        error.strerror = f"VM {container.host_id} cannot be contacted"
        raise


def _winreg() -> Any:
    """Return the standard library's winreg, which only Windows has."""
    if sys.platform == "win32":
        import winreg

        return winreg
    raise OSError(errno.ENOSYS, f"runhcs's state needs Windows, and this is {sys.platform}")


def _open_key(root: str, *names: str) -> Any:
    if not root:
        raise ValueError("the root is empty")
    winreg = _winreg()
    path = "\\".join(["SOFTWARE\\Microsoft\\runhcs", _path_escape("root", root), *names])
    # A 32-bit Python would be redirected to a registry of its own.
    access = winreg.KEY_READ | winreg.KEY_WOW64_64KEY
    try:
        return winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path, 0, access)
    except OSError as error:
        error.filename = f"HKEY_LOCAL_MACHINE\\{path}"
        raise


def _query(key: Any, name: str, kind: str) -> Any:
    """Return a value, or None if there is none of that name and kind."""
    winreg = _winreg()
    try:
        value, found = winreg.QueryValueEx(key, name)
    except FileNotFoundError:
        return None
    return value if found == getattr(winreg, kind) else None


def _subkeys(key: Any) -> list[str]:
    names: list[str] = []
    while True:
        try:
            names.append(_winreg().EnumKey(key, len(names)))
        except OSError as error:
            if getattr(error, "winerror", None) != ERROR_NO_MORE_ITEMS:
                raise
            return names


def _path_unescape(name: str) -> str:
    """Unescape a name as Go's url.PathUnescape does, and refuse what it refuses."""
    from urllib.parse import unquote

    if re.search("%(?![0-9A-Fa-f]{2})", name):
        raise ValueError(f"{name!r} has a % that escapes nothing")
    return unquote(name, errors="strict")


# ---- Server -----------------------------------------------------------------------------------

MAX_REQUEST = 65536
"""The longest request that a server reads, in bytes."""

_BUFFER_SIZE = 4096
_GRACE = 0.01  # seconds that a new client has for its request before the next is let in


class VMShimServer:
    """A VM shim's end of the pipe (hcsshim: the server in cmd/runhcs/vm.go).

    `handler` is called with one VMRequest at a time, in the order in which they arrived, in the
    thread that runs serve_forever(). If it returns, the client is told of success; if it raises an
    Exception, the client gets its text. `request_timeout` is how long, in seconds, a client may
    take for each of these: sending its request, reading the answer, closing its end.

    The pipe exists from here on; clients see busy until serve_forever() runs, and between its
    runs. Raises ValueError for a path that is no pipe path, and PermissionError if the name is
    taken or takes an elevated administrator.

    >>> with VMShimServer(r"\\\\.\\pipe\\my-shim", print) as server:  # doctest: +SKIP
    ...     server.serve_forever()
    """

    def __init__(
        self,
        pipe_path: str,
        handler: Callable[[VMRequest], object],
        *,
        request_timeout: float | None = 10.0,
    ) -> None:
        import threading

        _check_pipe_path(pipe_path)
        _deadline(request_timeout)
        self.pipe_path = pipe_path
        self.handler = handler
        self.request_timeout = request_timeout
        self._changed = threading.Condition()  # guards all that follows
        self._serving: threading.Thread | None = None
        self._stopping = False
        self._closed = False
        self._clients: list[_Client] = []  # at least those whose threads run
        self._waiting: deque[_Client] = deque()  # their requests have arrived
        self._early: list[Pipe] = []
        self._held = self._hold_name()

    def serve_forever(self) -> None:
        """Answer requests until shutdown() or close() is called.

        KeyboardInterrupt and SystemExit, in the handler too, end it and are passed on. When it
        returns or raises, the request under way has been answered and no thread is left. A
        shutdown() that came before it makes it return at once. Raises ValueError if the server is
        closed, RuntimeError if it is serving already.
        """
        import threading

        with self._changed:
            if self._closed:
                raise ValueError("the server is closed")
            if self._serving:
                raise RuntimeError("the server is serving already")
            self._serving = threading.current_thread()
        accepting = threading.Thread(target=self._accept_clients, name="vmshim accept")
        try:
            accepting.start()
            for client in self._arrivals():
                self._carry_out(client)
        finally:
            self._stop()
            accepting.join()
            for client in self._clients:
                client.thread.join()
            with self._changed:
                self._clients.clear()
                self._serving = None
                self._stopping = False
                if self._closed:
                    self._release_name()
                self._changed.notify_all()

    def shutdown(self) -> None:
        """Make serve_forever() return, and wait until it has, unless called from the handler.

        The request under way is answered; clients that wait are told that the shim has stopped.
        """
        import threading

        with self._changed:
            self._stop()
            while self._serving not in (None, threading.current_thread()):
                self._changed.wait(_SLICE)

    def close(self) -> None:
        """Shut down and give the pipe's name up; called from the handler, as soon as it returns."""
        with self._changed:
            self._closed = True
            self.shutdown()
            if not self._serving:
                self._release_name()

    def __enter__(self) -> VMShimServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What runs in serve_forever()'s own thread: one request after the other.

    def _arrivals(self) -> Iterator[_Client]:
        while True:
            with self._changed:
                while not (self._waiting or self._stopping):
                    self._changed.wait(_SLICE)
                if self._stopping:
                    return
                client = self._waiting.popleft()
                self._changed.notify_all()
            yield client

    def _carry_out(self, client: _Client) -> None:
        request = client.request
        try:
            self.handler(request)
            client.answer = SHIM_SUCCESS
        except Exception as error:
            _log("info", "%s: %r failed", self.pipe_path, request, exc_info=True)
            client.answer = str(error).encode("utf-8", "backslashreplace")
            if client.answer in (b"", SHIM_SUCCESS):  # neither would tell of a failure
                client.answer = repr(error).encode("utf-8", "backslashreplace")
        finally:
            client.answered.set()

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
            while self._waiting:
                self._waiting.popleft().answered.set()
            for client in self._clients:
                if client.idle:
                    client.pipe.deadline = 0.0
            self._changed.notify_all()

    # The pipe's instances.

    def _create_instance(self, first: int = 0) -> Pipe:
        handle = _kernel32.CreateNamedPipeW(
            self.pipe_path,
            PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | first,
            PIPE_TYPE_MESSAGE | PIPE_READMODE_BYTE | PIPE_REJECT_REMOTE_CLIENTS,
            PIPE_UNLIMITED_INSTANCES,
            _BUFFER_SIZE,
            _BUFFER_SIZE,
            0,
            None,
        )
        if handle.error:
            raise _pipe_error(handle.error, self.pipe_path)
        return Pipe(handle, self.pipe_path)

    def _hold_name(self) -> Pipe:
        """Return an instance that keeps the name, so that clients see busy, never "not found".

        Its only client is ourselves, and gone: no other can connect to it any more.
        """
        held = self._create_instance(FILE_FLAG_FIRST_PIPE_INSTANCE)
        while True:
            try:
                dial_pipe(self.pipe_path, timeout=0).close()
                return held
            except PipeBusyError:  # a real client was faster
                self._early.append(held)
                held = self._create_instance()

    def _release_name(self) -> None:
        for pipe in (self._held, *self._early):
            pipe.close()

    # What runs in the accepting thread: an instance after the other is offered.

    def _accept_clients(self) -> None:
        while not self._stopping:
            try:
                self._accept_client()
            except ConnectionError as error:
                _log("debug", "%s: a client came and went: %s", self.pipe_path, error)
            except Exception:
                if not self._stopping:
                    _log("error", "%s: no client accepted", self.pipe_path, exc_info=True)
                    time.sleep(_SLICE)

    def _accept_client(self) -> None:
        import threading

        pipe = self._early.pop() if self._early else self._create_instance()
        client = _Client(pipe, threading.Event())
        client.thread = threading.Thread(target=self._serve, args=(client,), name="vmshim client")
        with self._changed:
            self._clients = [other for other in self._clients if other.thread.is_alive()]
            self._clients.append(client)
        try:
            self._allow(client, None, idle=True)
            client.pipe._connect()
            client.thread.start()
        except BaseException:
            client.pipe.close()
            with self._changed:
                self._clients.remove(client)
            raise
        # Like the reference we let one client wait for the handler, and others see busy; but not
        # for one that keeps silent.
        with self._changed:
            self._changed.wait_for(lambda: client.arrived, _GRACE)
            self._changed.wait_for(lambda: not self._waiting or self._stopping)

    # What runs in a thread of each client's own: all that it could hold up.

    def _serve(self, client: _Client) -> None:
        try:
            self._allow(client, self.request_timeout, idle=True)
            self._take_request(client)
            client.answered.wait()
            self._reply(client)
        except OSError as error:
            _log("info", "%s: a client failed: %s", self.pipe_path, error)
        except Exception:
            _log("error", "%s: a client failed", self.pipe_path, exc_info=True)
        finally:
            client.pipe.close()

    def _take_request(self, client: _Client) -> None:
        wrong = ""
        try:
            client.request = _read_request(client.pipe)
            client.request.check()
        except ValueError as error:
            wrong = str(error)
        except ResponseTimeoutError:
            wrong = "no complete request came in time"
        with self._changed:
            client.arrived = True
            if wrong:
                client.answer = wrong.encode("utf-8", "backslashreplace")
            if wrong or self._stopping:
                client.answered.set()
            else:
                self._waiting.append(client)
            self._changed.notify_all()

    def _reply(self, client: _Client) -> None:
        pipe = client.pipe
        self._allow(client, self.request_timeout, idle=False)
        pipe.write(client.answer)
        if client.answer == SHIM_SUCCESS:
            # The zero-length message is lost to a client that still has data to read.
            pipe._flush()
            pipe.close_write()
            self._allow(client, self.request_timeout, idle=True)
            while pipe.read(_BUFFER_SIZE):
                pass

    def _allow(self, client: _Client, timeout: float | None, *, idle: bool) -> None:
        """Give a client time for its next step; an idle one is cut off when the server stops."""
        with self._changed:
            client.idle = idle
            client.pipe.deadline = 0.0 if idle and self._stopping else _deadline(timeout)


class _Client:
    """A client of the server: its connection, its request and its answer."""

    thread: threading.Thread
    request: VMRequest

    def __init__(self, pipe: Pipe, answered: threading.Event) -> None:
        self.pipe = pipe
        self.answered = answered
        self.idle = True
        self.arrived = False
        self.answer = b"the VM shim stopped before it had carried the request out"


def _read_request(pipe: Readable) -> VMRequest:
    """Read one request. Raises ValueError for anything else, as soon as it can't become one."""
    received = bytearray()
    end = _JSONEnd()
    while True:
        chunk = pipe.read(_BUFFER_SIZE)
        if not chunk:
            break
        received += chunk
        if end.is_in(chunk):
            break
        if len(received) >= MAX_REQUEST:
            raise ValueError(f"the request is longer than {MAX_REQUEST} bytes")
    return VMRequest.from_json(bytes(received))


class _JSONEnd:
    """Finds, piece by piece, where a JSON object ends, or where it can't be one any more."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def is_in(self, piece: bytes) -> bool:
        for byte in piece:
            if self._in_string:
                if byte < 0x20:
                    return True
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:  # backslash
                    self._escaped = True
                elif byte == 0x22:  # quotation mark
                    self._in_string = False
            elif byte in b" \t\r\n":
                pass
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    return True
            elif self._depth == 0 or byte not in b'",:-+.0123456789eEtrufalsn':
                return True
            elif byte == 0x22:
                self._in_string = True
        return False


# ---- Command line -----------------------------------------------------------------------------

_EXAMPLES = """\
examples:
  vmshim.py list
  vmshim.py unmount my-container
  vmshim.py unmount --vm 6ba7b810-9dad-11d1-80b4-00c04fd430c8 my-container
  vmshim.py create --pipe \\\\.\\pipe\\my-shim --timeout 30 --json my-container
  vmshim.py pipe-path 6ba7b810-9dad-11d1-80b4-00c04fd430c8
  vmshim.py serve --pipe \\\\.\\pipe\\my-shim
  vmshim.py demo

exit status:
  0  done
  1  the shim refused; its text is on stderr
  2  usage
  3  no such container or VM, or nobody listens there
  4  access denied; it takes an elevated administrator
  5  busy; nothing was sent, try again
  6  no answer in time, or the connection broke; the outcome is unknown
  130  Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    # A redirected stream may not know all characters of an ID.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if getattr(options, "verbose", False):
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    try:
        status: int = options.run(options)
        return status
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    except (ShimError, LookupError, OSError) as error:
        print(_text(error), file=sys.stderr)
        return _exit_status(error)


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="vmshim.py",
        description="Talk to a runhcs VM shim.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vmshim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_where(command: argparse.ArgumentParser, *, required: bool) -> None:
        where = command.add_mutually_exclusive_group(required=required)
        where.add_argument("--vm", metavar="GUID", help="the VM's HostUniqueID")
        where.add_argument("--pipe", metavar="PATH", help="the path of its shim's pipe")

    def add_root(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--root",
            default="default",
            help="what runhcs was given as --root (default: %(default)s)",
        )

    for op, text in {
        VMRequestOp.CREATE_CONTAINER: "create a container in the VM",
        VMRequestOp.SYNC_NAMESPACE: "sync a container's network namespace",
        VMRequestOp.UNMOUNT_CONTAINER: "take a container's file systems out of the VM",
        VMRequestOp.UNMOUNT_CONTAINER_DISK_ONLY: "take only a container's disks out of the VM",
    }.items():
        description = f"{text}; without --vm or --pipe, the VM is the one that runhcs knows"
        command = commands.add_parser(op.value, help=text, description=description)
        command.add_argument("id", metavar="ID", help="the container's ID")
        add_where(command, required=False)
        add_root(command)
        command.add_argument(
            "--connect-timeout",
            type=float,
            default=2.0,
            metavar="S",
            help="seconds to try while the pipe is busy (default: %(default)s)",
        )
        command.add_argument(
            "--timeout", type=float, metavar="S", help="seconds to wait for the answer"
        )
        command.add_argument("--json", action="store_true", help="print the outcome as JSON")
        command.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        command.set_defaults(run=_run_request, op=op)

    text = "list runhcs's containers on this host"
    command = commands.add_parser("list", help=text, description=text)
    add_root(command)
    command.add_argument("--json", action="store_true", help="print a JSON array")
    command.set_defaults(run=_run_list)

    text = "print the path of a VM shim's pipe"
    command = commands.add_parser("pipe-path", help=text, description=text)
    command.add_argument("vm", metavar="GUID", help="the VM's HostUniqueID")
    command.set_defaults(run=_run_pipe_path)

    text = "answer requests, and print each, until Ctrl-C"
    command = commands.add_parser("serve", help=text, description=text)
    add_where(command, required=True)
    command.add_argument("--fail", metavar="TEXT", help="refuse every request with this text")
    command.add_argument(
        "--handshake",
        action="store_true",
        help="be a child: read options as JSON from stdin, tell on stdout that the pipe is ready "
        "and close it, and print to stderr",
    )
    command.set_defaults(run=_run_serve)

    text = "show a request and a refusal, on a pipe that needs no elevation"
    command = commands.add_parser("demo", help=text, description=text)
    command.set_defaults(run=_run_demo)
    return parser


def _run_request(options: argparse.Namespace) -> int:
    pipe_path: str | None = options.pipe
    timeouts = {"connect_timeout": options.connect_timeout, "timeout": options.timeout}
    started = time.monotonic()
    failure: Exception | None = None
    try:
        with _seconds_shown():
            if options.pipe or options.vm:
                pipe_path = options.pipe or vm_pipe_path(options.vm)
                issue_vm_request(pipe_path, VMRequest(options.id, options.op), **timeouts)
            else:
                container = read_container(options.id, root=options.root)
                pipe_path = container.vm_pipe_path()
                _ask_vm(container, options.op, **timeouts)
    except (ShimError, LookupError, OSError) as error:
        failure = error
        print(_text(error), file=sys.stderr)
    if options.json:
        outcome = {
            "id": options.id,
            "op": options.op.value,
            "pipe": pipe_path,
            "ok": failure is None,
            "error": failure and _text(failure),
            "elapsed_ms": round((time.monotonic() - started) * 1000, 1),
        }
        print(json.dumps(outcome))
    return _exit_status(failure) if failure else 0


def _run_list(options: argparse.Namespace) -> int:
    containers = sorted(list_containers(root=options.root))
    shims = [_shim_listens(container) for container in containers]
    if options.json:
        rows = [
            {**container._asdict(), "created": _format_time(container.created, 0), "vm_shim": shim}
            for container, shim in zip(containers, shims)
        ]
        print(json.dumps(rows, default=str, indent=2))
        return 0
    table = [("ID", "VM", "OWNER", "CREATED", "VM SHIM")]
    for container, shim in zip(containers, shims):
        vm = str(container.host_unique_id) if shim else "-"
        created = container.created.isoformat(" ", "seconds")
        table.append((container.id, vm, container.owner or "-", created, shim or "-"))
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _shim_listens(container: Container) -> str | None:
    """Tell whether a container's VM's shim is free, busy or absent; None if it runs in no VM."""
    try:
        path = container.vm_pipe_path()
    except LookupError:
        return None
    # Opening the pipe would take an instance from a client.
    verdict = _kernel32.WaitNamedPipeW(path, 1)
    return {0: "free", ERROR_SEM_TIMEOUT: "busy"}.get(verdict, "absent")


def _run_pipe_path(options: argparse.Namespace) -> int:
    print(vm_pipe_path(options.vm))
    return 0


def _run_serve(options: argparse.Namespace) -> int:
    def carry_out(request: VMRequest) -> None:
        print(VMRequestOp(request.op).value, request.id, flush=True)
        if options.fail is not None:
            raise RuntimeError(options.fail)

    def server() -> VMShimServer:
        return VMShimServer(options.pipe or vm_pipe_path(options.vm), carry_out)

    with _handshake(server) if options.handshake else server() as serving:
        print(f"serving {serving.pipe_path} until Ctrl-C", file=sys.stderr, flush=True)
        serving.serve_forever()
    return 0


def _handshake(server: Callable[[], VMShimServer]) -> VMShimServer:
    """Start as a shim process does: options on stdin, then success or an error on stdout."""
    try:
        _expect(_Object, "the options on stdin", _whole_go_value(sys.stdin.buffer.read()))
        started = server()
    except (ValueError, OSError) as error:
        os.write(1, _text(error).encode())
        raise
    os.write(1, SHIM_SUCCESS)
    # sys.stdout.close() would leave the handle open, and the parent waiting for its end.
    os.close(1)
    sys.stdout = sys.stderr
    return started


def _run_demo(options: argparse.Namespace) -> int:
    import threading

    def carry_out(request: VMRequest) -> None:
        if request.op == VMRequestOp.SYNC_NAMESPACE:
            raise RuntimeError("Not implemented")  # what the reference answers

    with VMShimServer(rf"\\.\pipe\vmshim-demo-{uuid.uuid4()}", carry_out) as server:
        threading.Thread(target=server.serve_forever, name="vmshim demo").start()
        print(server.pipe_path)
        for op in VMRequestOp.CREATE_CONTAINER, VMRequestOp.SYNC_NAMESPACE:
            request = VMRequest("demo", op)
            answer = SHIM_SUCCESS
            try:
                issue_vm_request(server.pipe_path, request, timeout=10.0)
                outcome = "done"
            except ShimError as error:
                answer = error.response
                outcome = f"refused: {error}"
            print(f"\n{op.value}: {outcome}")
            print(f"  client to shim  {request.to_json()!r}")
            print(f"  shim to client  {answer!r}")
    return 0


def _exit_status(error: Exception) -> int:
    for kind, status in (
        (ShimError, 1),
        (PermissionError, 4),
        (PipeBusyError, 5),
        (ResponseTimeoutError, 6),
        (BrokenPipeError, 6),
    ):
        if isinstance(error, kind):
            return status
    return 3


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _seconds_shown() -> ContextManager[None]:
    """While a wait lasts over a second, show the seconds on stderr if that is a terminal."""
    import threading
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Iterator[None]:
        if not sys.stderr.isatty():
            yield
            return
        done = threading.Event()
        counting = threading.Thread(target=count, args=(done,), name="vmshim seconds")
        counting.start()
        try:
            yield
        finally:
            done.set()
            counting.join()

    def count(done: threading.Event) -> None:
        started = time.monotonic()
        line = ""
        while not done.wait(1.0):
            line = f"waiting for the VM shim: {time.monotonic() - started:.0f} s"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        print("\r" + " " * len(line) + "\r" if line else "", end="", file=sys.stderr, flush=True)

    return shown()


if __name__ == "__main__":
    sys.exit(main())
