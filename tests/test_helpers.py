"""A script that is called in this process is what it is in one of its own."""

import sys

import pytest

from tests.helpers import call_script, run_python

SCRIPT = """
import os, sys
print("in", os.path.basename(os.getcwd()), sys.argv[1:], __name__, os.environ["COLUMNS"])
print("to stderr", file=sys.stderr)
outcome = sys.argv[1]
if outcome == "raises":
    raise RuntimeError("ours")
sys.exit({"ends": None, "zero": 0, "two": 2, "text": "a sentence"}[outcome])
"""


@pytest.mark.parametrize("outcome", ["ends", "zero", "two", "text", "raises"])
def test_call_script_is_run_python(tmp_path, outcome):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = sys.argv, sys.stdout
    called, ran = (run(str(script), outcome, cwd=tmp_path) for run in (call_script, run_python))
    assert (called.returncode, called.stdout) == (ran.returncode, ran.stdout)
    assert called.stderr.splitlines()[0] == ran.stderr.splitlines()[0] and called.stderr[-20:] == ran.stderr[-20:]
    assert (sys.argv, sys.stdout) == before


def test_a_script_of_ours():
    called, ran = (run("sharding/inspect_shards.py", "/nowhere") for run in (call_script, run_python))
    assert (called.returncode, called.stdout, called.stderr) == (ran.returncode, ran.stdout, ran.stderr)
    assert called.returncode == 2
