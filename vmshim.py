# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the vmshim maintainers
"""Talk to a runhcs VM shim from Python, with nothing to install.

On Windows, Microsoft's hcsshim runs containers inside utility VMs. Each VM is owned by a VM shim,
a process that listens on a named pipe, takes one JSON request a connection and responds with four
bytes for success or with an error's text. This module is both ends of that protocol in one file:

    from vmshim import VMRequest, VMRequestOp, issue_vm_request, vm_pipe_path

    pipe_path = vm_pipe_path("6ba7b810-9dad-11d1-80b4-00c04fd430c8")
    request = VMRequest("my-container", VMRequestOp.UNMOUNT_CONTAINER)
    issue_vm_request(pipe_path, request, timeout=60)

Protocol names are those of hcsshim v0.9.6, called "the reference" below. This module can be
imported on every platform; opening a pipe or the registry needs Windows. For the command line see
`python vmshim.py --help`. The file can be cut at each line that begins with `# ====`.

One exchange, and who waits for whom:

    client                                    VM shim
    ------                                    -------
    open the pipe; busy: try again            offer an instance of the pipe
    write one JSON object and a newline  -->  read to the object's end
                                              carry the request out
    read to end of file                  <--  write 00 4F 4B 00, or the error's text and close
                                         <--  after a success, write a message of length zero
    close                                -->  read until the client has closed, then close

Constants: SAFE_PIPE_PREFIX (hcsshim: SafePipePrefix) is the prefix of the pipe names that only an
elevated administrator can create. SHIM_SUCCESS (ShimSuccess) is the whole response of a shim that
succeeded. MAX_REQUEST and MAX_RESPONSE limit, in bytes, what a server and a client read.
"""

from __future__ import annotations

import ctypes
import errno
import io
import math
import os
import sys
import time
from collections import namedtuple
from enum import Enum

if "VMShimError" in globals():
    # What is under way would lose the memory that Windows writes to, and its exceptions' classes.
    raise ImportError("vmshim can't be reloaded; to use another version, start Python anew")

# Modules that a plain request does not need are imported inside functions: they are slow to load.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    import uuid
    from collections.abc import Callable, Mapping
    from typing import Any, NamedTuple

    from _typeshed import SupportsRead
else:

    class _NamedTupleType(type):
        """Makes what typing.NamedTuple makes: importing typing takes longer than all else here."""

        def __new__(mcs, name, bases, namespace):
            base = namedtuple(name, namespace["__annotations__"])
            return type(name, (base,), {"__slots__": (), **namespace})

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})

__version__ = "0.3.0"
__all__ = ["VMRequest", "VMRequestOp", "issue_vm_request"]
__all__ += ["SAFE_PIPE_PREFIX", "safe_pipe_path", "shim_pipe_path", "vm_pipe_path"]
__all__ += ["MAX_RESPONSE", "SHIM_SUCCESS", "Pipe", "check_shim_response", "dial_pipe"]
__all__ += ["VMShimError", "ShimError", "NotSentError", "OutcomeUnknownError"]
__all__ += ["NeedsWindowsError", "PipeOpenError", "PipeNotFoundError", "PipeAccessError"]
__all__ += ["PipeBusyError", "ShimBusyError", "ResponseTimeoutError", "ConnectionLostError"]


# ---- Names and paths ----------------------------------------------------------------------------

SAFE_PIPE_PREFIX = "\\\\.\\pipe\\ProtectedPrefix\\Administrators\\"

_NOT_ESCAPED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+=:@"


def safe_pipe_path(name: str) -> str:
    """Return the path of the protected pipe `name` (hcsshim: SafePipePath).

    The name is escaped byte for byte as by Go's url.PathEscape. Raises ValueError if it has a
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
    return safe_pipe_path(f"runhcs-vm-{_parse_guid('host_unique_id', host_unique_id)}")


def shim_pipe_path(unique_id: uuid.UUID | str) -> str:
    """Return the path of the pipe of a container's own shim (hcsshim: runhcs-shim-<UniqueID>).

    `unique_id` is as in vm_pipe_path(). Connecting to that pipe starts the container's process.
    """
    return safe_pipe_path(f"runhcs-shim-{_parse_guid('unique_id', unique_id)}")


def _path_escape(what: str, name: str) -> str:
    """Escape a name as Go's url.PathEscape does; `what` is what an error calls it."""
    _check_text(what, name)
    return "".join(chr(byte) if byte in _NOT_ESCAPED else f"%{byte:02X}" for byte in name.encode())


def _parse_guid(what: str, guid: uuid.UUID | str) -> uuid.UUID:
    import uuid

    if isinstance(guid, uuid.UUID):
        return guid
    _check_text(what, guid)
    try:
        parsed = uuid.UUID(guid)
    except ValueError:
        parsed = None
    # uuid.UUID() also takes braces, a urn: and dashes anywhere.
    if parsed is None or str(parsed) != guid.lower():
        raise ValueError(f'invalid GUID "{guid}"')
    return parsed


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"the {what} must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text!a} has a lone surrogate, which UTF-8 can't carry") from None


def _check_pipe_path(path: str) -> None:
    _check_text("pipe path", path)
    before, between, server, pipe, name = [*path.split("\\", 4), "", "", "", ""][:5]
    is_path = not before and not between and server and pipe.lower() == "pipe" and name
    # Windows takes a path that begins with \\?\ as it is.
    is_changed = "/" in path or any(part in f"\\{name}\\" for part in ("\\\\", ".\\", " \\"))
    if not is_path or "\0" in path or (is_changed and server != "?"):
        raise ValueError(
            f"not a pipe path: {path!r} (expected \\\\.\\pipe\\NAME or \\\\SERVER\\pipe\\NAME; "
            "Windows would change a NAME with a /, or a part that is empty or ends in . or space)"
        )


# ---- Errors -------------------------------------------------------------------------------------

ERROR_FILE_NOT_FOUND = 2
ERROR_ACCESS_DENIED = 5
ERROR_NETNAME_DELETED = 64
ERROR_BROKEN_PIPE = 109
ERROR_SEM_TIMEOUT = 121
ERROR_PIPE_BUSY = 231
ERROR_NO_DATA = 232
ERROR_PIPE_NOT_CONNECTED = 233
ERROR_MORE_DATA = 234
WAIT_TIMEOUT = 258
ERROR_OPERATION_ABORTED = 995
ERROR_IO_PENDING = 997

_LOOK_FIRST = ", so the outcome is unknown; look at the container before you repeat the request"


class VMShimError(Exception):
    """Base of all that this module raises for a request, beyond ValueError and TypeError.

    There are three kinds, and they tell whether the request may be repeated:

    - ShimError: the shim refused it;
    - NotSentError: it was not carried out and won't be, so repeating is safe;
    - OutcomeUnknownError: it may have been carried out, or may be later; look before repeating.
    """


class ShimError(VMShimError):
    """The shim refused the request; str() gives its error text. A server's handler raises it, too.

    `message` is the text as it came, `response` the bytes of the response, and `exit_code` that of
    the shim's process where check_shim_response() was given one and it is known, otherwise None.
    """

    def __init__(self, message: Any, response: bytes = b"", exit_code: int | None = None) -> None:
        self.message = str(message)  # an exception is as good as its text
        self.response = response
        self.exit_code = exit_code
        super().__init__(self.message, response, exit_code)

    def __str__(self) -> str:
        return self.message.rstrip("\r\n")


class NotSentError(VMShimError):
    """The request was not carried out and won't be, so repeating it is safe."""


class OutcomeUnknownError(VMShimError):
    """The request may have been carried out, or may be later: look at the container first."""


class _PipeError(OSError):
    """An OSError with errno, strerror, filename and winerror, which pickling keeps as well."""

    _means = errno.EIO, ""
    winerror: int

    def __init__(self, number: int, text: str, path: str | None = None, winerror: int = 0) -> None:
        super().__init__(number, text, path)
        self.winerror = winerror

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self.errno, self.strerror, self.filename, self.winerror
        return type(self), arguments, self.__dict__

    def __str__(self) -> str:
        number = f"[WinError {self.winerror}] " if self.winerror else ""
        path = "" if self.filename is None else f": {self.filename!r}"
        return f"{number}{self.strerror}{path}"


class NeedsWindowsError(NotSentError, _PipeError):
    """A pipe or the registry is needed, and this is not Windows."""


class PipeOpenError(NotSentError, _PipeError):
    """The pipe can't be opened or created; `winerror` tells why."""


class PipeNotFoundError(PipeOpenError, FileNotFoundError):
    """Nobody listens on the pipe."""

    _means = errno.ENOENT, "no shim listens there; check the ID, and that the VM is running"


class PipeAccessError(PipeOpenError, PermissionError):
    """Windows denies access to the pipe, or, to a server, the name."""

    _means = errno.EACCES, "access denied; run this as an elevated administrator"


class PipeBusyError(PipeOpenError, TimeoutError):
    """No instance of the pipe came free in time.

    A VM's pipe exists before the VM has booted, so this may also mean "still booting".
    """

    _means = errno.ETIMEDOUT, "the pipe stayed busy; try again later, the VM may still be booting"


class ShimBusyError(NotSentError, _PipeError, TimeoutError):
    """The time was over before the shim had read the request: it was busy with another one.

    That it won't carry the request out rests on how hcsshim's shim reads: in whole buffers, and
    from a pipe that has no buffers. If your shim reads otherwise, look at the container first.
    """

    _means = errno.ETIMEDOUT, "the shim is busy with another request and has not read this one"


class ResponseTimeoutError(OutcomeUnknownError, _PipeError, TimeoutError):
    """The exchange didn't end in time."""

    _means = errno.ETIMEDOUT, f"the exchange did not end in time{_LOOK_FIRST}"


class ConnectionLostError(OutcomeUnknownError, _PipeError, BrokenPipeError):
    """The connection ended before the exchange had."""

    _means = errno.EPIPE, f"the connection to the shim was lost{_LOOK_FIRST}"


_ERRORS: dict[int, type[_PipeError]] = {
    ERROR_FILE_NOT_FOUND: PipeNotFoundError,
    ERROR_ACCESS_DENIED: PipeAccessError,
    ERROR_PIPE_BUSY: PipeBusyError,
    ERROR_NETNAME_DELETED: ConnectionLostError,
    ERROR_BROKEN_PIPE: ConnectionLostError,
    ERROR_NO_DATA: ConnectionLostError,
    ERROR_PIPE_NOT_CONNECTED: ConnectionLostError,
}


