"""The request by open(): no deadline, no busy pipe."""

MESSAGE = b'{"ID":"c8d6f0","Op":"unmount"}\n'


def request(path: str) -> None:
    with open(path, "r+b", buffering=0) as pipe:
        pipe.write(MESSAGE)
        response = b"".join(iter(lambda: pipe.read(4096), b""))
    assert response == b"\0OK\0", response
