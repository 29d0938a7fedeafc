"""What the smoke benchmark makes of its rounds: ratios, what has fallen too far, and what it says of that."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from measuring import heading, machine, markdown_table
from smoke_sides import RATIOS

FALL = 0.2  # as a share of the committed ratio: a larger one is an error
_RISE = 0.25  # a larger one is told: until it is committed, as much can be lost again unseen
# What was measured and is not compared, and why
LEFT_OUT: dict[str, str] = {
    "host": "decoding over reading and drawing was about 118 on a quieter machine, 97 to 103 on a busy one, and once 173",
    "heads-sgd": "small steps of the plain torch loop took up to half more where others used the cache, and ours did not",
}


class Verdict(NamedTuple):
    """name: of a ratio; text: a sentence on it; failed: whether it is an error."""

    name: str
    text: str
    failed: bool


def of_rounds(yardstick: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Times of the two, round by round -> the median of the ratios within a round, so that a slow minute cancels out."""
    ratios = [theirs / mine for theirs, mine in zip(yardstick, ours, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": ratio, "spread": (high - low) / ratio, "rounds": len(ratios)}


def summarise(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """ratio: median over the runs; spread: from the lowest to the highest of them, or where there is one, of its rounds' middle
    half, as a share of the ratio. One that failed in a run is missing."""
    found: dict[str, dict[str, Any]] = {}
    for name in RATIOS:
        mine = [run[name] for run in runs if name in run]
        if len(mine) == len(runs) == 1:
            found[name] = dict(mine[0])
        elif len(mine) == len(runs):
            ratios = [each["ratio"] for each in mine]
            ratio = statistics.median(ratios)
            spread = (max(ratios) - min(ratios)) / ratio
            found[name] = {"ratio": ratio, "spread": spread, "rounds": min(each["rounds"] for each in mine)}
    return found


def compare(
    found: Mapping[str, Mapping[str, Any]],
    committed: Mapping[str, Any],
    wanted: Collection[str],
    why: Mapping[str, str],
) -> list[Verdict]:
    """What there is to say of the ratios wanted. why: those that could not be measured are not there."""
    verdicts, known = [], committed["ratios"]
    for name in dict.fromkeys((*wanted, *(known if set(wanted) >= set(RATIOS) else ()))):
        was = known.get(name, {}).get("ratio")
        if name not in found:
            reason = why.get(name) or "this benchmark does not know it any more; --update drops it"
            verdicts.append(Verdict(name, f"{name}: not measured: {reason}", True))
            continue
        now = found[name]["ratio"]
        if was is None:
            verdicts.append(Verdict(name, f"{name}: {now:.3g} is new: --update commits it", False))
            continue
        change, at = now / was - 1, f"{name}: {now:.3g}, committed {was:.3g}"
        if fell(now, was):
            text = f"{at} ({known[name]['means']}): a fall of {-change:.0%}, more than {FALL:.0%}"
            verdicts.append(Verdict(name, f"{text}{_elsewhere(committed)}", True))
        elif change > _RISE:
            verdicts.append(Verdict(name, f"{at}: a rise of {change:.0%}; --update commits it", False))
    return verdicts


def _elsewhere(committed: Mapping[str, Any]) -> str:
    here, there = machine(1)["cpu"], committed["machine"]["cpu"]
    return "" if here == there else f"; it was committed on another processor, {there}, and this is {here}"


def falls(runs: Sequence[Mapping[str, Mapping[str, Any]]], committed: Mapping[str, Any]) -> dict[str, int]:
    """In how many runs each ratio fell too far."""
    return {
        name: sum(fell(run[name]["ratio"], was["ratio"]) for run in runs if name in run)
        for name, was in committed["ratios"].items()
    }


def fell(now: float, was: float) -> bool:
    """Too far. What is no number has fallen."""
    return not now >= (1 - FALL) * was


def committed_form(record: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What smoke.json holds."""
    return {
        "what": "Times of yardsticks over times of ours: more is better. benchmarks/smoke.py compares, and --update writes this.",
        "spread": "from the lowest to the highest run, as a share of the ratio (of a single run: of its rounds' middle half)",
        **{key: record[key] for key in ("date", "time", "commit", "command", "machine", "versions")},
        "runs": len(record["runs"]),
        "ratios": {
            name: {
                "ratio": _rounded(each["ratio"]),
                "spread": _rounded(each["spread"]),
                "rounds": each["rounds"],
                "means": RATIOS[name].means,
            }
            for name, each in found.items()
        },
        "left_out": LEFT_OUT,
    }


def _rounded(value: float) -> float:
    """To four digits."""
    return round(value, 3 - math.floor(math.log10(abs(value)))) if value else value


def table(found: Mapping[str, Mapping[str, Any]], committed: Mapping[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    known = committed["ratios"] if committed else {}
    rows = []
    for name, each in found.items():
        was = known[name]["ratio"] if name in known else None
        change = ["-", "-"] if was is None else [f"{was:.3g}", f"{each['ratio'] / was - 1:+.1%}"]
        rows.append([name, f"{each['ratio']:.3g}", f"{each['spread']:.1%}", *change])
    return ["ratio", "measured", "spread", "committed", "change"], rows


def markdown(record: Mapping[str, Any], committed: Mapping[str, Any] | None) -> str:
    runs, known = len(record["runs"]), committed["ratios"] if committed else {}
    against = f"commit {committed['commit']}, {committed['date']} {committed['time']}" if committed else "none is"
    text = (
        f"{runs} runs, in each of which a group's rounds take {record['seconds']:g} CPU seconds; a run takes"
        f" {statistics.median(record['wall_s']):,.0f} s by the clock. A ratio is a yardstick's time over ours, in CPU seconds on"
        " one core. Of a run it is the median of the ratios within a round; their middle half spreads over that share of it"
        " (median over the runs). Lowest and highest: of the runs, against their median. Falls: runs that were more than"
        f" {FALL:.0%} below the committed ratio ({against})."
    )
    rows = []
    for name, each in record["ratios"].items():
        mine, ratio = [run[name] for run in record["runs"]], each["ratio"]
        reach = [f"{pick(one['ratio'] for one in mine) / ratio - 1:+.1%}" for pick in (min, max)]
        rounds = f"{statistics.median(one['rounds'] for one in mine):g}"
        middle = f"{statistics.median(one['spread'] for one in mine):.1%}"
        was = f"{known[name]['ratio']:.3g}" if name in known else "-"
        fallen = f"{record['falls'][name]} of {runs}" if name in record["falls"] else "-"
        rows.append([RATIOS[name].means, name, rounds, middle, f"{ratio:.3g}", *reach, was, fallen])
    header = ["yardstick / ours", "name", "rounds", "middle half", "median", "lowest", "highest", "committed", "falls"]
    lines = [*heading("Ratios of the smoke benchmark", dict(record)), text, "", *markdown_table(header, rows), ""]
    lines += [f"- {name}: FAILED: {why}" for name, why in record["failed"].items()]
    lines += [f"- {name}: left out: {why}" for name, why in LEFT_OUT.items()]
    return "\n".join([*lines, ""])
