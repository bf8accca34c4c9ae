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
`python vmshim.py --help`.

One exchange, and who waits for whom:

    client                                    VM shim
    ------                                    -------
    open the pipe; busy: try again            offer an instance of the pipe
    write one JSON object and a newline  -->  read to the object's end
                                              carry the request out
    read to end of file                  <--  write 00 4F 4B 00, or the error's text and close
                                         <--  after a success, write a message of length zero
    close                                -->  read until the client has closed, then close

Constants: SAFE_PIPE_PREFIX is the prefix of the pipe names that only an elevated administrator can
create. SHIM_SUCCESS is the whole response of a shim that succeeded. MAX_REQUEST and MAX_RESPONSE
are the limits, in bytes, of what a server and a client read.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import io
import math
import os
import sys
import time
from collections import namedtuple
from enum import Enum

# Modules that a plain request does not need are imported inside functions: they are slow to load.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import subprocess
    import uuid
    from collections import OrderedDict, deque
    from datetime import datetime
    from queue import SimpleQueue
    from types import FrameType, TracebackType
    from typing import (
        Any,
        Callable,
        Generator,
        List,
        Mapping,
        NamedTuple,
        NoReturn,
        Optional,
        Protocol,
        Sequence,
        Tuple,
    )

    class Readable(Protocol):
        """What check_shim_response() reads: a pipe, a file, a BytesIO."""

        def read(self, size: int, /) -> bytes | None: ...

    _Pairs = List[Tuple[str, Any]]
    _Task = Generator[Optional["_Operation"], Any, None]
else:
    _Pairs = list

__version__ = "0.2.0"
__all__ = [
    "ConnectionLostError",
    "Container",
    "ContainerNotFoundError",
    "ContainerState",
    "ContainerStateError",
    "MAX_REQUEST",
    "MAX_RESPONSE",
    "NeedsWindowsError",
    "NotSentError",
    "OperationCancelledError",
    "OutcomeUnknownError",
    "Pipe",
    "PipeAccessError",
    "PipeBusyError",
    "PipeNotFoundError",
    "PipeOpenError",
    "RegistryError",
    "ResponseTimeoutError",
    "SAFE_PIPE_PREFIX",
    "SHIM_SUCCESS",
    "ShimError",
    "VMRequest",
    "VMRequestOp",
    "VMShimError",
    "VMShimServer",
    "check_shim_response",
    "dial_pipe",
    "issue_container_request",
    "issue_vm_request",
    "list_containers",
    "read_container",
    "safe_pipe_path",
    "shim_pipe_path",
    "vm_pipe_path",
]


# ---- Records ------------------------------------------------------------------------------------


class _Made:
    """A default of a named tuple that is made when it is needed."""

    def __init__(self, make: Callable[[], object], text: str) -> None:
        self.make = make
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(make: Callable[[], object], text: str) -> Any:
    """Return a default that type checkers take for any type; `text` stands for it in help()."""
    return _Made(make, text)


if not TYPE_CHECKING:

    class _NamedTupleType(type):
        """Makes what typing.NamedTuple makes, and a default by _default() anew for each record.

        Importing typing takes longer than all other modules together.
        """

        def __new__(mcs, name, bases, namespace):
            fields = namespace["__annotations__"]
            defaults = [namespace.pop(field) for field in fields if field in namespace]
            base = namedtuple(name, fields, defaults=defaults)

            def create(cls, *values, **more):
                record = base.__new__(cls, *values, **more)
                made = (value.make() if type(value) is _Made else value for value in record)
                return tuple.__new__(cls, made)

            create.__wrapped__ = base.__new__  # help() shows its arguments
            return type(name, (base,), {"__slots__": (), "__new__": create, **namespace})

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})


# ---- Names and paths ----------------------------------------------------------------------------

SAFE_PIPE_PREFIX = "\\\\.\\pipe\\ProtectedPrefix\\Administrators\\"
"""Prefix of the pipe names that only an elevated administrator can create (SafePipePrefix)."""

_LOCAL_PIPE_PREFIX = "\\\\.\\pipe\\"
_NOT_ESCAPED = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~$&+=:@"
)


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
    return safe_pipe_path(f"runhcs-vm-{_parse_guid(host_unique_id)}")


def shim_pipe_path(unique_id: uuid.UUID | str) -> str:
    """Return the path of the pipe of a container's own shim (hcsshim: runhcs-shim-<UniqueID>).

    `unique_id` is as in vm_pipe_path(). Connecting to that pipe starts the container's process.
    """
    return safe_pipe_path(f"runhcs-shim-{_parse_guid(unique_id)}")


def _path_escape(what: str, name: str) -> str:
    """Escape a name as Go's url.PathEscape does; `what` is what an error calls it."""
    _check_text(what, name)
    return "".join(chr(byte) if byte in _NOT_ESCAPED else f"%{byte:02X}" for byte in name.encode())


def _path_unescape(name: str) -> str:
    """Unescape a name as Go's url.PathUnescape does, and refuse what it refuses."""
    import re
    from urllib.parse import unquote

    if re.search("%(?![0-9A-Fa-f]{2})", name):
        raise ValueError(f"{name!r} has a % without two hexadecimal digits after it")
    return unquote(name, errors="strict")


def _parse_guid(guid: uuid.UUID | str) -> uuid.UUID:
    import uuid

    if isinstance(guid, uuid.UUID):
        return guid
    _check_text("GUID", guid)
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
        raise TypeError(f"a {what} must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text!a} has a lone surrogate, which UTF-8 can't carry") from None


def _check_pipe_path(path: str) -> None:
    _check_text("pipe path", path)
    parts = path.split("\\", 4)
    if (
        len(parts) < 5
        or parts[:2] != ["", ""]
        or not parts[2]
        or parts[3].lower() != "pipe"
        or not parts[4]
        or "\0" in path
    ):
        raise ValueError(
            f"not a pipe path: {path!r} (expected \\\\.\\pipe\\NAME or \\\\SERVER\\pipe\\NAME)"
        )
    # Windows takes a path that begins with \\?\ as it is.
    if parts[2] == "?":
        return
    name = f"\\{parts[4]}\\"
    if "/" in name or "\\\\" in name or ".\\" in name or " \\" in name:
        raise ValueError(
            f"not a pipe path: Windows would change {path!r} before it looks for the pipe; a name "
            "must have no /, and no part of it may be empty or end in a dot or a space"
        )


def _check_local_pipe_path(path: str) -> None:
    _check_pipe_path(path)
    if not path.lower().startswith(_LOCAL_PIPE_PREFIX):
        raise ValueError(
            f"a pipe can only be served on this host: {path!r} is not \\\\.\\pipe\\NAME"
        )


# ---- Errors -------------------------------------------------------------------------------------


class VMShimError(Exception):
    """Base of all that this module raises for a request, beyond ValueError and TypeError.

    There are three kinds, and they tell whether the request may be repeated:

    - ShimError: the shim refused it;
    - NotSentError: nothing was sent, so repeating is safe;
    - OutcomeUnknownError: it may have been carried out, or may be later; look before repeating.
    """


class ShimError(VMShimError):
    """The shim refused the request; str() gives its error text. A server's handler raises it, too.

    `response` is the bytes of the response, and `exit_code` that of the shim's process where
    check_shim_response() was given one, otherwise None. Without a `message` the text is the
    response, decoded whenever it is asked for: a long one is held only once.
    """

    def __init__(
        self, message: str | None, response: bytes = b"", exit_code: int | None = None
    ) -> None:
        super().__init__(message, response, exit_code)
        self._message = message
        self.response = response
        self.exit_code = exit_code

    @property
    def message(self) -> str:
        """The text as it came."""
        if self._message is None:
            return self.response.decode("utf-8", "replace")
        return self._message

    def __str__(self) -> str:
        return self.message.rstrip("\r\n")

    def __repr__(self) -> str:
        return f"ShimError({self.message!r}, {self.response!r}, {self.exit_code!r})"


class NotSentError(VMShimError):
    """Nothing was sent, so repeating the request is safe."""


class OutcomeUnknownError(VMShimError):
    """The request may have been carried out, or may be later: look at the container first."""


class _PipeError(OSError):
    """An OSError with all four of errno, strerror, filename and winerror, through pickling too."""

    winerror: int

    def __init__(self, number: int, text: str, path: str | None = None, winerror: int = 0) -> None:
        super().__init__(number, text, path)
        self.winerror = winerror

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror, self.filename, self.winerror)

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


class PipeAccessError(PipeOpenError, PermissionError):
    """Windows denies access to the pipe, or, to a server, the name."""


class PipeBusyError(PipeOpenError, TimeoutError):
    """No instance of the pipe came free in time.

    A VM's pipe exists before the VM has booted, so this may also mean "still booting".
    """


class RegistryError(NotSentError, _PipeError):
    """The registry can't be read; `filename` is the key."""


class ContainerNotFoundError(NotSentError, LookupError):
    """runhcs knows no such container, or it runs in no VM."""


class ContainerStateError(NotSentError, ValueError):
    """What runhcs stored of the container is broken."""


class ResponseTimeoutError(OutcomeUnknownError, _PipeError, TimeoutError):
    """The exchange didn't end in time."""


class ConnectionLostError(OutcomeUnknownError, _PipeError, BrokenPipeError):
    """The connection ended before the exchange had."""


class OperationCancelledError(OutcomeUnknownError, _PipeError, ConnectionAbortedError):
    """Pipe.cancel() in another thread ended the operation."""


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
ERROR_NO_MORE_ITEMS = 259
ERROR_PIPE_CONNECTED = 535
ERROR_OPERATION_ABORTED = 995
ERROR_IO_PENDING = 997
ERROR_KEY_DELETED = 1018

_LOOK_FIRST = "so the outcome is unknown; look at the container before you repeat the request"
_CONNECTION_LOST = (
    ConnectionLostError,
    errno.EPIPE,
    f"the connection to the shim was lost, {_LOOK_FIRST}",
)

# By what was going on and by the Win32 error: the exception, its errno, and what str() says.
_OPEN_ERRORS: dict[int, tuple[type[_PipeError], int, str]] = {
    ERROR_FILE_NOT_FOUND: (
        PipeNotFoundError,
        errno.ENOENT,
        "no shim listens there; check the ID, and that the VM is running",
    ),
    ERROR_ACCESS_DENIED: (
        PipeAccessError,
        errno.EACCES,
        "access denied; run this as an elevated administrator",
    ),
    ERROR_PIPE_BUSY: (
        PipeBusyError,
        errno.ETIMEDOUT,
        "the pipe stayed busy, so nothing was sent; try again later, the VM may still be booting",
    ),
}
_NAME_TAKEN = (
    PipeAccessError,
    errno.EACCES,
    "the name is taken by another server, or needs an elevated administrator",
)
_SERVE_ERRORS: dict[int, tuple[type[_PipeError], int, str]] = {
    ERROR_ACCESS_DENIED: _NAME_TAKEN,
    # A server that has all the instances that it allows says so, before the name is looked at.
    ERROR_PIPE_BUSY: _NAME_TAKEN,
}
_EXCHANGE_ERRORS: dict[int, tuple[type[_PipeError], int, str]] = {
    WAIT_TIMEOUT: (
        ResponseTimeoutError,
        errno.ETIMEDOUT,
        f"the exchange did not end in time, {_LOOK_FIRST}",
    ),
    ERROR_BROKEN_PIPE: _CONNECTION_LOST,
    ERROR_NETNAME_DELETED: _CONNECTION_LOST,
    ERROR_NO_DATA: _CONNECTION_LOST,
    ERROR_PIPE_NOT_CONNECTED: _CONNECTION_LOST,
    ERROR_OPERATION_ABORTED: (
        OperationCancelledError,
        errno.ECONNABORTED,
        f"the operation was cancelled, {_LOOK_FIRST}",
    ),
}


