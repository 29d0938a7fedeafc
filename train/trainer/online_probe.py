"""The online probe: during pretraining, a ridge classifier and nearest neighbours on the frozen backbone's features.

It is a cheap monitor, not an evaluation: it uses labels of the training split, never of the test split. Each probe adds four
numbers to a row of metrics.jsonl: `probe_accuracy` and `probe_balanced_accuracy` of the ridge classifier, and of the neighbours
`probe_knn_accuracy` and `probe_knn_balanced_accuracy`. They compare runs whose losses cannot be compared.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from pipelines.shard_reader import ShardReader
from sharding.manifest import class_names, read_manifest
from sharding.selection import select
from train.config import PretrainConfig
from train.records.data import Input, SetInput, cache_limit, open_set
from train.scoring.knn import knn_probabilities
from train.scoring.logistic import principal
from train.scoring.metrics import accuracies
from train.trainer.early_stopping import features_while_training

# n patches that a classifier is fitted on, m that it is asked about, F features, R principal components, K classes, D decays

# On standardised features, so they mean the same for every backbone; the strongest first, which equals are decided for.
DECAYS = tuple(10.0**exponent for exponent in range(4, -4, -1))
NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' votes: Wu et al. 2018

_HELD_OUT, _TUNING = 0.3, 0.25  # of the patches, and of the others
_SEED = 0  # not the run's: runs with different seeds are probed on the same patches
_COLUMNS = ["id", "label", "group", "split", "sha256", "source_sha256"]
_NAMES = ("probe_accuracy", "probe_balanced_accuracy", "probe_knn_accuracy", "probe_knn_balanced_accuracy")


@dataclass(frozen=True)
class Probe:
    """Which patches are looked at, and when. It travels to every worker, so it is plain data.

    every: epochs; input: one set and the ids, (p,) ascending; labels: (p,) from 0 to classes - 1; held_out: (p,) bool, the
    patches asked about; tuning: (p,) bool, those of the others that the ridge's decay is chosen on; by_group: whether no
    group (slide or patient) is both among the held_out and the others.
    """

    every: int
    input: Input
    labels: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)
    tuning: np.ndarray = field(repr=False)
    classes: int
    by_group: bool

    def due(self, step: int, steps_per_epoch: int, steps: int) -> bool:
        """Whether to probe after this step: at the end of every `every`-th epoch, and of the last one."""
        return step % (self.every * steps_per_epoch) == 0 or step == steps

    def describe(self) -> dict[str, Any]:
        """As plain data, for the run's result."""
        return {
            "set": self.input.name,
            "labels": int((~self.held_out).sum()),
            "judged": int(self.held_out.sum()),
            "by_group": self.by_group,
            "every_epochs": self.every,
        }


def build_probe(config: PretrainConfig) -> tuple[Probe | None, str]:
    """The probe that a config asks for, None for none, and a line that says which, or why none.

    The patches are the first of the split that have labels: a set's patches lie in shuffled order, so these are a sample like
    any other, and they lie in few shards, which matters where shards are fetched.
    Raises ValueError where --probe-data cannot be probed on; where that is so of --data, which need not have labels, there is no
    probe.
    """
    if not config.probe_every:
        return None, "no probe (--probe-every 0)"
    try:
        probe = _choose_patches(config.probe_data or config.data, config)
    except ValueError as error:
        if config.probe_data:
            raise ValueError(f"--probe-data {config.probe_data}: {error}") from None
        return None, f"no probe: {config.data} {error}"
    others = "other groups (slides or patients)" if probe.by_group else "other patches, perhaps of the same slides"
    described = probe.describe()
    return probe, (
        f"probe every {described['every_epochs']} epochs: {described['labels']:,} labels of {config.probe_data or config.data},"
        f" evaluated on {described['judged']:,} of {others}"
    )


def _choose_patches(shards: str, config: PretrainConfig) -> Probe:
    cache_bytes = cache_limit(config.cache_gib)
    with open_set(shards, cache_bytes) as reader:
        manifest = read_manifest(reader.folder, columns=_COLUMNS)
        ids = select(manifest, split=config.split)
        ids = ids[reader.labels[ids] >= 0][: config.probe_patches]
        looked_at = f"the patches looked at (split {config.split!r})"
        if config.on_bad_patch == "skip" and (damaged := _damaged(reader, ids)).any():
            looked_at += f", of which {damaged.sum():,} of {len(ids):,} are damaged"
            ids = ids[~damaged]
        labels, classes = reader.labels[ids], len(class_names(reader.folder))
        if len(np.unique(labels)) < 2:
            raise ValueError(f"has no labels of two classes among {looked_at}")
        rows = manifest.take(pa.array(ids))
        held_out, by_group = _hold_out(rows, _HELD_OUT)
        tuning = np.zeros(len(ids), bool)
        tuning[~held_out], _ = _hold_out(rows.filter(pa.array(~held_out)), _TUNING)
        chosen = Input((SetInput.of(shards, reader, ids),), window=1, cache_bytes=cache_bytes)
    return Probe(config.probe_every, chosen, labels, held_out, tuning, classes, by_group)


