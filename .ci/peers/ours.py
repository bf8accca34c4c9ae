"""The request by vmshim."""

import sys

from vmshim import VMRequest, dial_pipe, issue_vm_request

REQUEST = VMRequest("c8d6f0", "unmount")
MESSAGE = REQUEST.to_json()


def request(path: str) -> None:
    issue_vm_request(path, REQUEST)


def exchange(path: str) -> None:
    with dial_pipe(path) as pipe:
        pipe.write(MESSAGE)
        assert pipe.read(4096) == b"\0OK\0"


if __name__ == "__main__":
    request(sys.argv[1])
