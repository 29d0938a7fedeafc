"""Which pretrainings can be compared, and by what."""

from collections.abc import Sequence

from tune.schema import By, Cell

# What candidates must have in common for a figure to mean the same for all of them. Top-1 accuracy is among the negatives of a
# batch too, so that a small batch is easier; it is the same for any temperature, which scales all similarities.
_IN_COMMON = {"loss": ("method", "recipe", "batch_size", "temperature"), "top1": ("method", "recipe", "batch_size")}
_NOT_OF_ROTATION = ("batch_size", "temperature")
_WHY = {
    "batch_size": "NT-Xent's loss and top-1 accuracy depend on the batch size (more negatives are harder: docs/pretraining.md)",
    "temperature": "the loss of NT-Xent depends on the temperature, which scales it",
    "method": "each method has a task of its own",
    "recipe": "how hard the task is depends on the recipe",
}


def incomparable(cells: Sequence[Cell], by: By) -> str | None:
    """Why these pretrainings cannot be compared by that, as the end of "... would compare"; None where they can."""
    configs = [cell.config for cell in cells]
    if by == "probe":
        unprobed = [cell.name for cell in cells if not cell.config.probe_every]
        if unprobed:
            return f"{unprobed[0]} by the probe, of which it has none (probe_every: 0); give it one"
        sets = {(config.probe_data or config.data, config.split, config.probe_patches) for config in configs}
        if len(sets) > 1:
            shown = " and ".join(" ".join(map(str, each)) for each in sorted(sets)[:2])
            return f"probes of different patches ({shown}); give all of them the same probe_data"
        return None
    contrastive = configs[0].method == "simclr"
    if by == "top1" and not all(config.method == "simclr" for config in configs):
        return "by top1, which only simclr has; compare by probe or loss"
    for name in _IN_COMMON[by]:
        if name in _NOT_OF_ROTATION and not contrastive:
            continue
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            there = " and ".join(map(str, values[:2]))
            return f"by {by} {name.replace('_', ' ')} {there}, and {_WHY[name]}; compare within one, or by probe"
    return None