def _open_error(winerror: int, path: str) -> _PipeError:
    """Return the exception for a pipe that a client can't open."""
    return _win32_error(_OPEN_ERRORS, PipeOpenError, winerror, path)


def _serve_error(winerror: int, path: str) -> _PipeError:
    """Return the exception for a pipe that a server can't create."""
    return _win32_error(_SERVE_ERRORS, PipeOpenError, winerror, path)


def _exchange_error(winerror: int, path: str) -> _PipeError:
    """Return the exception for an open pipe that fails."""
    return _win32_error(_EXCHANGE_ERRORS, ConnectionLostError, winerror, path)


def _win32_error(
    known: Mapping[int, tuple[type[_PipeError], int, str]],
    kind: type[_PipeError],
    winerror: int,
    path: str,
) -> _PipeError:
    if winerror in known:
        kind, number, text = known[winerror]
        return kind(number, text, path, winerror)
    text = f"Win32 error {winerror}"
    if sys.platform == "win32":
        text = ctypes.FormatError(winerror).strip() or text
    if issubclass(kind, OutcomeUnknownError):
        text += f"; {_LOOK_FIRST}"
    return kind(errno.EIO, text, path, winerror)


class _Outcome(NamedTuple):
    """How a command may end."""

    status: int
    """The exit status."""
    outcome: str
    """What the JSON line says: done, refused, not-sent or unknown."""
    errors: tuple[type[BaseException], ...]
    """The exceptions that end a command so."""
    meaning: str
    advice: str


# In the order in which an exception is looked up: the first that fits.
_OUTCOMES = (
    _Outcome(0, "done", (), "done", ""),
    _Outcome(
        1, "refused", (ShimError,), "the shim refused; its text is on stderr", "act on the text"
    ),
    _Outcome(
        4,
        "not-sent",
        (PipeAccessError,),
        "access denied; nothing was sent",
        "run it as an elevated administrator",
    ),
    _Outcome(
        5,
        "not-sent",
        (PipeBusyError,),
        "the pipe stayed busy; nothing was sent",
        "try again; the VM may still be booting",
    ),
    _Outcome(
        3,
        "not-sent",
        (NotSentError,),
        "no such container or VM, or nobody listens there; nothing was sent",
        "check the ID, and that the VM is running",
    ),
    _Outcome(
        6,
        "unknown",
        (OutcomeUnknownError,),
        "no response in time, an empty one, or the connection was lost: the outcome is unknown",
        "look at the container before you repeat the request",
    ),
    _Outcome(
        2,
        "not-sent",
        (ValueError, TypeError),
        "wrong arguments; nothing was sent",
        "correct the call",
    ),
    _Outcome(
        130,
        "unknown",
        (KeyboardInterrupt,),
        "Ctrl-C; if the request was under way, its outcome is unknown",
        "look at the container before you repeat the request",
    ),
    _Outcome(
        70,
        "unknown",
        (BaseException,),
        "a bug in vmshim; the traceback is on stderr",
        "look at the container, and report the bug",
    ),
)


def _outcome_of(error: BaseException | None) -> _Outcome:
    """Return how a command ends that raised `error`, or nothing."""
    if error is None:
        return _OUTCOMES[0]
    return next(outcome for outcome in _OUTCOMES if isinstance(error, outcome.errors))


# ---- JSON as Go's encoding/json writes and reads it ---------------------------------------------
# Python's json differs from Go's: it escapes other characters, merges duplicate keys, and accepts
# NaN. One difference remains: Python reads JSON nested about 1,000 deep, and Go 10,000.

_JSON_SPACE = " \t\r\n"

