"""The request by multiprocessing.connection.Client, which sends raw bytes to a pipe."""

import json
import sys
from multiprocessing.connection import Client

MESSAGE = b'{"ID":"c8d6f0","Op":"unmount"}\n'


def request(path: str) -> None:
    with Client(path) as pipe:
        pipe.send_bytes(json.dumps({"ID": "c8d6f0", "Op": "unmount"}).encode() + b"\n")
        response = pipe.recv_bytes()
    if response != b"\0OK\0":
        raise RuntimeError(response)


def exchange(path: str) -> None:
    with Client(path) as pipe:
        pipe.send_bytes(MESSAGE)
        assert pipe.recv_bytes() == b"\0OK\0"


if __name__ == "__main__":
    request(sys.argv[1])
