"""Running a study: each stage once, an unfinished one from its checkpoint, a finished one not at all."""

from collections.abc import Callable, Sequence

from tune.schema import Study
from tune.selection_rules import check_probes
from tune.stage_runner import run_stage
from tune.study_state import Book, Outcome, set_aside


def run_study(
    study: Study, *, force: Sequence[str] = (), without_ray: bool = False, say: Callable[[str], None] = print
) -> Outcome:
    """Run what is not finished. What fails, and what starts from it, is in the outcome; all else is run.

    force: stages to run again, with all that start from them; their earlier runs are set aside. without_ray: one cell after
    another in this process.
    Raises ValueError for a stage that there is not, for a selection by a probe that there will not be, and where the cluster
    has too little for a single trial.
    """
    check_probes(study)
    for place in set_aside(study, list(force)):
        say(f"set aside: {place}")
    book = Book(study, say)
    if without_ray:
        _run_here(book)
    else:
        begun = book.next()
        if begun is not None:  # else nothing is left to do, and Ray takes long to start
            from tune.trials import run_trials

            book.give_back(begun)
            run_trials(book)
    return book.outcome


def _run_here(book: Book) -> None:
    while (begun := book.next()) is not None:
        try:
            run = run_stage(begun.cell.kind, begun.config)
        except (ValueError, OSError) as error:
            book.failed(begun.cell.name, " ".join(str(error).split()))
        else:
            book.done(begun.cell.name, run)
    assert book.ended
