"""The design's rules, held against the code: who may import whom, names, sizes, and the signatures that others rely on."""

import ast
import dataclasses
import fnmatch
import functools
import graphlib
import importlib.metadata
import importlib.util
import inspect
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from docs.make_reference import SCRIPTS
from tests.helpers import ROOT

# Which of our folders a folder may import besides itself; arrows point one way.
MAY_IMPORT = {
    "sharding": set(),
    "models": set(),
    "pipelines": {"sharding"},
    "train": {"sharding", "models", "pipelines"},
    "tune": {"sharding", "models", "pipelines", "train"},
}
# Rooms of a folder, and which other rooms of that folder they may import. Those of train/ and tune/ stand on floors: arrows
# point down.
# "train" itself is config.py and the scripts. Sections are a part of the room that they are in.
ROOMS = {
    "sharding/sources": {"sharding"},
    "sharding/images": {"sharding"},
    "sharding/splits": {"sharding"},
    "sharding/drawn_patches": {"sharding"},
    "train/records": set(),
    "train/scoring": set(),
    "train/trainer": {"train", "train/records", "train/scoring"},
    "train/cluster": {"train", "train/records", "train/trainer"},
    "train/reporting": {"train/records", "train/scoring", "train/trainer"},
    "train/reporting/sections": {"train/records", "train/scoring", "train/trainer"},
    "tune/study": set(),
    "tune/execution": {"tune/study"},
    "tune/reporting": {"tune/study", "tune/execution"},
    "train/stages": {"train", "train/records", "train/scoring", "train/trainer", "train/cluster", "train/reporting"},
}
# Outside packages that are the business of few modules, by their dotted prefix.
ONLY_IN = {
    "ray": {"train.cluster.ray_cluster", "train.cluster.launcher", "tune.execution.ray_trials"},
    "nvidia.dali": {"pipelines.dali_graph"},
    "nvidia": {"pipelines.dali_graph", "sharding.images.image_checks"},
    "simplejpeg": {"sharding.images.jpeg_decoder"},
}
MOST_LINES = 400

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in MAY_IMPORT
    for path in sorted((ROOT / folder).glob("**/*.py"))
    if path.stem != "__init__"
}


def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def imports_of(path: Path, *, lazy: bool = True) -> set[str]:
    """Dotted names that a module imports, with `from a import b` as a.b; lazy: also inside functions."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import, which a script cannot have"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _name_of(node.func) in ("import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: an import that cannot be read off the code"
            found.add(node.args[0].value)
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source_of(path)))
    return found


def _name_of(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_the_reader_of_imports_reads_them(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import a.b\nfrom c import d\ndef f():\n    import e\n    class G:\n        from h.i import j as k\n")
    assert imports_of(path) == {"a.b", "c.d", "e", "h.i.j"}
    assert imports_of(path, lazy=False) == {"a.b", "c.d"}
    path.write_text("if True:\n    import importlib\nx = importlib.import_module('ray')")
    assert imports_of(path) == {"importlib", "ray"}


def test_all_folders_are_known():
    """A new folder of modules, or one inside another, needs its rule here."""
    tops = [top for top in ROOT.iterdir() if top.is_dir() and not top.name.startswith((".", "tests", "benchmarks", "docs"))]
    folders = {path.parent.relative_to(ROOT).as_posix() for top in tops for path in top.glob("**/*.py")}
    assert folders == set(MAY_IMPORT) | set(ROOMS)
    assert len(MODULES) >= 30


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    folder = module.split(".")[0]
    ours = {"tests", "benchmarks", *MAY_IMPORT}
    imported = {name.split(".")[0] for name in imports_of(MODULES[module])} & ours
    assert imported <= MAY_IMPORT[folder] | {folder}


def room_of(module: str) -> str:
    """The room that a module is in, sections counted to the room around them; the folder where it is in none."""
    return MODULES[module].parent.relative_to(ROOT).as_posix().removesuffix("/sections")


@pytest.mark.parametrize("module", MODULES)
def test_rooms_point_one_way(module):
    names = imports_of(MODULES[module])
    imported = {other for other in MODULES if any(starts_with(name, other) for name in names)}
    folder, room = module.split(".")[0], room_of(module)
    for other in imported:
        if other.split(".")[0] == folder and room_of(other) != room and room != folder:
            assert room_of(other) in ROOMS[room], other
            assert folder != "train" or room_of(other) != "train" or other == "train.config", (
                f"{module} imports a script, {other}"
            )


def test_rooms_stand_on_floors():
    """The table above has no circle."""
    floors = graphlib.TopologicalSorter({room: below - {"sharding", "train"} for room, below in ROOMS.items()})
    assert set(floors.static_order()) == set(ROOMS)


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_that_few_may_import(package):
    users = {module for module, path in MODULES.items() if any(starts_with(name, package) for name in imports_of(path))}
    assert users <= ONLY_IN[package]


def test_ray_is_imported_only_when_it_is_used():
    """It takes seconds, and most commands do without."""
    for module in ONLY_IN["ray"]:
        assert not any(starts_with(name, "ray") for name in imports_of(MODULES[module], lazy=False)), module


def test_no_circles():
    graph = {}
    for module, path in MODULES.items():
        names = imports_of(path)
        graph[module] = {other for other in MODULES if any(starts_with(name, other) for name in names)}
        assert module not in graph[module]
    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert sum(len(others) for others in graph.values()) > 50  # the arrows are seen at all


@functools.cache
def installed_modules():
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_hides_another(module):
    """`python sharding/build.py` puts sharding/ first on sys.path: its modules come before all others of their name."""
    name = module.split(".")[-1]
    others = set(installed_modules().get(name, ())) - {"patchclr"}
    assert name not in sys.stdlib_module_names
    assert not others, f"{name} is also a module of {others}"
    assert name not in MAY_IMPORT


@functools.cache
def left_out() -> list[str]:
    """Patterns of names that git, or what copies the project to the nodes of a cluster, leaves out."""
    ignored = [line.strip("/") for line in source_of(ROOT / ".gitignore").splitlines()]
    clusters = [yaml.safe_load(source_of(ROOT / file)) for file in ("cluster.yaml", "cluster.local.yaml")]
    return ignored + [pattern for cluster in clusters for pattern in cluster["rsync_exclude"]]


FOLDERS = sorted({path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()})


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_hides_a_package_or_stays_behind(folder):
    """A folder beside a script hides packages as a module does. And it must reach the nodes and the wheel."""
    name = folder.split("/")[-1]
    if "/" in folder:
        assert name not in sys.stdlib_module_names and not set(installed_modules().get(name, ())) - {"patchclr"}
        assert name not in MAY_IMPORT
    assert not [pattern for pattern in left_out() if fnmatch.fnmatch(name, pattern)]
    assert folder.replace("/", ".") in tomllib.loads(source_of(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]
    assert (ROOT / folder / "__init__.py").exists()


def test_no_file_stays_behind():
    """Modules and what lies beside them: no name is left out, and what is no module is listed as the package's data."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).iterdir() if path.is_file()]
    assert not [path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in left_out())]
    listed = tomllib.loads(source_of(ROOT / "pyproject.toml"))["tool"]["setuptools"]["package-data"]
    for path in files:
        if path.suffix != ".py":
            assert path.name in listed[path.parent.relative_to(ROOT).as_posix().replace("/", ".")], path


