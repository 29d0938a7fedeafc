"""Run a study: python tune/grid.py tune/studies/demo.yaml"""

import sys
from dataclasses import dataclass

from rich.console import Console

from sharding.command import option, positional, run_script
from tune.study import read_study


@dataclass(frozen=True)
class GridConfig:
    """Which study."""

    study: str = positional("the study file (YAML)")
    plan: bool = option(False, "only print the stages, and which of them are finished")


def main(config: GridConfig) -> None:
    study = read_study(config.study)
    # After the study file was found right: these import torch, which takes seconds.
    from train.report import write_report
    from tune.stages import is_finished, run_study
    from tune.table import result_table

    if config.plan:
        for cell in study.cells:
            print(f"{'finished' if is_finished(study, cell) else 'to do':9} {cell.kind:9} {cell.name}")
        return
    runs = run_study(study)
    Console().print(result_table(runs))
    print(write_report(runs, study.report, title=f"Study {study.name}"))


if __name__ == "__main__":
    sys.exit(run_script(main, GridConfig, prog="grid.py", description="Run a study's stages, each once, and fill its table."))