def _pipe_error(kind: type[_PipeError], winerror: int, path: str) -> _PipeError:
    """Return the exception of this kind that a Win32 error stands for."""
    exact = _ERRORS.get(winerror, _PipeError)
    if issubclass(exact, kind):
        return exact(*exact._means, path, winerror)
    text = getattr(ctypes, "FormatError", "Win32 error {}".format)(winerror).strip()
    if issubclass(kind, OutcomeUnknownError):
        text += _LOOK_FIRST
    return kind(kind._means[0], text, path, winerror)


def _check_windows(what: str) -> None:
    if sys.platform != "win32":
        raise NeedsWindowsError(errno.ENOSYS, f"{what} needs Windows, and this is {sys.platform}")


def _log(level: str, text: str, *values: object) -> None:
    """Log one line. Whatever goes wrong with it, a request's outcome stands and a server goes on.

    If nobody has imported logging, nobody reads information: skip the slow import, and write
    warnings and errors where logging would write them.
    """
    failure = ""
    try:
        if sys.modules.get("logging"):
            import logging  # waits if another thread is importing it

            number = getattr(logging, level)
            logger = logging.getLogger("vmshim")
            if logger.isEnabledFor(number):
                logger.log(number, "%s", _log_line(text % values))
            return
    except Exception as error:
        failure = f" (and logging failed: {type(error).__name__})"
    if failure or level in ("WARNING", "ERROR"):
        try:
            sys.stderr.write(f"{_log_line(text % values)}{failure}\n")
        except Exception:
            pass  # there is no stderr either


def _log_line(text: str) -> str:
    return _printable(text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}")


def _traceback_of(error: BaseException) -> str:
    try:
        import traceback

        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception as failure:  # of a module that loads sources, for example
        return f"{type(error).__name__} (and its traceback failed: {type(failure).__name__})"


def _printable(text: str) -> str:
    """Escape control characters: nobody else's text may drive a terminal, or forge a line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ---- JSON as Go's encoding/json writes and reads it ---------------------------------------------
# Python's json differs from Go's: it escapes other characters, merges duplicate keys, and accepts
# NaN. One difference is on purpose: Go reads JSON nested 10,000 deep.

_MAX_DEPTH = 32
"""How deep JSON may be nested. Reading it takes stack, of which some hosts give a thread little."""

# How Go's encoder escapes characters.
_GO_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *b"<>&", 0x2028, 0x2029)}
_GO_ESCAPES.update(str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r", '"': r"\"", "\\": r"\\"}))

_JSON_TYPES = {str: "a string", int: "a 64-bit integer", bool: "a bool", tuple: "an object"}


def _go_json(value: str | int | Mapping[str, Any]) -> str:
    if isinstance(value, str):
        return f'"{value.translate(_GO_ESCAPES)}"'
    if isinstance(value, int):
        return str(int(value))
    members = (f"{_go_json(key)}:{_go_json(member)}" for key, member in value.items())
    return "{" + ",".join(members) + "}"


def _decode_first(data: bytes | str) -> tuple[Any, str]:
    """Return the first JSON value in `data`, and the text after it.

    An object is a tuple of its pairs of key and value, in order and with duplicates.
    """
    import json

    decoder = json.JSONDecoder(
        object_pairs_hook=tuple, parse_int=_parse_int, parse_constant=_refuse
    )
    # For each byte that isn't UTF-8 Go puts a U+FFFD; _typed() puts it for a surrogate.
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    text = text.lstrip(" \t\r\n")
    _check_depth(text)
    value, end = decoder.raw_decode(text)
    return value, text[end:]


def _check_depth(text: str) -> None:
    """Raise ValueError if the first JSON value in a text is nested too deeply."""
    import re

    depth = 0
    for match in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', text, re.DOTALL):
        depth += (match[0] in ("[", "{")) - (match[0] in ("]", "}"))
        if depth > _MAX_DEPTH:
            raise ValueError(f"JSON nested more than {_MAX_DEPTH} deep")
        if depth <= 0:
            return


def _decode_only(data: bytes | str) -> Any:
    """Return the one JSON value that `data` is."""
    value, rest = _decode_first(data)
    if rest.strip(" \t\r\n"):
        raise ValueError(f"unexpected {rest[:20]!r} after the JSON value")
    return value


def _parse_int(digits: str) -> float:
    # More than 19 digits and a sign never fit an int64. Return a float, which _typed() refuses,
    # because int() takes quadratic time.
    return int(digits) if len(digits) <= 20 else float(digits)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return a decoded JSON value as Go has it, null as the zero value.

    `kind` is a type of _JSON_TYPES, or a function that reads the value. Raises ValueError if it
    isn't of this kind.
    """
    import re

    if kind not in _JSON_TYPES:
        return kind(key, value)
    if value is None:
        return kind()
    # Not isinstance: a bool is an int to Python, but not to Go.
    if type(value) is not kind or (kind is int and not -(2**63) <= value < 2**63):
        raise ValueError(f"{key} must be {_JSON_TYPES[kind]}")
    # For each lone surrogate, and so for each byte that isn't UTF-8, Go puts a U+FFFD.
    return re.sub(r"[\ud800-\udfff]", "\ufffd", value) if kind is str else value


