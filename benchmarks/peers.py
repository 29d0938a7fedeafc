"""Environments for packages to compare with. The project never imports them.

An environment sees the packages of the one that makes it, so that all run on the same torch (2 GB), and adds the peer and its
dependencies. It never gets another version of torch.
"""

import importlib.metadata
import os
import site
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from harness import RunFailed, last_line, run_fresh

_INSTALL_S = 900  # a network that hangs is an error too
_SAME = ("torch", "torchvision")


class Peer(NamedTuple):
    """package: its name on the index; modules: what is imported of it."""

    package: str
    modules: tuple[str, ...]


SIMCLR_PEERS = {
    "lightly": Peer("lightly", ("lightly.loss", "lightly.data", "lightly.models.modules", "lightly.transforms")),
    "simclr": Peer("simclr", ("simclr", "simclr.modules", "simclr.modules.transformations")),
}
LOADER_PEERS = {
    "webdataset": Peer("webdataset", ("webdataset",)),
    "litdata": Peer("litdata", ("litdata",)),
    "mosaicml": Peer("mosaicml-streaming", ("streaming",)),
    "spdl": Peer("spdl", ("spdl.pipeline",)),
    "ray-data": Peer("ray", ("ray.data",)),
    "ffcv": Peer("ffcv", ("ffcv", "ffcv.loader", "ffcv.writer")),
}


class Environment(NamedTuple):
    """python: the interpreter that has those in `versions`; missing: why the others are not there."""

    python: str
    versions: dict[str, str]
    missing: dict[str, str]

    def python_of(self, name: str) -> str:
        return self.python if name in self.versions else sys.executable


def environment_of(folder: str | None, names: Iterable[str], peers: Mapping[str, Peer] = SIMCLR_PEERS) -> Environment:
    """The environment in the folder, made where it is not there, with the named ones of the peers.

    None: those that are installed beside the project, as on a host without a network they may be. A peer that cannot be installed
    is a line of the result and no error.
    """
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
        same, log = home / "same.txt", home / "pip.log"
        same.write_text("".join(f"{name}=={version}\n" for name in _SAME if (version := _version_here(name))))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(same), peer.package]
        try:
            run_fresh(pip, log, limit=_INSTALL_S)
        except RunFailed as error:
            raise RunFailed(f"pip: {last_line(log) if str(error).startswith('exit') else error}") from None
        return _version(python, peer, home)


def _version(python: Path, peer: Peer, home: Path) -> str:
    code = f"import {', '.join(peer.modules)}, importlib.metadata; print(importlib.metadata.version({peer.package!r}))"
    log = home / f"{peer.package}.log"
    run_fresh([str(python), "-c", code], log)
    return last_line(log).split()[-1]
