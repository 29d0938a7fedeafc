"""Run a study's trials with Ray Tune, as many at a time as fit on the cluster, in reused processes.

Tune asks the study's state for the next trial that is ready, so stages that wait for each other are one run of Tune. Tune's own
records are discarded: the runs show what is finished.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from sharding.cli import describe
from train.cluster.ray_cluster import connect
from train.config import EvaluateConfig, PretrainConfig
from train.records.runs import Run, open_run
from tune.execution.study_state import ReadyTrial, StudyState
from tune.study.schema import KINDS, PRETRAINING_METRICS, Resources, Study

_DRIVER_BYTES = 64 * 2**20  # memory that a trial reserves if Ray Train's workers do its work
_RETRIES = 2  # of a trial whose process died; its stage continues from its checkpoint
_PROBE = PRETRAINING_METRICS["probe"].field


def run_trials(state: StudyState) -> None:
    """Run all trials of the state and record their results in it, failures too.

    Raises ValueError if a single trial needs more than the cluster has.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no progress tables: the state logs each event
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the command as it ends any other
    connect(state.study.name)
    import ray
    from ray import tune

    study, total = state.study, ray.cluster_resources()
    each = {kind: with_default_gpus(resources, total) for kind, resources in study.resources.items()}
    concurrent = min(_max_concurrent(total, kind, _required(each[kind])) for kind in {trial.kind for trial in study.trials})
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="patchclr-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(_trial_class(study), lambda given: _bundle(each[given["kind"]])),
            tune_config=tune.TuneConfig(
                search_alg=_searcher_class()(state, each),
                scheduler=_scheduler(study),
                num_samples=len(study.trials),
                max_concurrent_trials=concurrent,
                reuse_actors=study.early_stopping is None,  # early stopping ends a stage by ending its process
                trial_name_creator=lambda trial: trial.config["name"],
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="study",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                checkpoint_config=tune.CheckpointConfig(),
            ),
        )
        tuner.fit()
    assert state.is_complete, "Tune ended before the study did"


def with_default_gpus(resources: Resources, total: dict[str, float]) -> Resources:
    """The same with a number of GPUs: 1 by default if the cluster has any."""
    return dataclasses.replace(resources, gpus=float(total.get("GPU", 0) > 0) if resources.gpus is None else resources.gpus)


def _required(resources: Resources) -> dict[str, float]:
    """The CPUs and GPUs of a trial and its workers."""
    workers = max(1, resources.workers)
    return {"CPU": resources.cpus * workers, "GPU": (resources.gpus or 0) * workers}


def _max_concurrent(total: dict[str, float], kind: str, needed: dict[str, float]) -> int:
    """How many such trials fit the cluster at a time, so that none waits for resources that others hold."""
    places = [int(total.get(name, 0) / amount + 1e-9) for name, amount in needed.items() if amount]
    if min(places) < 1:
        short = next(name for name, amount in needed.items() if amount > total.get(name, 0))
        raise ValueError(
            f"resources of {kind}: a trial needs {needed[short]:g} {short}s, and the cluster has {total.get(short, 0):g}:"
            " ask for less in the study's `resources`"
        )
    return min(places)