def _read_members(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object's members by their keys in `fields`, which has the kind of each.

    As in Go, the case of a key doesn't matter, unknown keys and nulls are skipped, and the last
    duplicate wins. null instead of an object is an empty one.
    """
    members = {name: _typed(name, None, kind) for name, kind in fields.items()}
    names = {name.lower(): name for name in fields}
    for key, member in _typed("the JSON value", value, tuple):
        # Besides upper and lower case Go takes the long s, U+017F, for an s.
        name = names.get(key.lower().replace("\u017f", "s"))
        if name is not None and member is not None:
            members[name] = _typed(key, member, fields[name])
    return members


# ---- Messages -----------------------------------------------------------------------------------

SHIM_SUCCESS = b"\0OK\0"
MAX_RESPONSE = 1 << 20


class VMRequestOp(str, Enum):
    """What a VM shim can do to a container (hcsshim: VMRequestOp).

    - CREATE_CONTAINER, "create": create the container in the VM (OpCreateContainer);
    - SYNC_NAMESPACE, "sync": sync its network namespace (OpSyncNamespace), to which the reference
      always responds "Not implemented";
    - UNMOUNT_CONTAINER, "unmount": take its file systems out of the VM (OpUnmountContainer);
    - UNMOUNT_CONTAINER_DISK_ONLY, "unmount-disk": take only its disks out of the VM
      (OpUnmountContainerDiskOnly).

    A member is its wire text, also in an f-string.
    """

    CREATE_CONTAINER = "create"
    SYNC_NAMESPACE = "sync"
    UNMOUNT_CONTAINER = "unmount"
    UNMOUNT_CONTAINER_DISK_ONLY = "unmount-disk"

    def __str__(self) -> str:
        return self.value


_OPS = {op.value: op for op in VMRequestOp}


class VMRequest(NamedTuple):
    """One request to a VM shim: a container's ID and what to do to it (hcsshim: VMRequest).

    `id` is the container's ID, and `op` a VMRequestOp or its wire text. Like the reference's, a
    VMRequest can have an unknown op or an empty ID: from_json() must be able to return what a
    client sent. Neither is ever sent or handed to a handler.
    """

    id: str
    op: str

    def check(self) -> None:
        """Raise ValueError if the ID is empty or has a lone surrogate, or if the op is unknown.

        Raises TypeError if one of them isn't a str.
        """
        _check_text("container ID", self.id)
        _check_text("op", self.op)
        if not self.id:
            raise ValueError("the container ID is empty")
        if str.__str__(self.op) not in _OPS:
            raise ValueError(f"unknown op {self.op[:50]!r}; a VM shim knows {', '.join(_OPS)}")

    def to_json(self) -> bytes:
        """Return the request as it goes over the wire, newline included.

        >>> VMRequest("a<b", "create").to_json()
        b'{"ID":"a\\\\u003cb","Op":"create"}\\n'
        """
        return f"{_go_json({'ID': self.id, 'Op': self.op})}\n".encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> VMRequest:
        """Read a request as Go's decoder does: its first JSON value, keys in any case.

        The text of a known op becomes its VMRequestOp. Raises ValueError if the JSON value isn't an
        object, is broken, or has a member of a wrong type.
        """
        members = _read_members(_decode_first(data)[0], {"ID": str, "Op": str})
        return cls(members["ID"], _OPS.get(members["Op"], members["Op"]))


def check_shim_response(
    pipe: SupportsRead[bytes | None],
    process: subprocess.Popen[Any] | None = None,
    *,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Read a shim's response to the end and return if it is success (hcsshim: GetErrorFromPipe).

    `pipe` is anything with read(); `max_response` limits the response, in bytes. Raises ShimError
    if the response is anything else, empty, or too long; errors of pipe.read() pass through. On
    every error `process`, if given, is killed first, and its end awaited for at most 10 seconds.
    """
    try:
        response = _read_response(pipe, max_response)
        exit_code = _kill(process) if response != SHIM_SUCCESS else None
    except BaseException:
        _kill(process)  # again, for Ctrl-C may have come in the middle of that
        raise
    if response != SHIM_SUCCESS:
        raise _refusal(response, max_response, exit_code)


def _read_response(pipe: SupportsRead[bytes | None], limit: int) -> bytes:
    """Read to end of file, or to the first byte beyond the limit."""
    _check_max_response(limit)
    response = io.BytesIO()
    while response.tell() <= limit:
        chunk = pipe.read(min(limit + 1 - response.tell(), 65536))
        if chunk is None:
            raise BlockingIOError(errno.EAGAIN, "pipe.read() returned None: it must be blocking")
        if not chunk:
            break
        response.write(chunk)
    return response.getvalue()


def _check_max_response(limit: int) -> None:
    if not isinstance(limit, int):
        raise TypeError(f"max_response must be an int, not {type(limit).__name__}")
    if limit < len(SHIM_SUCCESS):
        raise ValueError(f"max_response must be at least {len(SHIM_SUCCESS)}, not {limit!r}")


def _refusal(response: bytes, limit: int, exit_code: int | None = None) -> ShimError:
    """Return the exception for a response that isn't success."""
    message = response.decode("utf-8", "replace")
    if not response:
        message = "unknown shim failure"
        if exit_code is not None:
            message += f", exit code {exit_code}"
    elif len(response) > limit:
        message = f"the response is longer than {limit} bytes; it begins: {message[:200]}"
    return ShimError(message, response, exit_code)


def _kill(process: subprocess.Popen[Any] | None) -> int | None:
    """Kill a process, if there is one; return its exit code, or None if it does not end."""
    if process is None:
        return None
    try:
        process.kill()
    except OSError:
        pass  # Windows refuses that to a process that is ending
    give_up = time.monotonic() + 10
    # Not process.wait(): on Windows Ctrl-C can't interrupt that.
    while process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    return process.returncode


# ---- Win32 --------------------------------------------------------------------------------------
# https://learn.microsoft.com/windows/win32/ipc/named-pipes

# Copied from ctypes.wintypes: importing that would make this module's import a third slower.
BOOL = ctypes.c_long
DWORD = ctypes.c_ulong
HANDLE = LPVOID = LPCVOID = ctypes.c_void_p
LPDWORD = ctypes.POINTER(DWORD)
LPCWSTR = ctypes.c_wchar_p
ULONG_PTR = ctypes.c_size_t

GENERIC_READ = 0x80000000
GENERIC_WRITE = 0x40000000
OPEN_EXISTING = 3
SECURITY_SQOS_PRESENT = 0x00100000
SECURITY_ANONYMOUS = 0x00000000
FILE_FLAG_OVERLAPPED = 0x40000000
INVALID_HANDLE_VALUE = ctypes.c_void_p(-1).value
STATUS_PENDING = 0x00000103


class OVERLAPPED(ctypes.Structure):
    """Windows' record of one operation under way."""

    _fields_ = [("Internal", ULONG_PTR), ("InternalHigh", ULONG_PTR)]
    _fields_ += [("Offset", DWORD), ("OffsetHigh", DWORD), ("hEvent", HANDLE)]


LPOVERLAPPED = ctypes.POINTER(OVERLAPPED)


def _finaliser(function: str) -> Any:
    """Return a __del__ that calls a function of kernel32: C code, which Ctrl-C can't cut short."""
    if sys.platform != "win32":
        return None
    # Of a library of its own, whose calls leave ctypes.get_last_error() alone.
    free = getattr(ctypes.WinDLL("kernel32"), function)
    free.argtypes = (LPVOID,)
    bind = ctypes.pythonapi["PyInstanceMethod_New"]  # not shared with the whole process
    bind.restype = ctypes.py_object
    bind.argtypes = (ctypes.py_object,)
    return bind(free)


def _declare(function: Any, restype: Any, *argtypes: Any) -> None:
    """Tell ctypes what a function of Windows returns and takes, as Microsoft documents it."""
    function.restype, function.argtypes = restype, argtypes


class _Handle(ctypes.c_void_p):
    """A kernel handle. It is closed, once, when the last reference to it goes."""

    __del__ = _finaliser("CloseHandle")
    __reduce__: Any = None  # no copying and no pickling: what was handed out once is closed once


_kernel32: Any = None  # where there is no Windows; _check_windows() comes before each use
_ntdll: Any = None

if sys.platform == "win32":
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _ntdll = ctypes.WinDLL("ntdll")
    _declare(_kernel32.CreateFileW, _Handle, LPCWSTR, DWORD, DWORD, LPVOID, DWORD, DWORD, HANDLE)
    _declare(_kernel32.WaitNamedPipeW, BOOL, LPCWSTR, DWORD)
    _declare(_kernel32.ReadFile, BOOL, HANDLE, LPVOID, DWORD, LPDWORD, LPOVERLAPPED)
    _declare(_kernel32.WriteFile, BOOL, HANDLE, LPCVOID, DWORD, LPDWORD, LPOVERLAPPED)
    _declare(_kernel32.WaitForSingleObject, DWORD, HANDLE, DWORD)
    _declare(_kernel32.CancelIoEx, BOOL, HANDLE, LPOVERLAPPED)
    _declare(_ntdll.RtlNtStatusToDosError, DWORD, DWORD)

_last_error: Callable[[], int] = getattr(ctypes, "get_last_error", int)
"""Returns the Win32 error of this thread's last call that failed; 0 where there is no Windows."""


# ---- Pipe ---------------------------------------------------------------------------------------

_LONGEST_WAIT = 0.1
"""The longest single wait, in seconds: a wait inside Windows ignores Ctrl-C."""
_NOT_STARTED = 1
"""Stands in OVERLAPPED.Internal until Windows replaces it; Windows never puts it there."""

_under_way: dict[int, tuple[OVERLAPPED, object]] = {}
"""What Windows may still write to, by the address of its OVERLAPPED. It keeps the memory, whatever
Ctrl-C cuts short."""


class _Operation:
    """One overlapped operation, and all that Windows may write to while it is under way."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.arguments = arguments
        self._function = function
        self.overlapped = OVERLAPPED(Internal=_NOT_STARTED)
        self._handle: _Handle | None = None
        self._failure = ERROR_OPERATION_ABORTED  # if it is never started

    def start(self, owner: Any, event: _Handle | None = None) -> None:
        """Start it on its owner's handle. It may have ended, or failed, when this returns.

        Windows signals its end by the event, if there is one, and not by the handle.
        """
        # Not a local variable: a traceback would keep the handle open.
        self._handle = owner._handle
        overlapped = self.overlapped
        if event:
            overlapped.hEvent = event.value
        _under_way[ctypes.addressof(overlapped)] = overlapped, self.arguments
        is_done = self._function(self._handle, *self.arguments, overlapped)
        error = ERROR_IO_PENDING if is_done else _last_error()
        # A failure leaves Internal at STATUS_PENDING for ever; CancelIoEx then finds nothing to
        # cancel. If a signal's handler has replaced the error of a pending one, this cancels that.
        if (
            error != ERROR_IO_PENDING
            and not _kernel32.CancelIoEx(self._handle, overlapped)
            and overlapped.Internal in (STATUS_PENDING, _NOT_STARTED)
        ):
            overlapped.Internal = _NOT_STARTED
            self._failure = error or self._failure

    def is_pending(self) -> bool:
        return bool(self.overlapped.Internal == STATUS_PENDING)

    def wait(self, seconds: float) -> None:
        """Wait until Windows has signalled the handle, for its end or for another operation's."""
        is_timeout = _kernel32.WaitForSingleObject(self._handle, math.ceil(seconds * 1000))
        if self.is_pending() and not is_timeout:
            time.sleep(0.001)  # another thread's operation has ended, and the signal stays

    def end(self) -> None:
        """Cancel it if it is pending, and wait until Windows has let go of its memory.

        Ctrl-C may interrupt this; then it can be called again.
        """
        is_known = self.is_pending() and _kernel32.CancelIoEx(self._handle, self.overlapped)
        # If Windows doesn't know it, it is ending, and has ended within 100 of these. Or it failed
        # at once, which Ctrl-C has hidden from start(): then it stays at STATUS_PENDING for ever.
        waits = math.inf if is_known else 100
        while self.is_pending() and waits > 0:
            time.sleep(0.001)
            waits -= 1
        _under_way.pop(ctypes.addressof(self.overlapped), None)
        self._handle = None

    def error(self) -> int:
        """Return the Win32 error of its end; ctypes' last error may be another call's by now."""
        status = self.overlapped.Internal
        if status == _NOT_STARTED:
            return self._failure
        return int(_ntdll.RtlNtStatusToDosError(status)) if status else 0


def _check_timeout(name: str, seconds: float | None) -> None:
    if seconds is not None and not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, or None, not {seconds!r}")
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"{name} must be a number of seconds from 0 up, or None, not {seconds!r}")


def _deadline(seconds: float | None) -> float:
    """Return the time.monotonic() at which a timeout is over."""
    # An int may be too large for a float.
    return math.inf if seconds is None else time.monotonic() + min(seconds, 1e9)