# How Go's encoder escapes characters.
_GO_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), *b"<>&", 0x2028, 0x2029)}
_GO_ESCAPES.update(
    {ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r", ord('"'): r"\"", ord("\\"): r"\\"}
)


class _Object(_Pairs):
    """A JSON object's members, in order and with duplicates: pairs of key and value."""


def _go_string(text: str) -> str:
    return f'"{text.translate(_GO_ESCAPES)}"'


def _go_object(members: Mapping[str, str]) -> str:
    return "{" + ",".join(f"{_go_string(key)}:{value}" for key, value in members.items()) + "}"


def _decode_first(data: bytes | str) -> tuple[Any, str]:
    """Return the first JSON value in `data`, and the text after it."""
    import json

    decoder = json.JSONDecoder(
        object_pairs_hook=_Object, parse_int=_parse_int, parse_constant=_refuse_constant
    )
    # For each byte that isn't UTF-8 Go puts a U+FFFD; _read_string() puts it for a surrogate.
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    text = text.lstrip(_JSON_SPACE)
    try:
        value, end = decoder.raw_decode(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return value, text[end:]


def _decode_only(data: bytes | str) -> Any:
    """Return the one JSON value that `data` is."""
    value, rest = _decode_first(data)
    if rest.strip(_JSON_SPACE):
        raise ValueError(f"unexpected {rest[:20]!r} after the JSON value")
    return value


def _parse_int(digits: str) -> float:
    # More than 19 digits and a sign never fit an int64. Return a float, which _read_integer()
    # refuses, because int() takes quadratic time.
    return int(digits) if len(digits) <= 20 else float(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_string(key: str, value: Any) -> str:
    _check_type(key, value, str, "a string")
    text = str(value)
    if not text.isascii():
        text = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    return text


def _read_integer(key: str, value: Any) -> int:
    _check_type(key, value, int, "a 64-bit integer")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{key} must be a 64-bit integer")
    return int(value)


def _read_bool(key: str, value: Any) -> bool:
    _check_type(key, value, bool, "a bool")
    return bool(value)


def _read_guid(key: str, value: Any) -> uuid.UUID:
    return _parse_guid(_read_string(key, value))


def _read_strings(key: str, value: Any) -> dict[str, str]:
    _check_type(key, value, _Object, "an object")
    return {
        _read_string("a key", name): "" if text is None else _read_string(f"{key}[{name!r}]", text)
        for name, text in value
    }


def _check_type(key: str, value: Any, kind: type, what: str) -> None:
    # Not isinstance: a bool is an int to Python, and an _Object a list; neither is to Go.
    if type(value) is not kind:
        raise ValueError(f"{key} must be {what}")


def _read_time(key: str, value: Any) -> tuple[datetime, int]:
    """Return the datetime and the nanoseconds that it can't hold."""
    import re
    from datetime import datetime, timedelta, timezone

    text = _read_string(key, value)
    match = re.fullmatch(
        r"(\d{4})-(\d\d)-(\d\d)T(\d{1,2}):(\d\d):(\d\d)(?:[.,](\d+))?(?:Z|([+-])(\d\d):(\d\d))",
        text,
        re.ASCII,
    )
    if not match:
        raise ValueError(f"{key} must be an RFC 3339 time, not {text[:40]!r}")
    *whole, fraction, sign, hours, minutes = match.groups()
    digits = (fraction or "").ljust(9, "0")
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    year, month, day, hour, minute, second = map(int, whole)
    zone = timezone(-offset if sign == "-" else offset)
    moment = datetime(year, month, day, hour, minute, second, int(digits[:6]), zone)
    return moment, int(digits[6:9])


def _go_time(moment: datetime, nanosecond: int) -> str:
    text = moment.isoformat(timespec="seconds")
    whole, zone = text[:19], text[19:]
    fraction = f"{moment.microsecond:06}{nanosecond:03}".rstrip("0")
    return whole + (f".{fraction}" if fraction else "") + ("Z" if zone == "+00:00" else zone)


class _Field(NamedTuple):
    """A field of a record, the key that it has in JSON, and how it is read from there."""

    name: str
    key: str
    read: Callable[[str, Any], Any]
    doc: str


def _read_members(value: Any, fields: Sequence[_Field]) -> dict[str, Any]:
    """Return an object's members by the names of their fields.

    As in Go, the case of a key doesn't matter, unknown keys and nulls are skipped, and the last
    duplicate wins. null instead of an object is an empty one.
    """
    if value is None:
        return {}
    _check_type("the JSON value", value, _Object, "an object")
    known = {field.key.lower(): field for field in fields}
    members = {}
    for key, member in value:
        # Besides upper and lower case Go takes the long s, U+017F, for an s.
        field = known.get(key.lower().replace("\u017f", "s"))
        if field and member is not None:
            members[field.name] = field.read(key, member)
    # _read_time() returns what goes into two fields.
    if "created" in members:
        members["created"], members["created_nanosecond"] = members["created"]
    return members


def _document(record: type, fields: Sequence[_Field]) -> None:
    """Give each field of a named tuple its text in help()."""
    for field in fields:
        getattr(record, field.name).__doc__ = field.doc


# ---- Messages -----------------------------------------------------------------------------------

SHIM_SUCCESS = b"\0OK\0"
"""The whole response of a shim that succeeded (hcsshim: ShimSuccess)."""
MAX_REQUEST = 1 << 20
"""The longest request that a server reads, in bytes."""
MAX_RESPONSE = 1 << 20
"""The longest response that a client reads unless a call says otherwise, in bytes."""


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

    def __format__(self, format_spec: str) -> str:
        return self.value.__format__(format_spec)


_REQUEST_FIELDS = (
    _Field("id", "ID", _read_string, "The container's ID."),
    _Field("op", "Op", _read_string, "What to do: a VMRequestOp, or the text of an unknown op."),
)


class _Request(NamedTuple):
    """The fields of a VMRequest: a NamedTuple may have no __new__ of its own."""

    id: str
    op: str


class VMRequest(_Request):
    """One request to a VM shim: a container's ID and what to do to it (hcsshim: VMRequest).

    `op` is a VMRequestOp or its wire text. Like the reference's, a VMRequest can have an unknown
    op, which stays a plain str, or an empty ID: from_json() must be able to return what a client
    sent. Neither is ever sent or handed to a handler.
    """

    __slots__ = ()

    def __new__(cls, id: str, op: str) -> VMRequest:
        """Make a request; the wire text of a known op becomes its VMRequestOp."""
        try:
            op = VMRequestOp(op)
        except ValueError:
            pass
        return super().__new__(cls, id, op)

    @classmethod
    def _make(cls, iterable: Any) -> VMRequest:
        """Make a request from an ID and an op; _replace() calls this, too."""
        return cls(*iterable)

    def check(self) -> None:
        """Raise ValueError if the ID is empty or has a lone surrogate, or if the op is unknown."""
        _check_text("container ID", self.id)
        if not self.id:
            raise ValueError("the container ID is empty")
        if not isinstance(self.op, VMRequestOp):
            raise ValueError(f"unknown op {self.op!r}; a VM shim knows {', '.join(VMRequestOp)}")

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
        members = _read_members(_decode_first(data)[0], _REQUEST_FIELDS)
        return cls(members.get("id", ""), members.get("op", ""))


_document(VMRequest, _REQUEST_FIELDS)


def _zero_time() -> datetime:
    from datetime import datetime, timezone

    return datetime(1, 1, 1, tzinfo=timezone.utc)


_CREATED = "When it was created, an aware datetime; 0001-01-01T00:00:00Z means never."
_NANOSECOND = "The last three digits of that time, 0 to 999 ns, which a datetime can't hold."

_STATE_FIELDS = (
    _Field("version", "ociVersion", _read_string, "The OCI version."),
    _Field("id", "id", _read_string, "The container's ID."),
    _Field("init_process_pid", "pid", _read_integer, "The pid of its init process; -1: unknown."),
    _Field(
        "status", "status", _read_string, "created, running, paused, stopped, unknown, or empty."
    ),
    _Field("bundle", "bundle", _read_string, "The path of its bundle."),
    _Field("rootfs", "rootfs", _read_string, "The path of its root file system."),
    _Field("created", "created", _read_time, _CREATED),
    _Field("annotations", "annotations", _read_strings, "Its annotations, by their names."),
    _Field("owner", "owner", _read_string, "Who created it, such as runhcs.exe."),
)


class ContainerState(NamedTuple):
    """A container's status, as `runhcs state` prints it (hcsshim: ContainerState).

    `runhcs list --format json` prints an array of these.
    """

    version: str = ""
    id: str = ""
    init_process_pid: int = 0
    status: str = ""
    bundle: str = ""
    rootfs: str = ""
    created: datetime = _default(_zero_time, "never")
    annotations: Mapping[str, str] = _default(dict, "{}")
    owner: str = ""
    created_nanosecond: int = 0

    def to_json(self) -> bytes:
        """Return the state as compact JSON, byte for byte as the reference writes it.

        Raises ValueError for a naive `created`, a `created_nanosecond` that isn't from 0 to 999,
        or a lone surrogate.
        """
        if self.created.tzinfo is None:
            raise ValueError("created has no time zone")
        if not 0 <= self.created_nanosecond <= 999:
            raise ValueError(f"created_nanosecond must be 0 to 999, not {self.created_nanosecond}")
        members = {}
        for name, key, *_ in _STATE_FIELDS:
            value = getattr(self, name)
            if name == "created":
                members[key] = _go_string(_go_time(value, self.created_nanosecond))
            elif name == "annotations":
                if value:
                    texts = {key: _go_string(text) for key, text in sorted(value.items())}
                    members[key] = _go_object(texts)
            else:
                members[key] = _go_string(value) if isinstance(value, str) else str(int(value))
        return _go_object(members).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> ContainerState:
        """Read one container's state as Go's decoder does.

        Raises ValueError if it is broken, has a member of a wrong type, or a time that isn't
        RFC 3339. Go's decoder differs in this: it also takes an offset of 24 hours, refuses a time
        that is written with escapes, and merges the annotations if that key comes twice.
        """
        return cls(**_read_members(_decode_only(data), _STATE_FIELDS))


_document(
    ContainerState,
    (*_STATE_FIELDS, _Field("created_nanosecond", "", _read_integer, _NANOSECOND)),
)


def check_shim_response(
    pipe: Readable,
    process: subprocess.Popen[Any] | None = None,
    *,
    max_response: int = MAX_RESPONSE,
) -> None:
    """Read a shim's response to the end and return if it is success (hcsshim: GetErrorFromPipe).

    `pipe` is anything with read(); `max_response` limits the response, in bytes. Raises ShimError
    if the response is anything else, empty, or too long; errors of pipe.read() pass through. On
    every error `process`, if given, is killed and waited for first.
    """
    try:
        response = _read_response(pipe, max_response)
        if response == SHIM_SUCCESS:
            return
        exit_code = _kill(process) if process is not None else None
        raise _refusal(response, max_response, exit_code)
    except BaseException:
        # Ctrl-C may have come while the process was being killed.
        if process is not None:
            _kill(process)
        raise


def _read_response(pipe: Readable, limit: int) -> bytes:
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
    message = None
    if not response:
        message = "unknown shim failure"
        if exit_code is not None:
            message += f", exit code {exit_code}"
    elif len(response) > limit:
        beginning = response[:800].decode("utf-8", "replace")[:200]
        message = f"the response is longer than {limit} bytes; it begins: {beginning}"
    return ShimError(message, response, exit_code)


def _kill(process: subprocess.Popen[Any]) -> int:
    process.kill()
    # Not process.wait(): on Windows Ctrl-C can't interrupt that.
    while process.poll() is None:
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

PIPE_ACCESS_DUPLEX = 0x00000003
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
PIPE_TYPE_MESSAGE = 0x00000004
PIPE_READMODE_BYTE = 0x00000000
PIPE_REJECT_REMOTE_CLIENTS = 0x00000008
PIPE_UNLIMITED_INSTANCES = 255
SDDL_REVISION_1 = 1

INVALID_HANDLE_VALUE = ctypes.c_void_p(-1).value
STATUS_PENDING = 0x00000103
INFINITE = 0xFFFFFFFF


class OVERLAPPED(ctypes.Structure):
    """Windows' record of one operation under way."""

    _fields_ = [
        ("Internal", ULONG_PTR),
        ("InternalHigh", ULONG_PTR),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", HANDLE),
    ]


class SECURITY_ATTRIBUTES(ctypes.Structure):
    """Who may open what is being created."""

    _fields_ = [
        ("nLength", DWORD),
        ("lpSecurityDescriptor", LPVOID),
        ("bInheritHandle", BOOL),
    ]


LPOVERLAPPED = ctypes.POINTER(OVERLAPPED)

if sys.platform == "win32":
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
    _ntdll = ctypes.WinDLL("ntdll")

    def _finaliser(function: str) -> Any:
        """Return a __del__ that passes the object to a function of kernel32.

        It is C code from end to end. One in Python could be cut short by Ctrl-C, or swallow it.
        """
        # Of a library of its own, whose calls leave ctypes.get_last_error() alone.
        free = getattr(ctypes.WinDLL("kernel32"), function)
        free.argtypes = (LPVOID,)
        bind = ctypes.pythonapi["PyInstanceMethod_New"]  # not shared with the whole process
        bind.restype = ctypes.py_object
        bind.argtypes = (ctypes.py_object,)
        return bind(free)

    def _refuse_to_copy(self: object) -> NoReturn:
        raise TypeError("what Windows has handed out once can't be copied or pickled")

    class _Handle(ctypes.c_void_p):
        """A kernel handle. It is closed, once, when the last reference to it goes."""

        __del__ = _finaliser("CloseHandle")
        __reduce__ = _refuse_to_copy

    class _SecurityDescriptor(ctypes.c_void_p):
        """A security descriptor in memory that Windows has allocated, freed like a handle."""

        __del__ = _finaliser("LocalFree")
        __reduce__ = _refuse_to_copy

    def _prototype(library: ctypes.WinDLL, function: str, restype: Any, **parameters: Any) -> None:
        """Declare a function of Windows, and its parameters by their names."""
        prototype = getattr(library, function)
        prototype.restype = restype
        prototype.argtypes = tuple(parameters.values())

    _prototype(
        _kernel32,
        "CreateFileW",
        _Handle,
        lpFileName=LPCWSTR,
        dwDesiredAccess=DWORD,
        dwShareMode=DWORD,
        lpSecurityAttributes=LPVOID,
        dwCreationDisposition=DWORD,
        dwFlagsAndAttributes=DWORD,
        hTemplateFile=HANDLE,
    )
    _prototype(_kernel32, "WaitNamedPipeW", BOOL, lpNamedPipeName=LPCWSTR, nTimeOut=DWORD)
    _prototype(
        _kernel32,
        "CreateNamedPipeW",
        _Handle,
        lpName=LPCWSTR,
        dwOpenMode=DWORD,
        dwPipeMode=DWORD,
        nMaxInstances=DWORD,
        nOutBufferSize=DWORD,
        nInBufferSize=DWORD,
        nDefaultTimeOut=DWORD,
        lpSecurityAttributes=ctypes.POINTER(SECURITY_ATTRIBUTES),
    )
    _prototype(_kernel32, "ConnectNamedPipe", BOOL, hNamedPipe=HANDLE, lpOverlapped=LPOVERLAPPED)
    _prototype(
        _kernel32,
        "ReadFile",
        BOOL,
        hFile=HANDLE,
        lpBuffer=LPVOID,
        nNumberOfBytesToRead=DWORD,
        lpNumberOfBytesRead=LPDWORD,
        lpOverlapped=LPOVERLAPPED,
    )
    _prototype(
        _kernel32,
        "WriteFile",
        BOOL,
        hFile=HANDLE,
        lpBuffer=LPCVOID,
        nNumberOfBytesToWrite=DWORD,
        lpNumberOfBytesWritten=LPDWORD,
        lpOverlapped=LPOVERLAPPED,
    )
    _prototype(_kernel32, "FlushFileBuffers", BOOL, hFile=HANDLE)
    _prototype(
        _kernel32,
        "CreateEventW",
        _Handle,
        lpEventAttributes=LPVOID,
        bManualReset=BOOL,
        bInitialState=BOOL,
        lpName=LPCWSTR,
    )
    _prototype(
        _kernel32,
        "GetOverlappedResultEx",
        BOOL,
        hFile=HANDLE,
        lpOverlapped=LPOVERLAPPED,
        lpNumberOfBytesTransferred=LPDWORD,
        dwMilliseconds=DWORD,
        bAlertable=BOOL,
    )
    _prototype(_kernel32, "CancelIoEx", BOOL, hFile=HANDLE, lpOverlapped=LPOVERLAPPED)
    # Not a _Handle: it may be the existing port, which must not be closed.
    _prototype(
        _kernel32,
        "CreateIoCompletionPort",
        HANDLE,
        FileHandle=HANDLE,
        ExistingCompletionPort=HANDLE,
        CompletionKey=ULONG_PTR,
        NumberOfConcurrentThreads=DWORD,
    )
    _prototype(
        _kernel32,
        "GetQueuedCompletionStatus",
        BOOL,
        CompletionPort=HANDLE,
        lpNumberOfBytesTransferred=LPDWORD,
        lpCompletionKey=ctypes.POINTER(ULONG_PTR),
        lpOverlapped=ctypes.POINTER(LPVOID),
        dwMilliseconds=DWORD,
    )
    _prototype(
        _kernel32,
        "PostQueuedCompletionStatus",
        BOOL,
        CompletionPort=HANDLE,
        dwNumberOfBytesTransferred=DWORD,
        dwCompletionKey=ULONG_PTR,
        lpOverlapped=LPOVERLAPPED,
    )
    _prototype(
        _advapi32,
        "ConvertStringSecurityDescriptorToSecurityDescriptorW",
        BOOL,
        StringSecurityDescriptor=LPCWSTR,
        StringSDRevision=DWORD,
        SecurityDescriptor=ctypes.POINTER(_SecurityDescriptor),
        SecurityDescriptorSize=LPDWORD,
    )
    _prototype(_ntdll, "RtlNtStatusToDosError", DWORD, Status=DWORD)
else:

    class _NeedsWindows:
        def __getattr__(self, function: str) -> Any:
            # pydoc, pickle and mock look for names with two underscores.
            if function.startswith("__"):
                raise AttributeError(function)
            raise NeedsWindowsError(
                errno.ENOSYS, f"a runhcs pipe needs Windows, and this is {sys.platform}"
            )

    _kernel32 = _advapi32 = _ntdll = _NeedsWindows()

    class _Handle(ctypes.c_void_p):
        """A kernel handle, which only Windows has."""

    class _SecurityDescriptor(ctypes.c_void_p):
        """A security descriptor, which only Windows has."""


def _last_error() -> int:
    """Return the Win32 error of this thread's last call that failed."""
    if sys.platform == "win32":
        return ctypes.get_last_error()
    return 0


# ---- Pipe ---------------------------------------------------------------------------------------

_LONGEST_WAIT = 0.1
"""The longest single wait in a thread that Ctrl-C can interrupt, in seconds: a wait inside Windows
ignores Ctrl-C."""
_Chunk = ctypes.c_char * 8192
"""The buffer of a read."""

_NOT_STARTED = 1
"""Stands in OVERLAPPED.Internal until Windows replaces it; no NTSTATUS that Windows puts there."""

_under_way: dict[int, tuple[OVERLAPPED, object]] = {}
"""What Windows may still write to, by the address of its OVERLAPPED. It keeps the memory, whatever
Ctrl-C cuts short."""


class _Operation:
    """One overlapped operation, and all that Windows may write to while it is under way.

    A client waits for its end with wait(); the server gets it from a completion port.
    """

    def __init__(self, handle: _Handle | None, function: Any, *arguments: Any) -> None:
        self.handle = handle
        self.event: _Handle | None = None
        self.function = function
        self.arguments = arguments
        self.overlapped = OVERLAPPED(Internal=_NOT_STARTED)
        self.address = ctypes.addressof(self.overlapped)
        self.thread = _thread.get_ident()
        self._is_started = False

    def signal_by(self, event: _Handle) -> None:
        """Have Windows signal an event at its end, and not the pipe's own handle."""
        self.event = event
        self.overlapped.hEvent = event.value

    def start(self) -> int:
        """Start it. Return 0, ERROR_IO_PENDING, or why it failed at once."""
        _under_way[self.address] = self.overlapped, self.arguments
        if self.function(self.handle, *self.arguments, self.overlapped):
            self._is_started = True
            return 0
        error = _last_error()
        # A failure leaves Internal at STATUS_PENDING for ever. Windows is asked whether it was one:
        # a signal's handler may have replaced the error of an operation that is under way.
        if (
            error != ERROR_IO_PENDING
            and not _kernel32.CancelIoEx(self.handle, self.overlapped)
            and self.overlapped.Internal in (STATUS_PENDING, _NOT_STARTED)
        ):
            self.overlapped.Internal = _NOT_STARTED
            return error or ERROR_OPERATION_ABORTED
        self._is_started = True
        return ERROR_IO_PENDING

    def error(self) -> int:
        """Return the Win32 error of its end, or ERROR_IO_PENDING before that.

        Windows' own record has it. ctypes' last error may be another call's by now: a signal's
        handler may run between any two steps of Python.
        """
        status = self.overlapped.Internal
        if status == STATUS_PENDING:
            return ERROR_IO_PENDING
        return int(_ntdll.RtlNtStatusToDosError(status)) if status else 0

    def wait(self, seconds: float) -> int:
        """Wait for its end, and return its error()."""
        milliseconds = math.ceil(seconds * 1000)
        _kernel32.GetOverlappedResultEx(self.handle, self.overlapped, DWORD(), milliseconds, False)
        return self.error()

    def is_pending(self) -> bool:
        return bool(self.overlapped.Internal == STATUS_PENDING)

    def end(self) -> None:
        """Cancel it if it is pending, and wait until Windows has let go of its memory.

        Ctrl-C may interrupt this; then it can be called again.
        """
        if self.is_pending():
            cancelled = _kernel32.CancelIoEx(self.handle, self.overlapped)
            while self.is_pending():
                self.wait(_LONGEST_WAIT)
                # Ctrl-C may have hidden what start() returned. If the operation failed at once, it
                # stays at STATUS_PENDING for ever; one that is ending has ended within this wait.
                if not (cancelled or self._is_started):
                    break
        _under_way.pop(self.address, None)

    def release(self) -> None:
        """Give its handles back, which tracebacks would keep open otherwise."""
        self.handle = self.event = None


def _forget_ended() -> None:
    """Give memory back that an operation has left behind because Ctrl-C cut its end short."""
    for address, (overlapped, _) in _under_way.copy().items():
        if overlapped.Internal not in (STATUS_PENDING, _NOT_STARTED):
            _under_way.pop(address, None)


class _Flush:
    """A FlushFileBuffers under way: it blocks its thread and has no timeout, so it has a thread."""

    def __init__(self, handle: _Handle) -> None:
        from queue import SimpleQueue

        self._handle: _Handle | None = handle
        self.thread = _thread.get_ident()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._begun = False
        self._done = False
        self._cancelled = False
        self.error = 0

    def start(self) -> None:
        _thread.start_new_thread(self._flush, ())

    def _flush(self) -> None:
        self._begun = True
        try:
            if not self._cancelled and not _kernel32.FlushFileBuffers(self._handle):
                self.error = _last_error()
        finally:
            self._done = True
            self._ended.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait until the other end has read everything or has gone; return whether it has."""
        if not self._done:
            _get(self._ended, seconds)
        return self._done

    def end(self) -> None:
        """Cancel it and everything else on its handle, and wait until its thread has ended."""
        self._cancelled = True
        # When Python ends, it lets no other thread go on.
        while self._begun and not self._done and not sys.is_finalizing():
            # Again and again, because the thread may not have called FlushFileBuffers yet.
            _kernel32.CancelIoEx(self._handle, None)
            time.sleep(0.001)

    def release(self) -> None:
        """Give the handle back."""
        self._handle = None


def _get(queue: SimpleQueue[Any], seconds: float) -> Any:
    """Return the next item of a queue, or None if there is none in time."""
    from queue import Empty

    # Before CPython 3.13, get() waits for ever if the queue's own lock was free, and the time is
    # over when it has taken it. The first attempt, which does not wait, leaves the lock taken.
    for timeout in 0, seconds:
        try:
            return queue.get(timeout > 0, timeout)
        except Empty:
            pass
    return None


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

    One thread may read while another writes. `deadline` is a time.monotonic() value; math.inf, as
    at first, means no limit. An operation that hasn't ended by then raises ResponseTimeoutError.
    If the other end closes, read() returns the remaining data, then b"". If it disconnects, or has
    gone when write() comes, ConnectionLostError is raised.
    """

    deadline = math.inf

    # io.RawIOBase's finaliser would call close(), Python code in which a Ctrl-C would be lost. The
    # handle has a finaliser of its own, so this one does nothing.
    __del__ = object.__init__

    def __init__(self, handle: _Handle, path: str) -> None:
        self.name = path
        self._handle: _Handle | None = handle
        self._operations: list[_Operation | _Flush] = []
        self._at_end = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return what there is, at most `size` bytes, or wait for the first of it.

        b"" is end of file. Without a size, read to end of file.
        """
        if size is None or size < 0:
            return self.readall() or b""
        self._open_handle()
        if size == 0 or self._at_end:
            return b""
        chunk = _Chunk()
        error, count = self._run(_kernel32.ReadFile, chunk, min(size, len(chunk)), None)
        if error in (ERROR_BROKEN_PIPE, ERROR_NETNAME_DELETED):
            count = 0
        elif error not in (0, ERROR_MORE_DATA):
            raise _exchange_error(error, self.name)
        # A zero-length message is end of file, like the other end's close.
        self._at_end = count == 0
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
        self._open_handle()
        message = bytes(memoryview(data))
        return self._send(message) if message else 0

    def close_write(self) -> None:
        """Write a zero-length message: end of file to the reader of a message-type pipe.

        Windows drops such a message that comes while data is still unread, so this waits first
        until the other end has read everything. If it doesn't in time, the pipe is closed.
        """
        flush = _Flush(self._open_handle())
        self._operations.append(flush)
        try:
            flush.start()
            has_ended = False
            while not has_ended:
                has_ended = flush.wait(
                    min(_LONGEST_WAIT, max(0.0, self.deadline - time.monotonic()))
                )
                self._open_handle()  # another thread may have closed the pipe
                if not has_ended and time.monotonic() >= self.deadline:
                    raise _exchange_error(WAIT_TIMEOUT, self.name)
            if flush.error == ERROR_OPERATION_ABORTED:
                raise _exchange_error(flush.error, self.name)
        except BaseException:
            self.close()
            raise
        self._operations.remove(flush)
        self._send(b"")

    def cancel(self) -> None:
        """End what other threads do on this pipe, where it raises OperationCancelledError."""
        if not self.closed:
            _kernel32.CancelIoEx(self._handle, None)

    def close(self) -> None:
        """Close the pipe. What was written before can still be read at the other end.

        Operations of other threads raise ValueError. If Ctrl-C interrupts this, call it again.
        """
        super().close()
        for operation in list(self._operations):
            operation.end()
            # Ctrl-C may have kept _run() from releasing it. Another thread's needs its handle.
            if operation.thread == _thread.get_ident():
                operation.release()
        # This closes the handle, unless another thread's operation still has it.
        self._handle = None

    def _open_handle(self) -> _Handle:
        handle = self._handle
        if handle is None or self.closed:
            raise ValueError("I/O operation on a closed pipe")
        return handle

    def _send(self, message: bytes) -> int:
        error, count = self._run(_kernel32.WriteFile, message, len(message), None)
        if error:
            raise _exchange_error(error, self.name)
        return count

    def _run(self, function: Any, *arguments: Any) -> tuple[int, int]:
        """Run an operation to its end; return its Win32 error and its count of bytes.

        Ctrl-C is seen within 100 ms. However this is left, Windows has let go of the memory, or
        close() sees to it. Raises ResponseTimeoutError if the deadline came first.
        """
        if _under_way:
            _forget_ended()
        operation = _Operation(self._open_handle(), function, *arguments)
        self._operations.append(operation)
        timed_out = False
        try:
            # The pipe's own handle can signal one operation only. Where one is under way at a time,
            # as it mostly is, that saves an event.
            if self._operations[0] is not operation:
                operation.signal_by(self._new_event())
            error = operation.start()
            while error == ERROR_IO_PENDING:
                seconds = self.deadline - time.monotonic()
                timed_out = seconds <= 0
                if timed_out or self.closed:
                    operation.end()
                error = operation.wait(min(_LONGEST_WAIT, max(0.0, seconds)))
        finally:
            operation.end()
            operation.release()
            self._operations.remove(operation)
        if self.closed:
            raise ValueError("the pipe was closed during the operation")
        if error == ERROR_OPERATION_ABORTED and timed_out:
            error = WAIT_TIMEOUT
        return error, operation.overlapped.InternalHigh

    def _new_event(self) -> _Handle:
        event: _Handle = _kernel32.CreateEventW(None, True, False, None)
        if not event.value:
            raise _exchange_error(_last_error(), self.name)
        return event


# ---- Client -------------------------------------------------------------------------------------


def dial_pipe(
    path: str, *, connect_timeout: float | None = 2.0, timeout: float | None = None
) -> Pipe:
    """Connect to a named pipe (go-winio: DialPipe).

    While all instances are busy, this tries again for `connect_timeout` seconds; 0 means one
    attempt. `timeout` seconds after the connection, the Pipe's deadline, reads and writes raise
    ResponseTimeoutError. None means no limit. Raises ValueError for a path that is not a pipe path,
    PipeNotFoundError if nobody listens there, PipeAccessError, PipeBusyError, or PipeOpenError.
    """
    _check_pipe_path(path)
    _check_timeout("connect_timeout", connect_timeout)
    _check_timeout("timeout", timeout)
    give_up = _deadline(connect_timeout)
    offered = False
    while True:
        handle = _open_pipe(path)
        if handle.value != INVALID_HANDLE_VALUE:
            pipe = Pipe(handle, path)
            pipe.deadline = _deadline(timeout)
            return pipe
        error = _last_error()
        seconds = min(_LONGEST_WAIT, give_up - time.monotonic())
        if error != ERROR_PIPE_BUSY or seconds <= 0:
            raise _open_error(error, path)
        if not offered:
            offered = _wait_for_instance(path, seconds)
        else:
            # A new instance wakes all who wait, and another client took it. Stand back for a random
            # while, 32 ms at most: where all rush at each instance, 16 get a third as much done.
            time.sleep(min(os.urandom(1)[0] / 8000, seconds))
            offered = False


def _wait_for_instance(path: str, seconds: float) -> bool:
    """Return whether the server has offered one by then, to whoever comes first."""
    # 0 would mean the server's default time.
    if _kernel32.WaitNamedPipeW(path, max(1, int(seconds * 1000))):
        return True
    if _last_error() != ERROR_SEM_TIMEOUT:  # in some containers the wait fails at once
        time.sleep(min(0.01, seconds))
    return False


def _open_pipe(path: str) -> _Handle:
    handle: _Handle = _kernel32.CreateFileW(
        path,
        GENERIC_READ | GENERIC_WRITE,
        0,
        None,
        OPEN_EXISTING,
        # Without SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS the server could impersonate us.
        FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS,
        None,
    )
    return handle


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
      NeedsWindowsError): nothing was sent, so repeating is safe;
    - OutcomeUnknownError (ResponseTimeoutError, ConnectionLostError, or itself for an empty
      response): the request may have been carried out, or may be later.
    """
    if not isinstance(request, VMRequest):
        raise TypeError(f"request must be a VMRequest, not {type(request).__name__}")
    request.check()
    _check_max_response(max_response)
    message = request.to_json()
    started = time.monotonic()
    failure: BaseException | None = None
    try:
        with dial_pipe(pipe_path, connect_timeout=connect_timeout, timeout=timeout) as pipe:
            response = _exchange(pipe, message, max_response)
        if response == b"":
            # A shim that died in the middle of the request looks exactly like this.
            raise OutcomeUnknownError(f"unknown shim failure: empty response, {_LOOK_FIRST}")
        if response != SHIM_SUCCESS:
            raise _refusal(response, max_response)
    except BaseException as error:
        failure = error
        raise
    finally:
        if _is_debugging():
            outcome = f"{type(failure).__name__}: {str(failure)[:200]}" if failure else "done"
            milliseconds = (time.monotonic() - started) * 1000
            text = "%s: %r %s: %s (%.1f ms)"
            _log("debug", text, pipe_path, request.id, request.op, outcome, milliseconds)
        failure = None  # it would keep itself alive, by its traceback


def _exchange(pipe: Pipe, message: bytes, max_response: int) -> bytes:
    """Send a request and return the response."""
    try:
        pipe.write(message)
    except ConnectionLostError:
        # The shim may have refused before it had read everything: its text can still be read.
        response = _read_response(pipe, max_response)
        if not response:
            raise
        return response
    return _read_response(pipe, max_response)


def _is_debugging() -> bool:
    # If nobody has imported logging, nobody reads debug lines: skip the slow import.
    if "logging" not in sys.modules:
        return False
    import logging  # waits if another thread is importing it

    return logging.getLogger("vmshim").isEnabledFor(logging.DEBUG)


def _log(level: str, message: str, *arguments: object, exc_info: Any = None) -> None:
    # Nobody has imported logging: only warnings and errors are worth the slow import.
    if "logging" in sys.modules or level in ("warning", "error"):
        import logging

        try:
            getattr(logging.getLogger("vmshim"), level)(message, *arguments, exc_info=exc_info)
        except Exception:
            # A log handler of the user's must not hide how a request ended, nor end a server.
            sys.excepthook(*sys.exc_info())


# ---- runhcs's own state -------------------------------------------------------------------------


def _zero_guid() -> uuid.UUID:
    import uuid

    return uuid.UUID(int=0)


_CONTAINER_FIELDS = (
    _Field("id", "ID", _read_string, "The container's ID."),
    _Field("owner", "Owner", _read_string, "Who created it."),
    _Field("sandbox_id", "SandboxID", _read_string, "The ID of the sandbox that it belongs to."),
    _Field("host_id", "HostID", _read_string, "The ID of its VM; empty if it runs in none."),
    _Field("bundle", "Bundle", _read_string, "The path of its bundle."),
    _Field("created", "Created", _read_time, _CREATED),
    _Field("rootfs", "Rootfs", _read_string, "The path of its root file system."),
    _Field("is_host", "IsHost", _read_bool, "Whether it was created together with its VM."),
    _Field(
        "unique_id", "UniqueID", _read_guid, "GUID in the name of its own pipe: shim_pipe_path()."
    ),
    _Field(
        "host_unique_id",
        "HostUniqueID",
        _read_guid,
        "GUID in the name of its VM's pipe; the zero GUID if it runs in no VM.",
    ),
)


class Container(NamedTuple):
    """A container's registry entry, as runhcs stores it (hcsshim: persistedState in cmd/runhcs)."""

    id: str
    owner: str = ""
    sandbox_id: str = ""
    host_id: str = ""
    bundle: str = ""
    created: datetime = _default(_zero_time, "never")
    rootfs: str = ""
    is_host: bool = False
    unique_id: uuid.UUID = _default(_zero_guid, "the zero GUID")
    host_unique_id: uuid.UUID = _default(_zero_guid, "the zero GUID")
    shim_pid: int = -1
    created_nanosecond: int = 0

    def vm_pipe_path(self) -> str:
        """Return the path of the pipe of this container's VM.

        Raises ContainerNotFoundError if the container runs in no VM.
        """
        if self.host_unique_id == _zero_guid():
            raise ContainerNotFoundError(
                f"container '{self.id}' runs in no VM, so no VM shim can be asked"
            )
        return vm_pipe_path(self.host_unique_id)


_SHIM_PID = "The pid of its own shim; 0 if that has exited, -1 if unknown."
_document(
    Container,
    (
        *_CONTAINER_FIELDS,
        _Field("shim_pid", "", _read_integer, _SHIM_PID),
        _Field("created_nanosecond", "", _read_integer, _NANOSECOND),
    ),
)


def read_container(container_id: str, *, root: str = "default") -> Container:
    """Return what runhcs stored of a container (hcsshim: getContainer in cmd/runhcs).

    `root` is runhcs's --root. Raises ContainerNotFoundError, ContainerStateError if the stored
    state is broken, RegistryError if the registry can't be read, NeedsWindowsError, and ValueError
    if the ID or the root is empty or has a lone surrogate.
    """
    key_name = _path_escape("container ID", container_id)
    if not container_id:
        raise ValueError("the container ID is empty")
    try:
        with _open_key(root, key_name) as key:
            state = _read_value(key, "state", "REG_BINARY")
            shim_pid = _read_value(key, "shim", "REG_QWORD")
    except FileNotFoundError:
        raise ContainerNotFoundError(f"ID '{container_id}' was not found") from None
    if state is None:
        # hcsshim's words.
        raise ContainerNotFoundError(f"state 'state' is not present for ID '{container_id}'")
    try:
        fields = _read_members(_decode_only(state), _CONTAINER_FIELDS)
        if fields.get("id") == "":
            raise ValueError("its ID is empty")
    except ValueError as error:
        raise ContainerStateError(f"the state of ID '{container_id}' is broken: {error}") from None
    if shim_pid is not None:
        fields["shim_pid"] = shim_pid
    return Container(**{"id": container_id, **fields})


def list_containers(*, root: str = "default") -> list[Container]:
    """Return what runhcs stored of each container on this host; nothing if it has never run.

    Broken entries are logged as warnings and left out. `root` and exceptions are those of
    read_container().
    """
    try:
        with _open_key(root) as key:
            names = _subkey_names(key)
    except FileNotFoundError:
        return []
    containers = []
    for name in names:
        try:
            containers.append(read_container(_path_unescape(name), root=root))
        except (LookupError, ValueError) as error:
            _log("warning", "registry key %r of root %r left out: %s", name, root, error)
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
    _check_request(container_id, op, connect_timeout, timeout, max_response)
    container = read_container(container_id, root=root)
    _issue_to_vm(
        container,
        op,
        connect_timeout=connect_timeout,
        timeout=timeout,
        max_response=max_response,
    )


def _check_request(
    container_id: str,
    op: str,
    connect_timeout: float | None,
    timeout: float | None,
    max_response: int,
) -> None:
    VMRequest(container_id, op).check()
    _check_timeout("connect_timeout", connect_timeout)
    _check_timeout("timeout", timeout)
    _check_max_response(max_response)


def _issue_to_vm(container: Container, op: str, **limits: Any) -> None:
    """Issue a request to a container's VM, and name the VM if its pipe doesn't exist."""
    try:
        issue_vm_request(container.vm_pipe_path(), VMRequest(container.id, op), **limits)
    except PipeNotFoundError as error:
        text = f"VM {container.host_id} cannot be contacted"
        raise PipeNotFoundError(errno.ENOENT, text, error.filename, error.winerror) from None


def _winreg() -> Any:
    """Return the standard library's winreg, which only Windows has."""
    if sys.platform == "win32":
        import winreg

        return winreg
    raise NeedsWindowsError(
        errno.ENOSYS, f"runhcs's state needs Windows, and this is {sys.platform}"
    )


def _open_key(root: str, *names: str) -> Any:
    if not root:
        raise ValueError("the root is empty")
    path = "\\".join(["SOFTWARE\\Microsoft\\runhcs", _path_escape("root", root), *names])
    winreg = _winreg()
    # A 32-bit Python would be redirected to a registry of its own.
    access = winreg.KEY_READ | winreg.KEY_WOW64_64KEY
    try:
        return winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path, 0, access)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _registry_error(error, f"HKEY_LOCAL_MACHINE\\{path}") from None


def _registry_error(error: OSError, path: str) -> RegistryError:
    text = f"the registry can't be read ({error.strerror}); run this as an elevated administrator"
    return RegistryError(error.errno or errno.EIO, text, path, getattr(error, "winerror", 0) or 0)


def _read_value(key: Any, name: str, kind: str) -> Any:
    """Return a value, or None if there is none of that name and kind."""
    winreg = _winreg()
    try:
        value, found = winreg.QueryValueEx(key, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if getattr(error, "winerror", None) == ERROR_KEY_DELETED:
            raise FileNotFoundError(errno.ENOENT, "the key was deleted meanwhile") from None
        raise _registry_error(error, f"the value {name!r} of a container") from None
    return value if found == getattr(winreg, kind) else None


def _subkey_names(key: Any) -> list[str]:
    names: list[str] = []
    while True:
        try:
            names.append(_winreg().EnumKey(key, len(names)))
        except OSError as error:
            if getattr(error, "winerror", None) != ERROR_NO_MORE_ITEMS:
                raise _registry_error(error, f"subkey {len(names)} of runhcs's root") from None
            return names


# ---- Server -------------------------------------------------------------------------------------
# Two threads share the work. The thread that calls serve_forever() runs the handler and nothing
# else; Ctrl-C may interrupt it between any two steps. The I/O thread talks to all clients, through
# one completion port. Between the two there are only queues, flags that are set once, and
# PostQueuedCompletionStatus, which wakes the I/O thread: no locks, so none can be left locked.

_RequestChunk = ctypes.c_char * 4096
"""The buffer in which each client's request is awaited."""
_STOP_GRACE = 0.5
"""How long a server that stops gives its clients to take their responses, in seconds."""
_RETRY_SECONDS = 0.1
"""How long a server waits after Windows has refused it a new instance of the pipe."""
_MAX_ERROR_TEXT = 65536
"""The longest error text that a server sends, in bytes."""
_MAX_DEPTH = 1000
"""How deep a request may be nested. Without it a process that has raised Python's recursion limit
could be crashed by a client."""

_STOPPED = b"the VM shim stopped before it had carried the request out"
_TOO_LATE = b"no complete request came in time"


class VMShimServer:
    """A VM shim's end of the pipe (hcsshim: the server in cmd/runhcs/vm.go).

    `handler` is called with one VMRequest at a time, in the order in which they arrived, in the
    thread that runs serve_forever(). If it returns, the client is told of success. To refuse a
    request it raises ShimError with the text for the client. Any other Exception is a bug in the
    handler: it is logged as an error, and the client gets its text, too.

    `request_timeout` is how long, in seconds, a client may take for each of these: sending its
    request, reading the response, closing its end. None means no limit. At most `max_clients` are
    connected at a time, and nobody new is let in while a request waits for the handler; other
    clients get PipeBusyError.

    `security_descriptor` is an SDDL string that says who may connect. Without it LocalSystem,
    administrators and the account that runs the server may. It must give this account GA. Give
    clients 0x12019b, not GW, FA or GA: these include the right to create an instance of the pipe,
    and so to pose as the server.

    The pipe exists as soon as the server object does. Clients get PipeBusyError while
    serve_forever() is not running. Raises ValueError for a path that is not \\\\.\\pipe\\NAME or a
    wrong security descriptor, PipeAccessError if the name is taken or needs an elevated
    administrator, and PipeOpenError.

    >>> with VMShimServer(r"\\\\.\\pipe\\my-shim", print) as server:  # doctest: +SKIP
    ...     server.serve_forever()
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
        self.pipe_path = pipe_path
        self.handler = handler
        self.request_timeout = request_timeout
        self.max_clients = max_clients
        self._listener = _Listener(pipe_path, _parse_security(security_descriptor))
        # Not in the thread that serves: queue imports threading, which takes the first thread that
        # imports it for the main thread, and Python waits for that one at its end.
        from queue import SimpleQueue

        self._new_queue = SimpleQueue
        self._stopping = False
        self._closed = False
        # At most one, which its I/O thread enters by setdefault(), in one step, and removes.
        self._serving: dict[str, _Service] = {}

    def serve_forever(self) -> None:
        """Respond to requests until shutdown() or close() is called.

        KeyboardInterrupt and SystemExit, in the handler too, end it and are passed on; a request
        that the handler had begun then gets no response, because its outcome is unknown. When it
        returns or raises, no thread is left. If shutdown() was called while the server was idle,
        it returns at once. Raises ValueError if the server is closed, RuntimeError if it is serving
        already or if no thread can be started, and OSError if Windows has no completion port left.
        """
        if self._closed:
            raise ValueError("the server is closed")
        service = _Service(self)
        try:
            _thread.start_new_thread(service.run_io, ())
            service.run_handler()
        finally:
            service.leave_handler()
            service.join()

    def shutdown(self) -> None:
        """Make serve_forever() return, and wait until it has, unless the handler calls this.

        The request under way is carried out; clients that wait are told that the shim has stopped.
        """
        self._stopping = True
        for service in list(self._serving.values()):
            service.stop()

    def close(self) -> None:
        """Shut down and release the pipe's name.

        When the handler calls it, the name is released after the handler has returned. If Ctrl-C
        interrupts this, call it again.
        """
        self._closed = True
        self.shutdown()
        if not self._serving:
            self._listener.close()

    def __enter__(self) -> VMShimServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _parse_security(text: str | None) -> SECURITY_ATTRIBUTES | None:
    """Return what CreateNamedPipeW takes for an SDDL string; None stands for Windows' default."""
    if text is None:
        return None
    _check_text("security_descriptor", text)
    descriptor = _SecurityDescriptor()
    if not _advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW(
        text, SDDL_REVISION_1, descriptor, None
    ):
        raise ValueError(f"security_descriptor is not SDDL: {text!r} (Win32 error {_last_error()})")
    attributes = SECURITY_ATTRIBUTES(ctypes.sizeof(SECURITY_ATTRIBUTES), descriptor.value, False)
    attributes.descriptor = descriptor  # keeps the memory as long as the attributes
    return attributes


class _Listener:
    """Makes the instances of a server's pipe and keeps its name (go-winio: ListenPipe).

    Between two offered instances the name must not vanish, nor may anybody else take it. So the
    first instance is used up by a client of our own, which leaves at once: the instance stays,
    keeps the name, and nobody can connect to it. DisconnectNamedPipe can't do that for a new
    instance under Wine, and CreateNamedPipeW has no option for it.

    Our own client gets in, because by default "full control to the LocalSystem account,
    administrators, and the creator owner" is granted (Named Pipe Security and Access Rights).
    """

    def __init__(self, path: str, security: SECURITY_ATTRIBUTES | None) -> None:
        from collections import deque

        self.path = path
        self.came_early: deque[_Handle] = deque()
        """Instances to which others have connected before us, oldest first."""
        self._name_keeper: _Handle | None = None
        instance = self._create(FILE_FLAG_FIRST_PIPE_INSTANCE, security)
        while not self.use_up():
            self.came_early.append(instance)
            instance = self.create()
        self._name_keeper = instance

    def create(self) -> _Handle:
        """Make a further instance, to which one client can connect."""
        # The descriptor belongs to the name: only the first instance's counts.
        return self._create(0, None)

    def use_up(self) -> bool:
        """Connect to the offered instance and leave; return False if another client was faster."""
        try:
            dial_pipe(self.path, connect_timeout=0).close()
        except PipeBusyError:
            return False
        except PipeAccessError as error:
            error.strerror = (
                "the server can't connect to its own pipe; its security descriptor must allow it to"
            )
            raise
        return True

    def close(self) -> None:
        """Release the name."""
        self.came_early.clear()
        self._name_keeper = None

    def _create(self, first: int, security: SECURITY_ATTRIBUTES | None) -> _Handle:
        handle: _Handle = _kernel32.CreateNamedPipeW(
            self.path,
            PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | first,
            PIPE_TYPE_MESSAGE | PIPE_READMODE_BYTE | PIPE_REJECT_REMOTE_CLIENTS,
            PIPE_UNLIMITED_INSTANCES,
            # Buffers of 0: a write ends when the client has read it. Only then may the zero-length
            # message follow, which Windows drops while data is unread.
            0,
            0,
            0,
            security,
        )
        if handle.value == INVALID_HANDLE_VALUE:
            raise _serve_error(_last_error(), self.path)
        return handle


class _Client:
    """One client of the server: its instance of the pipe, and what is under way on it."""

    request: VMRequest

    def __init__(self, handle: _Handle) -> None:
        self.handle: _Handle | None = handle
        self.conversation: _Task | None = None
        self.tasks = 0
        self.operations: set[_Operation] = set()
        self.is_connected = False
        self.ends_on_stop = True
        """Whether a stopping server cuts it off at once, because it is owed no response."""
        self.is_cut_off = False
        self.is_used_up = False
        """Whether the client on this instance is our own, by which the instance was used up."""

    def cut_off(self) -> None:
        """Cancel what is under way, and let nothing new begin."""
        self.is_cut_off = True
        for operation in self.operations:
            _kernel32.CancelIoEx(self.handle, operation.overlapped)


class _Service:
    """One run of serve_forever(): its two threads and the queues between them.

    A client's way: the I/O thread connects to it and reads its request, then puts it into
    `_requests`. The handler's thread takes it from there, calls the handler, and puts it into
    `_responses` with what to respond. The I/O thread writes that and sees the client off.

    In the I/O thread a client is a task: a generator that yields an operation and is resumed with
    its Win32 error and its count of bytes. A second task drains what the client sends after its
    request. While the handler has the client, the first task has yielded None.
    """

    def __init__(self, server: VMShimServer) -> None:
        from collections import OrderedDict, deque

        self._server = server
        self._handler_thread = _thread.get_ident()
        self._io_thread: int | None = None
        self._requests: SimpleQueue[_Client | None] = server._new_queue()
        self._responses: SimpleQueue[tuple[_Client, bytes]] = server._new_queue()
        # What the I/O thread wants logged: logging may block, and belongs to the other thread.
        self._log_records: deque[tuple[Any, ...]] = deque(maxlen=1000)
        self._failure: BaseException | None = None
        # Each of these is set once.
        self._has_begun = False
        self._has_ended = False
        self._handler_has_left = False
        # Only the I/O thread changes the following; others read _port to wake it.
        self._port: _Handle | None = None
        self._operations: dict[int, tuple[_Operation, _Client, _Task]] = {}
        self._clients: set[_Client] = set()
        self._connected = 0
        self._at_handler: list[_Client] = []
        self._offered: _Client | None = None
        self._retry_at = 0.0
        self._is_stopping = False
        # Every step of a client has the same time limit, so the first in here is the first to end.
        self._deadlines: OrderedDict[_Client, float] = OrderedDict()

    # The handler's thread, and others that call shutdown() or close().

    def run_handler(self) -> None:
        """Call the handler for one request after the other, until the I/O thread has ended."""
        while not self._has_ended:
            client = _get(self._requests, _LONGEST_WAIT)
            self._write_log()
            if client is not None:
                self._responses.put((client, self._call_handler(client.request)))
                self._wake()
        self._write_log()
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                # Its traceback is in the log. Here it would keep handles open.
                raise failure.with_traceback(None)
        finally:
            del failure

    def leave_handler(self) -> None:
        """Tell the I/O thread that the handler isn't called any more."""
        self._handler_has_left = True
        self._wake()

    def stop(self) -> None:
        """Have the I/O thread stop, and wait for its end unless the handler calls this."""
        self._wake()
        # A finaliser may call this, in any thread.
        if _thread.get_ident() == self._io_thread:
            return
        if _thread.get_ident() == self._handler_thread:
            if self._is_in_handler():
                return
            # Two Ctrl-C in a row may have ended serve_forever() before it could say so.
            self.leave_handler()
        self.join()

    def join(self) -> None:
        """Wait for the end of the I/O thread; if it has not begun, it will do nothing."""
        # When Python ends, it lets no other thread go on: then there is nothing to wait for.
        while self._has_begun and not self._has_ended and not sys.is_finalizing():
            time.sleep(0.01)

    def _is_in_handler(self) -> bool:
        """Tell whether the handler is among this function's callers."""
        frame: FrameType | None = sys._getframe()
        while frame:
            if frame.f_code is _Service._call_handler.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _call_handler(self, request: VMRequest) -> bytes:
        """Return the response: success, or the text of the handler's exception."""
        path = self._server.pipe_path
        try:
            result = self._server.handler(request)
            if hasattr(result, "__await__"):
                raise TypeError("the handler returned something to await, which nobody does")
        except ShimError as error:
            _log("info", "%s: %r refused: %s", path, request, error)
            return _error_text(error)
        except Exception as error:
            _log("error", "%s: the handler failed at %r", path, request, exc_info=True)
            return _error_text(error)
        return SHIM_SUCCESS

    def _write_log(self) -> None:
        while self._log_records:
            level, message, *arguments = self._log_records.popleft()
            _log(level, f"%s: {message}", self._server.pipe_path, *arguments)

    def _wake(self) -> None:
        if self._port:
            _kernel32.PostQueuedCompletionStatus(self._port, 0, 0, None)

    # The I/O thread.

    def run_io(self) -> None:
        """Serve all clients until the server is to stop. This is the I/O thread."""
        server = self._server
        self._io_thread = _thread.get_ident()
        self._has_begun = True
        try:
            if self._handler_has_left:
                return
            if server._serving.setdefault("service", self) is not self:
                self._failure = RuntimeError("the server is serving already")
                return
            try:
                self._port = _create_port()
                self._serve()
            finally:
                for operation, *_ in self._operations.values():
                    operation.end()  # only after a bug is there any
                self._clients.clear()
                self._port = None
                server._stopping = False
                if server._closed:
                    server._listener.close()
                server._serving.clear()
        except Exception as error:
            import traceback

            self._log_later("error", "the I/O thread has failed: %s", traceback.format_exc())
            self._failure = error
        finally:
            self._has_ended = True
            self._requests.put(None)

    def _serve(self) -> None:
        came_early = self._server._listener.came_early
        while True:
            if self._must_stop():
                self._begin_to_stop()
            while came_early and not self._is_stopping:
                try:
                    self._admit(came_early.popleft())
                except OSError as error:
                    self._log_later("error", "a client can't be let in: %s", str(error))
            self._deliver_responses()
            self._cut_off_late_clients()
            self._offer_or_use_up()
            if self._is_stopping and not self._clients:
                return
            self._take_packet()

    def _must_stop(self) -> bool:
        return self._server._stopping or self._server._closed or self._handler_has_left

    def _begin_to_stop(self) -> None:
        """Refuse what the handler has not begun, and cut off clients that are owed no response."""
        if self._is_stopping:
            return
        self._is_stopping = True
        while not self._requests.empty():
            # The handler's thread may be faster.
            client = _get(self._requests, 0)
            if client:
                self._resume(client, _STOPPED)
        for client in list(self._clients):
            if client.ends_on_stop and client is not self._offered:
                client.cut_off()
        for client in list(self._deadlines):
            self._start_time_limit(client, ends_on_stop=client.ends_on_stop)

    def _deliver_responses(self) -> None:
        # In this order: what the handler's thread has put before it left must not be lost.
        handler_has_left = self._handler_has_left
        while not self._responses.empty():
            self._resume(*self._responses.get())
        if handler_has_left:
            for client in list(self._at_handler):
                self._resume(client, None)

    def _resume(self, client: _Client, response: bytes | None) -> None:
        """Give a client its response; None means that nobody knows."""
        self._at_handler.remove(client)
        assert client.conversation
        self._advance(client, client.conversation, response)

    def _cut_off_late_clients(self) -> None:
        now = time.monotonic()
        while self._deadlines and next(iter(self._deadlines.values())) <= now:
            client, _ = self._deadlines.popitem(last=False)
            client.cut_off()

    def _offer_or_use_up(self) -> None:
        """Offer an instance while clients may come in, and use it up when they may not."""
        try:
            # Once more if a client was faster than ConnectNamedPipe.
            while self._may_let_in() and not self._offered and time.monotonic() >= self._retry_at:
                client = self._admit(self._server._listener.create())
                self._retry_at = 0.0
                if client.tasks and not client.is_connected:
                    self._offered = client
            if self._offered and not self._may_let_in():
                self._offered.is_used_up = self._server._listener.use_up()
                self._offered = None
        except OSError as error:
            if not self._retry_at:
                self._log_later("error", "no client can be let in: %s", str(error))
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            if self._offered:
                self._offered.cut_off()
                self._offered = None

    def _may_let_in(self) -> bool:
        return (
            not self._is_stopping
            and len(self._at_handler) <= 1  # one is being handled, nobody waits
            and self._connected < self._server.max_clients
        )

    def _log_later(self, level: str, message: str, detail: object) -> None:
        """Have the handler's thread log this."""
        self._log_records.append((level, message, detail))

    def _admit(self, instance: _Handle) -> _Client:
        """Wait for a client on an instance, and serve it."""
        if not _kernel32.CreateIoCompletionPort(instance, self._port, 0, 0):
            raise _serve_error(_last_error(), self._server.pipe_path)
        client = _Client(instance)
        self._clients.add(client)
        client.conversation = self._converse(client)
        self._begin(client, client.conversation)
        return client

    def _take_packet(self) -> None:
        """Wait until an operation ends, somebody wakes us, or a deadline has come."""
        count, key, overlapped = DWORD(), ULONG_PTR(), LPVOID()
        _kernel32.GetQueuedCompletionStatus(
            self._port, count, key, overlapped, self._milliseconds()
        )
        if overlapped.value is None:
            return
        operation, client, task = self._operations.pop(overlapped.value)
        client.operations.remove(operation)
        operation.end()
        self._advance(client, task, (operation.error(), count.value))

    def _milliseconds(self) -> int:
        deadline = next(iter(self._deadlines.values()), math.inf)
        if self._retry_at > time.monotonic():
            deadline = min(deadline, self._retry_at)
        if deadline == math.inf:
            return INFINITE
        return min(math.ceil(max(0.0, deadline - time.monotonic()) * 1000), INFINITE - 1)

    def _begin(self, client: _Client, task: _Task) -> None:
        client.tasks += 1
        self._advance(client, task, None)

    def _advance(self, client: _Client, task: _Task, result: Any) -> None:
        """Resume a task, and start the operation that it yields."""
        try:
            while True:
                operation = task.send(result)
                if operation is None:
                    return
                error = ERROR_OPERATION_ABORTED
                if not client.is_cut_off:
                    self._operations[operation.address] = operation, client, task
                    client.operations.add(operation)
                    error = operation.start()
                    if error in (0, ERROR_IO_PENDING):
                        return
                    del self._operations[operation.address]
                    client.operations.remove(operation)
                    operation.end()
                result = error, 0
        except StopIteration:
            pass
        except OperationCancelledError:
            pass
        except _PipeError as error:
            # Not the exception itself: its text is for clients, its traceback keeps the pipe open.
            self._log_later("debug", "a client has failed: Win32 error %s", error.winerror)
            client.cut_off()
        except Exception as error:
            self._log_later("error", "a client was given up: %s", repr(error))
            client.cut_off()
        client.tasks -= 1
        if not client.tasks:
            self._close_client(client)

    def _close_client(self, client: _Client) -> None:
        self._clients.discard(client)
        self._deadlines.pop(client, None)
        self._connected -= client.is_connected
        if self._offered is client:
            self._offered = None
        client.conversation = None
        client.handle = None  # the last reference: this closes the handle

    def _start_time_limit(self, client: _Client, *, ends_on_stop: bool) -> None:
        """Give a client the time limit for its next step."""
        self._deadlines.pop(client, None)
        seconds = self._server.request_timeout
        if self._is_stopping:
            seconds = _STOP_GRACE if seconds is None else min(seconds, _STOP_GRACE)
        self._deadlines[client] = _deadline(seconds)
        client.ends_on_stop = ends_on_stop

    # The tasks of a client.

    def _converse(self, client: _Client) -> _Task:
        """Talk with a client, from its connection to its response."""
        error, _ = yield _Operation(client.handle, _kernel32.ConnectNamedPipe)
        if self._offered is client:
            self._offered = None
        # ERROR_NO_DATA: the client came and went.
        if client.is_used_up or error not in (0, ERROR_PIPE_CONNECTED):
            return
        client.is_connected = True
        self._connected += 1
        is_leaving = False
        try:
            self._start_time_limit(client, ends_on_stop=True)
            response = yield from self._receive(client)
            # A client that was cut off while it sent its request is still told why.
            client.is_cut_off = False
            self._begin(client, self._drain(client))
            if response is None:
                self._deadlines.pop(client, None)
                client.ends_on_stop = False
                self._at_handler.append(client)
                self._requests.put(client)
                response = yield None
            if response is not None:
                self._start_time_limit(client, ends_on_stop=False)
                yield from self._write(client, response)
            if response == SHIM_SUCCESS:
                yield from self._write(client, b"")
                self._start_time_limit(client, ends_on_stop=True)
                is_leaving = not self._is_stopping
        finally:
            # After a success, _drain() goes on until the client has left.
            if not is_leaving:
                client.cut_off()

    def _receive(self, client: _Client) -> Generator[_Operation, Any, bytes | None]:
        """Read a request. Return None if it is complete, or else what to tell the client."""
        reader = _RequestReader()
        try:
            while not reader.feed((yield from self._read(client))):
                pass
            client.request = reader.request()
        except ValueError as error:
            return str(error).encode("utf-8", "backslashreplace")
        except OperationCancelledError:
            return _STOPPED if self._is_stopping else _TOO_LATE
        return _STOPPED if self._is_stopping else None

    def _drain(self, client: _Client) -> _Task:
        """Read what a client sends after its request, which it could not end otherwise."""
        left = MAX_REQUEST
        while left > 0:
            data = yield from self._read(client)
            if not data:
                return
            left -= len(data)

    def _read(self, client: _Client) -> Generator[_Operation, Any, bytes]:
        chunk = _RequestChunk()
        read = _Operation(client.handle, _kernel32.ReadFile, chunk, len(chunk), None)
        error, count = yield read
        if error in (ERROR_BROKEN_PIPE, ERROR_NETNAME_DELETED):
            return b""
        if error not in (0, ERROR_MORE_DATA):
            raise _exchange_error(error, self._server.pipe_path)
        return ctypes.string_at(chunk, count)

    def _write(self, client: _Client, data: bytes) -> Generator[_Operation, Any, None]:
        write = _Operation(client.handle, _kernel32.WriteFile, data, len(data), None)
        error, _ = yield write
        if error:
            raise _exchange_error(error, self._server.pipe_path)


def _create_port() -> _Handle:
    """Return a new completion port. Only the I/O thread calls this, which Ctrl-C doesn't reach."""
    port = _kernel32.CreateIoCompletionPort(INVALID_HANDLE_VALUE, None, 0, 1)
    if not port:
        raise OSError(errno.ENOMEM, f"no completion port can be had (Win32 error {_last_error()})")
    return _Handle(port)


def _error_text(error: Exception) -> bytes:
    """Return what a client is told of the handler's exception: not empty, and not success."""
    for describe in str, repr:
        try:
            data = describe(error)[:_MAX_ERROR_TEXT].encode("utf-8", "backslashreplace")
        except Exception:  # the handler's own code, which may be as broken as its exception
            continue
        # Don't cut in the middle of a character.
        data = data[:_MAX_ERROR_TEXT].decode("utf-8", "ignore").encode()
        if data not in (b"", SHIM_SUCCESS):
            return data
    return b"the handler failed, and so did the text of its exception"


class _RequestReader:
    """Puts a request together from pieces, and finds its end without parsing it again each time."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, piece: bytes) -> bool:
        """Take the next piece; b"" is end of file. Return True to stop: it is complete, or broken.

        Raises ValueError if it is too long.
        """
        self._received += piece
        if not piece or self._is_end_in(piece):
            return True
        if len(self._received) >= MAX_REQUEST:
            raise ValueError(f"the request is longer than {MAX_REQUEST} bytes")
        return False

    def request(self) -> VMRequest:
        """Return the request. Raises ValueError if it is none that a handler may see."""
        request = VMRequest.from_json(bytes(self._received))
        request.check()
        return request

    def _is_end_in(self, piece: bytes) -> bool:
        """Tell whether the JSON object ends in this piece, or can't be one any more."""
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
                if self._depth > _MAX_DEPTH:
                    return True
            elif byte in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    return True
            # Punctuation, digits, and the letters of true, false and null.
            elif self._depth == 0 or byte not in b'",:-+.0123456789eEtrufalsn':
                return True
            elif byte == 0x22:
                self._in_string = True
        return False


# ---- Command line -------------------------------------------------------------------------------

_EXAMPLES = """\
examples:
  vmshim.py list
  vmshim.py unmount my-container
  vmshim.py unmount --vm 6ba7b810-9dad-11d1-80b4-00c04fd430c8 my-container
  vmshim.py create --pipe \\\\.\\pipe\\my-shim --timeout 30 --json my-container
  vmshim.py pipe-path 6ba7b810-9dad-11d1-80b4-00c04fd430c8
  vmshim.py serve --pipe \\\\.\\pipe\\my-shim
  vmshim.py demo
"""


_COMMANDS = (*VMRequestOp, "list", "pipe-path", "serve", "demo")


def _epilog() -> str:
    rows = sorted(_OUTCOMES, key=lambda outcome: outcome.status)
    statuses = "\n".join(f"  {outcome.status:<3}  {outcome.meaning}" for outcome in rows)
    return f"{_EXAMPLES}\nexit status:\n{statuses}\n"


def _version() -> str:
    """Return what a report of a bug needs."""
    python = ".".join(map(str, sys.version_info[:3]))
    bits = ctypes.sizeof(ctypes.c_void_p) * 8
    return f"vmshim {__version__}, Python {python}, {sys.platform}, {bits} bit"


class _UsageError(ValueError):
    """Wrong arguments of a command."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser = parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    failure: BaseException
    try:
        return _run_command(words)
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    _print_failure(failure)
    if "--json" in words or "--json-lines" in words:
        op = words[0] if words[0] in _COMMANDS else None
        _print_json(None, op, None, failure, 0.0)
    return _outcome_of(failure).status


def _run_command(words: list[str]) -> int:
    parser = _make_parser()
    if not words:
        parser.print_help()
        return 2
    _suggest(parser, words[0])
    options = parser.parse_args(words)
    if getattr(options, "verbose", False):
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    try:
        status: int = options.run(options)
    except ValueError as error:
        raise _UsageError(options.parser, str(error)) from None
    return status


def _suggest(parser: argparse.ArgumentParser, word: str) -> None:
    """Refuse an unknown command, and name a similar one."""
    if word in _COMMANDS:
        return
    from difflib import get_close_matches

    similar = get_close_matches(word, _COMMANDS, 1)
    if similar:
        raise _UsageError(parser, f"unknown command {word!r}; did you mean '{similar[0]}'?")


def _make_parser() -> argparse.ArgumentParser:
    import argparse
    import functools

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            # Without a width argparse would import shutil at every start, for the terminal's.
            formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=78)
            super().__init__(**options, formatter_class=formatter, allow_abbrev=False)

        def error(self, message: str) -> NoReturn:
            raise _UsageError(self, message)

        def _print_message(self, message: str, file: Any = None) -> None:
            _print(message.rstrip("\n"))

    parser = Parser(
        prog="vmshim.py",
        description="Talk to a runhcs VM shim.",
        epilog=_epilog(),
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_command(name: str, run: Callable[[Any], int], text: str, example: str) -> Any:
        example = f"example: vmshim.py {name} {example}".rstrip()
        command = commands.add_parser(name, help=text, description=text, epilog=example)
        command.set_defaults(run=run, parser=command)
        return command

    def add_where(command: argparse.ArgumentParser, *, required: bool) -> None:
        where = command.add_mutually_exclusive_group(required=required)
        where.add_argument("--vm", metavar="GUID", help="the VM's HostUniqueID")
        where.add_argument("--pipe", metavar="PATH", help="the path of its shim's pipe")

    def add_root(command: argparse.ArgumentParser) -> None:
        text = "runhcs's --root (default: %(default)s)"
        command.add_argument("--root", default="default", help=text)

    for op, text in {
        VMRequestOp.CREATE_CONTAINER: "create containers in their VM",
        VMRequestOp.SYNC_NAMESPACE: "sync containers' network namespaces",
        VMRequestOp.UNMOUNT_CONTAINER: "take containers' file systems out of their VM",
        VMRequestOp.UNMOUNT_CONTAINER_DISK_ONLY: "take only containers' disks out of their VM",
    }.items():
        command = add_command(op.value, _run_requests, text, "--timeout 60 my-container")
        command.description += ";\nwithout --vm or --pipe, the VM is looked up in runhcs's state"
        command.add_argument("ids", metavar="ID", nargs="+", help="a container's ID")
        add_where(command, required=False)
        add_root(command)
        command.add_argument(
            "--connect-timeout",
            type=float,
            default=2.0,
            metavar="S",
            help="seconds to try while the pipe is busy (default: %(default)s)",
        )
        text = "seconds to wait for the response (default: no limit)"
        command.add_argument("--timeout", type=float, metavar="S", help=text)
        command.add_argument("--json", action="store_true", help="print a line of JSON for each ID")
        command.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
        command.set_defaults(op=op)

    command = add_command("list", _run_list, "list runhcs's containers on this host", "--json")
    command.description += """.
VM SHIM says of the shim of a container's VM: free; busy (it serves somebody, or
is booting); absent (nobody listens); or - (the container runs in no VM)"""
    add_root(command)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print a JSON array")
    text = "print a line of JSON for each container, with the host in it"
    how.add_argument("--json-lines", action="store_true", help=text)

    guid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    command = add_command("pipe-path", _run_pipe_path, "print the path of a VM shim's pipe", guid)
    command.add_argument("vm", metavar="GUID", help="the VM's HostUniqueID")

    text = "respond to requests, and print each, until Ctrl-C"
    command = add_command("serve", _run_serve, text, r"--pipe \\.\pipe\my-shim")
    add_where(command, required=True)
    command.add_argument("--fail", metavar="TEXT", help="refuse every request with this text")
    command.add_argument(
        "--handshake",
        action="store_true",
        help="start like a shim that runhcs launches: read a JSON object from stdin (ignored), "
        "write the success bytes to stdout when the pipe exists, close stdout, print to stderr",
    )

    text = "show a request and a refusal, on a pipe that needs no elevation"
    add_command("demo", _run_demo, text, "")
    return parser


def _run_requests(options: argparse.Namespace) -> int:
    """Send one request after the other; return the exit status of the first that failed."""
    for container_id in options.ids:
        _check_request(
            container_id, options.op, options.connect_timeout, options.timeout, MAX_RESPONSE
        )
    first_failure = 0
    for container_id in options.ids:
        status = _run_request(options, container_id)
        first_failure = first_failure or status
        if status == 130:
            break
    return first_failure


def _run_request(options: argparse.Namespace, container_id: str) -> int:
    pipe_path = None
    limits = {"connect_timeout": options.connect_timeout, "timeout": options.timeout}
    started = time.monotonic()
    failure: BaseException | None = None
    try:
        with _WaitDisplay():
            if options.pipe is None and options.vm is None:
                container = read_container(container_id, root=options.root)
                pipe_path = container.vm_pipe_path()
                _issue_to_vm(container, options.op, **limits)
            else:
                pipe_path = vm_pipe_path(options.vm) if options.pipe is None else options.pipe
                issue_vm_request(pipe_path, VMRequest(container_id, options.op), **limits)
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    if isinstance(failure, ValueError) and not isinstance(failure, VMShimError):
        raise failure
    if failure is not None:
        _print_failure(failure)
    if options.json:
        _print_json(container_id, options.op, pipe_path, failure, time.monotonic() - started)
    return _outcome_of(failure).status


def _print_json(
    container_id: str | None,
    op: str | None,
    pipe_path: str | None,
    failure: BaseException | None,
    seconds: float,
) -> None:
    """Print how a request has ended, as one line of JSON."""
    import json

    outcome = _outcome_of(failure)
    row = {
        "host": _host(),
        "id": container_id,
        "op": op,
        "pipe": pipe_path,
        "ok": failure is None,
        "status": outcome.status,
        "error": None if failure is None else _describe(failure),
        "outcome": outcome.outcome,
        "retry": isinstance(failure, NotSentError),
        "elapsed_ms": round(seconds * 1000, 1),
        "version": __version__,
    }
    _print(json.dumps(row))


def _host() -> str | None:
    # platform.node() asks WMI from Python 3.12 on, which is slow.
    return os.environ.get("COMPUTERNAME")


def _print_failure(failure: BaseException) -> None:
    """Say on stderr why a command failed; Ctrl-C needs no words."""
    if isinstance(failure, _UsageError):
        prog = failure.parser.prog
        _print(f"{failure.parser.format_usage()}{prog}: error: {failure}", "stderr")
    elif _outcome_of(failure).status == 70:
        import traceback

        lines = traceback.format_exception(type(failure), failure, failure.__traceback__)
        _print("".join(lines).rstrip("\n"), "stderr")
    elif not isinstance(failure, KeyboardInterrupt):
        _print(_describe(failure), "stderr")


def _describe(error: BaseException) -> str:
    if isinstance(error, _PipeError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error) or type(error).__name__


def _print(text: str, stream_name: str = "stdout") -> None:
    """Print a text to stdout or stderr, and drop what can't be printed.

    The exit status tells the outcome even so. A shim's text must not be able to drive the
    administrator's terminal, so control characters are escaped.
    """
    text = "".join(
        char
        if char.isprintable() or char in "\n\t"
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )
    stream = getattr(sys, stream_name)
    if stream is None:
        return
    try:
        # A console or a file may not know every character.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        # Python would try to flush it again at its end, and change the exit status.
        setattr(sys, stream_name, None)


def _run_list(options: argparse.Namespace) -> int:
    import json

    containers = sorted(list_containers(root=options.root))
    shims = [_vm_shim_status(container) for container in containers]
    if options.json or options.json_lines:
        rows = []
        for container, shim in zip(containers, shims):
            row = {**container._asdict(), "vm_shim": shim}
            row["created"] = _go_time(container.created, row.pop("created_nanosecond"))
            rows.append(row)
        if options.json:
            _print(json.dumps(rows, default=str, indent=2))
        for row in rows if options.json_lines else ():
            _print(json.dumps({"host": _host(), **row}, default=str))
        return 0
    table = [("ID", "VM", "OWNER", "CREATED", "VM SHIM")]
    for container, shim in zip(containers, shims):
        vm = str(container.host_unique_id) if shim else "-"
        created = container.created.isoformat(" ", "seconds")
        table.append((container.id, vm, container.owner or "-", created, shim or "-"))
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        _print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    return 0


def _vm_shim_status(container: Container) -> str | None:
    """Tell whether the shim of a container's VM is free, busy or absent; None: there is no VM."""
    try:
        path = container.vm_pipe_path()
    except ContainerNotFoundError:
        return None
    # Opening the pipe would take an instance from a client.
    if _kernel32.WaitNamedPipeW(path, 1):
        return "free"
    return "busy" if _last_error() == ERROR_SEM_TIMEOUT else "absent"


def _run_pipe_path(options: argparse.Namespace) -> int:
    _print(vm_pipe_path(options.vm))
    return 0


def _run_serve(options: argparse.Namespace) -> int:
    def print_request(request: VMRequest) -> None:
        _print(f"{request.op} {request.id}")
        if options.fail is not None:
            raise ShimError(options.fail)

    def make_server() -> VMShimServer:
        path = vm_pipe_path(options.vm) if options.pipe is None else options.pipe
        return VMShimServer(path, print_request)

    with _handshake(make_server) if options.handshake else make_server() as server:
        _print(f"serving {server.pipe_path} until Ctrl-C", "stderr")
        server.serve_forever()
    return 0


def _handshake(make_server: Callable[[], VMShimServer]) -> VMShimServer:
    """Start as a shim process does: options on stdin, then success or an error on stdout."""
    try:
        options = _decode_only(sys.stdin.buffer.read())
        _check_type("the options on stdin", options, _Object, "an object")
        server = make_server()
    except (ValueError, VMShimError) as error:
        os.write(1, _describe(error).encode())
        raise
    os.write(1, SHIM_SUCCESS)
    # sys.stdout.close() would leave the handle open, and the parent waiting for its end.
    os.close(1)
    sys.stdout = sys.stderr
    return server


def _run_demo(options: argparse.Namespace) -> int:
    import uuid

    def carry_out(request: VMRequest) -> None:
        if request.op == VMRequestOp.SYNC_NAMESPACE:
            raise ShimError("Not implemented")  # as the reference responds

    def serve() -> None:
        try:
            server.serve_forever()
        except ValueError:
            pass  # Ctrl-C has closed it before it served

    with VMShimServer(rf"\\.\pipe\vmshim-demo-{uuid.uuid4()}", carry_out) as server:
        _thread.start_new_thread(serve, ())
        _print(server.pipe_path)
        for op in VMRequestOp.CREATE_CONTAINER, VMRequestOp.SYNC_NAMESPACE:
            request = VMRequest("demo", op)
            response = SHIM_SUCCESS
            try:
                issue_vm_request(server.pipe_path, request, timeout=10.0)
                outcome = "done"
            except ShimError as error:
                response = error.response
                outcome = f"refused: {error}"
            _print(f"\n{op}: {outcome}")
            _print(f"  client to shim  {request.to_json()!r}")
            _print(f"  shim to client  {response!r}")
    return 0


class _WaitDisplay:
    """Shows the seconds on stderr, if that is a terminal, while a wait lasts over a second."""

    def __init__(self) -> None:
        self._stop: SimpleQueue[bool] | None = None
        self._has_begun = False
        self._has_ended = False

    def __enter__(self) -> None:
        """Start to count, in a thread."""
        if sys.stderr and not sys.stderr.closed and sys.stderr.isatty():
            from queue import SimpleQueue

            self._stop = SimpleQueue()
            try:
                _thread.start_new_thread(self._count, ())
            except RuntimeError:
                pass  # the request can do without

    def __exit__(self, *_: object) -> None:
        """Remove the line, and wait for the end of the thread."""
        if self._stop:
            self._stop.put(True)
        while self._has_begun and not self._has_ended:
            time.sleep(0.01)

    def _count(self) -> None:
        self._has_begun = True
        started = time.monotonic()
        line = ""
        try:
            while self._stop and not _get(self._stop, 1.0):
                line = f"waiting for the VM shim: {time.monotonic() - started:.0f} s"
                print(f"\r{line}", end="", file=sys.stderr, flush=True)
            if line:
                print("\r" + " " * len(line) + "\r", end="", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # the terminal has gone
        finally:
            self._has_ended = True


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


if __name__ == "__main__":
    sys.exit(main())
