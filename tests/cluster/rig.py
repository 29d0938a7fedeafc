"""Two machines and a laptop on this one: namespaces, each with a network, processes, /tmp/ray and home of its own, and a bridge.

Each machine has an sshd, with keys that are made for it and thrown away. `ray stop` in one of them sees no process of another
and none of the host's, and all of them die with the first process of the namespaces.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import yaml

from tests.helpers import ROOT

NODES = {"head": "10.77.0.2", "worker": "10.77.0.3"}
_LAPTOP = "10.77.0.1"
_HOME = "/run/home"  # of each of the three
_TOOLS = ["sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter", "setpriv", "mount"]
_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNSHARE = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
_ENVIRONMENT = {"PATH": _PATH, "HOME": _HOME, "TERM": "dumb", "LANG": "C.UTF-8", "COLUMNS": "140"}
_READY = "ready"
_DRIVE = "drive"
_DRIVE_MIB = 64

# What all three share: names, keys, the account's home. What is mounted here nobody outside sees.
_BEGIN = """
mount -t tmpfs tmpfs /run && mkdir -p /run/netns /run/sshd {home}
ip link add name bridge type bridge
"""
_NETWORK = """
hostname laptop
for name in passwd shadow hosts; do mount --bind {folder}/$name /etc/$name; done
mount --bind {folder}/laptop {home}
mount -t tmpfs -o size={drive_mib}m tmpfs {drive}
mkdir -p {masked}
for place in {masked}; do mount -t tmpfs tmpfs $place; done
ip link set lo up
ip addr add {laptop}/24 dev bridge
ip link set bridge up
"""
# A machine: its end of a cable whose other end is in the bridge, and its sshd.
_NODE = """
ip netns add {name}
ip link add name {name} type veth peer name eth0 netns {name}
ip link set {name} master bridge up
ip -n {name} addr add {address}/24 dev eth0
ip -n {name} link set eth0 up
ip -n {name} link set lo up
{power_on}
"""
_POWER_ON = """
ip netns exec {name} {unshare} bash -euc {inside} &
echo $! > {folder}/{name}.process
"""
_INSIDE = """
hostname {name}
mount --bind {folder}/{name} {home}
for place in {masked} /dev/shm; do mount -t tmpfs tmpfs $place; done
exec {sshd} -D -e -f {folder}/sshd_config
"""
_SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
LogLevel ERROR
"""


def missing() -> str | None:
    """Why there can be no rig on this machine; None where there can."""
    if lacking := [tool for tool in _TOOLS if not shutil.which(tool, path=_PATH)]:
        return f"{', '.join(lacking)} not installed (openssh-server, rsync, iproute2, util-linux)"
    if os.geteuid() != 0:
        return "namespaces with an sshd in them need root"
    tried = _unshared(["bash", "-euc", _BEGIN.format(home=_HOME)])
    if tried.returncode:
        return f"this machine forbids namespaces or bridges: {' '.join(tried.stderr.split())}"
    return None