class Pipe(io.RawIOBase):
    """One end of a named pipe, as a raw binary file (go-winio: the net.Conn of DialPipe).

    `deadline` is a time.monotonic() value; math.inf, as at first, means no limit. An operation that
    hasn't ended by then raises ResponseTimeoutError. If the other end closes, read() returns the
    remaining data, then b"". If it disconnects, or has gone when write() comes, ConnectionLostError
    is raised. One thread may read while another writes; close() may be called in any thread.
    """

    deadline = math.inf

    # Not close(): a Ctrl-C in it would be lost. The handle has a finaliser of its own.
    __del__ = object.__init__

    def __init__(self, path: str) -> None:
        self.name = path
        self._handle: _Handle | None = None
        self._is_at_end = False

    def readable(self) -> bool:
        """Return True."""
        return True

    writable = readable

    def read(self, size: int | None = -1, /) -> bytes:
        """Return what there is, at most `size` bytes, or wait for the first of it.

        b"" is end of file. Without a size, read to end of file.
        """
        if size is None or size < 0:
            return self.readall() or b""
        self._check_open()
        if size == 0 or self._is_at_end:
            return b""
        chunk = ctypes.create_string_buffer(8192)
        count = self._run(_kernel32.ReadFile, chunk, min(size, len(chunk)), None)
        # A zero-length message is end of file, like the other end's close, and it stays so.
        self._is_at_end = count == 0
        return ctypes.string_at(chunk, count)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer what there is, or wait for the first of it; 0 is end of file."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            if view.readonly:
                raise TypeError("can't read into a read-only buffer")
            data = self.read(len(view))
            view[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        """Write all of `data`, as one message where the pipe has messages."""
        self._check_open()
        message = bytes(memoryview(data))
        if not message:  # the reader would take it for end of file
            return 0
        return self._run(_kernel32.WriteFile, message, len(message), None)

    def close(self) -> None:
        """Close the pipe. What was written before can still be read at the other end.

        What another thread does on it meanwhile raises ValueError there, within 0.1 seconds. If
        Ctrl-C interrupts this, call it again.
        """
        try:
            super().close()
            if _under_way:  # perhaps by another thread, on this pipe
                _kernel32.CancelIoEx(self._handle, None)
        finally:
            # This closes the handle, unless another thread's operation still has it.
            self._handle = None

    def _open(self) -> bool:
        """Connect to the pipe, or return False; then _last_error() tells why."""
        access = GENERIC_READ | GENERIC_WRITE
        # Without SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS the server could impersonate us.
        flags = FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS
        self._handle = _kernel32.CreateFileW(self.name, access, 0, None, OPEN_EXISTING, flags, None)
        return bool(self._handle and self._handle.value != INVALID_HANDLE_VALUE)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed pipe")

    def _run(self, function: Any, *arguments: Any) -> int:
        """Run an operation to its end and return its count of bytes, 0 for a read at end of file.

        Ctrl-C is seen within 100 ms. Raises ResponseTimeoutError if the deadline came first.
        """
        operation = _Operation(function, *arguments)
        is_late = False
        try:
            operation.start(self)
            while operation.is_pending():
                seconds = self.deadline - time.monotonic()
                is_late = seconds <= 0
                if is_late or self.closed:
                    operation.end()
                else:
                    operation.wait(min(_LONGEST_WAIT, seconds))
        finally:
            try:
                operation.end()
            except BaseException:
                operation.end()  # a second Ctrl-C has cut that short
                raise
        error = operation.error()
        if is_late and error == ERROR_OPERATION_ABORTED:
            raise ResponseTimeoutError(*ResponseTimeoutError._means, self.name, WAIT_TIMEOUT)
        self._check_open()  # another thread may have closed the pipe
        if function is _kernel32.ReadFile and error in (ERROR_BROKEN_PIPE, ERROR_NETNAME_DELETED):
            return 0
        if error not in (0, ERROR_MORE_DATA):
            raise _pipe_error(ConnectionLostError, error, self.name)
        return int(operation.overlapped.InternalHigh)


# ---- Client -------------------------------------------------------------------------------------


def dial_pipe(
    path: str, *, connect_timeout: float | None = 2.0, timeout: float | None = None
) -> Pipe:
    """Connect to a named pipe (go-winio: DialPipe).

    While all instances are busy, this tries again for `connect_timeout` seconds; 0 means one
    attempt. From `timeout` seconds after the connection on, the deadline, reads and writes raise
    ResponseTimeoutError. None means no limit. Raises ValueError for a path that is not a pipe path,
    NeedsWindowsError, PipeNotFoundError if nobody listens there, PipeAccessError, PipeBusyError, or
    PipeOpenError.
    """
    _check_pipe_path(path)
    _check_timeout("connect_timeout", connect_timeout)
    _check_timeout("timeout", timeout)
    _check_windows("a runhcs pipe")
    pipe = Pipe(path)
    try:
        give_up = _deadline(connect_timeout)
        was_offered = False
        while not pipe._open():
            error = _last_error()
            seconds = min(_LONGEST_WAIT, give_up - time.monotonic())
            if error != ERROR_PIPE_BUSY or seconds <= 0:
                raise _pipe_error(PipeOpenError, error, path)
            if was_offered:
                # A new instance wakes all who wait, and another client took it. Stand back for a
                # random while: where all rush at each instance, 16 get a third as much done.
                time.sleep(min(os.urandom(1)[0] / 4000, seconds))
            was_offered = not was_offered and _wait_for_instance(path, seconds)
        pipe.deadline = _deadline(timeout)
        return pipe
    except BaseException:
        pipe.close()  # the traceback would keep it open
        raise


def _wait_for_instance(path: str, seconds: float) -> bool:
    """Return whether an instance was offered in time; another client may take it first."""
    # 0 would mean the server's default time.
    if _kernel32.WaitNamedPipeW(path, max(1, int(seconds * 1000))):
        return True
    if _last_error() != ERROR_SEM_TIMEOUT:  # in some containers the wait fails at once
        time.sleep(min(0.01, seconds))
    return False


def issue_vm_request(
    pipe_path: str,
    request: VMRequest,
    *,
    connect_timeout: float | None = 2.0,
    timeout: float | None = None,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Send a request to a VM's shim and return when it is carried out (hcsshim: IssueVMRequest).

    `connect_timeout` is how long to try while the pipe is busy; 0 means one attempt. `timeout` is
    how long the exchange may take from the connection on. Both are seconds; None means no limit.
    `max_response` limits the response, in bytes. Raises

    - ValueError or TypeError, before anything is opened: an unknown op, an empty ID or one that
      UTF-8 can't carry, a path that is not a pipe path, a wrong timeout or max_response;
    - ShimError: the shim refused;
    - NotSentError (PipeBusyError, PipeNotFoundError, PipeAccessError, PipeOpenError,
      NeedsWindowsError, ShimBusyError): it was not carried out and won't be; repeating is safe
      (ShimBusyError says on what that rests);
    - OutcomeUnknownError (ResponseTimeoutError, ConnectionLostError, or itself for an empty
      response): the request may have been carried out, or may be later.
    """
    if not isinstance(request, VMRequest):
        kind = f"{type(request).__module__}.{type(request).__qualname__}"
        raise TypeError(f"request must be a VMRequest of this {__name__}, not a {kind}")
    request.check()
    _check_max_response(max_response)
    began = time.monotonic()
    outcome: object = "done"
    try:
        with dial_pipe(pipe_path, connect_timeout=connect_timeout, timeout=timeout) as pipe:
            _exchange(pipe, request.to_json(), max_response)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:1000]}"
        raise
    finally:
        milliseconds = (time.monotonic() - began) * 1000
        _log("DEBUG", "%s: %r %s: %s (%.1f ms)", pipe_path, *request, outcome, milliseconds)


def _exchange(pipe: Pipe, message: bytes, max_response: int) -> None:
    """Send a request, and return if the response is success."""
    try:
        pipe.write(message)
    except ResponseTimeoutError:
        # The write has not ended, so the shim has not read the newline. It can have read the rest
        # only where that fills the buffers of Go's JSON decoder: 512, 1,536, 3,584, ... bytes.
        blocks, rest = divmod(len(message) - len(b"\n"), 512)
        if rest == 0 and blocks & (blocks + 1) == 0:
            raise
        raise ShimBusyError(*ShimBusyError._means, pipe.name, WAIT_TIMEOUT) from None
    except ConnectionLostError as error:
        if _ERRORS.get(error.winerror) is not ConnectionLostError:
            raise  # the shim is still there, and waits for the request
        # It may have refused before it had read everything: its text can still be read.
        response = _read_response(pipe, max_response)
        if not response:
            raise
    else:
        response = _read_response(pipe, max_response)
    if not response:
        # A shim that died in the middle of the request looks exactly like this.
        raise OutcomeUnknownError(f"unknown shim failure: empty response{_LOOK_FIRST}")
    if response != SHIM_SUCCESS:
        raise _refusal(response, max_response)


# ---- Licence ------------------------------------------------------------------------------------
# MIT License
#
# Copyright (c) 2026 the vmshim maintainers
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.


# ==== Part 2: runhcs's containers by their IDs. Cut here if you know the VM's GUID or its pipe.

if TYPE_CHECKING:
    from datetime import datetime

__all__ += ["Container", "ContainerState", "issue_container_request", "list_containers"]
__all__ += ["read_container", "RegistryError", "ContainerNotFoundError", "ContainerStateError"]


# ---- What runhcs prints -------------------------------------------------------------------------


class ContainerState(NamedTuple):
    """A container's status, as `runhcs state` prints it (hcsshim: ContainerState).

    `runhcs list --format json` prints an array of these. `version` is the OCI version; `status` is
    created, running, paused, stopped, unknown, or empty; `init_process_pid` is -1 if unknown; `id`,
    `bundle`, `rootfs`, `annotations` and `owner` are what they say. `created` is an aware datetime,
    0001-01-01T00:00:00Z for never, and `created_nanosecond` its last three digits, 0 to 999 ns,
    which a datetime can't hold.
    """

    version: str
    id: str
    init_process_pid: int
    status: str
    bundle: str
    rootfs: str
    created: datetime
    annotations: Mapping[str, str]
    owner: str
    created_nanosecond: int

    def to_json(self) -> bytes:
        """Return the state as compact JSON, byte for byte as the reference writes it.

        Raises ValueError for a `created` that is naive or whose offset isn't a number of minutes,
        a `created_nanosecond` that isn't from 0 to 999, a pid of no 64 bits, or a lone surrogate.
        """
        members = dict(zip(_STATE_FIELDS, self))
        members["pid"] = _typed("pid", self.init_process_pid, int)
        members["created"] = _go_time(self.created, self.created_nanosecond)
        members["annotations"] = dict(sorted(self.annotations.items()))
        if not self.annotations:
            del members["annotations"]
        return _go_json(members).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> ContainerState:
        """Read one container's state as Go's decoder does; what is absent is Go's zero value.

        Raises ValueError if it is broken, has a member of a wrong type, or a time that isn't
        RFC 3339. Go's decoder differs in this: it also takes an offset of 24 hours, refuses a time
        that is written with escapes, and merges the annotations if that key comes twice.
        """
        members = _read_members(_decode_only(data), _STATE_FIELDS)
        members["created"], members["nanosecond"] = members["created"]
        return cls(*members.values())


def _read_strings(key: str, value: Any) -> dict[str, str]:
    members = _typed(key, value, tuple)
    return {_typed("a key", name, str): _typed(name, text, str) for name, text in members}


_RFC_3339 = r"(\d{4}-\d\d-\d\dT)([01]?\d|2[0-3])(:\d\d:\d\d)(?:[.,](\d+))?(Z|[+-]\d\d:\d\d)"


def _read_time(key: str, value: Any) -> tuple[datetime, int]:
    """Return the datetime and the nanoseconds that it can't hold."""
    import re
    from datetime import datetime

    text = _typed(key, value, str) if value is not None else "0001-01-01T00:00:00Z"
    match = re.fullmatch(_RFC_3339, text, re.ASCII)
    if not match:
        raise ValueError(f"{key} must be an RFC 3339 time, not {text[:40]!r}")
    date, hour, minute, fraction, zone = match.groups("")
    digits = fraction.ljust(9, "0")
    # Before Python 3.11, fromisoformat() takes this one form only.
    iso = f"{date}{hour:0>2}{minute}.{digits[:6]}{zone.replace('Z', '+00:00')}"
    return datetime.fromisoformat(iso), int(digits[6:9])


def _go_time(moment: datetime, nanosecond: int) -> str:
    if not 0 <= nanosecond <= 999:
        raise ValueError(f"created_nanosecond must be 0 to 999, not {nanosecond}")
    text = moment.isoformat(timespec="seconds")
    seconds, zone = text[:19], text[19:]
    if len(zone) != len("+00:00"):
        raise ValueError(f"a time must have an offset in whole minutes, and {text} has none")
    fraction = f".{moment.microsecond:06}{nanosecond:03}".rstrip(".0")
    return seconds + fraction + ("Z" if zone == "+00:00" else zone)


# The keys of the reference's struct, in the order of the fields above.
_STATE_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("ociVersion", "id"), str),
    "pid": int,
    **dict.fromkeys(("status", "bundle", "rootfs"), str),
    "created": _read_time,
    "annotations": _read_strings,
    "owner": str,
}


# ---- runhcs's own state -------------------------------------------------------------------------

ERROR_NO_MORE_ITEMS = 259
ERROR_KEY_DELETED = 1018


class RegistryError(NotSentError, _PipeError):
    """The registry can't be read; `filename` is the key."""


class ContainerNotFoundError(NotSentError, LookupError):
    """runhcs knows no such container, or it runs in no VM."""


