"""Every command of docs/tutorial.md, in its order, on the patches that the tutorial generates."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from tests.helpers import ROOT, call_script

TUTORIAL = ROOT / "docs" / "tutorial.md"


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The name of the file to save a block as, or "" where it is commands, and its content."""
    return re.findall(r"(?:Save this as `([^`]+)`:\n\n)?^```\w*\n(.*?)^```$", text, flags=re.M | re.S)


def as_png(folder: Path) -> None:
    """What the tutorial is about: a folder of PNGs."""
    for path in [*folder.glob("**/*.jpg")]:
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()


@pytest.fixture
def one_thread():
    """Threads that wait for each other are slow on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.mark.timeout(900)
def test_every_command(tmp_path, one_thread):
    """Takes 40 s: it compiles the view kernels, pretrains, evaluates 18 times, and writes reports and tables."""
    (_, setup), *blocks = code_blocks(TUTORIAL.read_text())
    assert setup.splitlines() == ["make install", "source .venv/bin/activate"]
    printed = {}
    for file, content in blocks:
        if file:
            (tmp_path / file).write_text(content)
            continue
        for command in content.replace("\\\n", " ").splitlines():
            python, script, *arguments = shlex.split(command)
            done = call_script(script, *arguments, cwd=tmp_path)
            assert python == "python" and done.returncode == 0, f"{command}\n{done.stderr}"
            printed[script] = printed.get(script, "") + done.stdout
            if script == "sharding/synthetic.py":
                as_png(tmp_path / "patches")

    assert "300 PNG" in printed["sharding/build.py"]
    assert "4 of 4 finished" in printed["tune/grid.py"]  # as the page says: the study takes the runs that are there
    table = (tmp_path / "paper-tables" / "test-slides.md").read_text()
    assert all(f"| {stage} |" in table for stage in ("linear", "linear-random", "supervised")) and "**" in table
    assert "the test split has only 4 groups" in (tmp_path / "report.html").read_text()
    for file in ("views.png", "paper.html", "runs/simclr/report.html", "embeddings/part-00000.parquet"):
        assert (tmp_path / file).stat().st_size > 1000, file
