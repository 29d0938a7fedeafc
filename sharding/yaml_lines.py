"""YAML with the line of each entry, for error messages."""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MAX_ENTRIES = 100_000


class YamlFile(NamedTuple):
    """A YAML file. about: its leading comment, without the #; content: as safe_load gives it; lines: the line of each entry, from
    1, by the keys and list indices that lead to it."""

    path: Path
    about: str
    content: Any
    lines: dict[tuple, int]

    def line(self, *keys) -> int:
        """The line of an entry; of the innermost entry around it if it is not in the file."""
        while keys not in self.lines:
            keys = keys[:-1]
        return self.lines[keys]

    def at(self, *keys) -> str:
        """FILE:LINE of an entry, with which every message about it begins."""
        return f"{self.path}:{self.line(*keys)}"

    def error(self, message: str, *keys) -> ValueError:
        """The error about an entry."""
        return ValueError(f"{self.at(*keys)}: {message}")

    def mapping(self, *keys) -> dict[Any, Any]:
        """The mapping under these keys, empty if there is none. Raises ValueError for anything else."""
        value: Any = self.content
        for depth, key in enumerate(keys, start=1):
            value = value.get(key)
            if value is None:
                return {}
            if not isinstance(value, dict):
                place = ": ".join(map(str, keys[:depth]))
                raise self.error(f"`{place}` must be a mapping of names to values, not {value!r}", *keys[:depth])
        return value

    def check_keys(self, known: Collection[str], *keys) -> None:
        """Raise ValueError for a key of the mapping that is not known, with the most similar one that is."""
        for name in self.mapping(*keys):
            if name not in known:
                near = difflib.get_close_matches(str(name), sorted(known), n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
                place = f"{': '.join(map(str, keys))}: " if keys else ""
                raise self.error(f"{place}there is no field {name!r}; {hint}", *keys, name)


def read_yaml(path: str | Path, *, example: str) -> YamlFile:
    """Read a YAML file. example: the way out where there is none.

    Raises ValueError if it is not YAML, has more than MAX_ENTRIES entries (a few aliases of aliases make billions), or has a
    duplicate key, of which PyYAML silently keeps the last.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file: give {example}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give {example}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this file is not text in UTF-8: save it as UTF-8") from None
    loader = yaml.SafeLoader(text)
    lines: dict[tuple, int] = {(): 1}
    try:
        root = loader.get_single_node()
        if root is not None:
            _mark(loader, root, (), (), lines, path)
        content = None if root is None else _built(loader.construct_document, root, path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: this is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: this is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: its entries are nested too deeply") from None
    finally:
        loader.dispose()
    return YamlFile(Path(path), _leading_comment(text), content, lines)


def _mark(loader, node, keys, above, lines, path):
    if node in above:
        raise ValueError(f"{path}:{node.start_mark.line + 1}: this alias refers to an entry that contains it")
    if len(lines) > MAX_ENTRIES:
        raise ValueError(f"{path}:{node.start_mark.line + 1}: more than {MAX_ENTRIES:,} entries, counting those of aliases")
    if isinstance(node, yaml.SequenceNode):
        for place, each in enumerate(node.value):
            lines[*keys, place] = each.start_mark.line + 1
            _mark(loader, each, (*keys, place), (*above, node), lines, path)
    elif isinstance(node, yaml.MappingNode):
        own = set()
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{path}:{line}: a mapping's key must be a word or a number")
            key = "<<" if key_node.value == "<<" else _built(loader.construct_object, key_node, path)
            if key in own:
                raise ValueError(f"{path}:{line}: duplicate key {key!r}: keep one of them")
            own.add(key)
            lines[*keys, key] = line
            _mark(loader, value, (*keys, key), (*above, node), lines, path)


def _built(construct, node, path):
    try:
        return construct(node)
    except ValueError as error:  # such as an impossible date
        raise ValueError(f"{path}:{node.start_mark.line + 1}: this is not YAML: {error}") from None


def _leading_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip()