class ContainerStateError(NotSentError, ValueError):
    """What runhcs stored of the container is broken."""


class Container(NamedTuple):
    """A container's registry entry, as runhcs stores it (hcsshim: persistedState in cmd/runhcs).

    `id`, `owner`, `bundle`, `rootfs`, `created` and `created_nanosecond` are as in ContainerState.
    `sandbox_id` is the ID of the sandbox that it belongs to. `host_id` is the ID of its VM, and
    `host_unique_id` the GUID in the name of that VM's pipe; empty, and the zero GUID, if it runs in
    no VM. `is_host` tells whether it was created together with its VM. `unique_id` is the GUID in
    the name of its own pipe, see shim_pipe_path(), and `shim_pid` the pid of its own shim; 0 if
    that has exited, -1 if unknown.
    """

    id: str
    owner: str
    sandbox_id: str
    host_id: str
    bundle: str
    created: datetime
    rootfs: str
    is_host: bool
    unique_id: uuid.UUID
    host_unique_id: uuid.UUID
    shim_pid: int
    created_nanosecond: int

    def vm_pipe_path(self) -> str:
        """Return the path of the pipe of this container's VM.

        Raises ContainerNotFoundError if the container runs in no VM.
        """
        if not self.host_unique_id.int:
            raise ContainerNotFoundError(f"container '{self.id}' runs in no VM")
        return vm_pipe_path(self.host_unique_id)


def _read_guid(key: str, value: Any) -> uuid.UUID:
    zero = "00000000-0000-0000-0000-000000000000"
    return _parse_guid(key, _typed(key, value, str) if value is not None else zero)


# The keys of the reference's struct, in the order of the fields above.
_CONTAINER_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("ID", "Owner", "SandboxID", "HostID", "Bundle"), str),
    "Created": _read_time,
    "Rootfs": str,
    "IsHost": bool,
    **dict.fromkeys(("UniqueID", "HostUniqueID"), _read_guid),
}


def read_container(container_id: str, *, root: str = "default") -> Container:
    """Return what runhcs stored of a container (hcsshim: getContainer in cmd/runhcs).

    `root` is runhcs's --root. Raises ContainerNotFoundError, ContainerStateError if the stored
    state is broken, RegistryError if the registry can't be read, NeedsWindowsError, and ValueError
    if the ID or the root is empty or has a lone surrogate.
    """
    if not container_id:
        raise ValueError("the container ID is empty")
    key_name = _path_escape("container ID", container_id)
    values = _read_key(root, key_name, _stored_values)
    # hcsshim's words.
    if values is None:
        raise ContainerNotFoundError(f"ID '{container_id}' was not found")
    state, shim_pid = values
    if state is None:
        raise ContainerNotFoundError(f"state 'state' is not present for ID '{container_id}'")
    try:
        members = _read_members(_decode_only(state), _CONTAINER_FIELDS)
    except ValueError as error:
        raise ContainerStateError(f"the state of ID '{container_id}' is broken: {error}") from None
    members["ID"] = members["ID"] or container_id
    members["shim"] = shim_pid
    members["Created"], members["nanosecond"] = members["Created"]
    return Container(*members.values())


def list_containers(*, root: str = "default") -> list[Container]:
    """Return what runhcs stored of each container on this host; nothing if it has never run.

    Broken entries are logged as warnings and left out. `root` and exceptions are those of
    read_container().
    """
    from urllib.parse import unquote

    containers = []
    for name in _read_key(root, "", _subkey_names) or []:
        try:
            containers.append(read_container(unquote(name, errors="strict"), root=root))
        except (LookupError, ValueError) as error:
            _log("WARNING", "registry key %r of root %r left out: %s", name, root, error)
    return containers


