"""A study file: named shard sets, stages whose fields may be lists (axes of a grid), what is selected, and the tables it fills.

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

**Axes.** A field given a list is an axis. Fields that are lists themselves (`mix`, `fraction`, `classes`, ...) are none:
`fraction: [0.05, 0.5]` is one stage that judges both, and their axis is a list of lists. A cell is named by its stage and, where
it has axes, by their values: kidney-batch_size-64-temperature-0.1. `data`, `probe_data` and what is before "=" in `mix` may be
names of `data`.

**Chains.** `init` and `backbone` may name an earlier stage, which stands for each of its cells: the stage is done once for each,
and its cells inherit the axes. Where both have an axis of one name, only equal values are paired. One cell's full name stands for
it alone, without its axes.

**Selections.** `select` chooses the best of an earlier stage's pretrainings, for each combination of the axes in `per`, by
`loss`, `probe` or `top1`, when they are done. It may be `from` a stage that selects. What is not comparable is refused.

**Published** figures are shares of 1 beside the place that they belong to; one axis may be a list, and the figures then are too.

**asha**: {by: probe, grace_epochs: 10, reduction: 3} ends pretrainings of a stage early that are behind.

**resources**: what each trial of a kind gets, {pretrain: {workers: 0, gpus: 0.25, cpus: 2}}.

**smoke** is the study in a size that shows in minutes that it runs: other `data`, and for each kind of stage other fields. Of an
axis it gives the values that stay and what takes their place; those that it does not name are left out, if it names any. Runs
are in STORAGE-smoke.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.remote_folder import is_url
from tune.comparability import incomparable
from tune.grid_expansion import Choice, Field, Outside, Stage, expand, field_names, settle
from tune.schema import BY, KINDS, Cell, EarlyStopping, Node, Published, Resources, Selection, Study, TableSpec
from tune.smoke_study import read_smoke, shrunk
from tune.table_specs import read_tables
from tune.yaml_lines import Marked, read_marked

__all__ = ["Cell", "EarlyStopping", "Node", "Published", "Resources", "Selection", "Study", "TableSpec", "read_study"]

_KEYS = ("name", "storage", "report", "data", "defaults", "stages", "tables", "resources", "asha", "smoke")


def read_study(path: str | Path, *, smoke: bool = False) -> Study:
    """Read and check a study file. smoke: in the size that its `smoke` gives.

    Raises ValueError, which begins with FILE:LINE, before anything is started.
    """
    source = read_marked(path)
    content = source.content
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict) or not content["stages"]:
        raise ValueError(f"{source.at()}: a study is a mapping with at least `stages`, itself a mapping of names to stages")
    source.only(_KEYS)
    data = source.mapping("data")
    source.only(tuple(KINDS), "defaults")
    for key in ("name", "storage", "report"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{source.at(key)}: {key} is a word, not {content[key]!r}")
    resources = {kind: _resources(source, kind) for kind in KINDS}
    stages = [_read_stage(source, stage, resources) for stage in content["stages"]]
    small = read_smoke(source, stages)
    if smoke and small is None:
        raise ValueError(f"{source.at()}: this study has no `smoke`, which says what is smaller in smoke size")
    if not smoke:
        small = None
    if small:  # one process for each trial, whatever the whole study takes
        resources = dict.fromkeys(KINDS, Resources())
        stages = [shrunk(stage, small) if isinstance(stage, Stage) else stage for stage in stages]
    name = content.get("name", Path(path).stem)
    storage = content.get("storage", f"runs/{name}").rstrip("/") + ("-smoke" if smoke else "")
    report = _report(content.get("report"), name, storage, smoke)
    workers = {kind: each.workers for kind, each in resources.items()}
    nodes = expand(stages, Outside(data | (small.data if small else {}), storage, workers))
    cells = [node for node in nodes if isinstance(node, Cell)]
    about = source.about + (f"\n\n{small.describe(data)}" if small else "")
    return Study(
        name=name,
        storage=storage,
        report=report,
        about=about.strip(),
        nodes=nodes,
        tables=read_tables(source, cells, small),
        resources=resources,
        early_stopping=_early_stopping(source, cells, stages, smoke),
        smoke=smoke,
    )


def _report(given: str | None, name: str, storage: str, smoke: bool) -> Path:
    if given is None:
        return Path(f"{name}{'-smoke' * smoke}.html") if is_url(storage) else Path(storage) / "report.html"
    return Path(given).with_stem(Path(given).stem + "-smoke") if smoke else Path(given)


def _read_stage(source: Marked, key, resources: dict[str, Resources]) -> Stage | Choice:
    body, at, name = source.content["stages"][key], source.at("stages", key), str(key)
    kinds = (*KINDS, "select")
    if not isinstance(body, dict) or len(body) != 1 or not all(k in kinds and isinstance(v or {}, dict) for k, v in body.items()):
        raise ValueError(f"{at}: stage {name}: a stage is one of {' or '.join(f'`{kind}: {{...}}`' for kind in kinds)}")
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{at}: stage {name}: the name is that of a folder; give one without /")
    (kind,) = body
    line = source.line("stages", key)
    if kind == "select":
        return _read_choice(source, key, at, line)
    config_class = KINDS[kind]
    known = field_names(config_class) - {"name", "storage"}
    fields: dict[str, Field] = {}
    # Its own ones first: a default that is added later must not reorder the names.
    for keys in (("stages", key, kind), ("defaults", kind)):
        source.only(known, *keys)
        for field, value in source.mapping(*keys).items():
            fields.setdefault(field, Field(value, source.at(*keys, field)))
    workers = fields.pop("workers", None)  # a trial's, and so the same for all stages of a kind
    if workers and workers.value != resources[kind].workers:
        raise ValueError(
            f"{workers.at}: stage {name}: workers is {workers.value!r}, and {kind} trials have {resources[kind].workers}; give"
            f" `resources: {{{kind}: {{workers: N}}}}` alone"
        )
    return Stage(name, kind, config_class, fields, at, line)


def _read_choice(source: Marked, key, at: str, line: int) -> Choice:
    keys = ("stages", key, "select")
    source.only(("from", "by", "per"), *keys)
    given = source.mapping(*keys)
    for field in ("from", "by"):
        if field not in given:
            raise ValueError(
                f"{at}: stage {key}: select needs `{field}`: select: {{from: STAGE, by: {'|'.join(BY)}, per: [AXIS, ...]}}"
            )
    if given["by"] not in BY:
        raise ValueError(f"{source.at(*keys, 'by')}: stage {key}: selects by {given['by']!r}; choose {', '.join(BY)}")
    per = given.get("per") or []
    per = per if isinstance(per, list) else [per]
    if any(not isinstance(axis, str) for axis in per) or len(set(per)) < len(per):
        raise ValueError(f"{source.at(*keys, 'per')}: stage {key}: per is {per!r}, and should be a list of axes, each once")
    source_field = Field(str(given["from"]), source.at(*keys, "from"))
    return Choice(str(key), source_field, given["by"], Field(per, source.at(*keys, "per")), at, line)


def _resources(source: Marked, kind: str) -> Resources:
    source.only(tuple(KINDS), "resources")
    found = _settled(source, Resources, "resources", kind)
    if "workers" not in source.mapping("resources", kind):
        usual = source.mapping("defaults", kind).get("workers", 0)
        if not isinstance(usual, int) or isinstance(usual, bool):
            raise ValueError(
                f"{source.at('defaults', kind, 'workers')}: workers is {usual!r}; for the trials of a study it is a number"
            )
        found = replace(found, workers=usual)
    if found.workers < 0 or (found.gpus is not None and found.gpus < 0) or found.cpus <= 0:
        raise ValueError(f"{source.at('resources', kind)}: workers and gpus are 0 or more, cpus are more than 0")
    return found


def _early_stopping(source: Marked, cells: Sequence[Cell], stages: Sequence[Stage | Choice], smoke: bool) -> EarlyStopping | None:
    if source.content.get("asha") is None:
        return None
    at = source.at("asha")
    found = _settled(source, EarlyStopping, "asha")
    if found.grace_epochs < 1 or found.reduction < 2:
        raise ValueError(f"{at}: asha: grace_epochs is 1 or more, reduction 2 or more")
    for stage in stages:
        compete = [cell for cell in cells if cell.stage == stage.name and cell.kind == "pretrain"]
        reason = incomparable(compete, found.by) if len(compete) > 1 else None
        if reason:
            raise ValueError(f"{at}: asha: stage {stage.name} would compare {reason}")
        late = [cell.config.probe_every for cell in compete if cell.config.probe_every > found.grace_epochs]
        if found.by == "probe" and len(compete) > 1 and late and not smoke:
            raise ValueError(
                f"{at}: asha: grace_epochs {found.grace_epochs} ends before the first probe of stage {stage.name}, after"
                f" {late[0]} epochs; give a smaller probe_every or more grace_epochs"
            )
    return found


def _settled(source: Marked, config_class: type, *keys: str):
    source.only(field_names(config_class), *keys)
    fields = {name: Field(value, source.at(*keys, name)) for name, value in source.mapping(*keys).items()}
    return settle(config_class, fields, source.at(*keys))
