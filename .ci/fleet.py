"""Send vmshim.py to a fleet of hosts, as the README says, and compare the books at the end.

`python3 .ci/fleet.py` needs Linux and root, and takes some two minutes. It starts twelve hosts on
127.0.0.1. A host is an sshd in namespaces of its own, with a host name, a Wine registry and pipes
of its own; drive C and the Windows Python are those of wine-python's cache, for all hosts together.
On each host runs a shim, which behaves as SHIMS says, and `python` is the Windows Python.

Two engines send the same request to all hosts, each to a fresh set of shims: parallel-ssh, and
Ansible with the README's playbook, but for the name of the module. After the first round the absent
shim is started and the busy one is free, and the second round goes to those hosts only whose line
says `"retry": true`. Then what the hosts were told is compared with what the shims carried out. The
exit status is 1 if anything was lost, done twice, or ended in another way than it should.

Missing Debian packages are installed; Ansible goes into wine-python's cache. The hosts, and what
runs there, end with this script, however it ends. wine-python's own wineserver goes on, as always.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from typing import Any, Callable, Iterator, NamedTuple

import under_wine

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import vmshim  # the one beside us, wherever we are started

ROOT = os.path.dirname(os.path.abspath(vmshim.__file__))
ANSIBLE = "ansible-core==2.19.14"
PACKAGES = {
    "openssh-server": "/usr/sbin/sshd",
    "procps": "/usr/bin/pkill",
    "pssh": "/usr/bin/parallel-ssh",
}
CONTAINER = "my-container"
REQUEST = f"unmount {CONTAINER} --timeout 10"
# Runs a command in namespaces of its own. If this script ends, or the command does, then the kernel
# kills all that was started there.
ISOLATED = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"),
]
SLOW = 20.0  # seconds; longer than the request's timeout
LONG = 300.0  # seconds; longer than anything takes, unless it hangs


class Shim(NamedTuple):
    """How the shim of a host behaves, and how the requests to it end, round by round."""

    behaviour: str
    outcomes: list[str]
    carried_out: int
    listed: list[str]
    """What `list` says of the containers there, before any request."""


SERVING = Shim("serving", ["done"], 1, ["free"])
SHIMS = [
    Shim("host is down", ["no line"], 0, []),
    SERVING,
    # Wine can't list the pipes' folder, so `list` doesn't know that the shim is absent.
    Shim("absent, then serving", ["not-sent", "done"], 1, ["unknown"]),
    SERVING,
    Shim("busy, then serving", ["not-sent", "done"], 1, ["busy"]),
    SERVING,
    Shim("refusing", ["refused"], 0, ["free"]),
    Shim("dying before it is done", ["unknown"], 0, ["free"]),
    Shim("dying after it is done", ["unknown"], 1, ["free"]),
    Shim("slow", ["unknown"], 1, ["free"]),
    Shim("without the container", ["not-sent", "not-sent"], 0, []),
    SERVING,
]


# ---- The shim, on Windows' Python ---------------------------------------------------------------


def run_shim(behaviour: str) -> None:
    """Be a shim until stdin ends. The first line on stdin mends what is only absent or busy."""
    vm = uuid.uuid4()
    if behaviour != "without the container":
        register_container(vm)

    def carry_out(request: vmshim.VMRequest) -> None:
        say(f"received {request.op} {request.id}")
        if behaviour == "refusing":
            raise vmshim.ShimError("the file system is in use")
        if behaviour == "dying before it is done":
            os._exit(1)
        if behaviour == "slow":
            time.sleep(SLOW)
        say(f"carried out {request.op} {request.id}")
        if behaviour == "dying after it is done":
            os._exit(1)

    def wait_for_orders() -> None:
        if behaviour == "busy, then serving":
            with vmshim.dial_pipe(server.pipe_path, connect_timeout=LONG):
                say("ready")
                sys.stdin.readline()
        else:
            say("ready")
        sys.stdin.read()
        server.shutdown()

    if behaviour == "absent, then serving":
        say("ready")
        sys.stdin.readline()
    max_clients = 1 if behaviour == "busy, then serving" else 64
    with vmshim.VMShimServer(
        vmshim.vm_pipe_path(vm), carry_out, request_timeout=None, max_clients=max_clients
    ) as server:
        threading.Thread(target=wait_for_orders).start()
        server.serve_forever()


def say(text: str) -> None:
    print(text, flush=True)


def register_container(vm: uuid.UUID) -> None:
    """Write a container into the registry, as runhcs does."""
    if sys.platform == "win32":
        import winreg

        state = {"ID": CONTAINER, "HostID": "my-vm", "HostUniqueID": str(vm)}
        path = rf"SOFTWARE\Microsoft\runhcs\default\{CONTAINER}"
        access = winreg.KEY_ALL_ACCESS | winreg.KEY_WOW64_64KEY
        with winreg.CreateKeyEx(winreg.HKEY_LOCAL_MACHINE, path, 0, access) as key:
            winreg.SetValueEx(key, "state", 0, winreg.REG_BINARY, json.dumps(state).encode())


# ---- A host -------------------------------------------------------------------------------------


class Host:
    """An sshd in namespaces of its own; `python` there is Windows', with its own registry."""

    def __init__(self, name: str, shim: Shim, folder: str) -> None:
        self.name = name
        self.shim = shim
        self.folder = os.path.join(folder, name)
        self.port = free_port()
        self.ssh = ["ssh", "-F", os.path.join(folder, "ssh_config"), name]
        self.sshd: subprocess.Popen[bytes] | None = None
        self.shim_process: subprocess.Popen[bytes] | None = None
        self.log = os.path.join(self.folder, "shim.log")
        os.makedirs(os.path.join(self.folder, "bin"))

    def start(self, cache: str) -> None:
        """Start the host's sshd."""
        own_cache = os.path.join(self.folder, "cache")
        copy_cache(cache, own_cache)
        python = os.path.join(self.folder, "bin", "python")
        command = shlex.join([under_wine.WINE_PYTHON, "--python", under_wine.VERSION])
        write(python, f'#!/bin/sh\nVMSHIM_CACHE={shlex.quote(own_cache)} exec {command} "$@"\n')
        os.chmod(python, 0o755)
        # The login shell must not find root's own files, nor set a PATH of its own.
        path = shlex.quote(f"{os.path.dirname(python)}:/usr/bin:/bin")
        config = os.path.join(self.folder, "sshd_config")
        write(
            config,
            f"""\
ListenAddress 127.0.0.1
Port {self.port}
HostKey {self.folder}/../key
AuthorizedKeysFile {self.folder}/../key.pub
PidFile none
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
SetEnv "HOME={self.folder}"
ForceCommand PATH={path} exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
""",
        )
        script = f"hostname {self.name}; exec /usr/sbin/sshd -D -e -f {shlex.quote(config)}"
        with open(os.path.join(self.folder, "sshd.log"), "wb") as log:
            self.sshd = subprocess.Popen(
                [*ISOLATED, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        """Whether the host has been started, and answers."""
        return self.sshd is not None and self.can_connect()

    def can_connect(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def start_shim(self) -> None:
        """Start the host's shim, by SSH."""
        command = ["exec", "python", os.path.join(".ci", os.path.basename(__file__))]
        remote = shlex.join([*command, "--shim", self.shim.behaviour])
        with open(self.log, "wb") as log:
            self.shim_process = subprocess.Popen(
                [*self.ssh, f"cd {shlex.quote(ROOT)} && {remote}"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def shim_said(self, words: str) -> int:
        """How many lines of the shim begin with these words."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return sum(line.startswith(words) for line in log)

    def mend_shim(self) -> None:
        """Start the absent shim, and free the busy one."""
        with contextlib.suppress(BrokenPipeError):  # it has died
            assert self.shim_process and self.shim_process.stdin
            self.shim_process.stdin.write(b"\n")
            self.shim_process.stdin.flush()

    def end_shim(self) -> None:
        """Let the shim finish its request, and wait for its end."""
        assert self.shim_process
        self.shim_process.communicate(timeout=LONG)

    def stop(self) -> None:
        """End the host, and all that runs there."""
        if self.sshd:
            end_isolated(self.sshd)
        if self.shim_process:
            self.shim_process.kill()
            self.shim_process.wait()


def end_isolated(process: subprocess.Popen[Any]) -> None:
    """End a command that was started ISOLATED, and all that it has started."""
    if process.poll() is not None:
        return
    # unshare waits for the first process there, which is the last one to end.
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def copy_cache(cache: str, copy: str) -> None:
    """Make a cache for wine-python that has a registry of its own, and shares all the rest."""
    os.mkdir(copy)
    for entry in os.scandir(cache):
        target = os.path.join(copy, entry.name)
        if os.path.exists(os.path.join(entry.path, "system.reg")):
            os.mkdir(target)
            for name in "system.reg", "user.reg", "userdef.reg", ".update-timestamp":
                shutil.copy(os.path.join(entry.path, name), target)
            drives = os.path.join(entry.path, "dosdevices")
            shutil.copytree(drives, os.path.join(target, "dosdevices"), symlinks=True)
            os.symlink(os.path.join(entry.path, "drive_c"), os.path.join(target, "drive_c"))
        elif entry.name.startswith("python-") and entry.is_dir():
            os.symlink(entry.path, target)


@contextlib.contextmanager
def running_hosts(folder: str, cache: str) -> Iterator[list[Host]]:
    """Run the fleet, with its keys and its ssh_config in the folder."""
    key = os.path.join(folder, "key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    hosts = [Host(f"host{number:02}", shim, folder) for number, shim in enumerate(SHIMS, 1)]
    config = [f"Host {host.name}\n  Port {host.port}\n" for host in hosts]
    config.append(f"""\
Host *
  HostName 127.0.0.1
  User root
  IdentityFile {key}
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
""")
    write(os.path.join(folder, "ssh_config"), "".join(config))
    write(os.path.join(folder, "hosts"), "".join(f"{host.name}\n" for host in hosts))
    os.makedirs("/run/sshd", exist_ok=True)
    try:
        for host in hosts:
            if host.shim.behaviour != "host is down":
                host.start(cache)
        started = [host for host in hosts if host.sshd]
        wait_until("the hosts are up", lambda: all(host.is_up() for host in started))
        yield hosts
    finally:
        for host in hosts:
            host.stop()


@contextlib.contextmanager
def running_shims(hosts: list[Host]) -> Iterator[None]:
    """Run the shims of the hosts that are up; at the end let them finish what they do."""
    up = [host for host in hosts if host.sshd]
    for host in up:
        host.start_shim()
    wait_until("the shims are ready", lambda: all(host.shim_said("ready") for host in up))
    yield
    for host in up:
        host.end_shim()


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LONG
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited for {LONG:.0f} s until {what}")
        time.sleep(0.1)


# ---- The engines --------------------------------------------------------------------------------


class Fleet(NamedTuple):
    """What an engine needs to know."""

    folder: str
    """Where the ssh_config and the list of hosts are."""
    ansible: list[str]
    """The command that runs a playbook."""


def run(command: list[str], **options: Any) -> str:
    """Run a command and return what it printed; it is stopped if we are."""
    process = subprocess.Popen(
        [*ISOLATED, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
        **options,
    )
    try:
        said: str = process.communicate(timeout=LONG)[0]
        return said
    finally:
        end_isolated(process)


def run_parallel_ssh(fleet: Fleet, names: list[str], outcomes: str) -> str:
    """Send the request to these hosts by parallel-ssh."""
    return run_everywhere(fleet, names, outcomes, f"{REQUEST} --json")


def run_everywhere(fleet: Fleet, names: list[str], outcomes: str, arguments: str) -> str:
    """Run vmshim.py with some arguments on these hosts, by parallel-ssh."""
    write(os.path.join(fleet.folder, "these"), "".join(f"{name}\n" for name in names))
    options = ["-h", "these", "-p", "4", "-t", "0", "-I", "-x", "-F ssh_config", "-o", outcomes]
    with open(os.path.join(ROOT, "vmshim.py"), "rb") as file:
        command = ["/usr/bin/parallel-ssh", *options, f"python -I - {arguments}"]
        return run(command, cwd=fleet.folder, stdin=file)


def run_ansible(fleet: Fleet, names: list[str], outcomes: str) -> str:
    """Send the request to these hosts by the README's playbook."""
    folder = os.path.dirname(outcomes)
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        [playbook] = re.findall(r"^```yaml\n(.*?)^```$", file.read(), re.DOTALL | re.MULTILINE)
    assert "ansible.windows.win_command" in playbook
    playbook = playbook.replace("ansible.windows.win_command", "ansible.builtin.command")
    write(os.path.join(folder, "vmshim.yml"), playbook)
    shutil.copy(os.path.join(ROOT, "vmshim.py"), folder)
    write(os.path.join(folder, "again"), "".join(f"{name}\n" for name in names))
    environment = {
        **os.environ,
        "ANSIBLE_HOME": os.path.join(fleet.folder, "ansible"),
        "ANSIBLE_LOCALHOST_WARNING": "False",
        "ANSIBLE_REMOTE_TMP": os.path.join(fleet.folder, "ansible", "remote"),
        "ANSIBLE_NOCOLOR": "1",
        # The module goes through standard input, too, and nothing is left on the host.
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_SSH_ARGS": f"-F {fleet.folder}/ssh_config",
        "LC_ALL": "C.UTF-8",
    }
    # All hosts of the first batch, the one that is down, can't be reached. The others must follow.
    variables = {
        "request": REQUEST,
        "batch": [1, 5],
        "ansible_python_interpreter": sys.executable,
    }
    options = ["-i", f"{fleet.folder}/hosts", "-f", "4", "--limit", "@again"]
    command = [*fleet.ansible, *options, "-e", json.dumps(variables), "vmshim.yml"]
    return run(command, cwd=folder, stdin=subprocess.DEVNULL, env=environment)


ENGINES = {"parallel-ssh": run_parallel_ssh, "ansible": run_ansible}


# ---- The books ----------------------------------------------------------------------------------


NO_LINE = {"host": None, "outcome": "no line", "status": None, "retry": False, "error": None}


def read_rows(path: str) -> list[dict[str, Any]]:
    """Return the JSON lines that a host has left."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        return [json.loads(line) for line in file]
    return []


def run_engine(engine: str, fleet: Fleet, hosts: list[Host], results: str) -> list[str]:
    """Send the request to all hosts, then again where that is safe; return what went wrong."""
    send = ENGINES[engine]
    rows: dict[str, list[dict[str, Any]]] = {host.name: [] for host in hosts}
    names = list(rows)
    with running_shims(hosts):
        for number in 1, 2:
            outcomes = os.path.join(results, engine, f"round-{number}", "outcomes")
            os.makedirs(outcomes)
            started = time.monotonic()
            said = send(fleet, names, outcomes)
            write(os.path.join(os.path.dirname(outcomes), "log"), said)
            for name in names:
                [row] = read_rows(os.path.join(outcomes, name)) or [NO_LINE]
                rows[name].append(row)
            seconds = time.monotonic() - started
            print(f"\n{engine}, round {number}: {len(names)} hosts, {seconds:.0f} s")
            print_table(
                ["host", "shim", "outcome", "status", "retry", "error"],
                [
                    [host.name, host.shim.behaviour, *row_cells(rows[host.name][-1])]
                    for host in hosts
                    if host.name in names
                ],
            )
            names = [name for name in names if rows[name][-1]["retry"]]
            for host in hosts:
                if host.shim_process and number == 1:
                    host.mend_shim()
    wrong = []
    table = []
    for host in hosts:
        outcomes_of_host = [row["outcome"] for row in rows[host.name]]
        received = host.shim_said("received") if host.sshd else 0
        carried_out = host.shim_said("carried out") if host.sshd else 0
        faults = find_faults(host, rows[host.name], received, carried_out)
        wrong += [f"{engine}: {host.name}, {host.shim.behaviour}: {fault}" for fault in faults]
        table.append(
            [
                host.name,
                host.shim.behaviour,
                ", ".join(outcomes_of_host),
                received,
                carried_out,
                "; ".join(faults) or "as it should be",
            ]
        )
    print(f"\n{engine}: what the hosts were told, and what their shims did")
    print_table(["host", "shim", "outcomes", "received", "carried out", "verdict"], table)
    return wrong


def row_cells(row: dict[str, Any]) -> list[Any]:
    # The path of a pipe is long, and differs from run to run.
    error = re.sub(r"^\\\\\S+: ", "", row["error"] or "-")
    status = "-" if row["status"] is None else row["status"]
    return [row["outcome"], status, row["retry"], textwrap.shorten(error, 60, placeholder=" ...")]


def find_faults(
    host: Host, rows: list[dict[str, Any]], received: int, carried_out: int
) -> Iterator[str]:
    """Compare what a host was told with what its shim did."""
    outcomes = [row["outcome"] for row in rows]
    done, unknown = outcomes.count("done"), outcomes.count("unknown")
    if carried_out > 1:
        yield "carried out twice"
    if done and not carried_out:
        yield "lost"
    if carried_out > done + unknown:
        yield "carried out, but the host was told otherwise"
    if received != done + unknown + outcomes.count("refused"):
        yield "a request that was sent has not arrived, or one that was not has"
    if (outcomes, carried_out) != (host.shim.outcomes, host.shim.carried_out):
        yield f"expected {host.shim.outcomes}, {host.shim.carried_out} carried out"
    if any(row["host"] not in (None, host.name.upper()) for row in rows):
        yield "the line names another host"


def print_table(heads: list[str], rows: list[list[Any]]) -> None:
    cells = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    sys.stdout.flush()


def list_containers(fleet: Fleet, hosts: list[Host]) -> list[str]:
    """Ask all hosts for their containers, and print the answers joined; return what went wrong."""
    outcomes = os.path.join(fleet.folder, "containers")
    with running_shims(hosts):
        run_everywhere(fleet, [host.name for host in hosts], outcomes, "list --json-lines")
    print("\nlist --json-lines: all hosts")
    wrong = []
    table = []
    for host in hosts:
        rows = read_rows(os.path.join(outcomes, host.name))
        table += [[row["host"], row["id"], host.shim.behaviour, row["vm_shim"]] for row in rows]
        if [row["vm_shim"] for row in rows] != host.shim.listed:
            wrong.append(f"list: {host.name}, {host.shim.behaviour}: not {host.shim.listed}")
        if host.sshd and host.shim_said("received"):
            wrong.append(f"list: {host.name}: a request was sent")
    print_table(["host", "id", "shim", "vm_shim"], table)
    return wrong


# ---- What has to be there -----------------------------------------------------------------------


def install_packages() -> None:
    missing = [name for name, program in PACKAGES.items() if not os.path.exists(program)]
    if not missing:
        return
    print("installing", *missing, flush=True)
    # The package's own sshd is not wanted: this file keeps apt-get from starting it.
    policy = "/usr/sbin/policy-rc.d"
    is_ours = not os.path.exists(policy)
    if is_ours:
        write(policy, "#!/bin/sh\nexit 101\n")
        os.chmod(policy, 0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        for command in ["apt-get", "update", "-qq"], install:
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        if is_ours:
            os.remove(policy)


def install_ansible(cache: str) -> list[str]:
    """Make the virtual environment unless it is there; return the command for a playbook."""
    folder = os.path.join(cache, f"tools-{ANSIBLE.replace('==', '-')}")
    if not os.path.exists(folder):
        print("installing", ANSIBLE, flush=True)
        part = f"{folder}.part"
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", part], check=True)
        pip = [sys.executable, "-m", "pip", "--python", f"{part}/bin/python", "install", "-qq"]
        subprocess.run([*pip, "--disable-pip-version-check", ANSIBLE], check=True)
        os.rename(part, folder)
    return [f"{folder}/bin/python", "-m", "ansible", "playbook"]


def main(engines: list[str]) -> int:
    if sys.platform == "win32" or os.geteuid() != 0:
        print(f"fleet.py needs root; and apt-get install {' '.join(PACKAGES)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    install_packages()
    wine_python = [under_wine.WINE_PYTHON, "--python", under_wine.VERSION]
    subprocess.run([*wine_python, "-c", ""], check=True)  # fills the cache
    cache = subprocess.check_output([under_wine.WINE_PYTHON, "--cache"], text=True).strip()
    ansible = install_ansible(cache)
    results = os.path.join(cache, "fleet")
    shutil.rmtree(results, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        fleet = Fleet(folder, ansible)
        with running_hosts(folder, cache) as hosts:
            print(f"{sum(host.sshd is not None for host in hosts)} of {len(hosts)} hosts are up")
            wrong = list_containers(fleet, hosts)
            for engine in engines:
                wrong += run_engine(engine, fleet, hosts, results)
    for fault in wrong:
        print("WRONG:", fault)
    seconds = time.monotonic() - started
    print(f"\n{len(wrong)} faults, {seconds:.0f} s; the outcomes are in {results}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=[*ENGINES], help="only this one")
    parser.add_argument("--shim", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shim:
        run_shim(options.shim)
        sys.exit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main([options.engine] if options.engine else [*ENGINES]))
    except KeyboardInterrupt:
        print("\nstopped, and so are the hosts", file=sys.stderr)
        sys.exit(130)
