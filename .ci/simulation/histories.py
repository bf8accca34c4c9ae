"""Small histories of pipes, with what Windows answers at each step, and Wine where it differs.

They are run on the model (`.ci/simulate.py --histories`) and, under Wine, on the real kernel32
(`.ci/wine-python .ci/simulation/histories.py`). A history is text, one step a line:

    read c 10 as r -> 997           what is called, and what Windows answers
    result r       -> 0 3 abc       an operation's error, count and data
    flush s        -> 0 | wine: 5   Wine answers otherwise

Each names its source: a Wine conformance test (they pass on Windows, so they say what Windows
does), Microsoft's documentation, ReactOS's npfs driver, or go-winio. `--differences` lists where
Wine does otherwise. In a path, % stands for a name of the history's own. The steps are explained
at `Steps`, each by its function.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Callable, NamedTuple

DWORD = ctypes.c_uint32
K32 = "Wine, kernel32/tests/pipe.c"
NT = "Wine, ntdll/tests/pipe.c"
NTF = "Wine, ntdll/tests/file.c"
DOCS = "Microsoft's documentation"
NPFS = "ReactOS, npfs"
WINIO = "go-winio"


class History(NamedTuple):
    """A history: its name, where its answers are from, and its steps."""

    name: str
    source: str
    steps: str


class OVERLAPPED(ctypes.Structure):
    """As in minwinbase.h."""

    _fields_ = [
        ("Internal", ctypes.c_size_t),
        ("InternalHigh", ctypes.c_size_t),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", ctypes.c_void_p),
    ]


class SecurityAttributes(ctypes.Structure):
    """SECURITY_ATTRIBUTES."""

    _fields_ = [
        ("nLength", DWORD),
        ("lpSecurityDescriptor", ctypes.c_void_p),
        ("bInheritHandle", ctypes.c_int32),
    ]


class Api:
    """What the histories are run on: functions, threads and time."""

    functions: Any
    last_error: Callable[[], int]
    start: Callable[[Callable[[], None]], None]
    sleep: Callable[[float], None]


class Started(NamedTuple):
    """An operation that has been started, with all that it needs until it ends."""

    kind: str
    handle: Any
    overlapped: OVERLAPPED
    buffer: Any
    event: Any


INVALID = ctypes.c_void_p(-1).value


class Steps:
    """Runs one history, step by step."""

    def __init__(self, api: Api, path: str) -> None:
        self.api = api
        self.call = api.functions
        self.path = path
        self.handles: dict[str, Any] = {}
        self.started: dict[str, Started] = {}
        self.threads: dict[str, list[str]] = {}

    def run(self, line: str) -> str:
        """Run one step and return what came of it."""
        words = line.split()
        step: Callable[..., str] = getattr(self, f"do_{words[0]}")
        return step(*words[1:])

    def _code(self, succeeded: Any) -> str:
        return "0" if succeeded else str(self.api.last_error())

    def _path(self, path: str) -> str:
        return path.replace("%", self.path).replace("_", " ")

    def _keep(self, name: str, handle: Any) -> str:
        if handle in (None, 0, INVALID):
            return str(self.api.last_error())
        self.handles[name] = handle
        return "0"

    def do_create(self, name: str, *options: str) -> str:
        """create NAME [byte|message|message-reads] [in|out] [first] [sync] [limit=N] [quota=N] …"""
        given = dict(option.split("=", 1) for option in options if "=" in option)
        mode = {"in": 1, "out": 2}
        access = next((mode[option] for option in options if option in mode), 3)
        open_mode = access | (0 if "sync" in options else 0x40000000)
        if "first" in options:
            open_mode |= 0x80000
        pipe_mode = 0 if "byte" in options else 4
        if "message-reads" in options:
            pipe_mode |= 2
        if "reject-remote" in options:
            pipe_mode |= 8
        attributes = None
        if "sddl" in given:
            pointer = ctypes.c_void_p()
            convert = self.call.ConvertStringSecurityDescriptorToSecurityDescriptorW
            convert(given["sddl"], 1, ctypes.byref(pointer), None)
            size = ctypes.sizeof(SecurityAttributes)
            attributes = ctypes.byref(SecurityAttributes(size, pointer.value, 0))
        quota = int(given.get("quota", "0"))
        handle = self.call.CreateNamedPipeW(
            self._path(given.get("path", "\\\\.\\pipe\\%")),
            open_mode,
            pipe_mode,
            int(given.get("limit", "255")),
            int(given.get("out", quota)),
            int(given.get("in", quota)),
            int(given.get("timeout", "0")),
            attributes,
        )
        result = self._keep(name, handle)
        if attributes is not None:
            self.call.LocalFree(pointer)
        return result

    def do_open(self, name: str, *options: str) -> str:
        """open NAME [r|w|none] [sync] [path=…]"""
        given = dict(option.split("=", 1) for option in options if "=" in option)
        kinds = {"r": 0x80000000, "w": 0x40000000, "none": 0}
        access = next((kinds[option] for option in options if option in kinds), 0xC0000000)
        flags = 0x00100000 | (0 if "sync" in options else 0x40000000)
        path = self._path(given.get("path", "\\\\.\\pipe\\%"))
        return self._keep(name, self.call.CreateFileW(path, access, 0, None, 3, flags, None))

    def do_pair(self, server: str, client: str, *options: str) -> str:
        """pair SERVER CLIENT [options of create]: both ends of an instance"""
        first = self.do_create(server, *options)
        return first if first != "0" else self.do_open(client)

    def do_close(self, name: str) -> str:
        """close NAME: a handle"""
        return self._code(self.call.CloseHandle(self.handles[name]))

    def do_disconnect(self, name: str) -> str:
        """disconnect NAME"""
        return self._code(self.call.DisconnectNamedPipe(self.handles[name]))

    def do_flush(self, name: str) -> str:
        """flush NAME"""
        return self._code(self.call.FlushFileBuffers(self.handles[name]))

    def do_waitpipe(self, milliseconds: str, path: str = "\\\\.\\pipe\\%") -> str:
        """waitpipe MILLISECONDS: WaitNamedPipe"""
        return self._code(self.call.WaitNamedPipeW(self._path(path), int(milliseconds)))

    def do_peek(self, name: str) -> str:
        """peek NAME: the error, all bytes that could be read, the rest of the first message"""
        all_, left = DWORD(), DWORD()
        succeeded = self.call.PeekNamedPipe(
            self.handles[name], None, 0, None, ctypes.byref(all_), ctypes.byref(left)
        )
        if not succeeded:
            return self._code(0)
        return f"0 {all_.value} {left.value}"

    # Operations.

    def _begin(self, kind: str, handle: str, words: tuple[str, ...], buffer: Any) -> Started:
        event = None
        if "without-event" not in words:
            event = self.call.CreateEventW(None, True, False, None)
        name = words[words.index("as") + 1] if "as" in words else f"{handle}.{kind}"
        overlapped = OVERLAPPED(hEvent=event)
        if "port-silent" in words:
            overlapped.hEvent = (event or 0) | 1
        if "again" in words:
            overlapped = self.started[name].overlapped
        started = Started(kind, self.handles[handle], overlapped, buffer, event)
        self.started[name] = started
        return started

    def do_connect(self, handle: str, *words: str) -> str:
        """connect HANDLE [as NAME]"""
        started = self._begin("connect", handle, words, None)
        return self._code(self.call.ConnectNamedPipe(started.handle, started.overlapped))

    def do_read(self, handle: str, size: str, *words: str) -> str:
        """read HANDLE SIZE [as NAME]"""
        buffer = (ctypes.c_char * max(1, int(size)))()
        started = self._begin("read", handle, words, buffer)
        return self._code(
            self.call.ReadFile(started.handle, buffer, int(size), None, started.overlapped)
        )

    def do_readcount(self, handle: str, size: str, *words: str) -> str:
        """readcount HANDLE SIZE: as read, with the direct count as well"""
        buffer = (ctypes.c_char * max(1, int(size)))()
        started = self._begin("read", handle, words, buffer)
        count = DWORD(99)
        succeeded = self.call.ReadFile(
            started.handle, buffer, int(size), ctypes.byref(count), started.overlapped
        )
        return f"{self._code(succeeded)} {count.value}"

    def do_write(self, handle: str, data: str, *words: str) -> str:
        """write HANDLE DATA [as NAME]: DATA may be `nothing`, or `100*a`"""
        written = _data(data)
        started = self._begin("write", handle, words, written)
        return self._code(
            self.call.WriteFile(started.handle, written, len(written), None, started.overlapped)
        )

    def do_syncread(self, handle: str, size: str) -> str:
        """syncread HANDLE SIZE: without an OVERLAPPED; the error, the count, the data"""
        buffer = (ctypes.c_char * max(1, int(size)))()
        count = DWORD()
        succeeded = self.call.ReadFile(
            self.handles[handle], buffer, int(size), ctypes.byref(count), None
        )
        return f"{self._code(succeeded)} {_show(count.value, buffer)}"

    def do_syncwrite(self, handle: str, data: str) -> str:
        """syncwrite HANDLE DATA: without an OVERLAPPED; the error and the count"""
        written = _data(data)
        count = DWORD()
        succeeded = self.call.WriteFile(
            self.handles[handle], written, len(written), ctypes.byref(count), None
        )
        return f"{self._code(succeeded)} {count.value}"

    def do_syncconnect(self, handle: str) -> str:
        """syncconnect HANDLE: without an OVERLAPPED"""
        return self._code(self.call.ConnectNamedPipe(self.handles[handle], None))

    def _outcome(self, name: str, milliseconds: int) -> str:
        started = self.started[name]
        count = DWORD()
        succeeded = self.call.GetOverlappedResultEx(
            started.handle, started.overlapped, ctypes.byref(count), milliseconds, False
        )
        code = self._code(succeeded)
        if code in ("996", "258"):
            return code
        data = started.buffer if started.kind == "read" else None
        return f"{code} {_show(count.value, data)}"

    def do_result(self, name: str) -> str:
        """result NAME: how an operation ended, or 996"""
        return self._outcome(name, 0)

    def do_oldresult(self, name: str) -> str:
        """oldresult NAME: as result, by GetOverlappedResult"""
        started = self.started[name]
        count = DWORD(77)
        succeeded = self.call.GetOverlappedResult(
            started.handle, started.overlapped, ctypes.byref(count), False
        )
        return f"{self._code(succeeded)} {count.value}"

    def do_wait(self, name: str, milliseconds: str = "2000") -> str:
        """wait NAME [MILLISECONDS]: how an operation ended, after a wait; 258 if it didn't"""
        return self._outcome(name, int(milliseconds))

    def do_never(self) -> str:
        """never: GetOverlappedResult for an OVERLAPPED that was never used"""
        count = DWORD(5)
        handle = next(iter(self.handles.values()))
        succeeded = self.call.GetOverlappedResult(handle, OVERLAPPED(), ctypes.byref(count), False)
        return f"{self._code(succeeded)} {count.value}"

    def do_internal(self, name: str) -> str:
        """internal NAME: OVERLAPPED.Internal and InternalHigh"""
        overlapped = self.started[name].overlapped
        return f"{overlapped.Internal:#x} {overlapped.InternalHigh}"

    def do_signaled(self, name: str) -> str:
        """signaled NAME: whether an operation's event, or a handle, is signaled"""
        handle = self.started[name].event if name in self.started else self.handles[name]
        return "no" if self.call.WaitForSingleObject(handle, 0) else "yes"

    def do_cancel(self, handle: str, name: str) -> str:
        """cancel HANDLE OPERATION|all"""
        overlapped = None if name == "all" else self.started[name].overlapped
        return self._code(self.call.CancelIoEx(self.handles[handle], overlapped))

    # Completion ports.

    def do_port(self, name: str) -> str:
        """port NAME: make a completion port"""
        return self._keep(name, self.call.CreateIoCompletionPort(INVALID, None, 0, 0))

    def do_attach(self, handle: str, port: str, key: str = "7") -> str:
        """attach HANDLE PORT [KEY]"""
        result = self.call.CreateIoCompletionPort(
            self.handles[handle], self.handles[port], int(key), 0
        )
        return "0" if result else str(self.api.last_error())

    def do_post(self, port: str, count: str, key: str, name: str = "") -> str:
        """post PORT COUNT KEY [OPERATION]"""
        overlapped = self.started[name].overlapped if name else None
        return self._code(
            self.call.PostQueuedCompletionStatus(
                self.handles[port], int(count), int(key), overlapped
            )
        )

    def do_packet(self, port: str, milliseconds: str = "0") -> str:
        """packet PORT [MILLISECONDS]: the error, the count, the key, the operation's name"""
        count, key = DWORD(), ctypes.c_size_t()
        pointer = ctypes.c_void_p()
        succeeded = self.call.GetQueuedCompletionStatus(
            self.handles[port],
            ctypes.byref(count),
            ctypes.byref(key),
            ctypes.byref(pointer),
            int(milliseconds),
        )
        code = self._code(succeeded)
        if not succeeded and not pointer.value:
            return code
        name = "none"
        for known, started in self.started.items():
            if ctypes.addressof(started.overlapped) == pointer.value:
                name = known
        return f"{code} {count.value} {key.value} {name}"

    # Threads.

    def do_start(self, name: str, *words: str) -> str:
        """start NAME STEP: run a step in a thread of its own"""
        results = self.threads[name] = []
        self.api.start(lambda: results.append(self.run(" ".join(words))))
        self.api.sleep(0.03)
        return "0"

    def do_asleep(self, name: str) -> str:
        """asleep NAME: whether that thread's step goes on"""
        self.api.sleep(0.03)
        return "no" if self.threads[name] else "yes"

    def do_join(self, name: str) -> str:
        """join NAME: what came of a thread's step"""
        for _ in range(200):
            if self.threads[name]:
                return self.threads[name][0]
            self.api.sleep(0.01)
        return "asleep"

    def do_sleep(self, milliseconds: str) -> str:
        """sleep MILLISECONDS"""
        self.api.sleep(int(milliseconds) / 1000)
        return "0"

    def do_sddl(self, text: str, revision: str = "1") -> str:
        """sddl TEXT [REVISION]"""
        pointer = ctypes.c_void_p()
        succeeded = self.call.ConvertStringSecurityDescriptorToSecurityDescriptorW(
            "" if text == "empty" else text, int(revision), ctypes.byref(pointer), None
        )
        code = self._code(succeeded)
        if succeeded and self.call.LocalFree(pointer):
            return "not freed"
        return code


