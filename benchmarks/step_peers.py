"""Other packages to measure against, in an environment of their own: the project never imports them.

The environment sees the packages of the one that makes it, so that all run on the same torch (which is 2 GB), and holds the
others' code and whatever else they want. Of torch it takes no other version.
"""

import importlib.metadata
import os
import site
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from measuring import RunFailed, run_fresh

_INSTALL_S = 900  # a network that hangs is an error too
_SAME = ("torch", "torchvision")


class Peer(NamedTuple):
    """package: its name on the index; modules: what is used of it."""

    package: str
    modules: tuple[str, ...]


PEERS = {
    "lightly": Peer("lightly", ("lightly.loss", "lightly.data", "lightly.models.modules", "lightly.transforms")),
    "simclr": Peer("simclr", ("simclr", "simclr.modules", "simclr.modules.transformations")),
}


class Environment(NamedTuple):
    """python: the interpreter that has those in `versions`; missing: why the others are not there."""

    python: str
    versions: dict[str, str]
    missing: dict[str, str]


def environment_of(folder: str | None, names: Iterable[str], peers: Mapping[str, Peer] | None = None) -> Environment:
    """The environment in the folder, made where it is not there, with the peers of these names. None: those that are installed
    beside the project, as on a host without a network they may be.

    peers: that there are, by their names; None: the SimCLR packages. One that cannot be installed is a line of the result, and no
    error: the others' figures are worth having.
    """
    peers = PEERS if peers is None else peers
    names = [name for name in peers if name in names]
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # or it asks a server at every start
    if folder is None:
        here = {name: version for name in names if (version := _version_here(peers[name].package))}
        why = "not installed: --peers FOLDER does that"
        return Environment(sys.executable, here, {name: why for name in names if name not in here})
    home = Path(folder).resolve()
    python, versions, missing = home / "bin" / "python", {}, {}
    for name in names:
        try:
            if not python.exists():
                _make(home)
            versions[name] = _installed(python, peers[name], home)
        except RunFailed as error:
            missing[name] = f"not installed: {error}"
    return Environment(str(python), versions, missing)


def _version_here(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _make(home: Path) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    run_fresh([sys.executable, "-m", "venv", str(home)], home.with_name(f"{home.name}.log"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (home / "lib" / version / "site-packages" / "shared.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))


def _installed(python: Path, peer: Peer, home: Path) -> str:
    """Its version, after installing it if need be. Raises RunFailed."""
    try:
        return _version(python, peer, home)
    except RunFailed:
        same = home / "same.txt"
        same.write_text("".join(f"{name}=={version}\n" for name in _SAME if (version := _version_here(name))))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(same), peer.package]
        try:
            done = subprocess.run(pip, capture_output=True, text=True, timeout=_INSTALL_S, stdin=subprocess.DEVNULL, check=False)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"pip was not done after {_INSTALL_S} s") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise RunFailed(f"pip: {said[-1].strip() if said else 'it said nothing'}") from None
        return _version(python, peer, home)


def _version(python: Path, peer: Peer, home: Path) -> str:
    code = f"import {', '.join(peer.modules)}, importlib.metadata; print(importlib.metadata.version({peer.package!r}))"
    log = home / f"{peer.package}.log"
    run_fresh([str(python), "-c", code], log)
    return log.read_text().split()[-1]
