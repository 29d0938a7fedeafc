"""Read a study file: named shard sets, stages whose fields may be lists (axes of a grid), selections, and the tables it fills.

    # What it reproduces, and what it costs: the leading comment is part of the report.
    name: demo
    storage: demo/runs
    report: demo/report.html
    data: {kidney: demo/shards/kidney, breast: demo/shards/breast}
    defaults:
      pretrain: {image_size: 64, epochs: 8}
    stages:
      kidney:
        pretrain: {data: kidney, batch_size: [64, 128], temperature: [0.1, 0.5]}
      best:
        select: {from: kidney, by: probe, per: [batch_size]}
      linear:
        evaluate: {data: breast, backbone: best, mode: linear, fraction: [0.05, 0.5], seeds: 5}
    tables:
      - title: Linear protocol
        stages: [linear]
        rows: [batch_size]
        columns: [fraction]
        values: [accuracy]
        published:
          - {batch_size: 64, fraction: [0.05, 0.5], accuracy: [0.7697, 0.8946]}
    resources:
      pretrain: {gpus: 0.25}
    smoke:
      data: {kidney: demo/shards/kidney}
      pretrain: {epochs: 1, batch_size: {64: 16, 128: 32}}

**Axes.** A field with a list of values is an axis. A field that is a list itself (`mix`, `fraction`, `classes`, ...) is not:
`fraction: [0.05, 0.5]` is one stage that evaluates both, and its axis is a list of lists. A trial is named after its stage and
the values of its axes, if any: kidney-batch_size-64-temperature-0.1. `data`, `probe_data` and the part of `mix` before "=" may be
names from `data`.

**Chains.** `init` and `backbone` may name an earlier stage. The stage then runs once for each trial of that stage, and its trials
inherit the axes. If both have an axis of the same name, only equal values are paired. The full name of a trial refers to that
trial alone, without its axes.

**Selections.** `select` chooses the best pretraining of an earlier stage, for each combination of the axes in `per`, by `loss`,
`probe` or `top1`, when all have finished. It may be `from` another selection. Pretrainings that are not comparable are refused.

**Published** values are shares of 1, listed with their place in the table. One axis may be a list; the values are then lists too.

**asha**: {by: probe, grace_epochs: 10, reduction: 3} stops pretrainings of a stage that fall behind.

**resources**: what each trial of a kind gets, {pretrain: {workers: 0, gpus: 0.25, cpus: 2}}.

**smoke** is a small version of the study that shows within minutes that it runs: other `data`, and other fields for each kind of
stage. For an axis it maps the values to keep to their replacements; other values are dropped. Runs are in STORAGE-smoke.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.remote_folder import is_url
from sharding.folder_names import check_name
from sharding.yaml_lines import YamlFile, read_yaml
from tune.study.comparability import why_incomparable
from tune.study.grid_expansion import FieldValue, SelectSpec, StageSpec, StudySettings, build_config, expand, field_names
from tune.study.schema import KINDS, PRETRAINING_METRICS, EarlyStopping, Resources, Study, Trial
from tune.study.smoke_size import read_smoke_size, shrink_stage
from tune.study.table_specs import read_tables

_KEYS = ("name", "storage", "report", "data", "defaults", "stages", "tables", "resources", "asha", "smoke")


def read_study(path: str | Path, *, smoke: bool = False) -> Study:
    """Read and check a study file. smoke: in its smoke size.

    Raises ValueError, with FILE:LINE in front, before anything is started.
    """
    source = read_yaml(path, example="a study file such as tune/studies/demo.yaml")
    content = source.content
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or not content["stages"]:
        raise source.error("a study must be a mapping with at least `stages`, a mapping of names to stages")
    source.check_keys(_KEYS)
    data = source.mapping("data")
    source.check_keys(tuple(KINDS), "defaults")
    for key in ("name", "storage", "report"):
        if not isinstance(content.get(key, ""), str):
            raise source.error(f"{key} must be a word, not {content[key]!r}", key)
    if "name" in content:
        try:
            check_name(content["name"], what="name")
        except ValueError as error:
            raise source.error(str(error), "name") from None
    resources = {kind: _resources(source, kind) for kind in KINDS}
    stages = [_read_stage(source, stage, resources) for stage in content["stages"]]
    small = read_smoke_size(source, stages)
    if smoke and small is None:
        raise source.error("this study has no `smoke`, the section with the smoke size")
    if not smoke:
        small = None
    if small:  # one process for each trial, whatever the full study uses
        resources = dict.fromkeys(KINDS, Resources())
        stages = [shrink_stage(stage, small) if isinstance(stage, StageSpec) else stage for stage in stages]
    name = content.get("name", Path(path).stem)
    storage = content.get("storage", f"runs/{name}").rstrip("/") + ("-smoke" if smoke else "")
    report = _report(content.get("report"), name, storage, smoke)
    workers = {kind: each.workers for kind, each in resources.items()}
    nodes = expand(stages, StudySettings(data | (small.data if small else {}), storage, workers))
    trials = [node for node in nodes if isinstance(node, Trial)]
    about = source.about + (f"\n\n{small.describe(data)}" if small else "")
    return Study(
        name=name,
        storage=storage,
        report=report,
        about=about.strip(),
        nodes=nodes,
        tables=read_tables(source, trials, small),
        resources=resources,
        early_stopping=_early_stopping(source, trials, stages, smoke),
        smoke=smoke,
    )


def _report(given: str | None, name: str, storage: str, smoke: bool) -> Path:
    if given is None:
        return Path(f"{name}{'-smoke' * smoke}.html") if is_url(storage) else Path(storage) / "report.html"
    return Path(given).with_stem(Path(given).stem + "-smoke") if smoke else Path(given)


def _read_stage(source: YamlFile, key, resources: dict[str, Resources]) -> StageSpec | SelectSpec:
    body, at, name = source.content["stages"][key], source.at("stages", key), str(key)
    kinds = (*KINDS, "select")
    if not isinstance(body, dict) or len(body) != 1 or not all(k in kinds and isinstance(v or {}, dict) for k, v in body.items()):
        raise ValueError(f"{at}: stage {name}: a stage is one of {' or '.join(f'`{kind}: {{...}}`' for kind in kinds)}")
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{at}: stage {name}: the name becomes that of a folder; give one without /")
    (kind,) = body
    line = source.line("stages", key)
    if kind == "select":
        return _read_selection(source, key, at, line)
    config_class = KINDS[kind]
    known = field_names(config_class) - {"name", "storage"}
    fields: dict[str, FieldValue] = {}
    # The stage's own fields first: a default that is added later must not reorder the names.
    for keys in (("stages", key, kind), ("defaults", kind)):
        source.check_keys(known, *keys)
        for field, value in source.mapping(*keys).items():
            fields.setdefault(field, FieldValue(value, source.at(*keys, field)))
    workers = fields.pop("workers", None)  # a resource, so all stages of a kind have the same
    if workers and workers.value != resources[kind].workers:
        raise ValueError(
            f"{workers.at}: stage {name}: workers is {workers.value!r}, and {kind} trials have {resources[kind].workers}; give"
            f" `resources: {{{kind}: {{workers: N}}}}` alone"
        )
    return StageSpec(name, kind, config_class, fields, at, line)


def _read_selection(source: YamlFile, key, at: str, line: int) -> SelectSpec:
    keys = ("stages", key, "select")
    source.check_keys(("from", "by", "per"), *keys)
    given = source.mapping(*keys)
    for field in ("from", "by"):
        if field not in given:
            example = f"select: {{from: STAGE, by: {'|'.join(PRETRAINING_METRICS)}, per: [AXIS, ...]}}"
            raise ValueError(f"{at}: stage {key}: select needs `{field}`: {example}")
    if given["by"] not in PRETRAINING_METRICS:
        raise source.error(f"stage {key}: selects by {given['by']!r}; choose {', '.join(PRETRAINING_METRICS)}", *keys, "by")
    per = given.get("per") or []
    per = per if isinstance(per, list) else [per]
    if any(not isinstance(axis, str) for axis in per) or len(set(per)) < len(per):
        raise source.error(f"stage {key}: per is {per!r}, and should be a list of axes, each once", *keys, "per")
    source_field = FieldValue(str(given["from"]), source.at(*keys, "from"))
    return SelectSpec(str(key), source_field, given["by"], FieldValue(per, source.at(*keys, "per")), at, line)


def _resources(source: YamlFile, kind: str) -> Resources:
    source.check_keys(tuple(KINDS), "resources")
    found = _read_config(source, Resources, "resources", kind)
    if "workers" not in source.mapping("resources", kind):
        usual = source.mapping("defaults", kind).get("workers", 0)
        if not isinstance(usual, int) or isinstance(usual, bool):
            raise source.error(f"workers is {usual!r}; for the trials of a study it is a number", "defaults", kind, "workers")
        found = replace(found, workers=usual)
    if found.workers < 0 or (found.gpus is not None and found.gpus < 0) or found.cpus <= 0:
        raise source.error("workers and gpus are 0 or more, cpus are more than 0", "resources", kind)
    return found


def _early_stopping(
    source: YamlFile, trials: Sequence[Trial], stages: Sequence[StageSpec | SelectSpec], smoke: bool
) -> EarlyStopping | None:
    if source.content.get("asha") is None:
        return None
    found = _read_config(source, EarlyStopping, "asha")
    if found.grace_epochs < 1 or found.reduction < 2:
        raise source.error("asha: grace_epochs is 1 or more, reduction 2 or more", "asha")
    for stage in stages:
        compete = [trial for trial in trials if trial.stage == stage.name and trial.kind == "pretrain"]
        reason = why_incomparable(compete, found.by) if len(compete) > 1 else None
        if reason:
            raise source.error(f"asha: stage {stage.name} would compare {reason}", "asha")
        late = [trial.config.probe_every for trial in compete if trial.config.probe_every > found.grace_epochs]
        if found.by == "probe" and len(compete) > 1 and late and not smoke:
            raise source.error(
                f"asha: grace_epochs {found.grace_epochs} ends before the first probe of stage {stage.name}, after {late[0]}"
                " epochs; give a smaller probe_every or more grace_epochs",
                "asha",
            )
    return found


def _read_config(source: YamlFile, config_class: type, *keys: str):
    source.check_keys(field_names(config_class), *keys)
    fields = {name: FieldValue(value, source.at(*keys, name)) for name, value in source.mapping(*keys).items()}
    return build_config(config_class, fields, source.at(*keys))