def _bundle(resources: Resources):
    from ray.tune import PlacementGroupFactory

    if resources.workers:  # the workers have the cores and GPUs; the trial itself only waits
        return PlacementGroupFactory([{"memory": _DRIVER_BYTES}])
    return PlacementGroupFactory([{"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})])


def with_trial_resources(ready: ReadyTrial, resources: Resources) -> PretrainConfig | EvaluateConfig:
    """The trial's config with these resources."""
    if resources.workers:
        workers, cpus = resources.workers, int(resources.cpus)
        return dataclasses.replace(ready.config, workers=workers, gpus_per_worker=resources.gpus, cpus_per_worker=cpus)
    threads = ready.config.threads or max(1, int(resources.cpus))
    return dataclasses.replace(ready.config, workers=0, threads=threads, gpus_per_worker=None if resources.gpus else 0)


def _searcher_class():
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        """Gets trials from the study's state, and records there how they ended."""

        def __init__(self, state: StudyState, each: dict[str, Resources]):
            super().__init__()
            self._state, self._each = state, each
            self._ready: dict[str, ReadyTrial] = {}

        def suggest(self, trial_id: str) -> Any:
            ready = self._state.next_ready()
            if ready is None:
                return Searcher.FINISHED if self._state.is_complete else None
            self._ready[trial_id] = ready
            config = with_trial_resources(ready, self._each[ready.trial.kind])
            # With the trial's name, because its run may have another.
            fields = dataclasses.asdict(config)
            return {"name": ready.trial.name, "kind": ready.trial.kind, "fields": fields, "folder": os.getcwd()}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            ready, state = self._ready.pop(trial_id), self._state
            name = ready.trial.name
            run = open_run(state.study.storage, ready.config.name or name)
            if run.finished and not (result and result.get("failure")):
                state.mark_finished(name, run)
                return
            if result and result.get("failure"):
                why = result["failure"]
            elif error:
                why = f"its process died {_RETRIES + 1} times; run the study again to resume from its checkpoint"
            else:
                why = f"stopped early, at {_PROBE} {result.get(_PROBE, float('nan')):.3f}" if result else "stopped"
            state.mark_failed(name, why)

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles it into its own records, which are discarded

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the runs show what is finished."""

        def restore(self, checkpoint_path: str) -> None:
            raise AssertionError("Tune never restores a study")

    return StudySearcher


def _scheduler(study: Study):
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    early = study.early_stopping
    if early is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        metric=_PROBE,
        mode="max",
        grace_period=early.grace_epochs,
        reduction_factor=early.reduction,
        max_t=max((trial.config.epochs for trial in study.trials if trial.kind == "pretrain"), default=1),
    )


def _trial_class(study: Study):
    from ray import tune

    reports_probes = study.early_stopping is not None

    class TrialProcess(tune.Trainable):
        """A process that runs one trial after another. Without early stopping a trial is one step of Tune; with it, each probe
        ends a step, while the stage continues in a thread."""

        _thread: threading.Thread | None
        _seen: int

        def setup(self, config: dict[str, Any]) -> None:
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            self._begin(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._begin(new_config)
            return True

        def step(self) -> dict[str, Any]:
            if self._thread is None:
                self._run()
                return self._last_report()
            while self._thread.is_alive():
                self._thread.join(0.2)
                rows = [row for row in self._metrics() if _PROBE in row]
                # Except the last epoch's: ASHA would end the trial before the stage has written its results.
                if len(rows) > self._seen and rows[-1]["epoch"] + 1 < self._fields["epochs"]:
                    self._seen = len(rows)
                    return {"epoch": rows[-1]["epoch"] + 1, _PROBE: rows[-1][_PROBE]}
            return self._last_report()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing: a stage writes its own checkpoints."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """Nothing: a stage finds its own checkpoint."""

        def _begin(self, given: dict[str, Any]) -> None:
            self._kind, self._fields, self._folder = given["kind"], given["fields"], given["folder"]
            self._failure: str | None = None
            self._seen = 0
            self._thread = None
            if reports_probes and self._kind == "pretrain":
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

        def _run(self) -> None:
            import torch

            from tune.execution.stage_runner import run_stage

            torch.set_num_threads(max(1, self._fields["threads"]))
            try:
                os.chdir(self._folder)  # a study's paths are relative to the driver's folder; Tune chose another
                run_stage(self._kind, KINDS[self._kind](**self._fields))
            except (ValueError, OSError) as error:
                self._failure = describe(error)
            except Exception as error:  # our bug: reported as such, and the other trials continue
                where = Path(self._fields["storage"]) / f"{self._fields['name']}.error.txt"
                where.write_text(traceback.format_exc())
                self._failure = f"{type(error).__name__}: {describe(error)} (a bug in PatchCLR, not your mistake; see {where})"

        def _metrics(self) -> list[dict[str, Any]]:
            with contextlib.suppress(FileNotFoundError):
                return Run(f"{self._fields['storage']}/{self._fields['name']}").metrics()
            return []

        def _last_report(self) -> dict[str, Any]:
            epoch = self._fields.get("epochs", 1)
            rows = [row for row in self._metrics() if _PROBE in row] if reports_probes else []
            probe = rows[-1][_PROBE] if rows else 0.0
            return {"done": True, "failure": self._failure, "epoch": epoch, _PROBE: probe}

    return TrialProcess
