"""Run a study: skip finished trials, resume interrupted ones, and run the others."""

from collections.abc import Callable, Sequence

from sharding.cli import describe
from tune.execution.selection_rules import check_probes
from tune.execution.stage_runner import run_stage
from tune.execution.study_state import StudyResult, StudyState, set_aside
from tune.study.schema import Study


def run_study(
    study: Study, *, force: Sequence[str] = (), without_ray: bool = False, log: Callable[[str], None] = print
) -> StudyResult:
    """Run all trials that are not finished. If one fails, it and the trials that start from it are in `failed`; the others run.

    force: stages to run again, with all that start from them; their earlier runs are set aside. without_ray: run one trial after
    another in this process. log: called with a line for each event.
    Raises ValueError for an unknown stage, for a selection by a probe that the trials will not have, and if the cluster is too
    small for a single trial.
    """
    check_probes(study)
    for place in set_aside(study, list(force)):
        log(f"set aside: {place}")
    state = StudyState(study, log)
    if without_ray:
        _run_in_process(state)
    else:
        ready = state.next_ready()
        if ready is not None:  # otherwise nothing is left to do, and Ray takes seconds to start
            from tune.execution.ray_trials import run_trials

            state.requeue(ready)
            run_trials(state)
    return state.outcome


def _run_in_process(state: StudyState) -> None:
    while (ready := state.next_ready()) is not None:
        try:
            run = run_stage(ready.trial.kind, ready.config)
        except (ValueError, OSError) as error:
            state.mark_failed(ready.trial.name, describe(error))
        else:
            state.mark_finished(ready.trial.name, run)
    assert state.is_complete