def _data(text: str) -> bytes:
    if text == "nothing":
        return b""
    count, star, letter = text.partition("*")
    return letter.encode() * int(count) if star else text.encode()


def _show(count: int, buffer: Any) -> str:
    if buffer is None or not count:
        return str(count)
    data = buffer.raw[:count].decode("ascii", "replace")
    return f"{count} {data if count <= 20 else data[0] + '...'}"


def lines_of(history: History) -> list[tuple[str, str, str]]:
    """Return a history's steps: the call, what Windows answers, what Wine answers."""
    found = []
    for line in history.steps.strip().splitlines():
        call, _, expected = line.partition("->")
        windows, _, wine = expected.partition("| wine:")
        found.append((call.strip(), windows.strip(), (wine or windows).strip()))
    return found


def run_history(history: History, api: Api, path: str) -> list[str]:
    """Run a history and return what came of each step."""
    steps = Steps(api, path)
    results = [steps.run(call) for call, _, _ in lines_of(history)]
    closed = {call.split()[1] for call, _, _ in lines_of(history) if call.startswith("close ")}
    for name, handle in steps.handles.items():
        if name not in closed:
            api.functions.CloseHandle(handle)
    for started in steps.started.values():
        if started.event:
            api.functions.CloseHandle(started.event)
    return results


def compare(api: Api, *, wine: bool) -> list[str]:
    """Run all histories; return where an answer isn't what it should be."""
    wrong = []
    for number, history in enumerate(HISTORIES):
        results = run_history(history, api, f"vmshim-history-{number}")
        for (call, windows, other), result in zip(lines_of(history), results):
            # A later Wine may do as Windows does.
            if result != windows and not (wine and result == other):
                expected = other if wine else windows
                wrong.append(f"{history.name}: {call} -> {result}, not {expected}")
    return wrong


def differences() -> list[str]:
    """Return where Wine answers otherwise than Windows, with the source for Windows' answer."""
    found = []
    for history in HISTORIES:
        for call, windows, wine in lines_of(history):
            if windows != wine:
                found.append(f"{history.name}: {call}: {windows}, Wine {wine} ({history.source})")
    return found


