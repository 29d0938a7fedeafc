"""The command line of every script: a config dataclass becomes flags, and a user's mistake becomes one sentence.

A config is a frozen dataclass; a field made by `option` or `positional` is its flag. `--config FILE.yaml` sets any of
them, flags override it, and field names are the YAML keys.
"""

import dataclasses
import io
import math
import os
import re
import select
import signal
import sys
import typing
from collections.abc import Callable, Collection, Sequence

import rich.console
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, DefaultHelpFormatter

from sharding.yaml_lines import read_yaml

_AS_DEFAULT = object()


def option(
    default,
    text: str,
    *,
    identity: bool = True,
    old_default=_AS_DEFAULT,
    choices: Collection[str] | None = None,
    least: float | None = None,
):
    """A config field that becomes `--field-name`, with its default and its line of help.

    identity: whether the field decides the result; where, how fast and by how many something is done does not.
    old_default: the value that holds for records made before the field existed, where it is not `default`: what the code did
    then. Keep it when you give the field another default later.
    choices: the values that are accepted, such as the keys of a registry, to which names may still be added later.
    least: the least number that `check_numbers` accepts.
    """
    metadata = {
        "help": text,
        "identity": identity,
        "old_default": default if old_default is _AS_DEFAULT else old_default,
        "choices": choices,
        "least": least,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(text: str, *, identity: bool = True, choices: Collection[str] | None = None):
    """A config field that becomes `--field-name` and must be given. choices: as in `option`."""
    return dataclasses.field(metadata={"help": text, "identity": identity, "choices": choices})


def positional(text: str, *, identity: bool = True):
    """A config field that is given by its place; a list takes one or more."""
    return dataclasses.field(metadata={"help": text, "identity": identity, "positional": True})


def check_numbers(config) -> None:
    """Raise ValueError for a number that is below its field's `least`, or not finite."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), field.metadata.get("least")
        if least is not None and value is not None and not least <= value < math.inf:
            raise ValueError(f"--{field.name.replace('_', '-')} {value:g}: give at least {least:g}")


def old_defaults(config_class: type) -> dict[str, typing.Any]:
    """By field, the value that holds for a record made before the field existed. Fields without a default have none."""
    fields = dataclasses.fields(config_class)
    return {field.name: field.metadata["old_default"] for field in fields if "old_default" in field.metadata}


class _HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, at a width that a terminal shows."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=min(140, rich.console.Console().width))


class _Parser(ArgumentParser):
    """jsonargparse's, with a wrong flag answered by one sentence and exit code 2."""

    def error(self, message, ex=None):
        text = readable(message)
        hint = f"see {self.prog} --help"
        if text.startswith("unrecognized arguments") and os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.expanduser("~"):
            hint += "; `ray submit` cuts arguments at spaces: give those that have some in a file of the node, with --config"
        print(f"{self.prog}: {text} ({hint})", file=sys.stderr)
        sys.exit(2)


_OF_NO_TYPE = re.compile(r'[Kk]ey "(\w+)": Does not validate .*Subtypes: \[(.*?)\] .*Given value type: (\w+) Given value: (.*)')


def readable(message: object) -> str:
    """A message of jsonargparse in one line."""
    text = " ".join(str(message).split()).replace("<class '", "").replace("'>", "")
    found, wants_text = _OF_NO_TYPE.search(text), "Expected a str" in text
    if found:
        name, kinds, kind, value = found.groups()
        text = f"{name} is {value} ({kind}), and should be {' or '.join(kinds.replace('NoneType', 'null').split(', '))}"
    if wants_text:
        text += "; put text that looks like something else in quotes"
    return text


class _ConfigFile(ActionConfigFile):
    def __call__(self, parser, cfg, values, option_string=None):
        try:
            file = read_yaml(values, example="a YAML file of settings")
        except (ValueError, OSError) as error:
            parser.error(f"--config {describe(error)}")
        if not isinstance(file.content, dict):
            parser.error(f"--config {values}: give settings and their values, such as seed: 1")
        for action in parser._actions:
            value = file.content.get(action.dest)
            if action.nargs == "+" and not isinstance(value, list | None):
                parser.error(f"--config {file.at(action.dest)}: {action.dest} is a list, so write [{value}]")
        super().__call__(parser, cfg, values, option_string)


def build_parser(config_class: type, *, prog: str, description: str, exit_on_error: bool = True) -> ArgumentParser:
    """A parser with one flag per field of config_class, and --config.

    A list field takes one or more values; a bool field is `--name` or `--no-name`, also where its default is None. With
    exit_on_error False a wrong value raises jsonargparse.ArgumentError.
    """
    parser_class = _Parser if exit_on_error else ArgumentParser
    parser = parser_class(prog=prog, description=description, formatter_class=_HelpFormatter, exit_on_error=exit_on_error)
    parser.add_argument("--config", action=_ConfigFile, help="a YAML file with any of the settings below; flags override it")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        settings: dict[str, typing.Any] = {"help": field.metadata["help"]}
        if hint in (bool, bool | None):
            settings["action"] = ActionYesNo(no_prefix="no-")
        elif typing.get_origin(hint) is list:
            settings |= {"type": typing.get_args(hint)[0], "nargs": "+"}
        elif field.metadata.get("choices") is not None:
            settings["choices"] = field.metadata["choices"]
        else:
            settings["type"] = hint
        if field.metadata.get("positional"):
            parser.add_argument(field.name, **settings)
        elif field.default is not dataclasses.MISSING:
            parser.add_argument(flag, default=field.default, **settings)
        elif field.default_factory is not dataclasses.MISSING:
            parser.add_argument(flag, default=field.default_factory(), **settings)
        else:
            parser.add_argument(flag, required=True, **settings)
    return parser


def parse(config_class: type, arguments: Sequence[str] | None, *, prog: str, description: str):
    """The config that the arguments (default: sys.argv) ask for. Exits with code 2 when they are wrong."""
    parser = build_parser(config_class, prog=prog, description=description)
    values = parser.parse_args(arguments)
    return config_class(**{field.name: _plain(values[field.name]) for field in dataclasses.fields(config_class)})


def _plain(value):
    """Plain text: jsonargparse's restricted strings have types that YAML cannot write."""
    return str(value) if isinstance(value, str) else value


def run_script(main: Callable, config_class: type, *, prog: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Parse, call main(config), and turn a user's mistake into one sentence on stderr.

    Returns the exit code: 0, 2 for a mistake in the input (ValueError, or a file that cannot be read or written), 130
    after Ctrl-C, 143 after SIGTERM, which schedulers send. Anything else is our fault and keeps its traceback.
    """
    _open_standard_streams()
    config = parse(config_class, arguments, prog=prog, description=description)
    received = signal.SIGINT

    def terminate(*_) -> None:
        nonlocal received
        received = signal.SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the end
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main(config)
        sys.stdout.flush()
    except BrokenPipeError as error:
        # `... | head` ends quietly. Not by the signal, which a connection that a server closes sends as well.
        if not _nobody_reads():
            return _refused(prog, error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        return _refused(prog, error)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; run the same command again to resume", file=sys.stderr)
        return 128 + received
    finally:
        if received != signal.SIGTERM:
            signal.signal(signal.SIGTERM, before)
    return 0


def _open_standard_streams() -> None:
    """Without them (`2>&-`), the next file that is opened would take their numbers, and get what is written to them. And a
    terminal that cannot show a Korean name shows its code points."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refused(prog: str, error: BaseException) -> int:
    if os.environ.get("PATCHCLR_TRACEBACK"):
        raise error
    print(f"{prog}: {describe(error)}", file=sys.stderr)
    return 2


def _nobody_reads() -> bool:
    """Whether it is our own output that has lost its reader."""
    poll = select.poll()
    poll.register(
        sys.stdout.fileno(), 0
    )  # for the events that are always reported: an error of a pipe means that it has no reader
    return bool(poll.poll(0))


def describe(error: BaseException) -> str:
    """One line for a person: the message, and the file for an operating system's error."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    return without_addresses(" ".join(str(error).split()))


def without_addresses(text: str) -> str:
    """The text of a message without addresses of objects in memory, which differ between processes and tell a user nothing."""
    return re.sub(r" at 0x[0-9a-f]+(?=>)", "", text)
