"""Measure vmshim side by side with what one would write instead: `python3 .ci/bench.py`.

Everything is measured in one run, interleaved, against one server process that is nobody's own
code: plain kernel32. Only the ratios mean anything elsewhere. It prints the README's table. On
Linux it fetches pywin32 and goes on under Wine.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
from ctypes import wintypes
from typing import Any, Callable, NamedTuple
from unittest import mock

import under_wine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import vmshim  # the one beside us, wherever we are started

PYWIN32 = "pywin32==311"
REQUEST = vmshim.VMRequest("c8d6f0", "unmount")
MESSAGE = REQUEST.to_json()


if sys.platform == "win32":
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    HANDLE, DWORD, LPVOID, LPDWORD = (
        wintypes.HANDLE,
        wintypes.DWORD,
        wintypes.LPVOID,
        wintypes.LPDWORD,
    )
    kernel32.CreateFileW.restype = HANDLE
    kernel32.CreateFileW.argtypes = (
        *(wintypes.LPCWSTR, DWORD, DWORD, LPVOID, DWORD, DWORD, HANDLE),
    )
    kernel32.CreateNamedPipeW.restype = HANDLE
    kernel32.CreateNamedPipeW.argtypes = (wintypes.LPCWSTR, *[DWORD] * 6, LPVOID)
    kernel32.ReadFile.argtypes = (HANDLE, LPVOID, DWORD, LPDWORD, LPVOID)
    kernel32.WriteFile.argtypes = (HANDLE, LPVOID, DWORD, LPDWORD, LPVOID)
    kernel32.ConnectNamedPipe.argtypes = (HANDLE, LPVOID)
    kernel32.FlushFileBuffers.argtypes = (HANDLE,)
    kernel32.CloseHandle.argtypes = (HANDLE,)


# ---- The server --------------------------------------------------------------------------------


def serve(path: str, instances: int, answer: bytes) -> None:
    """Answer each request as the reference does, on so many instances at once, until stdin ends."""

    def create_instance() -> int:
        pipe: int = kernel32.CreateNamedPipeW(path, 3, 4, 255, 4096, 4096, 0, None)
        return pipe

    def answer_clients() -> None:
        buffer, count = ctypes.create_string_buffer(4096), DWORD()
        while True:
            pipe = create_instance()
            kernel32.ConnectNamedPipe(pipe, None)
            if kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None):
                kernel32.WriteFile(pipe, answer, len(answer), ctypes.byref(count), None)
                kernel32.FlushFileBuffers(pipe)
                kernel32.WriteFile(pipe, b"", 0, ctypes.byref(count), None)
                while kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None):
                    pass
            kernel32.CloseHandle(pipe)

    # An instance whose client is gone holds the name: between two turns clients see busy.
    create_instance()
    vmshim.dial_pipe(path).close()
    for _ in range(instances):
        threading.Thread(target=answer_clients, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


class Server:
    """That server, in a process of its own."""

    def __init__(self, instances: int, error_length: int = 0) -> None:
        self.path = rf"\\.\pipe\vmshim-bench-{uuid.uuid4()}"
        self.process = run_aside("serve", self.path, str(instances), str(error_length))
        assert self.process.stdout
        self.process.stdout.readline()

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def run_aside(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )


# ---- The clients -------------------------------------------------------------------------------


def vmshim_client(path: str) -> None:
    vmshim.issue_vm_request(path, REQUEST)


def bare_client(path: str) -> None:
    """The least that can be done in ctypes: no deadline, no Ctrl-C, no busy pipe, no errors."""
    pipe = kernel32.CreateFileW(path, 0xC0000000, 0, None, 3, 0, None)
    count = DWORD()
    kernel32.WriteFile(pipe, MESSAGE, len(MESSAGE), ctypes.byref(count), None)
    buffer = ctypes.create_string_buffer(4096)
    response = b""
    while kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None) and count.value:
        response += buffer.raw[: count.value]
    kernel32.CloseHandle(pipe)
    assert response == b"\0OK\0", response


def open_client(path: str) -> None:
    with open(path, "r+b", buffering=0) as pipe:
        pipe.write(MESSAGE)
        response = b"".join(iter(lambda: pipe.read(4096), b""))
    assert response == b"\0OK\0", response


PYWIN32_CLIENT = r"""
import json
import sys

import pywintypes
import win32file