def _damaged(reader: ShardReader, ids: np.ndarray) -> np.ndarray:
    """(n,) bool: which patches are damaged. One shard at a time, as a small cache has room for."""
    found, shards = np.zeros(len(ids), bool), reader.shards[ids]
    for shard in np.unique(shards):
        reader.expect(np.array([shard]))
        found[shards == shard] = reader.damaged(ids[shards == shard])
    return found


def _hold_out(manifest: pa.Table, share: float) -> tuple[np.ndarray, bool]:
    """(n,) bool, a share of each class, and whether it is of whole groups.

    By patch where groups are not known or are too few: what is set aside has two classes or more, all known to the rest.
    """
    labels = manifest["label"].to_numpy()
    for group_aware in (True, False):
        try:
            ids = select(manifest, validation=share, part="validation", group_aware=group_aware, seed=_SEED)
        except ValueError:  # no groups, one group, or groups that hang together through copies
            continue
        aside = np.isin(manifest["id"].to_numpy(), ids)
        asked = set(labels[aside])
        if len(asked) > 1 and asked <= set(labels[~aside]):
            return aside, group_aware
    raise ValueError(f"has too few labels to be probed on ({len(labels):,} patches, of which {share:.0%} are to be set aside)")


def run_probe(probe: Probe, backbone: nn.Module, image_size: int, device: str, threads: int | None) -> dict[str, float]:
    """The four numbers, 0 to 1, of a backbone on that device as it is; NaN where its features are no numbers.

    Nothing of the training changes: the backbone is in eval mode without gradients for as long as it takes, no random number
    is drawn, and the patches come by a reader of their own. With several workers the first one does it, whose statistics of
    batch norm are those that are saved, and the others wait for it in the next step: keep it far below the 30 minutes that
    they wait at most.
    Raises ValueError where the set is not to be had, or was changed since the probe was planned.
    """
    features_pF = features_while_training(backbone, probe.input, image_size=image_size, device=device, threads=threads)
    if not np.isfinite(features_pF).all():
        return dict.fromkeys(_NAMES, float("nan"))
    known, labels = ~probe.held_out, probe.labels
    ridge = _tuned_ridge(features_pF, probe)
    knn = knn_predictions(features_pF[known], labels[known], features_pF[probe.held_out], classes=probe.classes)
    values = [value for guess in (ridge, knn) for value in accuracies(guess, labels[probe.held_out]).values()]
    return dict(zip(_NAMES, values, strict=True))


def _tuned_ridge(features_pF: np.ndarray, probe: Probe) -> np.ndarray:
    """(m,) classes of the held_out patches, with the decay that did best on the tuning part, then fitted on both."""
    known, labels = ~probe.held_out, probe.labels
    fitted = known & ~probe.tuning
    tried = ridge_predictions(
        features_pF[fitted], labels[fitted], features_pF[probe.tuning], classes=probe.classes, decays=DECAYS
    )
    figures = [accuracies(guess, labels[probe.tuning])["balanced_accuracy"] for guess in tried]
    best = DECAYS[int(np.argmax(figures))]
    return ridge_predictions(
        features_pF[known], labels[known], features_pF[probe.held_out], classes=probe.classes, decays=(best,)
    )[0]


def ridge_predictions(
    known_nF: np.ndarray, labels_n: np.ndarray, asked_mF: np.ndarray, *, classes: int, decays: tuple[float, ...]
) -> np.ndarray:
    """(D, m) classes: for each decay, of the largest output of a linear regression on one-hot targets.

    The weights W minimise |Y - Z W|^2 / n + decay |W|^2, where Z are the features, standardised by the known ones, and Y the
    targets less their mean. In closed form, in float64, all decays from one decomposition.
    Source: big_vision's few-shot evaluator (Zhai et al. 2022, "Scaling vision transformers", section 2.1).
    """
    mean, std = known_nF.mean(0, dtype=np.float64), known_nF.std(0, dtype=np.float64)
    std[std < 1e-12] = 1.0  # a constant feature says nothing, and must not divide by 0
    z_nR, basis_FR, variance_R = principal((known_nF - mean) / std)
    target_nK = np.eye(classes)[labels_n]
    share_K = target_nK.mean(0)
    moment_RK = z_nR.T @ (target_nK - share_K) / len(z_nR)
    z_mR = (asked_mF - mean) / std @ basis_FR
    return np.stack([(z_mR / (variance_R + decay) @ moment_RK + share_K).argmax(1) for decay in decays])


def knn_predictions(
    known_nF: np.ndarray,
    labels_n: np.ndarray,
    asked_mF: np.ndarray,
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """(m,) classes that most votes of the nearest known patches are for; see `knn_probabilities`."""
    votes_mK = knn_probabilities(known_nF, labels_n, asked_mF, classes=classes, neighbours=neighbours, temperature=temperature)
    return votes_mK.argmax(1)