def test_scripts_are_short():
    lengths = {script: len(source_of(ROOT / script).splitlines()) for script in SCRIPTS}
    assert max(lengths.values()) < MOST_LINES, lengths


@pytest.mark.parametrize("module", MODULES)
def test_a_long_module_says_why(module):
    text = source_of(MODULES[module])
    assert len(text.splitlines()) <= MOST_LINES or f"more than {MOST_LINES} lines" in (ast.get_docstring(ast.parse(text)) or "")


def test_all_scripts_are_known():
    found = {path.relative_to(ROOT).as_posix() for path in MODULES.values() if '__name__ == "__main__"' in source_of(path)}
    assert found == set(SCRIPTS)


# The names in code that others rely on


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def required(function) -> set[str]:
    empty = inspect.Parameter.empty
    return {name for name, p in inspect.signature(function).parameters.items() if p.default is empty and name != "self"}


def keywords(function) -> set[str]:
    """Parameters that can only be given by name."""
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_read_manifest():
    from sharding.manifest import read_manifest

    assert parameters(read_manifest)[0] == "shards"
    assert required(read_manifest) == {"shards"}


def test_select():
    from sharding.selection import select

    assert parameters(select)[0] == "manifest"
    assert keywords(select) >= {"split", "fraction", "balance", "validation", "seed"}
    assert required(select) == {"manifest"}


def test_draw_views():
    from pipelines.views import draw_views

    assert parameters(draw_views)[0] == "ids"
    assert keywords(draw_views) >= {"seed", "epoch", "recipe"}


def test_view_loader():
    from pipelines.loader import Batch, ViewLoader

    assert parameters(ViewLoader.__init__)[:2] == ["shards", "ids"]
    wanted = {"batch_size", "image_size", "recipe", "seed", "rank", "world_size", "device", "backend"}
    assert keywords(ViewLoader.__init__) >= wanted
    assert required(ViewLoader.__init__) <= {"shards", "ids", "batch_size", "image_size", "recipe", "seed"}
    assert set(inspect.signature(Batch).parameters) == {"views", "id", "label"}
    assert parameters(ViewLoader.state_dict) == [] and len(parameters(ViewLoader.load_state_dict)) == 1
    assert callable(ViewLoader.__iter__)


def test_nt_xent():
    from models.ntxent import nt_xent

    assert parameters(nt_xent)[:3] == ["z", "temperature", "group"]
    assert inspect.signature(nt_xent).parameters["group"].default is None
    assert required(nt_xent) == {"z", "temperature"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_flags_are_a_config(script):
    """One frozen dataclass per script, every field with its line of help."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        config = next(iter(inspect.signature(module.main).parameters.values())).annotation
    finally:
        del sys.modules[spec.name]
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    assert config.__doc__ and not config.__doc__.startswith(f"{config.__name__}(")
    for field in dataclasses.fields(config):
        assert field.metadata.get("help"), field.name
