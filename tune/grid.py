"""Run a study: python tune/grid.py tune/studies/demo.yaml"""

import sys
from dataclasses import dataclass

from rich.console import Console

from sharding.cli import option, positional, run_script
from tune.study_file import read_study


@dataclass(frozen=True)
class GridConfig:
    """Which study."""

    study: str = positional("the study file (YAML)")
    smoke: bool = option(False, "its smoke size: tiny models on drawn patches, where no figure means anything")
    plan: bool = option(False, "only print the stages, which of them are finished, and how long the others may take")
    force: list[str] = option([], "stages to run again, with all that start from them; their earlier runs are set aside")
    without_ray: bool = option(False, "one stage after another in this process, without Ray")


def main(config: GridConfig) -> None:
    study = read_study(config.study, smoke=config.smoke)
    # After the study file was found right: these import torch, which takes seconds.
    from tune.study_plan import plan_lines
    from tune.study_runner import run_study
    from tune.table_writers import console_table, fill, study_report, write_tables

    if config.plan:
        print("\n".join(plan_lines(study)))
        return
    outcome = run_study(study, force=config.force, without_ray=config.without_ray, say=lambda line: print(line, flush=True))
    tables = fill(study, outcome)
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