def issue(path, id, op):
    pipe = win32file.CreateFile(
        path,
        win32file.GENERIC_READ | win32file.GENERIC_WRITE,
        0,
        None,
        win32file.OPEN_EXISTING,
        0,
        None,
    )
    try:
        request = json.dumps({"ID": id, "Op": op}, separators=(",", ":")) + "\n"
        win32file.WriteFile(pipe, request.encode())
        response = b""
        while True:
            try:
                _, data = win32file.ReadFile(pipe, 4096)
            except pywintypes.error as error:
                if error.winerror == 109:
                    break
                raise
            if not data:
                break
            response += data
    finally:
        win32file.CloseHandle(pipe)
    if response != b"\0OK\0":
        raise RuntimeError(response)


if __name__ == "__main__":
    issue(sys.argv[1], "c8d6f0", "unmount")
"""

VMSHIM_SCRIPT = """
import sys
import vmshim

vmshim.issue_vm_request(sys.argv[1], vmshim.VMRequest("c8d6f0", "unmount"))
"""


# ---- Measuring ---------------------------------------------------------------------------------


class Spread:
    """The median of some measurements, and the quartiles around it."""

    def __init__(self, values: list[float]) -> None:
        self.low, self.median, self.high = statistics.quantiles(values, n=4)

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f}-{self.high:.2f})"


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, block: int
) -> dict[str, Spread]:
    """Time each call in blocks, in an order that changes every round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            started = time.perf_counter()
            for _ in range(block):
                calls[name]()
            taken[name].append((time.perf_counter() - started) * 1000 / block)
    return {name: Spread(values) for name, values in taken.items()}


def measure_requests(win32: list[str], rounds: int) -> dict[str, Spread]:
    sys.path[:0] = win32
    pywin32: dict[str, Any] = {"__name__": "pywin32_client"}
    exec(PYWIN32_CLIENT, pywin32)
    with Server(instances=4) as path:
        calls: dict[str, Callable[[], object]] = {
            "vmshim": lambda: vmshim_client(path),
            "bare ctypes": lambda: bare_client(path),
            "open()": lambda: open_client(path),
            "pywin32": lambda: pywin32["issue"](path, "c8d6f0", "unmount"),
        }
        return interleaved(calls, rounds, 25)