class Rig(NamedTuple):
    """folder: what all three and the host see, at the same path. process: the first of the namespaces, as the host numbers it."""

    folder: Path
    process: int

    @property
    def drive(self) -> Path:
        """A network drive of 64 MiB, as the three see it."""
        return self.folder / _DRIVE

    def seen_from_here(self, path: Path) -> Path:
        """A file of the three, as a path of the host."""
        return Path(f"/proc/{self.process}/root{path}")

    def cut(self, node: str) -> None:
        """Pull the cable of a machine, which runs on."""
        self._done("ip", "link", "set", node, "down")

    def mend(self, node: str) -> None:
        """Plug it in again."""
        self._done("ip", "link", "set", node, "up")

    def power_off(self, node: str) -> None:
        """End a machine as if its plug were pulled: nobody hears of it any more."""
        self.cut(node)
        self._done("bash", "-c", f"kill -KILL $(cat {shlex.quote(str(self.folder))}/{node}.process)")

    def power_on(self, node: str) -> None:
        """Begin it again, with its home as it was."""
        self.mend(node)
        self._done("bash", "-euc", f"({_power_on(node, self.folder)}) < /dev/null > /dev/null 2>&1")

    def _done(self, *command):
        done = self.here(*command)
        assert done.returncode == 0, done.stdout

    def here(self, *command: object, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run a command on the laptop, in the project's folder. Its output is text, standard error in it."""
        return subprocess.run(
            self._entered(command),
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def begin(self, *command: object, output: IO[str]) -> subprocess.Popen:
        """Begin a command on the laptop, as `here` runs one to its end."""
        return subprocess.Popen(
            self._entered(command), env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )

    def _entered(self, command):
        namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc"]
        return ["nsenter", "--target", str(self.process), *namespaces, f"--wd={ROOT}", "--", *map(str, command)]

    def on(self, node: str, command: str, timeout: float = 60) -> str:
        """What a command prints on a node, in a shell as Ray opens one there."""
        options = ["-i", f"{_HOME}/.ssh/patchclr", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"]
        shell = f"touch ~/.bashrc; . ~/.bashrc; {command}"
        return self.here("ssh", *options, f"root@{NODES[node]}", f"bash -lc {shlex.quote(shell)}", timeout=timeout).stdout


def cluster_file(rig: Rig) -> Path:
    """The shipped cluster.local.yaml for the rig's machines, which find Python's packages installed: they have no network to get
    them from. The project itself they get as any machine does."""
    config = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    config["provider"] |= {"head_ip": NODES["head"], "worker_ips": [NODES["worker"]]}
    config["auth"]["ssh_user"] = "root"
    (install,) = (command for command in config["setup_commands"] if "pip install" in command)
    config["setup_commands"][config["setup_commands"].index(install)] = _installed()
    config["rsync_exclude"].remove(
        "__pycache__"
    )  # what Numba has compiled for this processor goes along: minutes on a busy machine
    path = rig.folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, width=1000))
    return path


def _installed() -> str:
    """In place of pip: an environment whose packages are this one's, and whose project is the node's own copy."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Path(sys.executable).parents[1] / "lib" / version / "site-packages"
    ray = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
    return (
        f"{sys.executable} -m venv --without-pip ~/.patchclr"
        f" && printf '%s\\n' ~/patchclr {site} > ~/.patchclr/lib/{version}/site-packages/installed.pth"
        f" && printf '%s\\n' \"#!$HOME/.patchclr/bin/python\" '{ray}' > ~/.patchclr/bin/ray && chmod +x ~/.patchclr/bin/ray"
    )


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[Rig]:
    """Two machines that can be reached by ssh from the laptop and from each other, until the block ends."""
    (folder / _DRIVE).mkdir()
    for name in ("laptop", *NODES):
        (folder / name / ".ssh").mkdir(parents=True)
    _write_accounts(folder)
    for path in (folder / "host_key", folder / "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=30)
    shutil.copy(folder / "key", folder / "laptop" / ".ssh" / "patchclr")
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    log = folder / "rig.log"
    with log.open("w") as file:
        # setpriv: whoever is killed before the end of the block leaves no rig behind.
        begin = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "bash", "-euc", _script(folder)]
        outer = subprocess.Popen(begin, stdout=file, stderr=file, env={"PATH": _PATH})
    try:
        ends = time.monotonic() + 30
        while not _answers(folder, log):
            assert outer.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        (first,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        rig = Rig(folder, int(first))
        for node in NODES:
            while rig.on(node, "hostname").strip() != node:
                assert time.monotonic() < ends, log.read_text()
        yield rig
    finally:
        outer.kill()  # the kernel then kills all that is left in its namespace
        outer.wait()


def _answers(folder: Path, log: Path) -> bool:
    return _READY in log.read_text().splitlines()


def _script(folder: Path) -> str:
    nodes = [_NODE.format(name=name, address=address, power_on=_power_on(name, folder)) for name, address in NODES.items()]
    settings = _settings(folder)
    return "".join([_BEGIN.format(**settings), _NETWORK.format(**settings), *nodes, f"echo {_READY}\nwait\n"])


def _power_on(name: str, folder: Path) -> str:
    settings = {"name": name} | _settings(folder)
    return _POWER_ON.format(inside=shlex.quote(_INSIDE.format(**settings)), **settings)


def _settings(folder: Path) -> dict[str, object]:
    control = hashlib.sha256(b"root").hexdigest()[:10]  # as Ray names the folder of its connections
    return {
        "home": _HOME,
        "folder": shlex.quote(str(folder)),
        "drive": shlex.quote(str(folder / _DRIVE)),
        "drive_mib": _DRIVE_MIB,
        "laptop": _LAPTOP,
        "masked": f"/tmp/ray /tmp/ray_ssh_{control}",
        "sshd": shutil.which("sshd", path=_PATH),
        "unshare": shlex.join([part for part in _UNSHARE if part != "--net"]),
    }


def _write_accounts(folder: Path) -> None:
    """The accounts of this machine, with root's home where each machine has its own, and a root who may log in by key."""
    lines = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    accounts = [":".join([*line[:5], _HOME, "/bin/bash"] if line[0] == "root" else line) for line in lines]
    (folder / "passwd").write_text("\n".join(accounts) + "\n")
    (folder / "shadow").write_text("".join(f"{line[0]}:*:19000:0:99999:7:::\n" for line in lines))
    names = {"127.0.0.1": "localhost", _LAPTOP: "laptop"} | {address: name for name, address in NODES.items()}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names.items()))


def _unshared(command: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run([*_UNSHARE, *command], capture_output=True, text=True, timeout=30, check=False, env={"PATH": _PATH})
