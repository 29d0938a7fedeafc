"""`--no-skips`: whatever did not run fails the whole run, and is named. Slow tests that do not say why are named always, and the
stack of a process that crashed."""

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
from tests import outcomes

def pytest_configure(config):
    config.addinivalue_line("markers", "faults: x")
    config.pluginmanager.register(outcomes.Outcomes(no_skips=True, slow_seconds=0.05), "outcomes")
"""
PLAIN = """
import pytest

def test_plain():
    pass

@pytest.mark.faults
def test_fault():
    pass
"""
SKIPS = """
import pytest

@pytest.fixture
def rig():
    pytest.skip("no rig")

def test_rig(rig):
    pass

def test_sshd():
    pytest.skip("no sshd")

@pytest.mark.skipif(True, reason="no root")
def test_root():
    pass

@pytest.mark.xfail(reason="later")
def test_later():
    assert False

@pytest.mark.xfail(reason="already")
def test_already():
    pass
"""
SLOW = """
def test_slow():
    [x * x for x in range(2_000_000)]

def test_explained():
    '''Long.'''
    [x * x for x in range(2_000_000)]

def test_quick():
    pass
"""
CRASH = """
import ctypes

def test_native():
    ctypes.string_at(0)
"""


@pytest.fixture
def run(pytester):
    def run(*arguments, **files):
        pytester.makeconftest(CONFTEST)
        pytester.makepyfile(**files)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments)

    return run


@pytest.mark.parametrize("arguments", [["-m", "not faults"], ["-m", "faults"]])
def test_the_two_halves_leave_nothing_out(run, arguments):
    done = run(*arguments, test_it=PLAIN)
    assert done.ret == 0
    assert "did not run" not in done.stdout.str()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "fault"],
        ["-m", "not faults", "--deselect", "test_it.py::test_plain"],
        ["-m", "not faults", "-k", "other"],
        ["-m", "not faults", "-k", "other", "-n", "1"],
    ],
)
def test_what_is_left_out_by_other_means_fails(run, arguments):
    done = run(*arguments, test_it=PLAIN + "\ndef test_other():\n    pass\n")
    assert done.ret == 1
    assert "test_it.py::test_plain: deselected" in done.stdout.str()


@pytest.mark.parametrize("processes", [[], ["-n", "2"]])
def test_a_skip_fails_and_is_named(run, processes):
    done = run(*processes, test_it=SKIPS, test_module="import pytest\npytest.importorskip('not_there')", test_plain=PLAIN)
    assert done.ret == 1
    said = done.stdout.str().split("did not run")[1]
    for each in ("rig: no rig", "sshd: no sshd", "root: no root", "later: later", "already: already"):
        assert f"test_it.py::test_{each}" in said
    assert "test_module.py: could not import 'not_there'" in said


def test_a_slow_test_says_why(run):
    done = run(test_it=SLOW)
    assert done.ret == 0
    named = done.stdout.str().split("no docstring that says why")[1]
    assert "test_it.py::test_slow: " in named and "explained" not in named and "quick" not in named


def test_the_stack_of_a_process_that_crashes_is_shown(run):
    done = run("-n", "1", "--max-worker-restart", "0", test_crash=CRASH)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["*where a process crashed*", "gw0: Fatal Python error: Segmentation fault", "*in test_native"])
