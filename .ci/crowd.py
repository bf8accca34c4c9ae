"""Thousands of clients that are silent, broken or gone, and one honest one in between.

`python3 .ci/crowd.py [--clients N]` (on Linux it goes on under Wine). A server in a process of its
own gets N clients: a quarter is silent, a quarter sends half a request, a quarter garbage, a
quarter leaves at once. Meanwhile an honest client sends one request after the other, and must be
served in each second. The last line tells in how many seconds it was, its longest wait, and what
the server needed for all that; the exit status is 1 if it had to do without in any second.
"""

from __future__ import annotations

import _thread
import argparse
import json
import os
import subprocess
import sys
import threading
import time
import uuid

import soak
import under_wine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import vmshim  # the one beside us, wherever we are started

COUNT = "_count"  # the threads of _thread, which threading does not count
PATIENCE = 60.0  # seconds; longer than anything here takes, unless it hangs


def serve(path: str, clients: str) -> None:
    """Serve until stdin ends; a line on stdin asks what this process has."""

    def take_orders() -> None:
        for _ in sys.stdin:
            threads = getattr(_thread, COUNT)()
            print(json.dumps([threads, soak.private_bytes()]), flush=True)
        server.close()

    server = vmshim.VMShimServer(
        path, bool, max_clients=int(clients) + 100, request_timeout=PATIENCE
    )
    threading.Thread(target=take_orders).start()
    print("ready", flush=True)
    server.serve_forever()


class HonestClient(threading.Thread):
    """Sends requests until it is stopped, and notes when each was served and how long it took."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.stopped = threading.Event()
        self.served: list[tuple[float, float]] = []

    def run(self) -> None:
        request = vmshim.VMRequest("honest", "create")
        while not self.stopped.wait(0.02):
            started = time.monotonic()
            vmshim.issue_vm_request(self.path, request, connect_timeout=PATIENCE, timeout=PATIENCE)
            self.served.append((time.monotonic(), time.monotonic() - started))


def be_crowd(path: str, clients: int) -> list[vmshim.Pipe]:
    """Connect them all; return those that stay."""
    crowd = []
    for number in range(clients):
        pipe = vmshim.dial_pipe(path, connect_timeout=PATIENCE, timeout=PATIENCE)
        if number % 4 == 3:
            pipe.close()
            continue
        crowd.append(pipe)
        try:
            if number % 4:
                pipe.write(b'{"ID":"half' if number % 4 == 1 else b"garbage")
        except vmshim.ConnectionLostError:
            pass
    return crowd


def main(clients: int) -> int:
    path = rf"\\.\pipe\vmshim-crowd-{uuid.uuid4()}"
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", path, str(clients)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert server.stdin and server.stdout
    server.stdout.readline()

    def ask() -> tuple[int, int]:
        assert server.stdin and server.stdout
        server.stdin.write("\n")
        server.stdin.flush()
        threads, size = json.loads(server.stdout.readline())
        return threads, size

    honest = HonestClient(path)
    threads_before, size_before = ask()
    started = time.monotonic()
    honest.start()
    crowd = be_crowd(path, clients)
    time.sleep(2.0)  # the crowd is complete, and two more seconds count
    threads, size = ask()
    seconds = int(time.monotonic() - started)
    honest.stopped.set()
    honest.join()
    for pipe in crowd:
        pipe.close()
    server.communicate()

    served = {int(moment - started) for moment, _ in honest.served}
    missed = [second for second in range(seconds) if second not in served]
    longest = max(wait for _, wait in honest.served)
    print(
        f"{clients} clients in {seconds} s, {len(crowd)} of them stayed; "
        f"an honest client was served {len(honest.served)} times, "
        f"in {seconds - len(missed)} of {seconds} s, after {longest:.2f} s at the longest; "
        f"the server grew by {threads - threads_before} threads "
        f"and {(size - size_before) / 1e6:.1f} MB"
    )
    return 1 if missed or server.returncode else 0


if __name__ == "__main__":
    if sys.platform != "win32":
        under_wine.go_on(__file__, *sys.argv[1:])
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=5000)
    sys.exit(main(parser.parse_args().clients))
