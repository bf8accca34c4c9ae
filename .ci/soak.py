"""Let clients and servers loose on each other, kill them at random, and do the books at the end.

`python3 .ci/soak.py --seconds 20` (on Linux it goes on under Wine). In the first half of the time
the server is killed and started again, too; in the second it lives, and must not grow. Each request
has an ID of its own. The server's ledger says which were carried out, the clients' say what
they were told, and at the end the two must agree.

Ctrl-C is one of the faults, for servers and clients. GenerateConsoleCtrlEvent needs a console, and
under Wine without a display there is none (error 6). So a thread calls _thread.interrupt_main() at
a random moment: it sets the flag that CPython's handler of a console's Ctrl-C sets.
"""

from __future__ import annotations

import _thread
import argparse
import collections
import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from ctypes import wintypes
from typing import Any

import under_wine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import vmshim  # the one beside us, wherever we are started

CLIENTS = 4
WARM = 50  # requests, after which a client holds what it needs for good
LONG = 60.0  # seconds; longer than anything takes, unless it hangs
OPS = list(vmshim.VMRequestOp)


class Ledger:
    """Lines in a file, each of them safe from the process's death once it is written."""

    def __init__(self, path: str) -> None:
        self.file = io.FileIO(path, "a")

    def write(self, word: str, number: str) -> None:
        self.file.write(f"{word} {number}\n".encode())


def entries(path: str) -> list[list[str]]:
    # The last line may be torn.
    with open(path, encoding="ascii") as file:
        return [line.split() for line in file if line.endswith("\n")]


# ---- The server's process ----------------------------------------------------------------------


def serve(path: str, ledger_path: str) -> None:
    """Serve until stdin ends. A line on stdin asks for what this process holds, or is Ctrl-C."""
    ledger = Ledger(ledger_path)
    chance = random.Random()

    def carry_out(request: vmshim.VMRequest) -> None:
        number, length, padding = request.id.split(":")
        if len(padding) != int(length):
            ledger.write("damaged", number)
        time.sleep(chance.choice([0, 0, 0, 0.001, 0.01]))
        if request.op == vmshim.VMRequestOp.SYNC_NAMESPACE:
            raise vmshim.ShimError("Not implemented" * chance.choice([1, 1, 1, 4000]))
        ledger.write("done", number)

    def take_orders() -> None:
        for line in sys.stdin:
            if line == "Ctrl-C\n":
                time.sleep(chance.random() * 0.05)
                _thread.interrupt_main()
            else:
                print(json.dumps(holdings()), flush=True)
        server.close()

    logging.getLogger("vmshim").setLevel(logging.CRITICAL)
    with vmshim.VMShimServer(path, carry_out, request_timeout=2.0) as server:
        threading.Thread(target=take_orders, daemon=True).start()
        print("ready", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            ledger.write("interrupted", "server")


def holdings() -> dict[str, int]:
    """Return what this process holds: threads, handles, memory."""
    gc.collect()
    # Windows hands out the lowest free value, so where nothing leaks this one doesn't rise.
    event = vmshim._kernel32.CreateEventW(None, True, False, None)
    return {
        "threads": threading.active_count(),
        "lowest free handle": event.value,
        "blocks": sys.getallocatedblocks(),
        "kilobytes": private_bytes() // 1024,
    }


class PROCESS_MEMORY_COUNTERS(ctypes.Structure):
    _fields_ = [
        ("cb", wintypes.DWORD),
        ("PageFaultCount", wintypes.DWORD),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPagedPoolUsage", ctypes.c_size_t),
        ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
        ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
    ]


def private_bytes() -> int:
    counters = PROCESS_MEMORY_COUNTERS()
    kernel32: Any = ctypes.CDLL("kernel32")
    process = ctypes.c_void_p(-1)  # GetCurrentProcess()
    size = ctypes.sizeof(counters)
    assert kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), size)
    return int(counters.PagefileUsage)


# ---- The clients' processes --------------------------------------------------------------------


def new_request(chance: random.Random, number: str) -> vmshim.VMRequest:
    length = chance.choice([0, 1, 100, 5000, 60000])
    return vmshim.VMRequest(f"{number}:{length}:{'x' * length}", chance.choice(OPS))


def be_client(path: str, ledger_path: str, name: str, seconds: str) -> None:
    """Send requests and write down, for each, what its sender knows of it."""
    ledger = Ledger(ledger_path)
    chance = random.Random(name)
    before: dict[str, int] = {}
    end = time.monotonic() + float(seconds)
    number = 0
    pressing: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    presser = threading.Thread(target=press, args=(pressing,))
    presser.start()
    while time.monotonic() < end:
        number += 1
        mark = f"{name}.{number}"
        request = new_request(chance, mark)
        timeout = chance.choice([None, None, None, 10.0, 0.02])
        try:
            if number == WARM:
                before = holdings()
            ledger.write("begun", mark)
            if chance.random() < 0.02:
                pressing.put(chance.random() * 0.01)
            ledger.write(outcome(path, request, timeout), mark)
        except KeyboardInterrupt:
            ledger.write("interrupted", "client")
    with contextlib.suppress(KeyboardInterrupt):
        pressing.put(None)
        presser.join()
    after = holdings()
    for what in "threads", "lowest free handle":
        if before and after[what] > before[what]:
            ledger.write("leak", f"{name}:{what},{before[what]},{after[what]}".replace(" ", "-"))


