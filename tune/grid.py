"""Run a study: python tune/grid.py tune/studies/demo.yaml"""

import sys
from dataclasses import dataclass

from rich.console import Console

from sharding.cli import option, positional, run_script
from tune.study.study_file import read_study


@dataclass(frozen=True)
class GridConfig:
    """Which study."""

    study: str = positional("the study file (YAML)")
    smoke: bool = option(False, "run at smoke size: tiny models on synthetic patches; the results mean nothing")
    plan: bool = option(False, "print the trials, which are finished, and how long the others may take; run nothing")
    force: list[str] = option([], "run these stages again, and all that start from them; their earlier runs are set aside")
    without_ray: bool = option(False, "run the trials one after another in this process, without Ray")


def main(config: GridConfig) -> None:
    study = read_study(config.study, smoke=config.smoke)
    # Only after the study file was checked: these import torch, which takes seconds.
    from tune.execution.dry_run import dry_run_lines
    from tune.execution.study_runner import run_study
    from tune.reporting.table_data import build_tables
    from tune.reporting.table_writers import console_table, study_report, write_tables

    if config.plan:
        lines = dry_run_lines(study)
        print("\n".join(lines))
        if any(line.startswith("CANNOT RUN") for line in lines):
            raise ValueError(f"{config.study}: not all trials can run; the plan says why")
        return
    outcome = run_study(study, force=config.force, without_ray=config.without_ray, log=lambda line: print(line, flush=True))
    tables = build_tables(study, outcome)
    for table in tables:
        Console().print(console_table(table))
    for path in write_tables(study, tables, study.report.with_name(f"{study.report.stem}-tables")):
        print(path)
    print(study_report(study, outcome, tables, study.report))
    if outcome.failed:
        print(f"FAILED: {', '.join(outcome.failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_script(main, GridConfig, prog="grid.py", description="Run a study's stages, each once, and fill its tables."))
