"""Which pretrainings can be compared, and by which metrics."""

from collections.abc import Sequence

from train.trainer.methods import METHODS
from tune.study.schema import Trial

# Settings that must be equal whatever the method, and why. Each method adds its own (train/trainer/methods.py).
_ALWAYS_EQUAL = {
    "method": "each method has a task of its own",
    "recipe": "how hard the task is depends on the recipe",
}


def why_incomparable(trials: Sequence[Trial], by: str) -> str | None:
    """Why these pretrainings cannot be compared by that, as the end of "... would compare"; None where they can."""
    configs = [trial.config for trial in trials]
    if by == "probe":
        unprobed = [trial.name for trial in trials if not trial.config.probe_every]
        if unprobed:
            return f"{unprobed[0]} by the probe, of which it has none (probe_every: 0); give it one"
        sets = {(config.probe_data or config.data, config.split, config.probe_patches) for config in configs}
        if len(sets) > 1:
            shown = " and ".join(" ".join(map(str, each)) for each in sorted(sets)[:2])
            return f"probes of different patches ({shown}); give all of them the same probe_data"
        return None
    able = [name for name, method in METHODS.items() if by in method.comparable_by]
    if not all(config.method in able for config in configs):
        return f"by {by}, which only {' and '.join(able)} has; compare by probe or loss"
    must_be_equal = _ALWAYS_EQUAL | METHODS[configs[0].method].comparable_by[by]
    for name, reason in must_be_equal.items():
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            there = " and ".join(map(str, values[:2]))
            return f"by {by} {name.replace('_', ' ')} {there}, and {reason}; compare within one, or by probe"
    return None
