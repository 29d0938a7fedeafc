"""The Ray that is started for this machine alone."""

import os
import stat
from pathlib import Path

LOOPBACK = {
    "0100007F",
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # 127.0.0.1 as an IPv6 address
}
LISTEN = "0A"


def descendants(pid: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def sockets_of(pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found.add(os.readlink(path))
            except OSError:
                continue
    return {link.removeprefix("socket:[").rstrip("]") for link in found if link.startswith("socket:[")}


def listening(pids: set[int]) -> set[str]:
    """The addresses that these processes listen on, in hexadecimal."""
    own, found = sockets_of(pids), set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in own:
                found.add(fields[1].partition(":")[0])
    return found


def test_it_listens_on_loopback_only(ray_here):
    ray_here.get(ray_here.remote(lambda: os.getpid()).remote())  # a worker is there as well
    processes = descendants(os.getpid())
    assert len(processes) > 4
    addresses = listening(processes)
    assert addresses and addresses <= LOOPBACK, addresses


def test_its_token_is_for_this_user_only(ray_here):
    assert stat.S_IMODE((Path.home() / ".ray/auth_token").stat().st_mode) == 0o600
