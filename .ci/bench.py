"""Measure vmshim side by side with what one would write instead: `python3 .ci/bench.py`.

A call to Wine's server costs several times as much when it runs on another core, as the scheduler
pleases. So everything is pinned to one core: this script, all that it starts, and a wineserver of
its own, with a prefix of its own (`pinned` in wine-python's cache). It prints the README's table.
Only ratios mean anything elsewhere, and none is printed without the pinning.

The server under the requests is nobody's own code: plain kernel32, with buffers of 0, as the
reference's. `peers/` has what is measured beside vmshim; `--before FILE` measures an older
vmshim.py's server beside ours.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import glob
import importlib
import importlib.util
import io
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
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, TypeVar

import under_wine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import bench_profile

import vmshim  # the one beside us, wherever we are started

PEERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peers")
PYWIN32 = "pywin32==311"
REQUEST = vmshim.VMRequest("c8d6f0", "unmount")
COMMAND = ("unmount", "--pipe")

Samples = Dict[str, List[float]]
Rows = List["Row"]


# ---- On Linux: pin, and go on under Wine --------------------------------------------------------


def go_on_under_wine(arguments: list[str], core: int) -> int:
    """Run this script on Windows' Python, everything on one core."""
    wheel = under_wine.unpack_wheel(PYWIN32)  # it fills the common cache, Python included
    cache = subprocess.check_output([under_wine.WINE_PYTHON, "--cache"], text=True).strip()
    pinned = os.path.join(cache, "pinned")
    os.makedirs(pinned, exist_ok=True)
    for folder in glob.glob(os.path.join(cache, "python-3*")) + glob.glob(cache + "/wheel-*"):
        link = os.path.join(pinned, os.path.basename(folder))
        if not os.path.lexists(link):
            os.symlink(os.path.join("..", os.path.basename(folder)), link)
    if "--unpinned" not in arguments:
        # Whatever we start inherits this.
        taskset = ["taskset", "-cp", str(core), str(os.getpid())]
        if subprocess.run(taskset, stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit(f"can't pin to core {core}; --unpinned measures without")
        arguments = [*arguments, "--pinned", f"core {core}"]
    os.environ["VMSHIM_CACHE"] = pinned
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    stop = [under_wine.WINE_PYTHON, "--stop"]
    run = [under_wine.WINE_PYTHON, "--python", under_wine.VERSION]
    # A wineserver that still ran could be on another core.
    subprocess.run(stop, stderr=subprocess.DEVNULL, check=True)
    try:
        imports = [] if "--profile" in arguments else ["--linux", json.dumps(measure_imports())]
        script = os.path.relpath(__file__)
        return subprocess.run([*run, script, "--wheel", wheel, *imports, *arguments]).returncode
    finally:
        subprocess.run(stop, stderr=subprocess.DEVNULL)


# ---- The server ---------------------------------------------------------------------------------

if sys.platform == "win32":
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    HANDLE, DWORD, LPVOID, LPDWORD = (
        *(wintypes.HANDLE, wintypes.DWORD, wintypes.LPVOID, wintypes.LPDWORD),
    )
    kernel32.CreateNamedPipeW.restype = HANDLE
    kernel32.CreateNamedPipeW.argtypes = (wintypes.LPCWSTR, *[DWORD] * 6, LPVOID)
    kernel32.ReadFile.argtypes = (HANDLE, LPVOID, DWORD, LPDWORD, LPVOID)
    kernel32.WriteFile.argtypes = (HANDLE, LPVOID, DWORD, LPDWORD, LPVOID)
    kernel32.ConnectNamedPipe.argtypes = (HANDLE, LPVOID)
    kernel32.FlushFileBuffers.argtypes = (HANDLE,)
    kernel32.CloseHandle.argtypes = (HANDLE,)
    kernel32.GetCurrentProcess.restype = HANDLE
    kernel32.SetProcessAffinityMask.argtypes = (HANDLE, ctypes.c_size_t)


def serve(path: str, instances: int, buffers: int, answer: bytes, re_offer: float) -> None:
    """Answer each request as the reference does, on so many instances at once, until stdin ends.

    `re_offer` is how many seconds it takes, on average, until the next instance is offered; from
    half of that to half as much again.
    """

    def create_instance() -> int:
        pipe: int = kernel32.CreateNamedPipeW(path, 3, 4, 255, buffers, buffers, 0, None)
        return pipe

    def answer_clients(pipe: int) -> None:
        buffer, count = ctypes.create_string_buffer(4096), DWORD()
        while True:
            kernel32.ConnectNamedPipe(pipe, None)
            if kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None):
                kernel32.WriteFile(pipe, answer, len(answer), ctypes.byref(count), None)
                kernel32.FlushFileBuffers(pipe)
                kernel32.WriteFile(pipe, b"", 0, ctypes.byref(count), None)
                while kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None):
                    pass
            kernel32.CloseHandle(pipe)
            if re_offer:
                time.sleep(re_offer * random.uniform(0.5, 1.5))
            pipe = create_instance()

    # An instance whose client is gone holds the name: between two turns clients see busy.
    create_instance()
    vmshim.dial_pipe(path).close()
    for _ in range(instances):
        threading.Thread(target=answer_clients, args=(create_instance(),), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def serve_by_vmshim(path: str, seconds: float, file: str) -> None:
    """Answer by this vmshim.py's server, each after so many seconds, until stdin ends."""
    module: Any = load(file)

    def carry_out(_: object) -> None:
        if seconds:
            time.sleep(seconds)

    server = module.VMShimServer(path, carry_out, request_timeout=None, max_clients=10000)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def load(file: str) -> Any:
    """Return this vmshim.py as a module, whatever its name is."""
    spec = importlib.util.spec_from_file_location("served_" + os.path.basename(file)[:-3], file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AsideType = TypeVar("AsideType", bound="Aside")


class Aside:
    """This script in a process of its own, for one of its tasks; it ends with the `with` block."""

    def __init__(self, task: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, task, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.receive()

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def receive(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def __enter__(self: AsideType) -> AsideType:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


class Server(Aside):
    """That server; `path` is its pipe."""

    def __init__(
        self, instances: int, *, buffers: int = 0, error_length: int = 0, re_offer: float = 0
    ) -> None:
        self.path = rf"\\.\pipe\vmshim-bench-{uuid.uuid4()}"
        super().__init__("serve", self.path, instances, buffers, error_length, re_offer)


class OurServer(Aside):
    """The server of a vmshim.py, ours if no other is named; `path` is its pipe."""

    def __init__(self, *, handler_seconds: float = 0, file: str = vmshim.__file__) -> None:
        self.path = rf"\\.\pipe\vmshim-bench-{uuid.uuid4()}"
        super().__init__("serve-by-vmshim", self.path, handler_seconds, file)


# ---- Measuring ----------------------------------------------------------------------------------


class Spread:
    """The median of some measurements, in milliseconds, and the quartiles around it."""

    def __init__(self, seconds: list[float]) -> None:
        values = [1000 * value for value in seconds]
        self.low, self.median, self.high = statistics.quantiles(values, n=4)

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 3
        low, median, high = (f"{ms:.{digits}f}" for ms in (self.low, self.median, self.high))
        return f"{median} ms ({low} to {high})"


class Row(NamedTuple):
    """A row of the table: what is measured, ours, what stands beside it, and what was to be."""

    what: str
    ours: object
    other: object
    ratio: float | None
    goal: str


def beside(what: str, samples: Samples, ours: str, other: str, goal: str) -> Row:
    mine, theirs = Spread(samples[ours]), Spread(samples[other])
    return Row(what, mine, theirs, mine.median / theirs.median, goal)


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int, block: int = 5) -> Samples:
    """Time each call in blocks, in an order that changes every round."""
    samples: Samples = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            started = time.perf_counter()
            for _ in range(block):
                calls[name]()
            if turn:
                samples[name].append((time.perf_counter() - started) / block)
    return samples


NAMES = {
    "bare_ctypes": "bare ctypes",
    "pywin32": "pywin32",
    "plain_open": 'open(path, "r+b")',
    "winapi": "`_winapi`",
    "mp_client": "multiprocessing's Client",
}
REQUESTS = (
    ("request", "a whole request", "bare_ctypes", "1.10"),
    ("request", "a whole request", "pywin32", "1.10"),
    ("request", "a whole request", "plain_open", "0.92"),
    ("exchange", "dial, write, read, close", "bare_ctypes", "1.08"),
    ("exchange", "dial, write, read, close", "winapi", "1.12"),
    ("exchange", "dial, write, read, close", "mp_client", "0.80"),
)


def measure_requests(rounds: int) -> Rows:
    sys.path.insert(0, PEERS)
    peers = {
        name: importlib.import_module(name)
        for name in ("ours", "bare_ctypes", "pywin32", "plain_open", "winapi", "mp_client")
    }
    rows: Rows = []
    for buffers in 0, 4096:
        with Server(instances=4, buffers=buffers) as server:
            calls = {
                f"{name} {kind}": functools.partial(getattr(peer, kind), server.path)
                for name, peer in peers.items()
                for kind in ("request", "exchange")
                if hasattr(peer, kind)
            }
            samples = interleaved(calls, rounds)
        for kind, what, other, goal in REQUESTS:
            what = f"{what} / {NAMES[other]}"
            if buffers:
                what, goal = f"{what}, buffers of {buffers:,}", ""
            rows.append(beside(what, samples, f"ours {kind}", f"{other} {kind}", goal))
    return rows


def measure_processes(folder: str, paths: list[str], rounds: int) -> Rows:
    """Time whole processes, each with its modules compiled and in the disk's cache."""
    shutil.copy(vmshim.__file__, folder)
    for script in glob.glob(os.path.join(PEERS, "*.py")):
        shutil.copy(script, folder)
    environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": ""}
    with_pywin32 = {**environment, "PYTHONPATH": ";".join([folder, *paths])}
    with Server(instances=4) as server:
        calls: dict[str, Callable[[], object]] = {}

        def add(name: str, *arguments: str) -> None:
            env = with_pywin32 if name == "pywin32" else environment
            command = [sys.executable, *arguments]
            calls[name] = lambda: subprocess.check_output(command, env=env)

        add("empty", "-c", "pass")
        for name in "ours", "bare_ctypes", "pywin32", "mp_client":
            add(name, os.path.join(folder, name + ".py"), server.path)
        words = (*COMMAND, server.path, REQUEST.id)
        add("command", os.path.join(folder, "vmshim.py"), *words)
        add("command -m", "-m", "vmshim", *words)
        samples = interleaved(calls, rounds, 1)
    what = "a cold script with one request"
    return [
        beside(f"{what} / by pywin32", samples, "ours", "pywin32", "0.75"),
        beside(f"{what} / in bare ctypes, no checks", samples, "ours", "bare_ctypes", "1.4"),
        beside(f"{what} / by multiprocessing's Client", samples, "ours", "mp_client", "0.70"),
        beside(f"{what} / an empty one", samples, "ours", "empty", ""),
        beside("`python vmshim.py unmount …` / that script", samples, "command", "ours", "1.35"),
        beside("`python -m vmshim unmount …` / the same", samples, "command -m", "ours", ""),
    ]


def measure_imports(rounds: int = 25) -> Samples:
    """Time the import of vmshim, and of the least that a script of one's own needs."""

    def imported(modules: str) -> float:
        folder = os.path.dirname(os.path.abspath(vmshim.__file__))
        code = (
            f"import sys, time; sys.path.insert(0, {folder!r}); started = time.perf_counter(); "
            f"import {modules}; print(time.perf_counter() - started)"
        )
        # Without site, where what else is installed may import half of it before.
        command = [sys.executable, "-E", "-s", "-S", "-c", code]
        return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    samples: Samples = {"vmshim": [], "ctypes, json, uuid": []}
    for turn in range(rounds + 1):
        for modules in random.sample(list(samples), len(samples)):
            seconds = imported(modules)
            if turn:
                samples[modules].append(seconds)
    return samples


def import_row(system: str, samples: Samples) -> Row:
    what = f"`import vmshim` / `import ctypes, json, uuid`, {system}"
    return beside(what, samples, "vmshim", "ctypes, json, uuid", "0.85")


# ---- A busy server ------------------------------------------------------------------------------


def hurry() -> None:
    """For each line on stdin, send requests back to back for a while; print what came of it."""
    print("ready", flush=True)
    for line in sys.stdin:
        kind, path, seconds = line.split()
        send = send_sleeping if kind == "sleeper" else vmshim.issue_vm_request
        end = time.monotonic() + float(seconds)
        done, longest = 0, 0.0
        while time.monotonic() < end:
            started = time.monotonic()
            try:
                send(path, REQUEST)
                done += time.monotonic() < end
            except vmshim.PipeBusyError:
                pass
            longest = max(longest, time.monotonic() - started)
        print(json.dumps([done, longest]), flush=True)


def send_sleeping(path: str, request: vmshim.VMRequest) -> None:
    """As vmshim, but with the reference's way to wait: 10 ms of sleep between two tries."""
    deadline = time.monotonic() + 2
    while True:
        try:
            return vmshim.issue_vm_request(path, request, connect_timeout=0)
        except vmshim.PipeBusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class Busy(NamedTuple):
    """What clients in a hurry got out of a server with one instance."""

    rate: float
    """Requests a second, of all clients together."""
    least: float
    """The least client's part of its share."""
    longest: float
    """The longest request, in seconds."""

    def __str__(self) -> str:
        return f"{self.rate:.0f}/s, least {self.least:.0%}, longest {self.longest:.2f} s"


@contextlib.contextmanager
def clients_in_a_hurry() -> Iterator[list[Aside]]:
    clients = [Aside("hurry") for _ in range(16)]
    try:
        yield clients
    finally:
        for client in clients:
            client.process.communicate()


def send_at_once(clients: list[Aside], kind: str, path: str, seconds: float) -> Busy:
    """Let these clients send requests for a while."""
    for client in clients:
        client.send(f"{kind} {path} {seconds}")
    outcomes = [json.loads(client.receive()) for client in clients]
    done, longest = zip(*outcomes)
    least = min(done) / max(1, statistics.mean(done))
    return Busy(sum(done) / seconds, least, max(longest))


def measure_busy(seconds: float) -> Rows:
    rows = []
    with clients_in_a_hurry() as clients:
        for re_offer in 0, 2, 10:
            # Chance alone gives the least of 16 half its share while each has served about ten.
            for count, time_for_each in (1, seconds), (4, seconds), (16, 5 * seconds):
                both: list[Busy] = []
                for kind in "vmshim", "sleeper":
                    with Server(instances=1, re_offer=re_offer / 1000) as server:
                        both.append(send_at_once(clients[:count], kind, server.path, time_for_each))
                what = f"busy, re-offer {re_offer} ms, {count} in a hurry / 10 ms sleeper"
                waiting, sleeping = both
                rows.append(
                    Row(what, waiting, sleeping, waiting.rate / max(1, sleeping.rate), "≥ 8")
                )
    return rows


def measure_servers(seconds: float, before: str, rounds: int = 5) -> Rows:
    """Let our clients send to our server, and in turn to that of an older vmshim.py, if given."""
    files = [vmshim.__file__, before] if before else [vmshim.__file__]
    beside = f" / by vmshim {load(before).__version__}" if before else ""
    rows = []
    with clients_in_a_hurry() as clients:
        for handler_ms, goal in (0, "≥ 1.2"), (20, "≥ 0.95"):
            for count in 1, 4, 16:
                rates: dict[str, list[float]] = {file: [] for file in files}
                # Servers that live at the same time, and each is measured while the other is idle.
                with contextlib.ExitStack() as stack:
                    paths = {}
                    for file in files:
                        server = OurServer(handler_seconds=handler_ms / 1000, file=file)
                        paths[file] = stack.enter_context(server).path
                    for _ in range(rounds):
                        for file in random.sample(files, len(files)):
                            busy = send_at_once(clients[:count], "vmshim", paths[file], seconds)
                            rates[file].append(busy.rate)
                ours, *older = (statistics.median(rates[file]) for file in files)
                what = f"our server, a handler of {handler_ms} ms, {count} in a hurry{beside}"
                other = f"{older[0]:.0f}/s" if older else ""
                ratio = ours / older[0] if older else None
                rows.append(Row(what, f"{ours:.0f}/s", other, ratio, goal if older else ""))
    return rows


# ---- As the work grows --------------------------------------------------------------------------


def measure_memory(length: int) -> tuple[float, float]:
    """Return how long a refusal of so many bytes takes, and the most memory that Python holds."""
    seconds, peak = 0.0, 0
    with Server(instances=1, error_length=length) as server:
        for _ in range(3):
            started = time.perf_counter()
            refused(server.path)
            seconds = time.perf_counter() - started
        tracemalloc.start()
        refused(server.path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return seconds, peak / length


def refused(path: str) -> None:
    try:
        vmshim.issue_vm_request(path, REQUEST)
    except vmshim.ShimError:
        return
    raise AssertionError("not refused")


def memory_of(process: Any) -> int:
    """Return the private bytes of a process."""

    class PROCESS_MEMORY_COUNTERS(ctypes.Structure):
        _fields_ = [
            ("cb", DWORD),
            ("PageFaultCount", DWORD),
            *((f"size{index}", ctypes.c_size_t) for index in range(8)),
        ]

    counters = PROCESS_MEMORY_COUNTERS()
    counters.cb = ctypes.sizeof(counters)
    kernel32.K32GetProcessMemoryInfo.argtypes = (HANDLE, LPVOID, DWORD)
    kernel32.K32GetProcessMemoryInfo(int(process._handle), ctypes.byref(counters), counters.cb)
    working_set: int = counters.size1
    return working_set


def measure_growth(seconds: float) -> list[str]:
    """Return the rows of the second table."""
    rows = []
    for count in 1, 8, 64, 512:
        with OurServer() as server:
            path = server.path
            vmshim.issue_vm_request(path, REQUEST)
            before = memory_of(server.process)
            waiting = [vmshim.dial_pipe(path) for _ in range(count)]
            done, end = 0, time.monotonic() + seconds
            while time.monotonic() < end:
                vmshim.issue_vm_request(path, REQUEST)
                done += 1
            kib = (memory_of(server.process) - before) / 1024 / count
            for pipe in waiting:
                pipe.close()
        rate = f"{done / seconds:.0f} requests/s"
        rows.append(f"| our server, {count} silent clients | {rate} | {kib:.1f} KiB a client |")
    for kib in 1, 16, 256, 1024:
        taken, held = measure_memory(kib * 1024)
        time_taken = f"{taken * 1000:.2f} ms"
        rows.append(f"| our client, an error of {kib:,} KiB | {time_taken} | {held:.2f} of it |")
    return rows


# ---- The table ----------------------------------------------------------------------------------


def print_table(rows: Rows, mark: str) -> None:
    print("| measured, medians (and quartiles) | vmshim | beside it | ratio | goal |")
    print("| --- | --- | --- | --- | --- |")
    for what, ours, other, ratio, goal in rows:
        goal = f"≤ {goal}" if goal and not goal.startswith("≥") else goal
        quotient = "" if ratio is None else f"{ratio:.2f}{mark}"
        print(f"| {what} | {ours} | {other} | {quotient} | {goal} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="of requests; more is steadier")
    parser.add_argument("--processes", type=int, default=25, help="cold starts of each kind")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each busy server")
    parser.add_argument("--core", type=int, default=0, help="pin all to this one (Linux)")
    parser.add_argument("--unpinned", action="store_true", help="measure unpinned, marked so")
    parser.add_argument("--profile", action="store_true", help="print where a request's time goes")
    parser.add_argument("--only", default="", help="requests, processes, busy, servers or growth")
    parser.add_argument("--before", default="", metavar="FILE", help="an older vmshim.py")
    for given in "--wheel", "--pinned", "--linux":  # by the part of this script that runs on Linux
        parser.add_argument(given, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if sys.platform != "win32":
        # A relative path is the same on every drive.
        before = ["--before", os.path.relpath(options.before)] if options.before else []
        sys.exit(go_on_under_wine([*sys.argv[1:], *before], options.core))
    pinned = options.pinned
    if not pinned and not options.unpinned:
        if hasattr(ctypes.WinDLL("ntdll"), "wine_get_version"):
            sys.exit("the wineserver is not pinned: start this on Linux, `python3 .ci/bench.py`")
        if not kernel32.SetProcessAffinityMask(kernel32.GetCurrentProcess(), 1):
            sys.exit("can't pin to a core; --unpinned measures without")
        pinned = "core 0"
    # As pywin32's own .pth file has it.
    paths = (
        [options.wheel + part for part in ("", r"\win32", r"\win32\lib")] if options.wheel else []
    )
    sys.path += paths
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="utf-8")
    if options.profile:
        with Server(instances=4) as server:
            bench_profile.profile(
                lambda: vmshim.issue_vm_request(server.path, REQUEST), options.rounds
            )
        return

    rows: Rows = []
    growth: list[str] = []

    def wanted(part: str) -> bool:
        return options.only in ("", part)

    started = time.monotonic()
    if wanted("requests"):
        rows += measure_requests(options.rounds)
    if wanted("processes"):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_processes(folder, paths, options.processes)
        rows.append(import_row("Windows", measure_imports()))
        if options.linux:
            rows.append(import_row("Linux", json.loads(options.linux)))
    if wanted("busy"):
        rows += measure_busy(options.seconds)
    if wanted("servers"):
        rows += measure_servers(options.seconds, options.before)
    if wanted("growth"):
        _, held = measure_memory(1 << 20)
        rows.append(Row("1 MiB error held / its size", f"{held:.2f} MiB", "1.00 MiB", held, "1.1"))
        growth = measure_growth(options.seconds)
    print_table(rows, "" if pinned else " (unpinned)")
    if growth:
        print("\n| as the work grows | | memory held |\n| --- | --- | --- |")
        print("\n".join(growth))
    where = f"everything pinned to {pinned}" if pinned else "NOT PINNED"
    print(
        f"\n{time.strftime('%Y-%m-%d')}; {where}; Windows CPython {platform.python_version()}; "
        f"{PYWIN32}; vmshim {vmshim.__version__}; in {time.monotonic() - started:.0f} s"
    )


TASKS: dict[str, Callable[..., None]] = {
    "serve": lambda path, instances, buffers, length, re_offer: serve(
        *(path, int(instances), int(buffers), b"x" * int(length) or vmshim.SHIM_SUCCESS),
        float(re_offer),
    ),
    "serve-by-vmshim": lambda path, seconds, file: serve_by_vmshim(path, float(seconds), file),
    "hurry": hurry,
}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in TASKS:
        TASKS[sys.argv[1]](*sys.argv[2:])
    else:
        main()