HISTORIES = [
    # The life of an instance.
    History(
        "an instance listens from its creation on",
        f"{K32}: test_CreateNamedPipe",
        """
        create s -> 0
        open c -> 0
        connect s -> 535
        """,
    ),
    History(
        "a pending connect ends when a client opens",
        f"{NT}: test_pipe_state; {K32}: test_overlapped_error",
        """
        create s -> 0
        connect s as k -> 997
        result k -> 996
        open c -> 0
        wait k -> 0 0
        signaled k -> yes
        """,
    ),
    History(
        "connect while a client is there",
        f"{K32}: test_overlapped_error",
        """
        pair s c -> 0
        connect s as k -> 535
        internal k -> 0x103 0
        signaled k -> no
        result k -> 996
        """,
    ),
    History(
        "connect after the client has gone",
        f"{NT}: test_pipe_state",
        """
        pair s c -> 0
        close c -> 0
        connect s as k -> 232
        internal k -> 0x103 0
        signaled k -> no
        """,
    ),
    History(
        "connect after the client has gone and left data",
        f"{NT}: test_pipe_with_data_state",
        """
        pair s c quota=100 -> 0
        write c abc -> 0
        close c -> 0
        connect s -> 232
        read s 10 as r -> 0
        result r -> 0 3 abc
        read s 10 -> 109
        """,
    ),
    History(
        "one client ends all pending connects",
        f"{NPFS}: statesup.c",
        """
        create s -> 0
        connect s as k -> 997
        connect s as l -> 997
        open c -> 0
        wait k -> 0 0
        wait l -> 0 0
        """,
    ),
    History(
        "a listening instance can't be read, written or peeked",
        f"{NT}: test_pipe_state",
        """
        create s -> 0
        read s 10 as r -> 536
        internal r -> 0x103 0
        write s abc as w -> 536
        internal w -> 0x103 0
        peek s -> 230
        flush s -> 0
        """,
    ),
    History(
        "an instance whose client has gone",
        f"{NT}: test_pipe_state",
        """
        pair s c -> 0
        close c -> 0
        read s 10 -> 109
        write s abc -> 232
        write s nothing -> 232
        peek s -> 109
        flush s -> 0
        disconnect s -> 0
        """,
    ),
    History(
        "a disconnected instance",
        f"{NT}: test_pipe_state",
        """
        pair s c -> 0
        disconnect s -> 0
        read s 10 -> 233
        write s abc -> 233
        peek s -> 230
        flush s -> 0
        disconnect s -> 233
        connect s -> 997
        open d -> 0
        wait s.connect -> 0 0
        """,
    ),
    History(
        "a client that was disconnected",
        f"{NT}: test_pipe_state",
        """
        pair s c -> 0
        disconnect s -> 0
        read c 10 -> 233
        write c abc -> 233
        peek c -> 233
        flush c -> 233
        close c -> 0
        """,
    ),
    History(
        "a client that was disconnected stays so when the instance has another",
        f"{NT}: test_pipe_state",
        """
        pair s c quota=10 -> 0
        disconnect s -> 0
        connect s -> 997
        open d -> 0
        read c 10 -> 233
        write c abc -> 233
        write d abc -> 0
        close c -> 0
        read s 10 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    History(
        "a client can't connect or disconnect",
        f"{NT}: test_create; {NPFS}: fsctrl.c",
        """
        pair s c -> 0
        connect c -> 1
        disconnect c -> 1 | wine: 50
        """,
    ),
    History(
        "disconnect of a listening instance",
        f"{NPFS}: statesup.c",
        """
        create s -> 0
        disconnect s -> 0 | wine: 536
        open c -> 231 | wine: 0
        """,
    ),
    History(
        "disconnect ends a pending connect",
        f"{NPFS}: statesup.c",
        """
        create s -> 0
        connect s as k -> 997
        disconnect s -> 0 | wine: 536
        wait k 100 -> 233 0 | wine: 258
        """,
    ),
    History(
        "close ends a pending connect",
        f"{NPFS}: statesup.c; that the event is set: {K32}: test_wait_pipe",
        """
        create s -> 0
        connect s as k -> 997
        close s -> 0
        signaled k -> yes
        """,
    ),
    History(
        "the name is free once the server's handle is closed",
        f"{NT}: test_pipe_local_info",
        """
        pair s c limit=1 -> 0
        close s -> 0
        open d -> 2
        create t limit=1 -> 0
        open d -> 0
        """,
    ),
    # Opening and creating.
    History(
        "no such pipe",
        f"{K32}: test_CreateNamedPipe",
        """
        open c -> 2
        """,
    ),
    History(
        "no instance that listens",
        f"{K32}: test_CreateNamedPipe",
        """
        pair s c -> 0
        open d -> 231
        close c -> 0
        open d -> 231
        disconnect s -> 0
        open d -> 231
        """,
    ),
    History(
        "the instance that has listened longest gets the client",
        f"{K32}: test_multiple_instances",
        """
        create s quota=9 -> 0
        create t quota=9 -> 0
        connect t -> 997
        open c -> 0
        connect s -> 535
        result t.connect -> 996
        open d -> 0
        wait t.connect -> 0 0
        """,
    ),
    History(
        "an instance that is connected again goes to the end of the line",
        f"{K32}: test_multiple_instances",
        """
        create s -> 0
        create t -> 0
        open c -> 0
        disconnect s -> 0
        connect s -> 997
        open d -> 0
        connect t -> 535
        result s.connect -> 996
        """,
    ),
    History(
        "access that the direction excludes",
        f"{NT}: test_create",
        """
        create s in -> 0
        open c r -> 5
        open c -> 5
        open c w -> 0
        """,
    ),
    History(
        "access that the other direction excludes",
        f"{NT}: test_create",
        """
        create s out -> 0
        open c w -> 5
        open c r -> 0
        """,
    ),
    History(
        "a client without any access takes the instance",
        f"{K32}: test_CreateNamedPipe",
        """
        create s -> 0
        open c none -> 0
        open d -> 231
        connect s -> 535
        """,
    ),
    History(
        "a client may only do what it opened for",
        f"{DOCS}: CreateFile",
        """
        create s quota=10 -> 0
        open c r -> 0
        write c abc -> 5
        write s abc -> 0
        read c 10 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    History(
        "a further instance may differ in type and sizes",
        f"{K32}: test_CreateNamedPipe_instances_must_match",
        """
        create s -> 0
        create t byte quota=100 timeout=5 limit=7 -> 0
        """,
    ),
    History(
        "a further instance must have the same direction",
        f"{K32}: test_CreateNamedPipe_instances_must_match",
        """
        create s -> 0
        create t in -> 5
        create t out -> 5
        """,
    ),
    History(
        "more instances than the first allows",
        f"{K32}: test_CreateNamedPipe_instances_must_match",
        """
        create s limit=1 -> 0
        create t limit=2 -> 231
        close s -> 0
        create t limit=2 -> 0
        create u limit=2 -> 0
        create v limit=2 -> 231
        """,
    ),
    History(
        "a closing or disconnected instance counts",
        f"{K32}, {NT}",
        """
        pair s c limit=1 -> 0
        close c -> 0
        create t -> 231
        disconnect s -> 0
        create t -> 231
        close s -> 0
        create t -> 0
        """,
    ),
    History(
        "the first instance must be the first",
        f"{NT}: test_create_invalid; {DOCS}: CreateNamedPipe",
        """
        create s first -> 0
        create t first -> 5 | wine: 0
        create u -> 0
        """,
    ),
    History(
        "the first instance where the limit is reached",
        f"{NT}: test_pipe_local_info; {NPFS}: create.c",
        """
        create s first limit=1 -> 0
        create t first limit=1 -> 231
        """,
    ),
    History(
        "how many instances may be asked for",
        f"{DOCS}: CreateNamedPipe",
        """
        create s limit=0 -> 87 | wine: 0
        create t limit=256 path=\\\\.\\pipe\\%-two -> 87 | wine: 0
        create u limit=254 path=\\\\.\\pipe\\%-three -> 0
        """,
    ),
    History(
        "messages can't be read from bytes",
        f"{K32}: test_CreateNamedPipe",
        """
        create s byte message-reads -> 87
        """,
    ),
    History(
        "no name at all",
        f"{K32}: test_CreateNamedPipe",
        """
        create s path= -> 3
        create s path=nothing -> 123
        """,
    ),
    # What an end's closing does.
    History(
        "what was written before closing can be read",
        f"{K32}: test_CloseHandle",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        write s nothing -> 0
        close s -> 0
        read c 3 as r -> 0
        result r -> 0 3 abc
        read c 10 as r -> 0
        result r -> 0 0
        read c 10 -> 109
        read c 10 -> 109
        """,
    ),
    History(
        "two messages before closing",
        f"{K32}: test_CloseHandle",
        """
        pair s c quota=100 -> 0
        write c abc -> 0
        write c defg -> 0
        close c -> 0
        peek s -> 0 7 3
        read s 2 as r -> 0
        result r -> 0 2 ab
        read s 100 as r -> 0
        result r -> 0 5 cdefg
        read s 1 -> 109
        """,
    ),
    History(
        "closing ends the other end's pending write",
        f"{K32}: test_overlapped_transport",
        """
        pair s c -> 0
        write s abc as w -> 997
        close c -> 0
        wait w -> 109 0
        """,
    ),
    History(
        "closing ends a pending write that was read in part",
        f"{K32}: test_overlapped_transport",
        """
        pair s c -> 0
        write s abcdef as w -> 997
        read c 2 as r -> 0
        result r -> 0 2 ab
        result w -> 996
        close c -> 0
        wait w -> 109 0
        """,
    ),
    History(
        "closing ends the other end's pending read",
        f"{NT}: read_pipe_test",
        """
        pair s c -> 0
        read s 10 as r -> 997
        close c -> 0
        wait r -> 109 0
        internal r -> 0xc000014b 0
        """,
    ),
    History(
        "closing ends the other end's flush",
        f"{K32}: test_overlapped_transport",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        start f flush s -> 0
        asleep f -> yes
        close c -> 0
        join f -> 109
        """,
    ),
    History(
        "closing ends one's own pending read",
        f"{NTF}: test_iocp_fileio",
        """
        pair s c -> 0
        read c 10 as r -> 997
        close c -> 0
        signaled r -> yes
        internal r -> 0xc000014b 0
        """,
    ),
    History(
        "a pending write outlives its handle",
        f"{NPFS}: statesup.c (not sure)",
        """
        pair s c -> 0
        write c abc as w -> 997
        close c -> 0
        read s 10 as r -> 0 | wine: 109
        internal w -> 0x0 3 | wine: 0xc000014b 0
        read s 10 -> 109
        """,
    ),
    History(
        "what the closing end hasn't read is dropped",
        f"{NPFS}: statesup.c",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        close c -> 0
        flush s -> 0
        read s 10 -> 109
        """,
    ),
    History(
        "disconnect drops data and ends reads",
        f"{K32}: test_overlapped_transport, test_DisconnectNamedPipe",
        """
        pair s c quota=100 -> 0
        read s 10 as r -> 997
        write s abc -> 0
        disconnect s -> 0
        wait r -> 233 0
        read c 10 -> 233
        """,
    ),
    History(
        "disconnect ends the pending writes of both ends",
        f"{K32}: test_overlapped_transport",
        """
        pair s c -> 0
        write s abc as w -> 997
        write c def as x -> 997
        disconnect s -> 0
        wait w -> 233 0
        wait x -> 233 0
        """,
    ),
    History(
        "disconnect ends the client's pending read",
        f"{K32}: test_overlapped_transport",
        """
        pair s c -> 0
        read c 10 as r -> 997
        disconnect s -> 0
        wait r -> 233 0
        """,
    ),
    History(
        "disconnect ends a flush",
        f"{K32}: test_overlapped_transport",
        """
        pair s c quota=100 -> 0
        write c abc -> 0
        start f flush c -> 0
        asleep f -> yes
        disconnect s -> 0
        join f -> 233
        """,
    ),
    # Reads.
    History(
        "a byte read takes many messages",
        f"{K32}: test_CreateNamedPipe, test_blocking_rw",
        """
        pair s c quota=100 -> 0
        write s ab -> 0
        write s cd -> 0
        write s ef -> 0
        read c 5 as r -> 0
        result r -> 0 5 abcde
        read c 5 as r -> 0
        result r -> 0 1 f
        """,
    ),
    History(
        "a message read takes one message",
        f"{K32}: test_CreateNamedPipe",
        """
        pair s c message-reads quota=100 -> 0
        write c ab -> 0
        write c cd -> 0
        read s 10 as r -> 0
        result r -> 0 2 ab
        read s 10 as r -> 0
        result r -> 0 2 cd
        """,
    ),
    History(
        "a message that is too long",
        f"{K32}: test_CreateNamedPipe, overlapped_read_sync",
        """
        pair s c message-reads quota=100 -> 0
        write c abcdef -> 0
        read s 4 as r -> 234
        internal r -> 0x80000005 4
        signaled r -> yes
        result r -> 234 4 abcd
        read s 4 as r -> 0
        result r -> 0 2 ef
        """,
    ),
    History(
        "the direct count of a message that is too long is 0",
        f"{K32}: test_ReadFile, overlapped_read_sync",
        """
        pair s c message-reads quota=100 -> 0
        write c abcdef -> 0
        readcount s 4 as r -> 234 0
        result r -> 234 4 abcd
        readcount s 4 as r -> 0 2
        """,
    ),
    History(
        "pending reads are served in order",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=100 -> 0
        read c 2 as r -> 997
        read c 5 as q -> 997
        write s abcde as w -> 0
        wait r -> 0 2 ab
        wait q -> 0 3 cde
        """,
    ),
    History(
        "a message fills pending reads one after the other",
        f"{K32}: test_blocking_rw",
        """
        pair s c message-reads -> 0
        read s 2 as r -> 997
        read s 5 as q -> 997
        write c abcde as w -> 0
        wait r -> 234 2 ab
        wait q -> 0 3 cde
        """,
    ),
    History(
        "a pending read gets less than it asked for",
        f"{NT}: read_pipe_test",
        """
        pair s c -> 0
        read c 100 as r -> 997
        write s a as w -> 0
        wait r -> 0 1 a
        """,
    ),
    History(
        "a pending read writes nothing before it ends",
        f"{K32}: test_ReadFile",
        """
        pair s c -> 0
        read c 9 as r -> 997
        internal r -> 0x103 0
        signaled r -> no
        write s abc -> 0
        internal r -> 0x0 3
        signaled r -> yes
        """,
    ),
    History(
        "a read of no bytes waits for data and takes none",
        f"{K32}: test_readfileex_pending, test_blocking_rw",
        """
        pair s c quota=100 -> 0
        read c 0 as r -> 997
        write s abc as w -> 0
        wait r -> 0 0
        read c 9 as q -> 0
        result q -> 0 3 abc
        """,
    ),
    History(
        "a message read of no bytes waits for data and takes none",
        f"{K32}: test_blocking_rw",
        """
        pair s c message-reads quota=100 -> 0
        read s 0 as r -> 997
        write c abc as w -> 0
        wait r -> 234 0
        read s 9 as q -> 0
        result q -> 0 3 abc
        """,
    ),
    History(
        "a read of no bytes where data is",
        f"{K32}: test_CloseHandle",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        read c 0 as r -> 0
        result r -> 0 0
        read c 9 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    History(
        "a message read of no bytes where data is",
        f"{K32}: test_CloseHandle",
        """
        pair s c message-reads quota=100 -> 0
        write c abc -> 0
        read s 0 as r -> 234
        result r -> 234 0
        read s 9 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    History(
        "a read of no bytes takes a zero-length message",
        "CPython, multiprocessing/connection.py: wait",
        """
        pair s c message-reads quota=100 -> 0
        write c nothing -> 0
        write c abc -> 0
        read s 0 as r -> 0
        result r -> 0 0
        read s 9 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    History(
        "a read of no bytes where nothing will come",
        f"{K32}: test_CloseHandle",
        """
        pair s c -> 0
        close s -> 0
        read c 0 -> 109
        """,
    ),
    History(
        "a zero-length message alone",
        f"{K32}: test_blocking_rw, test_CloseHandle",
        """
        pair s c quota=100 -> 0
        write s nothing -> 0
        peek c -> 0 0 0
        read c 9 as r -> 0
        result r -> 0 0
        read c 9 as r -> 997
        """,
    ),
    History(
        "a zero-length message after one that is used up",
        f"{K32}: test_CloseHandle",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        write s nothing -> 0
        read c 3 as r -> 0
        result r -> 0 3 abc
        read c 3 as r -> 0
        result r -> 0 0
        """,
    ),
    History(
        "a zero-length message meets a pending read",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        read c 9 as r -> 997
        read c 9 as q -> 997
        write s nothing as w -> 0
        wait r -> 0 0
        result q -> 996
        """,
    ),
    History(
        "a zero-length message meets a pending read of no bytes",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        read c 0 as r -> 997
        read c 9 as q -> 997
        write s nothing as w -> 0
        wait r -> 0 0
        result q -> 996
        """,
    ),
    History(
        "a byte reader with room to spare swallows a zero-length message",
        f"{NPFS}: readsup.c; {WINIO}: commit 7c7d6b4 (CloseWrite flushes first)",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        write s nothing -> 0
        read c 9 as r -> 0
        result r -> 0 3 abc
        read c 9 as r -> 997 | wine: 0
        """,
    ),
    History(
        "a zero-length message behind a pending write is swallowed too",
        f"{NPFS}: readsup.c; {WINIO}: commit 7c7d6b4",
        """
        pair s c -> 0
        write s abc as w -> 997
        write s nothing -> 0
        read c 9 as r -> 0
        result r -> 0 3 abc
        wait w -> 0 3
        read c 9 as r -> 997 | wine: 0
        """,
    ),
    History(
        "a zero-length message after a write that was read arrives",
        f"{WINIO}: commit 7c7d6b4; {K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s abc as w -> 997
        read c 9 as r -> 0
        wait w -> 0 3
        write s nothing -> 0
        read c 9 as r -> 0
        result r -> 0 0
        """,
    ),
    History(
        "a zero-length message after a flush arrives",
        f"{WINIO}: pipe_test.go, TestFullDuplex and CloseWrite",
        """
        pair s c quota=100 -> 0
        write s abc -> 0
        start f flush s -> 0
        read c 9 as r -> 0
        join f -> 0
        write s nothing -> 0
        read c 9 as r -> 0
        result r -> 0 0
        """,
    ),
    History(
        "a byte reader loses a zero-length message before data",
        f"{NPFS}: readsup.c",
        """
        pair s c quota=100 -> 0
        write s nothing -> 0
        write s abc -> 0
        read c 9 as r -> 0
        result r -> 0 3 abc
        read c 9 as r -> 997
        """,
    ),
    History(
        "a message reader gets each zero-length message",
        f"{K32}: test_blocking_rw",
        """
        pair s c message-reads quota=100 -> 0
        write c ab -> 0
        write c nothing -> 0
        write c nothing -> 0
        write c cd -> 0
        read s 9 as r -> 0
        result r -> 0 2 ab
        read s 9 as r -> 0
        result r -> 0 0
        read s 9 as r -> 0
        result r -> 0 0
        read s 9 as r -> 0
        result r -> 0 2 cd
        """,
    ),
    History(
        "a zero-length write on a byte pipe does nothing",
        f"{K32}: test_blocking_rw",
        """
        pair s c byte quota=100 -> 0
        read c 9 as r -> 997
        write s nothing as w -> 0
        result r -> 996
        write s a -> 0
        wait r -> 0 1 a
        """,
    ),
    # Writes and quotas.
    History(
        "quota 0: a write waits until all of it is read",
        f"{NPFS}: writesup.c",
        """
        pair s c -> 0
        write s abcd as w -> 997
        peek c -> 0 4 4
        read c 3 as r -> 0
        result r -> 0 3 abc
        result w -> 996
        read c 3 as r -> 0
        wait w -> 0 4
        """,
    ),
    History(
        "quota 0: a pending read takes all",
        f"{NPFS}: writesup.c",
        """
        pair s c -> 0
        read c 9 as r -> 997
        write s abcd as w -> 0
        result w -> 0 4
        wait r -> 0 4 abcd
        """,
    ),
    History(
        "quota 0: a pending read takes a part",
        f"{NPFS}: writesup.c",
        """
        pair s c -> 0
        read c 2 as r -> 997
        write s abcd as w -> 997
        wait r -> 0 2 ab
        result w -> 996
        read c 2 as r -> 0
        result r -> 0 2 cd
        wait w -> 0 4
        """,
    ),
    History(
        "a write that fits in the quota",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=4 -> 0
        write s abc as w -> 0
        result w -> 0 3
        write s d as w -> 0
        write s e as w -> 997
        read c 1 as r -> 0
        wait w -> 0 1
        """,
    ),
    History(
        "the quota is exact",
        f"{K32}: test_blocking_rw, test_nowait",
        """
        pair s c quota=4096 -> 0
        write s 4096*a as w -> 0
        write s b as x -> 997
        read c 1 as r -> 0
        wait x -> 0 1
        """,
    ),
    History(
        "an odd quota isn't rounded",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=5000 -> 0
        write s 5000*a as w -> 0
        write s b as x -> 997
        """,
    ),
    History(
        "each direction has a quota of its own",
        f"{DOCS}: CreateNamedPipe",
        """
        pair s c out=3 in=1 -> 0
        write s abc as w -> 0
        write c a as x -> 0
        write c b as x -> 997
        write s d as w -> 997
        """,
    ),
    History(
        "a write larger than the quota",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=4 -> 0
        write s abcdef as w -> 997
        read c 1 as r -> 0
        result w -> 996
        read c 1 as r -> 0
        wait w -> 0 6
        peek c -> 0 4 4
        """,
    ),
    History(
        "a second write waits behind the first",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=4 -> 0
        write s abcdef as w -> 997
        write s g as x -> 997
        peek c -> 0 7 6
        read c 2 as r -> 0
        wait w -> 0 6
        result x -> 996
        read c 1 as r -> 0
        wait x -> 0 1
        """,
    ),
    History(
        "a zero-length write never waits",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s abc as w -> 997
        write s nothing as x -> 0
        result x -> 0 0
        """,
    ),
    History(
        "a write that is cancelled takes its unread rest away",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s abcd as w -> 997
        read c 1 as r -> 0
        result r -> 0 1 a
        cancel s w -> 0
        wait w -> 995 0
        peek c -> 0 0 0
        read c 9 as r -> 997
        """,
    ),
    History(
        "the writes behind a cancelled one move up",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=2 -> 0
        write s abcd as w -> 997
        write s ef as x -> 997
        cancel s w -> 0
        wait w -> 995 0
        wait x -> 0 2
        read c 9 as r -> 0
        result r -> 0 2 ef
        """,
    ),
    History(
        "a message reader takes a part of a pending write",
        f"{K32}: test_blocking_rw",
        """
        pair s c message-reads -> 0
        write c abcd as w -> 997
        read s 3 as r -> 234
        result w -> 996
        read s 3 as r -> 0
        result r -> 0 1 d
        wait w -> 0 4
        """,
    ),
    History(
        "a write when the other end has closed",
        f"{K32}: test_CloseHandle, serverThreadMain4",
        """
        pair s c quota=100 -> 0
        close s -> 0
        write c abc as w -> 232
        internal w -> 0x103 0
        write c nothing -> 232
        """,
    ),
    # Overlapped operations.
    History(
        "a new handle is signaled, until something starts",
        f"{K32}: test_ReadFile; {NT}: read_pipe_test",
        """
        pair s c -> 0
        signaled c -> yes
        read c 9 without-event as r -> 997
        signaled c -> no
        write s a -> 0
        signaled c -> yes
        """,
    ),
    History(
        "an operation with an event resets the handle and leaves it",
        f"{NT}: test_completion",
        """
        pair s c -> 0
        read c 9 as r -> 997
        signaled c -> no
        write s a -> 0
        signaled r -> yes
        signaled c -> no
        """,
    ),
    History(
        "success at once fills in everything",
        f"{K32}: overlapped_read_sync",
        """
        pair s c quota=9 -> 0
        write s abc as w -> 0
        internal w -> 0x0 3
        signaled w -> yes
        readcount c 9 as r -> 0 3
        internal r -> 0x0 3
        signaled r -> yes
        result r -> 0 3 abc
        """,
    ),
    History(
        "failure at once leaves Internal pending for ever",
        f"{K32}: test_ReadFile, test_overlapped_error; {NT}: read_pipe_test",
        """
        pair s c -> 0
        close s -> 0
        read c 9 as r -> 109
        internal r -> 0x103 0
        signaled r -> no
        result r -> 996
        wait r 50 -> 258
        cancel c r -> 1168
        """,
    ),
    History(
        "the result of a pending operation",
        f"{K32}: serverThreadMain3",
        """
        pair s c -> 0
        read c 9 as r -> 997
        oldresult r -> 996 77
        wait r 50 -> 258
        write s ab -> 0
        oldresult r -> 0 2
        """,
    ),
    History(
        "the result of a failed operation has a count of 0",
        f"{K32}: test_overlapped_failure",
        """
        pair s c -> 0
        read c 9 as r -> 997
        close s -> 0
        oldresult r -> 109 0
        """,
    ),
    History(
        "an OVERLAPPED is used again, its event still set",
        f"{NT}: read_pipe_test",
        """
        pair s c quota=9 -> 0
        read c 9 as r -> 997
        write s ab -> 0
        wait r -> 0 2 ab
        read c 9 as r -> 997
        signaled r -> no
        """,
    ),
    History(
        "no OVERLAPPED on an overlapped handle: it waits",
        f"{K32}: test_overlapped",
        """
        pair s c quota=9 -> 0
        start t syncread c 9 -> 0
        asleep t -> yes
        write s ab -> 0
        join t -> 0 2 ab
        syncwrite c ab -> 0 2
        """,
    ),
    History(
        "a synchronous handle waits",
        f"{K32}: test_blocking_rw",
        """
        create s sync -> 0
        start t syncconnect s -> 0
        asleep t -> yes
        open c -> 0
        join t -> 0
        start t syncread s 9 -> 0
        asleep t -> yes
        write c ab -> 0
        join t -> 0 2 ab
        """,
    ),
    History(
        "a synchronous write waits until it is read",
        f"{K32}: test_blocking_rw",
        """
        create s -> 0
        open c sync -> 0
        start t syncwrite c abc -> 0
        asleep t -> yes
        read s 9 as r -> 0
        join t -> 0 3
        """,
    ),
    # Cancelling.
    History(
        "cancel of a pending read",
        f"{K32}: cancel_overlapped; {NT}: test_cancelio",
        """
        pair s c -> 0
        read c 9 as r -> 997
        cancel c r -> 0
        internal r -> 0xc0000120 0
        wait r -> 995 0
        signaled r -> yes
        """,
    ),
    History(
        "cancel of what isn't pending",
        f"{K32}: test_blocking_rw; {DOCS}: CancelIoEx",
        """
        pair s c quota=9 -> 0
        read c 9 as r -> 997
        write s a -> 0
        cancel c r -> 1168
        wait r -> 0 1 a
        """,
    ),
    History(
        "cancel twice",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s abc as w -> 997
        cancel s w -> 0
        cancel s w -> 1168
        """,
    ),
    History(
        "cancel everything where nothing is pending",
        f"{DOCS}: CancelIoEx",
        """
        pair s c -> 0
        cancel c all -> 1168 | wine: 0
        """,
    ),
    History(
        "cancel everything",
        f"{NT}: read_pipe_test",
        """
        pair s c -> 0
        read c 9 as r -> 997
        read c 9 as q -> 997
        write c abc as w -> 997
        cancel c all -> 0
        wait r -> 995 0
        wait q -> 995 0
        wait w -> 995 0
        """,
    ),
    History(
        "cancel one of two reads",
        f"{NT}: test_cancelio",
        """
        pair s c -> 0
        read c 9 as r -> 997
        read c 9 as q -> 997
        cancel c r -> 0
        write s abc -> 0
        wait r -> 995 0
        wait q -> 0 3 abc
        """,
    ),
    History(
        "cancel ends both operations of an OVERLAPPED",
        f"{NT}: read_pipe_test",
        """
        pair s c -> 0
        read c 9 as r -> 997
        read c 9 again as r -> 997
        cancel c r -> 0
        write s abc as w -> 997
        """,
    ),
    History(
        "a cancelled connect leaves the instance listening",
        f"{K32}: test_overlapped; {NT}: test_cancelio",
        """
        create s -> 0
        connect s as k -> 997
        cancel s k -> 0
        wait k -> 995 0
        open c -> 0
        connect s -> 535
        """,
    ),
    History(
        "cancel ends a flush in another thread",
        f"{NPFS} (it has a cancel routine); {DOCS}: CancelIoEx",
        """
        pair s c quota=9 -> 0
        write s abc -> 0
        start f flush s -> 0
        asleep f -> yes
        cancel s all -> 0
        join f -> 995
        read c 9 as r -> 0
        result r -> 0 3 abc
        """,
    ),
    # Completion ports.
    History(
        "success at once gives a packet",
        f"{K32}: serverThreadMain4; {NT}: test_completion; {NTF}: test_iocp_fileio",
        """
        pair s c quota=9 -> 0
        port p -> 0
        attach c p 11 -> 0
        write c abc as w -> 0
        packet p -> 0 3 11 w
        write s de -> 0
        read c 9 as r -> 0
        packet p -> 0 2 11 r
        packet p -> 258
        """,
    ),
    History(
        "a message too long gives a packet",
        f"{NPFS} and the I/O manager: warnings complete",
        """
        pair s c message-reads quota=9 -> 0
        port p -> 0
        attach s p -> 0
        write c abcd -> 0
        read s 3 as r -> 234
        packet p -> 234 3 7 r
        """,
    ),
    History(
        "a pending read gives a packet when it ends",
        f"{NTF}: test_iocp_fileio; {NT}: test_completion",
        """
        pair s c -> 0
        port p -> 0
        attach c p -> 0
        read c 9 as r -> 997
        packet p -> 258
        write s abc -> 0
        packet p -> 0 3 7 r
        """,
    ),
    History(
        "a pending read that gets too long a message",
        f"{NT}: test_completion",
        """
        pair s c message-reads -> 0
        port p -> 0
        attach s p -> 0
        read s 2 as r -> 997
        write c abc as w -> 997
        packet p -> 234 2 7 r
        """,
    ),
    History(
        "failure at once gives no packet",
        f"{K32}: serverThreadMain4",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        connect s -> 535
        packet p -> 258
        close c -> 0
        connect s -> 232
        read s 9 -> 109
        write s abc -> 232
        packet p -> 258
        """,
    ),
    History(
        "a connect gives a packet when a client opens",
        f"{K32}: serverThreadMain4",
        """
        create s -> 0
        port p -> 0
        attach s p -> 0
        connect s as k -> 997
        packet p -> 258
        open c -> 0
        packet p -> 0 0 7 k
        """,
    ),
    History(
        "failure at once of a listening instance gives no packet",
        f"{NT}: test_completion",
        """
        create s -> 0
        port p -> 0
        attach s p -> 0
        read s 9 -> 536
        packet p 20 -> 258
        """,
    ),
    History(
        "a cancelled operation gives a packet",
        f"{DOCS}: CancelIoEx; {K32}: test_exit_process_async",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 as r -> 997
        write s abc as w -> 997
        cancel s r -> 0
        cancel s w -> 0
        packet p -> 995 0 7 r
        packet p -> 995 0 7 w
        packet p -> 258
        """,
    ),
    History(
        "the other end's closing gives a packet",
        f"{NT}: test_completion",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 as r -> 997
        close c -> 0
        packet p -> 109 0 7 r
        """,
    ),
    History(
        "one's own disconnect gives packets",
        f"{NT}, {K32}: the status",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 as r -> 997
        write s abc as w -> 997
        disconnect s -> 0
        packet p -> 233 0 7 r
        packet p -> 233 0 7 w
        """,
    ),
    History(
        "one's own closing gives one packet for a read",
        f"{NTF}: test_iocp_fileio",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 as r -> 997
        close s -> 0
        packet p -> 109 0 7 r
        packet p -> 258
        """,
    ),
    History(
        "one's own closing gives a packet for a connect",
        f"{NPFS}: statesup.c",
        """
        create s -> 0
        port p -> 0
        attach s p -> 0
        connect s as k -> 997
        close s -> 0
        packet p -> 109 0 7 k | wine: 676 0 7 k
        """,
    ),
    History(
        "packets come in the order of the ends",
        f"{DOCS}: I/O completion ports",
        """
        pair s c quota=9 -> 0
        port p -> 0
        attach s p -> 0
        write s ab as w -> 0
        write s cd as x -> 0
        post p 5 6 -> 0
        packet p -> 0 2 7 w
        packet p -> 0 2 7 x
        packet p -> 0 5 6 none
        """,
    ),
    History(
        "a timeout leaves no operation",
        f"{K32}: serverThreadMain4",
        """
        port p -> 0
        packet p -> 258
        packet p 30 -> 258
        """,
    ),
    History(
        "a posted packet comes as it was given",
        f"{NTF}: test_iocp_setcompletion",
        """
        pair s c -> 0
        read s 9 as r -> 997
        port p -> 0
        post p 123 456 r -> 0
        packet p -> 0 123 456 r
        post p 0 0 -> 0
        packet p -> 0 0 0 none
        """,
    ),
    History(
        "a posted packet wakes a thread that waits",
        f"{DOCS}: PostQueuedCompletionStatus",
        """
        port p -> 0
        start t packet p 2000 -> 0
        asleep t -> yes
        post p 1 2 -> 0
        join t -> 0 1 2 none
        """,
    ),
    History(
        "an event and a packet",
        f"{DOCS}: GetQueuedCompletionStatus",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 as r -> 997
        write c abc -> 0
        signaled r -> yes
        packet p -> 0 3 7 r
        """,
    ),
    History(
        "the low bit of the event keeps the packet away",
        f"{DOCS}: GetQueuedCompletionStatus",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 port-silent as r -> 997
        write c abc -> 0
        signaled r -> yes
        packet p -> 258
        """,
    ),
    History(
        "without an event, too, a packet comes",
        f"{NT}: test_completion",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        read s 9 without-event as r -> 997
        write c abc -> 0
        packet p -> 0 3 7 r
        """,
    ),
    History(
        "a file belongs to one port for life",
        f"{NTF}: test_iocp_fileio",
        """
        pair s c -> 0
        port p -> 0
        port q -> 0
        attach s p -> 0
        attach s p -> 87
        attach s q -> 87
        """,
    ),
    History(
        "a synchronous file has no port",
        f"{NTF}: test_iocp_fileio",
        """
        create s sync -> 0
        port p -> 0
        attach s p -> 87
        """,
    ),
    History(
        "operations that were under way report to the port too",
        f"{DOCS}: CreateIoCompletionPort",
        """
        pair s c -> 0
        read s 9 as r -> 997
        port p -> 0
        attach s p -> 0
        write c abc -> 0
        packet p -> 0 3 7 r
        """,
    ),
    History(
        "two clients on a port",
        f"{K32}: serverThreadMain4",
        """
        pair s c -> 0
        pair t d -> 0
        port p -> 0
        attach s p 1 -> 0
        attach t p 2 -> 0
        read s 9 as r -> 997
        read t 9 as q -> 997
        write d ab -> 0
        write c abc -> 0
        packet p -> 0 2 2 q
        packet p -> 0 3 1 r
        """,
    ),
    History(
        "an operation ends with the thread that has started it",
        f"{DOCS}: ReadFile, WSASend (cancelled when the thread exits)",
        """
        pair s c -> 0
        start t read s 9 as r -> 0
        join t -> 997
        wait r -> 995 0
        """,
    ),
    History(
        "with a completion port it outlives that thread",
        f"{DOCS}: CancelIo, I/O completion ports",
        """
        pair s c -> 0
        port p -> 0
        attach s p -> 0
        start t read s 9 without-event as r -> 0
        join t -> 997
        packet p 50 -> 258
        write c abc -> 0
        packet p -> 0 3 7 r
        """,
    ),
    History(
        "a pending write outlives its handle, and its packet comes late",
        f"{NPFS}: statesup.c (not sure)",
        """
        pair s c -> 0
        port p -> 0
        attach c p -> 0
        write c abc as w -> 997
        close c -> 0
        packet p 20 -> 258 | wine: 109 0 7 w
        read s 9 as r -> 0 | wine: 109
        packet p 20 -> 0 3 7 w | wine: 258
        """,
    ),
    History(
        "a port is closed while a thread waits",
        f"{DOCS}: GetQueuedCompletionStatus (ERROR_ABANDONED_WAIT_0)",
        """
        port p -> 0
        start t packet p 300 -> 0
        asleep t -> yes
        close p -> 0
        join t -> 735 | wine: 258
        """,
    ),
    History(
        "a port that is closed",
        f"{DOCS}: GetQueuedCompletionStatus",
        """
        port p -> 0
        close p -> 0
        packet p -> 6
        post p 1 2 -> 6
        """,
    ),
    History(
        "a handle that is closed",
        f"{NT}: read_pipe_test (invalid handle)",
        """
        pair s c -> 0
        close c -> 0
        close c -> 6
        read c 9 as r -> 6
        write c abc -> 6
        cancel c all -> 6 | wine: 0
        flush c -> 6
        """,
    ),
    # WaitNamedPipe, FlushFileBuffers, PeekNamedPipe.
    History(
        "wait for an instance that listens",
        f"{K32}: test_wait_pipe",
        """
        create s -> 0
        waitpipe 1000 -> 0
        waitpipe 0 -> 0
        open c -> 0
        """,
    ),
    History(
        "wait for a pipe that isn't there",
        f"{K32}: test_wait_pipe; {DOCS}: WaitNamedPipe",
        """
        waitpipe 1000 -> 2
        waitpipe 4294967295 -> 2
        """,
    ),
    History(
        "wait for a busy pipe",
        f"{K32}: test_wait_pipe",
        """
        pair s c -> 0
        waitpipe 30 -> 121
        close c -> 0
        waitpipe 30 -> 121
        disconnect s -> 0
        waitpipe 30 -> 121
        connect s -> 997
        waitpipe 30 -> 0
        """,
    ),
    History(
        "wait as long as the pipe's default",
        f"{DOCS}: WaitNamedPipe, CreateNamedPipe",
        """
        pair s c timeout=200 -> 0
        start w waitpipe 0 -> 0
        asleep w -> yes
        join w -> 121
        """,
    ),
    History(
        "the default of a pipe's default",
        f"{DOCS}: CreateNamedPipe",
        """
        pair s c timeout=0 -> 0
        start w waitpipe 0 -> 0
        join w -> 121
        """,
    ),
    History(
        "a new instance wakes who waits",
        f"{K32}: test_wait_pipe",
        """
        pair s c -> 0
        start w waitpipe 2000 -> 0
        start v waitpipe 2000 -> 0
        asleep w -> yes
        create t -> 0
        join w -> 0
        join v -> 0
        """,
    ),
    History(
        "an instance that listens again wakes who waits",
        f"{K32}: test_wait_pipe; {NPFS}: waitsup.c",
        """
        pair s c -> 0
        start w waitpipe 2000 -> 0
        disconnect s -> 0
        asleep w -> yes
        connect s -> 997
        join w -> 0
        """,
    ),
    History(
        "the last instance goes while somebody waits",
        f"{NPFS}: strucsup.c (NpDeleteFcb)",
        """
        pair s c -> 0
        start w waitpipe 500 -> 0
        close s -> 0
        join w -> 2 | wine: 121
        """,
    ),
    History(
        "the last instance goes, its client first",
        f"{NPFS}: strucsup.c (NpDeleteFcb)",
        """
        pair s c -> 0
        start w waitpipe 500 -> 0
        close c -> 0
        asleep w -> yes
        close s -> 0
        join w -> 2 | wine: 676
        """,
    ),
    History(
        "wait with no limit",
        f"{DOCS}: WaitNamedPipe",
        """
        pair s c -> 0
        start w waitpipe 4294967295 -> 0
        asleep w -> yes
        create t -> 0
        join w -> 0
        """,
    ),
    History(
        "flush waits until all is read",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=9 -> 0
        write s ab -> 0
        write s cd -> 0
        start f flush s -> 0
        read c 3 as r -> 0
        asleep f -> yes
        read c 3 as r -> 0
        join f -> 0
        """,
    ),
    History(
        "flush waits for a pending write",
        f"{NT}: test_blocking",
        """
        pair s c -> 0
        write s abcd as w -> 997
        start f flush s -> 0
        asleep f -> yes
        read c 9 as r -> 0
        join f -> 0
        wait w -> 0 4
        """,
    ),
    History(
        "flush waits for a zero-length message",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s nothing -> 0
        start f flush s -> 0
        asleep f -> yes
        read c 9 as r -> 0
        join f -> 0
        """,
    ),
    History(
        "flush doesn't wait for what comes later",
        f"{NPFS}: flush.c (a flush has its place in the queue)",
        """
        pair s c quota=9 -> 0
        write s ab -> 0
        start f flush s -> 0
        write s cd -> 0
        read c 2 as r -> 0
        join f -> 0 | wine: asleep
        """,
    ),
    History(
        "nothing to flush",
        f"{K32}: test_blocking_rw",
        """
        pair s c quota=9 -> 0
        flush s -> 0
        flush c -> 0
        read s 9 as r -> 997
        flush s -> 0
        write c ab -> 0
        flush c -> 0
        """,
    ),
    History(
        "flush ends when the unread write is cancelled",
        f"{K32}: test_blocking_rw",
        """
        pair s c -> 0
        write s ab as w -> 997
        start f flush s -> 0
        asleep f -> yes
        cancel s w -> 0
        join f -> 0
        """,
    ),
    History(
        "peek tells of all messages",
        f"{K32}: test_CreateNamedPipe, test_peek_pipe",
        """
        pair s c quota=3 -> 0
        peek c -> 0 0 0
        write s ab -> 0
        write s cde as w -> 997
        peek c -> 0 5 2
        read c 1 as r -> 0
        peek c -> 0 4 1
        """,
    ),
    History(
        "peek on a byte pipe",
        f"{K32}: test_peek_pipe",
        """
        pair s c byte quota=9 -> 0
        write s ab -> 0
        write s cde -> 0
        peek c -> 0 5 0
        """,
    ),
    # Names.
    History(
        "the case of a name doesn't matter",
        f"{DOCS}: CreateNamedPipe; {K32}: test_CreateNamedPipe",
        r"""
        create s path=\\.\PiPe\%-Name -> 0
        open c path=\\.\pipe\%-nAME -> 0
        """,
    ),
    History(
        "Windows tidies a path below \\\\.\\",
        f"{DOCS}: file path formats",
        r"""
        create s path=\\.\pipe\%. -> 0
        create t path=//./pipe/%-two -> 0
        create u path=\\.\pipe\a\..\%-three -> 0
        open c path=\\.\pipe\% -> 0
        open d path=\\.\pipe\%-two. -> 0
        open e path=\\.\pipe\.\%-three -> 0
        """,
    ),
    History(
        "Windows takes a path below \\\\?\\ as it is",
        f"{DOCS}: file path formats",
        r"""
        create s path=\\?\pipe\%. -> 0
        open c path=\\?\pipe\% -> 2
        open c path=\\?\pipe\%. -> 0
        """,
    ),
    History(
        "out of the pipes' folder",
        f"{DOCS}: file path formats",
        r"""
        create s path=\\.\pipe\..\% -> 123
        """,
    ),
    History(
        "backslashes in a name",
        f"{NT}: test_empty_name, test_pipe_names",
        r"""
        create s path=\\.\pipe\%\a\b\c -> 0
        open c path=\\.\pipe\%\a\b\c -> 0
        """,
    ),
    History(
        "a name below a pipe's name",
        f"{NPFS}: create.c (prefix table)",
        r"""
        create s path=\\.\pipe\% -> 0
        create t path=\\.\pipe\%\b -> 123 | wine: 0
        open c path=\\.\pipe\%\c -> 123 | wine: 2
        """,
    ),
    History(
        "a name above a pipe's name",
        f"{NPFS}: create.c (prefix table)",
        r"""
        create s path=\\.\pipe\%\b -> 0
        create t path=\\.\pipe\% -> 0
        open c path=\\.\pipe\%\b -> 0
        open d path=\\.\pipe\% -> 0
        """,
    ),
    History(
        "odd characters in a name",
        f"{K32}: test_CreateNamedPipe; {NT}: test_pipe_names",
        r"""
        create s path=\\.\pipe\%<>*?|": -> 0
        open c path=\\.\pipe\%<>*?|": -> 0
        """.replace("%<", "%-<"),
    ),
    # Security.
    History(
        "a security descriptor's text",
        "Wine, advapi32/tests/security.c",
        """
        sddl D:(A;;GA;;;BA)(A;;GA;;;SY) -> 0
        sddl D:(A;;GA;;;BA) 2 -> 1305
        sddl garbage -> 87
        sddl D:(A;;QQ;;;BA) -> 1336
        sddl D:(A;;GA;;;QQ) -> 1336
        sddl empty -> 0
        sddl D: -> 0
        """,
    ),
    History(
        "a descriptor that grants nothing",
        f"{DOCS}: named pipe security and access rights",
        """
        create s sddl=D: -> 0
        open c -> 5 | wine: 0
        create t -> 5 | wine: 0
        """,
    ),
    History(
        "a descriptor that only lets read",
        f"{DOCS}: named pipe security and access rights",
        """
        create s sddl=D:(A;;GR;;;WD) -> 0
        open c -> 5 | wine: 0
        open d r -> 0 | wine: 231
        create t -> 5 | wine: 0
        """,
    ),
    History(
        "a further instance needs the right to create one",
        f"{DOCS}: named pipe security and access rights; {NPFS}: create.c",
        """
        create s sddl=D:(A;;0x3;;;WD) -> 0
        open c -> 0
        create t -> 5 | wine: 0
        """,
    ),
    History(
        "administrators may",
        f"{DOCS}: named pipe security and access rights",
        """
        create s sddl=D:(A;;GA;;;BA)(A;;GA;;;SY) reject-remote first -> 0
        create t -> 0
        open c -> 0
        open d -> 0
        """,
    ),
    # go-winio's own tests (pipe_test.go), as far as they are about the kernel.
    History(
        "TestDialListenerTimesOut: busy is busy",
        f"{WINIO}: pipe_test.go",
        """
        pair s c limit=1 -> 0
        open d -> 231
        open d -> 231
        """,
    ),
    History(
        "TestAbortedAccept: closing ends the accept",
        f"{WINIO}: pipe_test.go",
        """
        create s -> 0
        port p -> 0
        attach s p -> 0
        connect s as k -> 997
        cancel s k -> 0
        packet p -> 995 0 7 k
        close s -> 0
        open c -> 2
        """,
    ),
    History(
        "TestConnectRace: the client comes before the connect",
        f"{WINIO}: pipe_test.go",
        """
        create s -> 0
        port p -> 0
        attach s p -> 0
        open c -> 0
        connect s -> 535
        read s 9 as r -> 997
        write c ab -> 0
        packet p -> 0 2 7 r
        """,
    ),
    History(
        "TestEchoWithMessaging: messages, then end of file",
        f"{WINIO}: pipe_test.go",
        """
        pair s c message-reads quota=65536 -> 0
        write c abc -> 0
        write c de -> 0
        write c nothing -> 0
        read s 99 as r -> 0
        result r -> 0 3 abc
        read s 99 as r -> 0
        result r -> 0 2 de
        read s 99 as r -> 0
        result r -> 0 0
        """,
    ),
    History(
        "TestCloseReadRace, TestCloseAbortsListen: an end closes under a read",
        f"{WINIO}: pipe_test.go",
        """
        pair s c -> 0
        port p -> 0
        attach c p -> 0
        read c 9 as r -> 997
        cancel c r -> 0
        packet p -> 995 0 7 r
        close c -> 0
        read s 9 -> 109
        """,
    ),
    History(
        "TestMessageReadMode: a message in pieces",
        f"{WINIO}: pipe_test.go",
        """
        pair s c message-reads quota=65536 -> 0
        write c 20*a -> 0
        read s 8 as r -> 234
        result r -> 234 8 aaaaaaaa
        read s 8 as r -> 234
        read s 8 as r -> 0
        result r -> 0 4 aaaa
        """,
    ),
    History(
        "TestCloseWriteEOF: nothing but an end",
        f"{WINIO}: pipe_test.go",
        """
        pair s c quota=65536 -> 0
        write c nothing -> 0
        read s 9 as r -> 0
        result r -> 0 0
        """,
    ),
    History(
        "TestTimeoutPendingRead: the deadline comes, then data",
        f"{WINIO}: pipe_test.go",
        """
        pair s c -> 0
        read s 9 as r -> 997
        wait r 50 -> 258
        cancel s r -> 0
        wait r -> 995 0
        write c abc as w -> 997
        read s 9 as q -> 0
        result q -> 0 3 abc
        wait w -> 0 3
        """,
    ),
    History(
        "TestTimeoutPendingWrite: nobody reads",
        f"{WINIO}: pipe_test.go",
        """
        pair s c -> 0
        write s abc as w -> 997
        wait w 50 -> 258
        cancel s w -> 0
        wait w -> 995 0
        read c 9 as r -> 997
        """,
    ),
    History(
        "TestDisconnect: the server throws the client out",
        f"{WINIO}: pipe_test.go",
        """
        pair s c quota=9 -> 0
        write s abc -> 0
        disconnect s -> 0
        read c 9 -> 233
        """,
    ),
]


def real_api() -> Api:
    """Return Windows' own functions."""
    import threading
    import time

    api = Api()
    api.last_error = lambda: 0
    if sys.platform == "win32":
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
        functions = _Functions()
        for name, restype, argtypes in _PROTOTYPES:
            library = advapi32 if name.startswith("Convert") else kernel32
            function = getattr(library, name)
            function.restype = restype
            function.argtypes = argtypes
            setattr(functions, name, function)
        api.functions = functions
        api.last_error = ctypes.get_last_error

    def start(step: Callable[[], None]) -> None:
        threading.Thread(target=step, daemon=True).start()

    api.start = start
    api.sleep = time.sleep
    return api


class _Functions:
    """Holds the functions of several libraries under their names."""


_H = ctypes.c_void_p
_W = ctypes.c_wchar_p
_N = ctypes.POINTER(DWORD)
_O = ctypes.POINTER(OVERLAPPED)
_B = ctypes.c_int32
_PROTOTYPES: list[tuple[str, Any, list[Any]]] = [
    ("CreateNamedPipeW", _H, [_W, DWORD, DWORD, DWORD, DWORD, DWORD, DWORD, _H]),
    ("CreateFileW", _H, [_W, DWORD, DWORD, _H, DWORD, DWORD, _H]),
    ("CreateEventW", _H, [_H, _B, _B, _W]),
    ("CloseHandle", _B, [_H]),
    ("ConnectNamedPipe", _B, [_H, _O]),
    ("DisconnectNamedPipe", _B, [_H]),
    ("ReadFile", _B, [_H, _H, DWORD, _N, _O]),
    ("WriteFile", _B, [_H, _H, DWORD, _N, _O]),
    ("FlushFileBuffers", _B, [_H]),
    ("PeekNamedPipe", _B, [_H, _H, DWORD, _N, _N, _N]),
    ("WaitNamedPipeW", _B, [_W, DWORD]),
    ("WaitForSingleObject", DWORD, [_H, DWORD]),
    ("CancelIoEx", _B, [_H, _O]),
    ("GetOverlappedResult", _B, [_H, _O, _N, _B]),
    ("GetOverlappedResultEx", _B, [_H, _O, _N, DWORD, _B]),
    ("CreateIoCompletionPort", _H, [_H, _H, ctypes.c_size_t, DWORD]),
    ("GetQueuedCompletionStatus", _B, [_H, _N, ctypes.POINTER(ctypes.c_size_t), _H, DWORD]),
    ("PostQueuedCompletionStatus", _B, [_H, DWORD, ctypes.c_size_t, _O]),
    ("ConvertStringSecurityDescriptorToSecurityDescriptorW", _B, [_W, DWORD, _H, _H]),
    ("LocalFree", _H, [_H]),
]


def main() -> int:
    """Run the histories on the kernel that this Python runs on."""
    if "--differences" in sys.argv:
        print("\n".join(differences()))
        return 0
    api = real_api()
    wine = hasattr(ctypes.CDLL("ntdll"), "wine_get_version")
    wrong = compare(api, wine=wine)
    for line in wrong:
        print(line)
    print(f"{len(HISTORIES)} histories on {'Wine' if wine else 'Windows'}, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