def press(delays: queue.SimpleQueue[float | None]) -> None:
    """Press Ctrl-C after each of these delays, in seconds, until None comes."""
    for delay in iter(delays.get, None):
        time.sleep(delay or 0.0)
        _thread.interrupt_main()


def outcome(path: str, request: vmshim.VMRequest, timeout: float | None) -> str:
    try:
        vmshim.issue_vm_request(path, request, connect_timeout=5.0, timeout=timeout)
    except vmshim.ShimError:
        return "refused"
    except vmshim.PipeNotFoundError:
        time.sleep(0.05)  # until there is a server again
        return "unsent"
    except vmshim.NotSentError:
        return "unsent"
    except vmshim.OutcomeUnknownError:
        return "unknown"
    return "done"


def be_doomed(path: str, ledger_path: str, name: str, moment: str) -> None:
    """Die before, while or after sending a request."""
    ledger = Ledger(ledger_path)
    request = new_request(random.Random(name), name)
    message = request.to_json()
    try:
        pipe = vmshim.dial_pipe(path, connect_timeout=5.0, timeout=5.0)
    except vmshim.NotSentError:
        return
    ledger.write("begun", name)
    try:
        if moment == "while":
            ledger.write("unsent", name)
            pipe.write(message[:-3])
        elif moment == "after":
            pipe.write(message)
        else:
            ledger.write("unsent", name)
    except OSError:
        pass
    os.kill(os.getpid(), 9)


def be_vandal(path: str, ledger_path: str, name: str, seconds: str) -> None:
    """Keep silent, talk nonsense, hang up: all that a server mustn't mind."""
    ledger = Ledger(ledger_path)
    chance = random.Random(name)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        kind = chance.choice(["silent", "garbage", "garbage", "gone"])
        try:
            with vmshim.dial_pipe(path, connect_timeout=1.0, timeout=5.0) as pipe:
                if kind == "silent":
                    # Until the server has had enough of it, or we.
                    pipe.deadline = time.monotonic() + chance.choice([0.1, 5.0])
                    answer = pipe.readall()
                elif kind == "garbage":
                    size = chance.choice([1, 100, 70000])
                    pipe.write(bytes(chance.randrange(256) for _ in range(size)))
                    answer = pipe.readall()
                else:
                    answer = b""
            if answer == vmshim.SHIM_SUCCESS:
                ledger.write("vandalised", name)
        except OSError:
            pass
        ledger.write(kind, name)
        time.sleep(chance.choice([0, 0.05]))


# ---- The supervisor ----------------------------------------------------------------------------


