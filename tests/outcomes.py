"""What pytest's outcome hides: tests that did not run, slow tests that do not say why, and where a process crashed.

`pytest --no-skips` fails where a test was skipped, was expected to fail, or was left out although -m asks for it. Every run lists
the tests that took more than 10 s of processor time and have no docstring. Processor time is the same on a busy machine.

With pytest-xdist the processes that run tests have an `Outcomes` each, and so has the one that reports. It sees each test's
report, but what was left out before the tests began it has to be told by the others. When one of these crashes, its stack goes
to a file, which the process that reports shows at the end: on stderr it stands anywhere among the dots of the output.
"""

import faulthandler
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_CPU = "cpu_seconds"  # of report.user_properties


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    return sum(os.times()[:4])


class Outcomes:
    """no_skips: whether a test that did not run makes the whole run fail. slow_seconds: of processor time."""

    def __init__(self, *, no_skips: bool, slow_seconds: float = 10.0):
        self.no_skips, self.slow_seconds = no_skips, slow_seconds
        self.not_run: list[str] = []
        self._left_out: set[str] = set()  # before it began
        self.unexplained: list[str] = []
        self.crashes: list[str] = []

    def pytest_sessionstart(self, session) -> None:
        if worker := getattr(session.config, "workerinput", None):
            self._stack = _stack_file(worker).open("w")
            faulthandler.enable(self._stack)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item) -> Iterator[None]:
        before = _cpu_seconds()
        try:
            return (yield)
        finally:
            seconds = _cpu_seconds() - before
            if seconds > self.slow_seconds and not (item.function.__doc__ or "").strip():
                item.user_properties.append((_CPU, seconds))

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped or hasattr(report, "wasxfail"):
            self.not_run.append(_why(report))
        if report.when == "teardown" and (seconds := dict(report.user_properties).get(_CPU)):
            self.unexplained.append(f"{report.nodeid}: {seconds:.0f} s")

    def pytest_collectreport(self, report) -> None:
        if report.skipped:
            self._left_out.add(_why(report))

    def pytest_deselected(self, items) -> None:
        """-m "not faults" and -m faults together are all tests. Whatever else leaves one out, such as -k, hides it."""
        faults_only = {"faults": True, "not faults": False}
        for item in items:
            of_faults = item.get_closest_marker("faults") is not None
            if faults_only.get(item.config.option.markexpr, of_faults) == of_faults:
                self._left_out.add(f"{item.nodeid}: deselected")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        self._left_out.update(getattr(node, "workeroutput", {}).get("left_out", []))
        file = _stack_file(node.workerinput)
        if stack := file.read_text() if file.exists() else "":
            self.crashes.append(f"{node.gateway.id}: {stack}")
        file.unlink(missing_ok=True)

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        if (told := getattr(session.config, "workeroutput", None)) is not None:
            told["left_out"] = sorted(self._left_out)
            return
        self.not_run += sorted(self._left_out)
        if self.no_skips and self.not_run and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.crashes:
            terminalreporter.section("where a process crashed", red=True)
            terminalreporter.write_line("\n".join(self.crashes))
        if self.unexplained:
            terminalreporter.section(f"more than {self.slow_seconds:.0f} s of processor time, and no docstring that says why")
            terminalreporter.write_line("\n".join(self.unexplained))
        if self.no_skips and self.not_run:
            terminalreporter.section(f"--no-skips: {len(self.not_run)} tests did not run", red=True)
            terminalreporter.write_line("\n".join(self.not_run))


def _stack_file(worker: dict) -> Path:
    return Path(tempfile.gettempdir()) / f"pytest-{worker['testrunuid']}-{worker['workerid']}.stack"


def _why(report) -> str:
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    return f"{report.nodeid}: {why.removeprefix('Skipped: ') or 'no reason given'}"
