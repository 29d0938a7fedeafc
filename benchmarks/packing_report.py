"""What the packing benchmark says: ratios, targets, tables, and what they were measured on."""

import statistics
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from measuring import heading, markdown_table, versions_of
from packing_contenders import CONTENDERS, DECODERS

_PACKAGES = ("numpy", "pyarrow", "pillow", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda130")


class Target(NamedTuple):
    """What a contender should reach. ratio: a column of `summarise`; at_least: or else at most."""

    contender: str
    ratio: str
    wanted: float
    at_least: bool
    text: str


TARGETS = (
    Target("ours-decode", "rate_to_decode", 0.8, True, "ours with --check decode, as a share of the bare decode's rate"),
    Target("ours-header", "time_to_tar", 3.0, False, "ours with --check header, its time as a multiple of tar's"),
    Target("ours-header", "rate_to_webdataset", 5.0, True, "ours with --check header, its rate as a multiple of ShardWriter's"),
)
RATIOS = {"rate_to_decode": "rate / bare decode", "time_to_tar": "time / tar", "rate_to_webdataset": "rate / ShardWriter"}


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Medians over the rounds, and medians of the ratios within a round, so that a slow minute of the machine cancels out.

    The bare decode is the faster of its two, by their medians. A ratio is None where its other side was not measured.
    """
    rates = {name: statistics.median(run["patches_per_s"] for run in found) for name, found in runs.items() if found}
    decode = max((name for name in DECODERS if name in rates), key=lambda name: rates[name], default=None)

    def ratio(name: str, other: str | None, figure: str) -> float | None:
        if other not in rates:
            return None
        assert other is not None
        pairs = zip(runs[name], runs[other], strict=False)  # one that failed later has fewer rounds
        return statistics.median(mine[figure] / theirs[figure] for mine, theirs in pairs)

    return {
        name: {
            "patches_per_s": rate,
            "counted_s": statistics.median(run["counted_s"] for run in runs[name]),
            "start_s": statistics.median(run["start_s"] for run in runs[name]),
            "sync_s": statistics.median(run["sync_s"] for run in runs[name]),
            "rate_to_decode": ratio(name, decode, "patches_per_s"),
            "time_to_tar": None if name in DECODERS else ratio(name, "tar", "counted_s"),
            "rate_to_webdataset": None if name in DECODERS else ratio(name, "webdataset", "patches_per_s"),
        }
        for name, rate in rates.items()
    }


def judge(summary: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    found = []
    for target in TARGETS:
        reached = summary.get(target.contender, {}).get(target.ratio)
        enough = None if reached is None else (reached >= target.wanted if target.at_least else reached <= target.wanted)
        found.append({**target._asdict(), "reached": reached, "enough": enough})
    return found


def speed_lines(record: dict[str, Any]) -> list[str]:
    """What a table does not show: targets, and who is not in it or ended early."""
    words = {None: "not measured", True: "reached", False: "MISSED"}
    lines = [
        f"{words[target['enough']]}: {target['text']}: "
        + ("" if target["reached"] is None else f"{target['reached']:.2f}, ")
        + f"wanted at {'least' if target['at_least'] else 'most'} {target['wanted']:g}"
        for target in record["targets"]
    ]
    lines += [f"FAILED: {CONTENDERS[name].title}: {why}" for name, why in record["failed"].items()]
    return lines + [f"{CONTENDERS[name].title}: {how}" for name, how in record["missing"].items()]


def speed_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, of the contenders that were measured; `speed_lines` has the others."""
    rounds = max(map(len, record["runs"].values()), default=0)
    header = ["contender", *(f"round {number}" for number in range(1, rounds + 1)), "median patches/s", "s", "start s", "sync s"]
    rows = []
    for name, row in record["summary"].items():
        rates = [f"{run['patches_per_s']:,.0f}" for run in record["runs"][name]]
        rates += ["-"] * (rounds - len(rates))
        ratios = ["-" if row[ratio] is None else f"{row[ratio]:.2f}" for ratio in RATIOS]
        median = [f"{row['patches_per_s']:,.0f}", *(f"{row[seconds]:.2f}" for seconds in ("counted_s", "start_s", "sync_s"))]
        rows.append([CONTENDERS[name].title, *rates, *median, *ratios])
    return [*header, *RATIOS.values()], rows


def speed_markdown(record: dict[str, Any]) -> str:
    images = record["images"]
    what = f"{images['patches']:,} {'drawn' if images['drawn'] else 'real'} images of {images['bytes'] / images['patches']:,.0f}"
    return "\n".join(
        [
            *heading("Packing", record),
            f"{what} bytes on average, in the page cache. Patches/s, a fresh process each time, the rounds interleaved. A "
            "packer's time runs from the start of its process, imports included, until its output is synced to the disk; a bare "
            "decode's time is that of decoding alone. Ratios are medians of the ratios within a round.",
            "",
            *markdown_table(*speed_table(record)),
            "",
            *(f"- {line}" for line in speed_lines(record)),
            "",
        ]
    )


# ---- Memory ----


def memory_table(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Bytes per patch are the growth since the first row, over the patches more than there; "-" where that had no child."""
    header = ["patches", "bytes each", "parent, MB", "its bytes per patch", "largest child, MB", "its bytes per patch", "s"]
    rows = []
    for row in found:
        more = row["patches"] - found[0]["patches"]
        cells = [f"{row['patches']:,}", f"{row['image_bytes']:,.0f}"]
        for figure in ("parent_bytes", "child_bytes"):
            base = found[0][figure]
            growth = f"{(row[figure] - base) / more:,.0f}" if more and base else "-"
            cells += [f"{row[figure] / 1e6:,.1f}", growth]
        rows.append([*cells, f"{row['wall_s']:.1f}"])
    return header, rows


def memory_markdown(record: dict[str, Any]) -> str:
    return "\n".join(
        [
            *heading("Memory of packing", record),
            "Peak resident memory (VmHWM; MB are 10^6 bytes) of ours with --check header: of the process that packs, and of its "
            "largest child. Bytes per patch are the growth since the first row.",
            "",
            *markdown_table(*memory_table(record["memory"])),
            "",
            *(f"- FAILED: {what}: {why}" for what, why in record["failed"].items()),
            "",
        ]
    )


# ---- What a result says of itself ----


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of Python, of what decodes and writes, and of the contenders."""
    found = versions_of([*_PACKAGES, *(p for name in names if (p := CONTENDERS[name].package))])
    if "tar" in names:
        found["tar"] = (
            subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .removeprefix("tar ")
        )
    return found
