"""Write an HTML report of one run, or of several side by side: python train/report.py runs/a runs/b --out report.html"""

import sys
from dataclasses import dataclass
from pathlib import Path

from sharding.cli import option, positional, run_script


@dataclass(frozen=True)
class ReportConfig:
    """Which runs to report, and where."""

    runs: list[str] = positional("names, folders or URLs of runs")
    out: str = option("report.html", "the HTML file to write")
    title: str | None = option(None, 'title of the page; default: the name of the run, or "Runs side by side"')
    storage: str = option("runs", "folder or URL of runs")


def main(config: ReportConfig) -> None:
    # matplotlib and torch take seconds to import, which --help should not
    from train.records.runs import find_run
    from train.reporting.report_writer import write_report

    runs = []
    for name in config.runs:
        run = find_run(name, config.storage)
        if run is None:
            raise ValueError(f"{name}: no run of that name in {config.storage}, and no folder of a run")
        runs.append(run)
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(
            "two of these runs have the same name, so that a table could not distinguish them: report them one by one"
        )
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(write_report(runs, out, title=config.title))


if __name__ == "__main__":
    sys.exit(
        run_script(
            main, ReportConfig, prog="report.py", description="Write an HTML report of one run, or of several side by side."
        )
    )