def measure_processes(folder: str, win32: list[str], rounds: int) -> dict[str, Spread]:
    """Time whole processes: cold starts with one request, and bare imports."""
    scripts = {"vmshim script": VMSHIM_SCRIPT, "pywin32 script": PYWIN32_CLIENT, "no script": ""}
    scripts["import vmshim"] = imported("vmshim")
    scripts["import baseline"] = imported("ctypes, json, uuid")
    shutil.copy(vmshim.__file__, folder)
    for name, code in scripts.items():
        with open(os.path.join(folder, name + ".py"), "w") as file:
            file.write(code)
    # All find their modules compiled, as on a second start, and look for them nowhere else.
    environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": ""}
    with_pywin32 = {**environment, "PYTHONPATH": ";".join(win32)}
    taken: dict[str, list[float]] = {name: [] for name in scripts}
    with Server(instances=4) as path:
        for turn in range(rounds + 1):
            for name in random.sample(list(scripts), len(scripts)):
                script = os.path.join(folder, name + ".py")
                started = time.perf_counter()
                output = subprocess.run(
                    [sys.executable, script, path],
                    env=with_pywin32 if name == "pywin32 script" else environment,
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
                seconds = float(output) if output else time.perf_counter() - started
                if turn:
                    taken[name].append(seconds * 1000)
    return {name: Spread(values) for name, values in taken.items()}


def imported(modules: str) -> str:
    return f"import time\nt = time.perf_counter()\nimport {modules}\nprint(time.perf_counter() - t)"


def busy_client(kind: str, path: str, seconds: str) -> None:
    """Send requests back to back for a while; print what came of it."""
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + float(seconds)
    done, busy, longest = 0, 0, 0.0
    while time.monotonic() < end:
        started = time.monotonic()
        try:
            (sleeping_client if kind == "sleeper" else vmshim_client)(path)
            done += 1
        except vmshim.PipeBusyError:
            busy += 1
        longest = max(longest, time.monotonic() - started)
    print(json.dumps([done, busy, longest]))


def sleeping_client(path: str) -> None:
    """As vmshim, but with the reference's way to wait: 10 ms of sleep between two tries."""
    deadline = time.monotonic() + 2
    while True:
        try:
            return vmshim.issue_vm_request(path, REQUEST, connect_timeout=0)
        except vmshim.PipeBusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class Busy(NamedTuple):
    """What clients that hurry got out of a server with one instance."""

    rate: float
    """Requests a second, of all clients together."""
    least: float
    """What the unluckiest client got, beside their mean."""
    longest: float
    """The longest request, in seconds."""
    gave_up: int
    """How often a client met PipeBusyError."""

    def __str__(self) -> str:
        return (
            f"{self.rate:.0f}/s; least client {self.least:.0%}, longest wait {self.longest:.2f} s, "
            f"{self.gave_up} gave up"
        )


def measure_busy(kind: str, clients: int, seconds: float) -> Busy:
    with Server(instances=1) as path:
        processes = [run_aside("busy-client", kind, path, str(seconds)) for _ in range(clients)]
        for process in processes:
            assert process.stdout
            process.stdout.readline()
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        outcomes = [json.loads(process.communicate()[0]) for process in processes]
    done, gave_up, longest = zip(*outcomes)
    return Busy(sum(done) / seconds, min(done) / statistics.mean(done), max(longest), sum(gave_up))


def measure_memory() -> int:
    """Return the most bytes that Python holds while an error of 1 MiB arrives."""
    with Server(instances=1, error_length=1 << 20) as path:
        for _ in range(2):
            tracemalloc.start()
            try:
                vmshim.issue_vm_request(path, REQUEST)
            except vmshim.ShimError:
                peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    return peak


def count_calls() -> dict[str, int]:
    """Return how often a request calls each Win32 function."""
    counts: collections.Counter[str] = collections.Counter()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            counts[name] += 1
            return getattr(real, name)

    real = vmshim._kernel32
    with Server(instances=4) as path, mock.patch.object(vmshim, "_kernel32", Counting()):
        vmshim_client(path)
    return dict(counts)


def main(pywin32: str, rounds: int) -> None:
    # As pywin32's own .pth file has it.
    win32 = [pywin32, os.path.join(pywin32, "win32"), os.path.join(pywin32, "win32", "lib")]
    with tempfile.TemporaryDirectory() as folder:
        processes = measure_processes(folder, win32, rounds)
    requests = measure_requests(win32, rounds * 10)
    busy: dict[tuple[str, int], list[Busy]] = collections.defaultdict(list)
    for _ in range(3):
        for clients in 1, 4, 16:
            for kind in "vmshim", "sleeper":
                busy[kind, clients].append(measure_busy(kind, clients, 2.0))

    print("| measured | vmshim | beside it | ratio |")
    print("| --- | --- | --- | --- |")
    ours = requests["vmshim"]
    for name in "bare ctypes", "open()", "pywin32":
        row(f"a request, beside {name}", ours, requests[name], ours.median / requests[name].median)
    for what, mine, other in (
        ("a script with one request, beside pywin32", "vmshim script", "pywin32 script"),
        ("that script, beside an empty one", "vmshim script", "no script"),
        ("import, beside `import ctypes, json, uuid`", "import vmshim", "import baseline"),
    ):
        ratio = processes[mine].median / processes[other].median
        row(what, processes[mine], processes[other], ratio)
    for clients in 1, 4, 16:
        # The run in the middle of the three.
        waiting, sleeping = (sorted(busy[kind, clients])[1] for kind in ("vmshim", "sleeper"))
        row(
            f"a busy server and {clients} in a hurry, beside a 10 ms sleeper",
            *(waiting, sleeping, waiting.rate / sleeping.rate),
        )
    peak = measure_memory() / 2**20
    row("held while a 1 MiB error arrives", f"{peak:.1f} MiB", "1.0 MiB", peak)
    calls = ", ".join(f"{name} {count}" for name, count in count_calls().items())
    print(f"\nWin32 calls of a request: {calls}")
    print(
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores; Windows CPython "
        f"{platform.python_version()}; {PYWIN32}; vmshim {vmshim.__version__}; {rounds} rounds"
    )


def row(what: str, ours: object, other: object, ratio: float) -> None:
    print(f"| {what} | {ours} | {other} | {ratio:.2f} |")


if __name__ == "__main__":
    if sys.platform != "win32":
        under_wine.go_on(__file__, "--pywin32", under_wine.unpack_wheel(PYWIN32), *sys.argv[1:])
    elif sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]), b"x" * int(sys.argv[4]) or vmshim.SHIM_SUCCESS)
    elif sys.argv[1:2] == ["busy-client"]:
        busy_client(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--pywin32", required=True, help="the folder with pywin32's wheel")
        parser.add_argument("--rounds", type=int, default=20, help="more is steadier")
        options = parser.parse_args()
        main(options.pywin32, options.rounds)
