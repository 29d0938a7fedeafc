"""`make soak`: a long run on two machines, to which everything happens that happens to clusters, in random order.

    pytest tests/cluster/soak.py -s --faults 24 --results benchmarks/results      # about 35 minutes on 2 cores

Afterwards the run is held against one to which nothing happened. <date>-soak.md and .json in --results have the figures; they are
written after every fault.
"""

import datetime
import itertools
import json
import random
import statistics
from pathlib import Path

import pytest

from tests.cluster.conftest import as_if_nothing_had_happened
from tests.cluster.faults import FAULTS, Outage, befall
from tests.cluster.rig import missing
from train.records.runs import code_commit, versions

_MISSING = missing()
# In each twelve: processes die more often than machines.
_KINDS = [*FAULTS, *["worker killed"] * 4, *["disk full"] * 2]
pytestmark = [pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)), pytest.mark.timeout(2 * 3600)]


def test_soak(course, shards, request, tmp_path):
    faults, seed, results = (request.config.getoption(name) for name in ("--faults", "--order", "--results"))
    seed = random.randrange(10**6) if seed is None else seed
    order = [kind for kind, _ in zip(itertools.cycle(_KINDS), range(faults), strict=False)]
    random.Random(seed).shuffle(order)
    path = Path(results, f"{datetime.date.today()}-soak.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"seed": seed, "commit": code_commit(), "versions": versions(), "faults": []}
    for number, fault in enumerate(order, 1):
        outage = befall(course, fault)
        record["faults"].append(outage._asdict() | {"step": course.step})
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{number}/{faults} {outage}, at step {course.step}", flush=True)
    course.until_rows(20)
    record["steps"] = as_if_nothing_had_happened(course, shards, tmp_path)
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text("\n".join(_table(record)) + "\n")


def _table(record) -> list[str]:
    outages = [Outage(*(each[name] for name in Outage._fields)) for each in record["faults"]]
    lines = [
        f"# Faults of a cluster, {datetime.date.today()}",
        "",
        f"{len(outages)} faults in random order (seed {record['seed']}) to one run with `--workers 1:2` on two machines made of"
        f" namespaces, which share two cores; `make soak`, commit {record['commit']}, Ray {record['versions']['ray']}.",
        "",
        f"After {record['steps']:,} steps the weights and all losses were those of a run to which nothing happened, to 1e-9.",
        "",
        "Stood still: the longest time without a new row, seconds. Steps again: those taken twice. All back: seconds until all"
        " that the fault took was in use again. In these times are the 60 s for which the storage is away, the 20 s for which the"
        " disk is full, and of a preemption its notice of 15 s and 20 s without the machine.",
        "",
        "| fault | times | stood still, median | longest | steps again, most | all back, median |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for fault in FAULTS:
        of_it = [each for each in outages if each.fault == fault]
        if of_it:
            still, again, whole = ([getattr(each, name) for each in of_it] for name in ("still", "again", "whole"))
            figures = f"{statistics.median(still):.1f} | {max(still):.1f} | {max(again)} | {statistics.median(whole):.0f}"
            lines.append(f"| {fault} | {len(of_it)} | {figures} |")
    return lines
