"""Warnings about a run's metrics: the model learns nothing, the embeddings collapse, or patches are damaged."""

from collections.abc import Iterable
from typing import Any

_NEAR_CHANCE = 0.02  # of the chance loss
_COLLAPSED = 0.1  # embedding_std, which is 1 for embeddings that are spread over the sphere


class HealthChecks:
    """Takes the rows of metrics.jsonl in their order. Gives each warning once, also when rows come again after a restart.

    chance_loss: of a model that has learned nothing. grace_steps: for this many steps a loss like that, and embeddings that lie
    close together, are normal: warm-up, and at least one epoch.
    """

    def __init__(self, *, chance_loss: float, grace_steps: int):
        self._chance, self._grace_steps = chance_loss, grace_steps
        self._given: set[str] = set()

    def add(self, row: dict[str, Any]) -> list[str]:
        """The new warnings that this row causes."""
        found = self._find(row)
        new = [text for kind, text in found.items() if kind not in self._given]
        self._given |= found.keys()
        return new

    def of_finished(self, rows: Iterable[dict[str, Any]]) -> list[str]:
        """The warnings about all rows of a finished run. A loss that was at chance level and has left it causes none."""
        first: dict[str, str] = {}
        last: dict[str, str] = {}
        for row in rows:
            last = self._find(row)
            first = last | first
        if "damaged" in first:
            first["damaged"] = last["damaged"]  # with their final number
        return [text for kind, text in first.items() if kind != "chance" or kind in last]

    def _find(self, row: dict[str, Any]) -> dict[str, str]:
        found = {}
        loss, std = row["loss"], row.get("embedding_std")
        if row["step"] >= self._grace_steps:
            if loss is not None and loss >= (1 - _NEAR_CHANCE) * self._chance:
                found["chance"] = (
                    f"at step {row['step']} the loss is {loss:.3f}, and chance level is {self._chance:.3f}:"
                    " check the augmentations (pipelines/preview.py) and --learning-rate"
                )
            if std is not None and std < _COLLAPSED:
                found["collapse"] = (
                    f"at step {row['step']} embedding_std is {std:.3f} (1: spread out, 0: all in one point):"
                    " the embeddings are collapsing"
                )
        if row.get("probe_damaged"):
            found["probe"] = f"at step {row['step']} a patch of the probe was damaged: there are no probe metrics from then on"
        if damaged := row.get("damaged_patches"):
            skipped = "1 damaged patch was" if damaged == 1 else f"{damaged:,} damaged patches were"
            found["damaged"] = f"{skipped} skipped (--on-bad-patch): damaged_patches in result.json lists them"
        return found