class Soak:
    """One run: its processes, their ledgers, and what is wrong."""

    def __init__(self, folder: str, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.path = rf"\\.\pipe\vmshim-soak-{uuid.uuid4()}"
        self.server_ledger = os.path.join(folder, "server")
        self.ledgers: list[str] = []
        self.running: list[subprocess.Popen[str]] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def start(self, role: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, role, self.path, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.running.append(process)
        return process

    def start_server(self) -> subprocess.Popen[str]:
        server = self.start("serve", self.server_ledger)
        assert server.stdout
        if server.stdout.readline() != "ready\n":
            self.wrong.append("a server didn't start")
        return server

    def start_client(self, role: str, argument: str) -> subprocess.Popen[str]:
        name = f"{role}{len(self.ledgers)}"
        self.ledgers.append(os.path.join(self.folder, name))
        return self.start(f"be_{role}", self.ledgers[-1], name, argument)

    def ask_holdings(self, server: subprocess.Popen[str]) -> dict[str, int]:
        assert server.stdin and server.stdout
        server.stdin.write("\n")
        server.stdin.flush()
        holds: dict[str, int] = json.loads(server.stdout.readline())
        return holds

    def kill(self, process: subprocess.Popen[str], what: str) -> None:
        if process.poll() is None:
            process.kill()
            self.counts[f"{what}s killed"] += 1
        self.end(process)

    def interrupt(self, server: subprocess.Popen[str]) -> None:
        """Press Ctrl-C: the server must end by itself, and soon."""
        assert server.stdin
        server.stdin.write("Ctrl-C\n")
        server.stdin.flush()
        started = time.monotonic()
        try:
            server.wait(LONG)
        except subprocess.TimeoutExpired:
            self.wrong.append("a server hangs after Ctrl-C")
        if time.monotonic() - started > 10:
            self.wrong.append(f"a server took {time.monotonic() - started:.1f} s after Ctrl-C")
        if self.end(server):
            self.wrong.append(f"a server ended with status {server.returncode} after Ctrl-C")

    def end(self, process: subprocess.Popen[str]) -> int | None:
        """Wait for a process's end; its status, or None if it hangs."""
        try:
            process.communicate(timeout=LONG)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"process {process.args!r} hangs")
            process.kill()
            process.communicate()
            return None
        self.running.remove(process)
        return process.returncode

    def run_phase(self, seconds: float, *, kill_servers: bool) -> None:
        server = self.start_server()
        for number in range(20):
            outcome(self.path, vmshim.VMRequest(f"warm.{number}:1:x", "sync"), LONG)
        before = self.ask_holdings(server)

        end = time.monotonic() + seconds
        clients = [self.start_client("client", str(seconds)) for _ in range(CLIENTS)]
        vandal = self.start_client("vandal", str(seconds))
        while time.monotonic() < end:
            time.sleep(self.chance.uniform(0.1, 0.6))
            left = str(max(0.0, end - time.monotonic()))
            event = self.chance.choice(["client", "doomed", "doomed", "server", "Ctrl-C"])
            if event == "client":
                victim = self.chance.randrange(CLIENTS)
                self.kill(clients[victim], "client")
                clients[victim] = self.start_client("client", left)
            elif event == "doomed":
                moment = self.chance.choice(["before", "while", "after"])
                self.end(self.start_client("doomed", moment))
                self.counts[f"clients that died {moment} sending"] += 1
            elif kill_servers and event == "server":
                self.kill(server, "server")
                server = self.start_server()
            elif kill_servers:
                self.interrupt(server)
                server = self.start_server()
        for client in (*clients, vandal):
            if self.end(client):
                self.wrong.append(f"a client ended with status {client.returncode}")

        if not kill_servers:
            self.check_holdings(server, before)
        if self.end(server):
            self.wrong.append(f"the server ended with status {server.returncode}")
        try:
            vmshim.dial_pipe(self.path, connect_timeout=0).close()
            self.wrong.append("an instance is left")
        except FileNotFoundError:
            pass

    def check_holdings(self, server: subprocess.Popen[str], before: dict[str, int]) -> None:
        """Compare what an idle server holds after the load with what it held before."""
        # It may have a silent client to see off.
        deadline = time.monotonic() + LONG
        after = self.ask_holdings(server)
        while after["threads"] > before["threads"] and time.monotonic() < deadline:
            time.sleep(0.1)
            after = self.ask_holdings(server)
        print(f"the server held, before and after: {before} {after}")
        for what, allowed in (
            ("threads", 0),
            ("lowest free handle", 0),
            ("blocks", 3000),
            ("kilobytes", 4000),  # what malloc keeps for the longest messages
        ):
            if after[what] > before[what] + allowed:
                self.wrong.append(f"{what} grew from {before[what]} to {after[what]}")

    def do_the_books(self) -> None:
        words = entries(self.server_ledger)
        done = collections.Counter(number for word, number in words if word == "done")
        self.wrong += [f"{number} was carried out twice" for number, n in done.items() if n > 1]
        self.wrong += [f"{number} came damaged" for word, number in words if word == "damaged"]
        self.counts["servers interrupted"] = sum(word == "interrupted" for word, _ in words)
        told: dict[str, str] = {}
        for path in self.ledgers:
            for word, number in entries(path) if os.path.exists(path) else []:
                if word in ("leak", "vandalised"):
                    self.wrong.append(f"{word}: {number}")
                elif word == "interrupted":
                    self.counts["clients interrupted"] += 1
                elif word in ("silent", "garbage", "gone"):
                    self.counts[f"{word} clients"] += 1
                else:
                    told[number] = word
        for number, word in told.items():
            if word == "done" and not done[number]:
                self.wrong.append(f"{number} was reported done and wasn't")
            if word in ("refused", "unsent") and done[number]:
                self.wrong.append(f"{number} was reported {word} and was done")
            if word in ("begun", "unknown"):
                word = "unknown, was done" if done[number] else "unknown, was not"
            self.counts[f"requests {word}"] += 1
        for number in done.keys() - told.keys():
            self.wrong.append(f"{number} was carried out and nobody had sent it")


def main(seconds: float, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(folder, seed)
        try:
            soak.run_phase(seconds / 2, kill_servers=True)
            soak.run_phase(seconds / 2, kill_servers=False)
            soak.do_the_books()
        finally:
            for process in soak.running:
                process.kill()
    if soak.running:
        soak.wrong.append(f"{len(soak.running)} processes were left")
    for what, count in sorted(soak.counts.items()):
        print(f"{count:6} {what}")
    if not soak.counts["requests done"]:
        soak.wrong.append("no request was carried out")
    for problem in soak.wrong[:20]:
        print("WRONG:", problem)
    print(f"{len(soak.wrong)} wrong, seed {seed}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    if sys.platform != "win32":
        under_wine.go_on(__file__, *sys.argv[1:])
    roles = (serve, be_client, be_doomed, be_vandal)
    for role in roles:
        if sys.argv[1:2] == [role.__name__]:
            role(*sys.argv[2:])
            sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    sys.exit(main(options.seconds, options.seed))