def issue_container_request(
    container_id: str,
    op: str,
    *,
    root: str = "default",
    connect_timeout: float | None = 2.0,
    timeout: float | None = None,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Look a container up and send a request for it to its VM's shim.

    hcsshim does this in cmd/runhcs, in issueVMRequest. `op` is a VMRequestOp or its wire text. The
    other arguments and the exceptions are those of read_container() and issue_vm_request(). If the
    VM's pipe does not exist, PipeNotFoundError names the VM.
    """
    VMRequest(container_id, op).check()
    _check_timeout("connect_timeout", connect_timeout)
    _check_timeout("timeout", timeout)
    _check_max_response(max_response)
    limits = {"connect_timeout": connect_timeout, "timeout": timeout}
    container = read_container(container_id, root=root)
    _issue_to_vm(container, op, max_response=max_response, **limits)


def _issue_to_vm(container: Container, op: str, **limits: Any) -> None:
    """Issue a request to a container's VM, and name the VM if its pipe doesn't exist."""
    try:
        issue_vm_request(container.vm_pipe_path(), VMRequest(container.id, op), **limits)
    except PipeNotFoundError as error:
        text = f"VM {container.host_id} cannot be contacted"
        raise PipeNotFoundError(errno.ENOENT, text, error.filename, error.winerror) from None


def _registry_path(root: str, name: str) -> str:
    if not root:
        raise ValueError("the root is empty")
    return f"SOFTWARE\\Microsoft\\runhcs\\{_path_escape('root', root)}\\{name}".rstrip("\\")


def _read_key(root: str, name: str, read: Callable[[Any, Any], Any]) -> Any:
    """Return what `read` returns for winreg and a key below a root of runhcs; None: no such key."""
    path = _registry_path(root, name)
    _check_windows("runhcs's state")
    from importlib import import_module

    winreg: Any = import_module("winreg")  # which type checkers don't know elsewhere

    # A 32-bit Python would be redirected to a registry of its own.
    access = winreg.KEY_READ | winreg.KEY_WOW64_64KEY
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path, 0, access) as key:
            return read(winreg, key)
    except OSError as error:
        winerror = getattr(error, "winerror", 0) or 0
        # The second if the key has been deleted since it was opened. No key has a longer name.
        is_gone = winerror in (ERROR_FILE_NOT_FOUND, ERROR_KEY_DELETED)
        if is_gone or max(map(len, path.split("\\"))) > 255:
            return None
        text = f"can't be read ({error.strerror})"
        if winerror == ERROR_ACCESS_DENIED:
            text += "; run this as an elevated administrator"
        raise RegistryError(error.errno or 0, text, f"HKLM\\{path}", winerror) from None


def _stored_values(winreg: Any, key: Any) -> tuple[Any, Any]:
    """Return a container's state, None if there is none, and the pid of its shim."""
    values = {}
    for name, kind in ("state", winreg.REG_BINARY), ("shim", winreg.REG_QWORD):
        try:
            value, found = winreg.QueryValueEx(key, name)
        except FileNotFoundError:
            continue
        if found == kind:
            values[name] = b"" if value is None else value  # winreg's None is a value of no bytes
    return values.get("state"), values.get("shim", -1)


def _subkey_names(winreg: Any, key: Any) -> list[str]:
    """Return the names of a key's subkeys, of one moment if runhcs lets it be had in ten tries."""
    names: list[str] = []
    for _ in range(10):
        before = winreg.QueryInfoKey(key)
        try:
            names = [winreg.EnumKey(key, index) for index in range(before[0])]
            if winreg.QueryInfoKey(key) == before:
                break
        except OSError as error:
            if getattr(error, "winerror", 0) != ERROR_NO_MORE_ITEMS:
                raise
    return names


# ==== Part 3: a VM shim's server. Cut here if you only send requests.

import _thread

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ += ["MAX_REQUEST", "VMShimServer"]


# ---- Win32 for a server --------------------------------------------------------------------------

PIPE_ACCESS_DUPLEX = 0x00000003
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
PIPE_TYPE_MESSAGE = 0x00000004
PIPE_READMODE_MESSAGE = 0x00000002
PIPE_REJECT_REMOTE_CLIENTS = 0x00000008
PIPE_UNLIMITED_INSTANCES = 255
SDDL_REVISION_1 = 1
ERROR_PIPE_CONNECTED = 535

_DEFAULT_SECURITY = "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)"
"""LocalSystem, administrators, the owner. Windows' default lets everybody read, so occupy it."""


class SECURITY_ATTRIBUTES(ctypes.Structure):
    """Who may open what is being created."""

    _fields_ = [("nLength", DWORD), ("lpSecurityDescriptor", LPVOID), ("bInheritHandle", BOOL)]


_SecurityDescriptor = type("_SecurityDescriptor", (LPVOID,), {"__del__": _finaliser("LocalFree")})
"""A security descriptor in memory that Windows has allocated, freed like a handle."""
LPSECURITY_ATTRIBUTES = ctypes.POINTER(SECURITY_ATTRIBUTES)
_parse_sddl: Any = None

if sys.platform == "win32":
    _declare(_kernel32.CreateNamedPipeW, _Handle, LPCWSTR, *[DWORD] * 6, LPSECURITY_ATTRIBUTES)
    _declare(_kernel32.ConnectNamedPipe, BOOL, HANDLE, LPOVERLAPPED)
    _declare(_kernel32.CreateEventW, _Handle, LPVOID, BOOL, BOOL, LPCWSTR)
    _declare(_kernel32.SetEvent, BOOL, HANDLE)
    _advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
    _parse_sddl = _advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW
    _declare(_parse_sddl, BOOL, LPCWSTR, DWORD, ctypes.POINTER(_SecurityDescriptor), LPDWORD)


def _check_local_pipe_path(path: str) -> None:
    _check_pipe_path(path)
    if not path.startswith("\\\\.\\"):
        raise ValueError(f"a server's pipe path must begin with \\\\.\\, and {path!r} doesn't")


def _parse_security(text: str | None) -> SECURITY_ATTRIBUTES:
    """Return what CreateNamedPipeW takes for an SDDL string."""
    text = _DEFAULT_SECURITY if text is None else text
    _check_text("security_descriptor", text)
    descriptor = _SecurityDescriptor()
    # Windows stops reading at a NUL. A descriptor without a D: would let everybody in.
    is_usable = "\0" not in text and "D:" in text
    if not (is_usable and _parse_sddl(text, SDDL_REVISION_1, descriptor, None)):
        raise ValueError(f"security_descriptor is not SDDL with a DACL: {text!r}")
    attributes = SECURITY_ATTRIBUTES(ctypes.sizeof(SECURITY_ATTRIBUTES), descriptor.value, False)
    attributes.descriptor = descriptor  # keeps the memory as long as the attributes
    return attributes


# ---- Server -------------------------------------------------------------------------------------
# The thread that calls serve_forever() does everything: it takes what has ended at any client, goes
# one step on with each, and runs the handler in between.

MAX_REQUEST = 1 << 20
_COURTESY = 0.01
"""How long a request waits for the client before it to take its response, in seconds."""
_STOP_GRACE = 0.5
"""How long a server that stops gives its clients to take their responses, in seconds."""
_STOPPED = b"the VM shim stopped before it had carried the request out"


class VMShimServer:
    """A VM shim's end of the pipe (hcsshim: the server in cmd/runhcs/vm.go).

    `handler` is called with one VMRequest at a time, in the thread that runs serve_forever(). If it
    returns, the client is told of success. To refuse a request it raises ShimError with the text
    for the client, who gets it byte for byte, or the first MAX_RESPONSE bytes. Any other Exception
    is a bug in the handler: it is logged as an error, and the client gets its text, too. While the
    handler runs, nothing else is done: one more client may connect and wait, as with the reference,
    and others get PipeBusyError. A request whose client has gone before the handler begins is not
    carried out.

    `request_timeout` is how long, in seconds, a client may take for each of these: sending its
    request, reading the response, closing its end. The handler's time doesn't count. None means no
    limit. At most `max_clients` are connected at a time, besides those who come while the server is
    made. Each can make it hold 5.1 MiB, a request of MAX_REQUEST bytes as it came and as text; up
    to 30 more are held while one of them is parsed.

    `security_descriptor` is an SDDL string that says who may connect. Without it LocalSystem,
    administrators and the account that runs the server may, and nobody else. It must give this
    account GA. Give clients 0x12019b, not GW, FA or GA: these include the right to create an
    instance of the pipe, and so to pose as the server.

    The pipe exists as soon as the server object does. Clients get PipeBusyError while
    serve_forever() is not running. Raises ValueError for a path that is not \\\\.\\pipe\\NAME or a
    wrong security descriptor, PipeAccessError if the name is taken or needs an elevated
    administrator, and PipeOpenError.
    """

    def __init__(
        self,
        pipe_path: str,
        handler: Callable[[VMRequest], object],
        *,
        request_timeout: float | None = 10.0,
        max_clients: int = 64,
        security_descriptor: str | None = None,
    ) -> None:
        _check_local_pipe_path(pipe_path)
        _check_timeout("request_timeout", request_timeout)
        if not callable(handler):
            raise TypeError(f"handler must be callable, not {handler!r}")
        if request_timeout == 0:
            raise ValueError("request_timeout must be more than 0, or no client could be heard")
        if not max_clients >= 1:
            raise ValueError(f"max_clients must be at least 1, not {max_clients!r}")
        _check_windows("a VM shim's pipe")
        self.pipe_path = pipe_path
        self.handler = handler
        self.request_timeout = request_timeout
        self.max_clients = max_clients
        # Other threads may use these. While serve_forever() runs, _runs["run"] is a new list of its
        # thread: dict.setdefault() is one step, and the list tells this run from the next.
        self._is_stopping = self._is_closed = False
        self._runs: dict[str, list[int]] = {}
        # The rest belongs to the thread that serves.
        self._clients: list[_Client] = []
        self._waiting: list[_Client] = []  # whose requests are complete
        self._retry_at = 0.0
        self._has_begun = False  # whether an operation was started, which resets the event
        self._event: _Handle | None = None  # Windows sets it when an operation has ended
        self._handle: _Handle | None = None  # the instance that keeps the pipe's name
        self._came_early: list[_Handle | None] = []  # instances that others have connected to
        try:
            self._take_name(security_descriptor)
        except BaseException:
            self.close()  # the traceback would keep the name
            raise

    def serve_forever(self) -> None:
        """Respond to requests until shutdown() or close() is called.

        KeyboardInterrupt, SystemExit and every other BaseException that is no Exception, in the
        handler too, end it and are passed on; a request that the handler had begun then gets no
        response, because its outcome is unknown. If shutdown() was called while the server was
        idle, it returns at once. Raises ValueError if the server is closed and RuntimeError if it
        is serving already. If more than two Ctrl-C cut its end short, call close() in its thread.
        """
        run = [_thread.get_ident()]
        if self._is_closed:
            raise ValueError("the server is closed")
        if self._is_serving_here() or self._runs.setdefault("run", run) is not run:
            raise RuntimeError("the server is serving already")
        try:
            self._serve()
        except BaseException:
            # Ctrl-C, mostly: clients that wait are told so, and others may take their responses. A
            # second Ctrl-C ends that, too.
            self._is_stopping = True
            self._serve()
            raise
        finally:
            try:
                self._end()
            except BaseException:
                self._end()  # Ctrl-C has cut that short
                raise

    def shutdown(self) -> None:
        """Make serve_forever() return, and wait until it has, unless its own thread calls this.

        The request under way is carried out; clients that wait are told that the shim has stopped.
        """
        # When Python ends, it lets no other thread go on, and then it clears this module's names.
        if sys is None or sys.is_finalizing():
            return
        run = self._runs.get("run")
        is_here = self._is_serving_here()
        self._is_stopping = True
        _kernel32.SetEvent(self._event)
        while run and self._runs.get("run") is run and not (is_here or sys.is_finalizing()):
            time.sleep(0.01)

    def close(self) -> None:
        """Shut down and release the pipe's name.

        When the handler calls it, the name is released after the handler has returned. If Ctrl-C
        interrupts this, call it again.
        """
        self._is_closed = True
        self.shutdown()
        if not self._runs:
            self._release()

    def __enter__(self) -> VMShimServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_serving_here(self) -> bool:
        """Tell whether serve_forever() called the caller; end a run that was cut short here."""
        if self._runs.get("run") != [_thread.get_ident()]:
            return False
        frame: Any = sys._getframe(1).f_back
        while frame:
            if (
                frame.f_code is VMShimServer.serve_forever.__code__
                and frame.f_locals["self"] is self
            ):
                return True
            frame = frame.f_back
        self._end()
        return False

    def _serve(self) -> None:
        """Attend to the clients until the server is to stop and they have gone."""
        while True:
            self._advance()
            if self._is_stopping or self._is_closed:
                self._waiting.clear()
                for client in list(self._clients):
                    client.stop()
                if not self._clients:
                    return
            else:
                self._offer_instance()
            if self._waiting:
                self._carry_out(self._waiting.pop(0))
            else:
                self._wait(_LONGEST_WAIT)

    def _advance(self) -> None:
        """Go on with each client at which something has ended, or whose time is over."""
        self._has_begun = False
        for client in list(self._clients):
            client.advance()
        now = time.monotonic()
        for client in [client for client in self._clients if client.deadline <= now]:
            client.give_up()

    def _wait(self, seconds: float) -> None:
        """Wait until an operation ends, a client's time is over, or shutdown() is called."""
        # A start resets the event, so what ended just before it may have left no signal.
        if self._has_begun:
            return
        deadline = min((client.deadline for client in self._clients), default=math.inf)
        seconds = max(0.0, min(seconds, deadline - time.monotonic()))
        _kernel32.WaitForSingleObject(self._event, math.ceil(seconds * 1000))

    def _offer_instance(self) -> None:
        """Offer an instance of the pipe if none is offered and one more client may come in."""
        is_full = len(self._clients) >= self.max_clients
        is_offered = any(client.step == "connect" for client in self._clients)
        if is_full or is_offered or time.monotonic() < self._retry_at:
            return
        client = _Client(self)
        self._clients.append(client)
        try:
            client.connect()
        except _PipeError as error:
            self._pause_offers(error.winerror)
            client.drop()

    def _carry_out(self, client: _Client) -> None:
        """Call the handler for a client's request, and give the client the response."""
        try:
            if not client.request:
                client.request = VMRequest.from_json(bytes(client.received))
            client.request.check()
        except ValueError as error:
            client.respond(str(error).encode("utf-8", "backslashreplace"))
            return
        if not client.is_there():
            # It may go on sending for ever.
            client.deadline = min(client.deadline, _deadline(self.request_timeout))
            self._waiting.append(client)
            return
        client.step = "handler"
        began = time.monotonic()
        response = self._call_handler(client.request)
        for other in self._clients:
            other.deadline += time.monotonic() - began  # nobody could be attended to
        client.respond(response)
        # The next request may take long. This client should not have to wait for that. Before
        # Python 3.13, monotonic() moves in steps of 15.6 ms, too long for this.
        give_up = time.perf_counter() + _COURTESY
        while client.step == "respond" and time.perf_counter() < give_up:
            self._wait(give_up - time.perf_counter())
            self._advance()

    def _call_handler(self, request: VMRequest) -> bytes:
        """Return the response: success, or the text of the handler's exception."""
        try:
            result = self.handler(request)
            # Asked of its type, because a proxy says yes to everything.
            if hasattr(type(result), "__await__"):
                raise TypeError("the handler returned something to await, which nobody does")
        except ShimError as error:
            _log("INFO", "%s: %s %r refused: %s", self.pipe_path, request.op, request.id, error)
            return _refusal_bytes(error)
        except Exception as error:
            text = "%s: the handler failed at %s %r: %s"
            _log("ERROR", text, self.pipe_path, request.op, request.id, _traceback_of(error))
            return _refusal_bytes(error)
        return SHIM_SUCCESS

    def _end(self) -> None:
        """Leave nothing of a run of serve_forever(). If Ctrl-C interrupts this, call it again."""
        self._waiting.clear()
        for client in list(self._clients):
            client.drop()
        self._is_stopping = False
        self._runs.clear()
        if self._is_closed:
            self._release()

    def _take_name(self, security_descriptor: str | None) -> None:
        """Create the pipe, and keep its name.

        Between two offered instances the name must not vanish, nor may anybody else take it. So the
        first instance is used up by a client of our own, which leaves at once: the instance stays,
        keeps the name, and nobody can connect to it. DisconnectNamedPipe can't do that for a new
        instance under Wine, and CreateNamedPipeW has no option for it.
        """
        self._event = _kernel32.CreateEventW(None, False, False, None)
        if not self._event:
            raise _pipe_error(PipeOpenError, _last_error(), self.pipe_path)
        # The descriptor belongs to the name: only the first instance's counts.
        self._create_instance(self, _parse_security(security_descriptor))
        while not self._use_up_instance():
            self._came_early.append(self._handle)
            self._create_instance(self)

    def _use_up_instance(self) -> bool:
        """Connect to the offered instance and leave; return False if another client was faster."""
        try:
            dial_pipe(self.pipe_path, connect_timeout=0).close()
        except PipeBusyError:
            return False
        except PipeAccessError as error:
            text = "the server can't connect to its own pipe; its security descriptor must allow it"
            raise PipeAccessError(errno.EACCES, text, self.pipe_path, error.winerror) from None
        return True

    def _create_instance(self, end: Any, attributes: Any = None) -> None:
        """Create an instance for `end`, a server or a client; only the first has attributes."""
        open_mode = PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED
        open_mode |= FILE_FLAG_FIRST_PIPE_INSTANCE if attributes else 0
        pipe_mode = PIPE_TYPE_MESSAGE | PIPE_READMODE_MESSAGE | PIPE_REJECT_REMOTE_CLIENTS
        # Buffers of 0: a write ends when the client has read it. Only then may the zero-length
        # message follow, which Windows drops while data is unread.
        numbers = open_mode, pipe_mode, PIPE_UNLIMITED_INSTANCES, 0, 0, 0
        # Not to a local variable: a traceback would keep the instance open.
        end._handle = _kernel32.CreateNamedPipeW(self.pipe_path, *numbers, attributes)
        if end._handle and end._handle.value != INVALID_HANDLE_VALUE:
            return
        winerror = _last_error()
        # A server that has all the instances that it allows says so, before the name is looked at.
        if winerror in (ERROR_ACCESS_DENIED, ERROR_PIPE_BUSY):
            text = "the name is taken by another server, or needs an elevated administrator"
            raise PipeAccessError(errno.EACCES, text, self.pipe_path, winerror)
        raise _pipe_error(PipeOpenError, winerror, self.pipe_path)

    def _release(self) -> None:
        self._came_early.clear()
        self._handle = self._event = None

    def _pause_offers(self, winerror: int) -> None:
        """Log why no client can be let in, if it is news, and offer nothing for a while."""
        if not self._retry_at:
            error = _pipe_error(PipeOpenError, winerror, self.pipe_path)
            _log("ERROR", "no client can be let in: %s", error)
        self._retry_at = time.monotonic() + _LONGEST_WAIT


def _refusal_bytes(error: Exception) -> bytes:
    """Return what a client is told of the handler's exception: never nothing, and never success."""
    try:
        # What another shim sent is passed on byte for byte.
        refusal = error if isinstance(error, ShimError) else ShimError(str(error) or repr(error))
        response = bytes(refusal.response) or refusal.message.encode("utf-8", "backslashreplace")
    except Exception:  # the exception's own code may be as broken as the handler
        response = b""
    return response if response not in (b"", SHIM_SUCCESS) else b"the handler gave no text"


class _Client:
    """One client of a server, on an instance of the pipe that was offered to it.

    Its steps are "connect", "send", "wait", "handler", "respond", "leave" and "gone". At most two
    operations are under way: ConnectNamedPipe or a read, and a write. From its connection on a read
    always is: it tells when the client goes, and a client whose write has not ended can't read.
    """

    def __init__(self, server: VMShimServer) -> None:
        self.step = "connect"
        self.deadline = math.inf
        self._server = server
        self._handle: _Handle | None = None
        # What is under way, and what to call with it when it has ended.
        self._operations: dict[_Operation, Callable[[_Operation], None]] = {}
        self.received = bytearray()
        self.request: VMRequest | None = None
        self._object_end = _object_end()
        next(self._object_end)
        self._response = b""

    def connect(self) -> None:
        """Offer an instance of the pipe, to which somebody may have connected already."""
        if self._server._came_early:
            self._handle = self._server._came_early.pop(0)
        else:
            self._server._create_instance(self)
        self._begin(self._connected, _kernel32.ConnectNamedPipe)

    def advance(self) -> None:
        """Go on after each operation that has ended."""
        for operation in [each for each in self._operations if not each.is_pending()]:
            operation.end()
            error = operation.error()
            then = self._operations.pop(operation, None)
            if not then:
                return  # the step before has dropped the client
            if error in (0, ERROR_MORE_DATA, ERROR_PIPE_CONNECTED):
                then(operation)
                continue
            if error == ERROR_OPERATION_ABORTED and self._server._is_stopping:
                continue  # Ctrl-C came before it began
            if self.step == "connect" and error != ERROR_NO_DATA:  # that one came and went
                self._server._pause_offers(error)
            elif self.step != "connect" and error != ERROR_BROKEN_PIPE:
                text = "%s: a client has failed: Win32 error %s"
                _log("DEBUG", text, self._server.pipe_path, error)
            self.drop()

    def is_there(self) -> bool:
        """Tell whether a client that waits has neither gone nor sent anything more."""
        return any(operation.is_pending() for operation in self._operations)

    def respond(self, response: bytes) -> None:
        """Tell the client how its request has ended."""
        self.step = "respond"
        self.deadline = _deadline(self._server.request_timeout)
        self.received.clear()
        self.request = None
        data = self._response = response[:MAX_RESPONSE]
        self._begin(self._responded, _kernel32.WriteFile, data, len(data), None)

    def give_up(self) -> None:
        """The time for a step is over: refuse the request if it is not complete, or else leave."""
        if self.step == "send":
            self.respond(b"no complete request came in time")
        else:
            self.drop()

    def stop(self) -> None:
        """The server stops: refuse the request, or give the client time to take the response."""
        if self.step in ("send", "wait"):
            self.respond(_STOPPED)
        elif self.step != "respond":
            self.drop()
        self.deadline = min(self.deadline, time.monotonic() + _STOP_GRACE)

    def drop(self) -> None:
        """End what is under way, and close the instance. If Ctrl-C interrupts this, call it again.

        What was written and not read is lost to the client.
        """
        self.step = "gone"
        for operation in list(self._operations):
            operation.end()
        self._operations.clear()
        self._handle = None  # the last reference: this closes the handle
        for clients in self._server._waiting, self._server._clients:
            if self in clients:
                clients.remove(self)

    def _connected(self, _: _Operation) -> None:
        self._server._retry_at = 0.0
        self.step = "send"
        self.deadline = _deadline(self._server.request_timeout)
        self._read()

    def _was_read(self, read: _Operation) -> None:
        if self.step == "send":
            piece = ctypes.string_at(read.arguments[0], read.overlapped.InternalHigh)
            self.received += piece
            # A message of length zero is the end of what the client sends.
            is_complete = self._object_end.send(piece) or not piece
            if len(self.received) > MAX_REQUEST:
                self.respond(b"the request is longer than %d bytes" % MAX_REQUEST)
            elif is_complete and read.error() != ERROR_MORE_DATA:  # the client's write has ended
                self.step = "wait"
                self.deadline = math.inf
                self._server._waiting.append(self)
        self._read()

    def _responded(self, _: _Operation) -> None:
        if self._response == SHIM_SUCCESS:
            self._begin(self._was_told, _kernel32.WriteFile, b"", 0, None)
        else:
            self.drop()

    def _was_told(self, _: _Operation) -> None:
        self.step = "leave"
        self.deadline = _deadline(self._server.request_timeout)

    def _read(self) -> None:
        chunk = ctypes.create_string_buffer(4096)
        self._begin(self._was_read, _kernel32.ReadFile, chunk, len(chunk), None)

    def _begin(self, then: Callable[[_Operation], None], function: Any, *arguments: Any) -> None:
        operation = _Operation(function, *arguments)
        self._operations[operation] = then
        self._server._has_begun = True
        operation.start(self, self._server._event)


def _object_end() -> Generator[bool, bytes, None]:
    """Take a JSON object in pieces, and yield whether it has ended, or can't be one any more."""
    depth = 0
    is_in_string = is_escaped = has_ended = False
    while True:
        for byte in (yield has_ended):
            if is_escaped:
                is_escaped = False
            elif is_in_string:
                is_escaped = byte == 0x5C  # backslash
                is_in_string = byte != 0x22  # quotation mark
                has_ended |= byte < 0x20
            elif byte in b"{[":
                depth += 1
            elif byte in b"}]":
                depth -= 1
                has_ended |= depth <= 0
            elif byte not in b" \t\r\n":
                is_in_string = byte == 0x22
                # In an object there are strings, punctuation, digits, and true, false and null.
                has_ended |= depth == 0 or byte not in b'",:-+.0123456789eEtrufalsn'


# ==== Part 4: the command line. Cut here if you only import this file.

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import NoReturn

__all__ += ["main"]


# ---- Command line -------------------------------------------------------------------------------


class _UsageError(ValueError):
    """Wrong arguments of a command."""


# The exit status, and the outcome in JSON, of the first exception that fits.
_OUTCOMES: tuple[tuple[Any, int, str], ...] = (
    (type(None), 0, "done"),
    (ShimError, 1, "refused"),
    (_UsageError, 2, "not-sent"),
    (PipeAccessError, 4, "not-sent"),
    ((PipeBusyError, ShimBusyError), 5, "not-sent"),
    (NotSentError, 3, "not-sent"),
    (OutcomeUnknownError, 6, "unknown"),
    (KeyboardInterrupt, 130, "unknown"),
    (BaseException, 70, "unknown"),
)

_EPILOG = """\
examples:
  vmshim.py unmount --timeout 60 my-container
  vmshim.py unmount --vm 6ba7b810-9dad-11d1-80b4-00c04fd430c8 my-container
  vmshim.py create --pipe \\\\.\\pipe\\my-shim --timeout 30 --json my-container

exit status:
  0    done
  1    the shim refused; its text is on stderr
  2    wrong arguments; nothing was sent
  3    nothing was sent: no such container or VM, nobody listens there, or as stderr says
  4    access denied; nothing was sent
  5    the pipe or the shim stayed busy and has not read the request: it was not carried out
  6    no response in time, an empty one, or the connection was lost: the outcome is unknown
  70   a bug in vmshim; the traceback is on stderr
  130  Ctrl-C; if the request was under way, its outcome is unknown
"""


def _outcome_of(error: BaseException | None) -> tuple[int, str]:
    """Return the exit status and the outcome of a command that raised `error`, or nothing."""
    return next((status, said) for kind, status, said in _OUTCOMES if isinstance(error, kind))


def _print(text: str, name: str = "stdout", *, is_for_terminal: bool = False) -> None:
    """Print a text to stdout or stderr, and drop what can't be printed.

    The exit status tells the outcome even so, whatever a host has put in place of the stream.
    """
    stream: Any = getattr(sys, name, None)
    try:
        if is_for_terminal and not getattr(stream, "isatty", bool)():
            return
        lines = "".join(f"{_printable(line)}\n" for line in text.split("\n"))
        # A console or a file may not know every character.
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(lines.encode(encoding, "backslashreplace").decode(encoding))
        getattr(stream, "flush", bool)()
    except Exception:
        # Python would try to flush it again at its end, and change the exit status.
        setattr(sys, name, None)


def _print_failure(failure: BaseException) -> None:
    """Say on stderr why a command failed; Ctrl-C needs no words."""
    status, _ = _outcome_of(failure)
    if status == 70:
        _print(_traceback_of(failure).rstrip("\n"), "stderr")
    elif status != 130:
        prefix = "vmshim.py: error: " if status == 2 else ""
        _print(_printable(f"{prefix}{_describe(failure)}"), "stderr")


def _describe(error: BaseException) -> str:
    if isinstance(error, _PipeError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error) or type(error).__name__


def _print_json(failure: BaseException | None, seconds: float, **sent: str | None) -> None:
    """Print how a request has ended, as one line of JSON."""
    import json

    status, outcome = _outcome_of(failure)
    error = None if failure is None else _describe(failure)
    row: dict[str, Any] = {"host": os.environ.get("COMPUTERNAME"), **sent, "ok": failure is None}
    row.update(status=status, error=error, outcome=outcome, retry=isinstance(failure, NotSentError))
    row.update(elapsed_ms=round(seconds * 1000, 1), version=__version__)
    _print(json.dumps(row))


def _run_requests(options: argparse.Namespace) -> int:
    """Send one request after the other; return the exit status of the first that failed."""
    limits = {"connect_timeout": options.connect_timeout, "timeout": options.timeout}
    longest = "without limit" if options.timeout is None else f"up to {sum(limits.values()):g} s"
    first_failure = 0
    for container_id in options.id:
        pipe_path = options.pipe
        began = time.monotonic()
        failure: BaseException | None = None
        text = f"{options.command} {container_id}: waiting for the VM shim, {longest}"
        _print(_printable(text), "stderr", is_for_terminal=True)
        try:
            if pipe_path is None:
                container = read_container(container_id, root=options.root)
                pipe_path = container.vm_pipe_path()
                _issue_to_vm(container, options.command, **limits)
            else:
                issue_vm_request(pipe_path, VMRequest(container_id, options.command), **limits)
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            _print_failure(error)
        if options.json:
            sent = {"id": container_id, "op": options.command, "pipe": pipe_path}
            _print_json(failure, time.monotonic() - began, **sent)
        status, _ = _outcome_of(failure)
        first_failure = first_failure or status
        if status == 130:
            break
    return first_failure


def _run_list(options: argparse.Namespace) -> None:
    import json

    rows: list[dict[str, Any]] = []
    for container in sorted(list_containers(root=options.root)):
        row = {**container._asdict(), "vm_shim": _vm_shim_status(container)}
        row["created"] = _go_time(container.created, row.pop("created_nanosecond"))
        rows.append(row)
    if options.json_lines:
        for row in rows:
            _print(json.dumps({"host": os.environ.get("COMPUTERNAME"), **row}, default=str))
    elif options.json:
        _print(json.dumps(rows, default=str, indent=2))
    else:
        table = [["ID", "VM", "OWNER", "CREATED", "VM SHIM"]]
        for row in rows:
            vm = row["host_unique_id"] if row["vm_shim"] else ""
            cells = row["id"], vm, row["owner"], row["created"], row["vm_shim"]
            table.append([_printable(str(cell or "-")) for cell in cells])
        widths = [max(map(len, column)) for column in zip(*table)]
        for line in table:
            _print("  ".join(map(str.ljust, line, widths)).rstrip())


def _vm_shim_status(container: Container) -> str | None:
    """Tell what the shim of a container's VM does; None: there is no VM."""
    if not container.host_unique_id.int:
        return None
    # Opening the pipe would take an instance from a client.
    if _kernel32.WaitNamedPipeW(container.vm_pipe_path(), 1):
        return "free"
    if _last_error() == ERROR_SEM_TIMEOUT:
        return "busy"
    # In some containers the wait fails also where the pipe exists.
    folder = "\\\\.\\pipe\\"
    try:
        names = os.listdir(folder)
    except OSError:
        return "unknown"
    return "unknown" if container.vm_pipe_path()[len(folder) :] in names else "absent"


def _run_serve(options: argparse.Namespace) -> None:
    def print_request(request: VMRequest) -> None:
        _print(_printable(f"{request.op} {request.id}"))
        if options.fail is not None:
            raise ShimError(options.fail)

    with VMShimServer(options.pipe, print_request) as server:
        if options.handshake:
            os.write(1, SHIM_SUCCESS)
            # sys.stdout.close() would leave the handle open, and the parent waiting for its end.
            os.close(1)
            sys.stdout = sys.stderr
        _print(_printable(f"serving {server.pipe_path} until Ctrl-C"), "stderr")
        server.serve_forever()


def _run_demo(_: argparse.Namespace) -> None:
    def carry_out(request: VMRequest) -> None:
        if request.op == VMRequestOp.SYNC_NAMESPACE:
            raise ShimError("Not implemented")  # as the reference responds

    with VMShimServer(rf"\\.\pipe\vmshim-demo-{os.urandom(8).hex()}", carry_out) as server:
        _thread.start_new_thread(server.serve_forever, ())
        for op in VMRequestOp.CREATE_CONTAINER, VMRequestOp.SYNC_NAMESPACE:
            request = VMRequest("demo", op)
            response = SHIM_SUCCESS
            try:
                issue_vm_request(server.pipe_path, request, timeout=10.0)
            except ShimError as error:
                response = error.response
            _print(f"client to shim  {request.to_json()!r}\nshim to client  {response!r}")


# What runs each command, what it takes, and its help.
_REQUEST = "id --vm --pipe --root --connect-timeout --timeout --json"
_COMMANDS: dict[str, tuple[Callable[[Any], int | None], str, str]] = {
    "create": (_run_requests, _REQUEST, "create containers in their VM"),
    "sync": (_run_requests, _REQUEST, "sync containers' network namespaces"),
    "unmount": (_run_requests, _REQUEST, "take containers' file systems out of their VM"),
    "unmount-disk": (_run_requests, _REQUEST, "take only containers' disks out of their VM"),
    "list": (_run_list, "--root --json --json-lines", "list runhcs's containers on this host"),
    "pipe-path": (lambda options: _print(options.pipe), "vm", "print the path of a VM shim's pipe"),
    "serve": (_run_serve, "--vm --pipe --fail --handshake", "respond to requests until Ctrl-C"),
    "demo": (_run_demo, "", "show an exchange, on a pipe that needs no elevation"),
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "id": {"metavar": "ID", "nargs": "+", "help": "a container's ID"},
    "vm": {"metavar": "GUID", "help": "the VM's HostUniqueID"},
    "--vm": {"metavar": "GUID", "help": "the VM's HostUniqueID"},
    "--pipe": {"metavar": "PATH", "help": "the path of its shim's pipe"},
    "--root": {"default": "default", "help": "runhcs's --root (default: %(default)s)"},
    "--connect-timeout": {"type": float, "default": 2.0, "help": "seconds to try while it is busy"},
    "--timeout": {"type": float, "help": "seconds to wait for the response (default: no limit)"},
    "--json": {"action": "store_true", "help": "print JSON, for requests a line for each ID"},
    "--json-lines": {"action": "store_true", "help": "print a line of JSON for each container"},
    "--fail": {"metavar": "TEXT", "help": "refuse every request with this text"},
    "--handshake": {"action": "store_true", "help": "start like a shim that runhcs launches"},
}


def _parse(words: list[str]) -> argparse.Namespace:
    """Return a command's arguments. Raises _UsageError for wrong ones, SystemExit for --help."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _print(self.format_usage().rstrip("\n"), "stderr")
            raise _UsageError(message)

        def _print_message(self, message: str, file: Any = None) -> None:
            _print(message.rstrip("\n"))

    # Without a width argparse would import shutil at every start, for the terminal's.
    style: dict[str, Any] = {"allow_abbrev": False}
    style["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=78)
    if sys.version_info >= (3, 14):
        style["color"] = False  # its escape sequences would be escaped
    if words[:1] and words[0] in _COMMANDS:
        _, arguments, text = _COMMANDS[words[0]]
        parser = Parser(f"vmshim.py {words[0]}", description=text, **style)
        for argument in arguments.split():
            if argument == "--vm":
                group = parser.add_mutually_exclusive_group(required=words[0] == "serve")
            owner = group if argument in ("--vm", "--pipe") else parser
            owner.add_argument(argument, **_ARGUMENTS[argument])
        options = parser.parse_args(words[1:], argparse.Namespace(command=words[0]))
        try:
            _check_options(options)
        except (ValueError, TypeError) as error:
            parser.error(str(error))
        return options
    commands = "".join(f"  {name:<14}{text}\n" for name, (_, _, text) in _COMMANDS.items())
    epilog = f"commands:\n{commands}\n{_EPILOG}"
    parser = Parser("vmshim.py", description="Talk to a runhcs VM shim.", epilog=epilog, **style)
    # What a report of a bug needs.
    python = f"Python {sys.version.split()[0]}, {sys.platform}, {8 * ctypes.sizeof(HANDLE)} bit"
    parser.add_argument("--version", action="version", version=f"vmshim {__version__}, {python}")
    parser.add_argument("command", metavar="COMMAND", choices=_COMMANDS)
    return parser.parse_args(words[:1])


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for wrong options, and put into `pipe` what `vm` means."""
    given = vars(options)
    if given.get("vm") is not None:
        options.pipe = vm_pipe_path(options.vm)
    if given.get("pipe") is not None:
        check = _check_local_pipe_path if options.command == "serve" else _check_pipe_path
        check(options.pipe)
    if given.get("handshake"):
        if not (getattr(sys.stdin, "buffer", None) and sys.stdout):
            raise ValueError("--handshake needs a stdin and a stdout")
        _typed("the options on stdin", _decode_only(sys.stdin.buffer.read()), tuple)
    _registry_path(given.get("root", "default"), "")
    _check_timeout("--connect-timeout", given.get("connect_timeout"))
    _check_timeout("--timeout", given.get("timeout"))
    for container_id in given.get("id", ()):
        VMRequest(container_id, options.command).check()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(words)
        return _COMMANDS[options.command][0](options) or 0
    except (Exception, KeyboardInterrupt) as error:
        failure: BaseException = error
    _print_failure(failure)
    if "--handshake" in words and getattr(sys, "stdout", None) not in (None, sys.stderr):
        _print(_describe(failure))  # a launched shim tells its parent, too
    elif "--json" in words or "--json-lines" in words:
        op = words[0] if words[0] in _COMMANDS else None
        _print_json(failure, 0.0, id=None, op=op, pipe=None)
    return _outcome_of(failure)[0]


if __name__ == "__main__":
    sys.exit(main())
