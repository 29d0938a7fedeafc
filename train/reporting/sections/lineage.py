"""Runs and their data: a card for each run, with the stages that led to its weights."""

from collections.abc import Sequence
from typing import Any

from train.reporting.markup import Content, Html, count, element, joined, share
from train.reporting.run_view import RunView

_KINDS = {
    "linear": "linear classifier, frozen backbone",
    "knn": "nearest neighbours, frozen backbone",
    "finetune": "fine-tuning",
    "supervised": "supervised training",
}
# What a co-author asks about training, and about a classifier on frozen features.
_TRAINED = ("epochs", "batch_size", "optimizer", "learning_rate", "temperature", "projection_dim", "precision")
_SETTINGS = {"linear": ("protocol", "head"), "knn": ("neighbours",)}
_PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130")


def show(runs: Sequence[RunView]) -> list[Html]:
    return [element("div", *(_card(run) for run in runs), class_="cards")]


def _card(run):
    facts = {name: text for name, text in _facts(run).items() if text}
    listed = joined(joined([element("dt", name), element("dd", text)]) for name, text in facts.items())
    return element("article", element("h3", run.name), _steps(run), element("dl", listed), class_="card")


def _steps(run):
    """The chain of stages. An evaluation is its own last step."""
    steps = list(run.result["chain"])
    if run.is_evaluation:
        data = " + ".join(each["name"] for each in run.sets)
        steps = [*(steps or ["random weights"]), f"{_KINDS.get(run.result['kind'], run.result['kind'])} on {data}"]
    return element("ol", *(element("li", step) for step in steps), class_="steps")


def _facts(run: RunView) -> dict[str, Content]:
    record, result, config = run.record, run.result, run.record["stage"]["config"]
    machine, versions = record["machine"], record["versions"]
    named: dict[str, Content] = {"Data": joined((_set(each, len(run.sets)) for each in run.sets), "; ")}
    named["Packed by"] = joined((element("code", each) for one in run.sets for each in one.get("packed_by", ())), "; ")
    if run.is_evaluation:
        labels = ", ".join(f"{each['labels']:,} ({share(each['fraction'])})" for each in result["summary"])
        tested = f"{run.cells[0]['test_patches']:,} patches"
        if run.largest["unit"] == "group":
            tested += f" of {count(run.largest['units'], 'group')} (slides or patients)"
        named |= {"Labels": labels, "Tested on": tested, "Split": result["split_rule"]}
        named["Seeds"] = ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in result["cells"]}))
    else:
        named |= {"Patches": f"{result['patches']:,}, {count(result['steps'], 'step')}", "Seed": str(record["seed"])}
    size = config.get("image_size")
    backbone = result.get("architecture") or config.get("backbone")
    named["Backbone"] = ", ".join(text for text in (backbone, size and f"{size} px") if text)
    named["Views"] = f"{record['input']['recipe']}: {_recipe(record['input']['recipe_fields'])}"
    named["Settings"] = ", ".join(
        f"{name.replace('_', ' ')} {config[name]}"
        for name in _SETTINGS.get(result["kind"], _TRAINED)
        if config.get(name) is not None
    )
    named["Code"] = joined([element("code", record["commit"][:10]), f", {_versions(versions)}"])
    named["Machine"] = f"{record['device']}, {machine['cores']} cores"
    named["Time"] = f"{record['started'][:10]}, {_duration(record['wall_seconds'])}"
    return named


def _set(each: dict[str, Any], of: int) -> Content:
    weight = f", weight {each['weight']:g}" if of > 1 else ""
    # The first digits distinguish sets; the record has them all.
    return joined([each["name"], " (", element("code", each["fingerprint"][:10]), f"{weight})"])


def _versions(versions):
    return ", ".join(f"{name.removeprefix('nvidia-').removesuffix('-cuda130')} {versions[name]}" for name in _PACKAGES)


def _recipe(fields: dict[str, Any]) -> str:
    """A recipe in words, from its fields, without what is off."""
    words = []
    if crop := fields["crop"]:
        words.append(f"crops of {crop['area'][0]:.0%} to {crop['area'][1]:.0%} of the area")
    else:
        words.append("the centred square" if fields["keep_aspect"] else "the whole patch")
    words += [name for field, name in (("flip", "mirrored"), ("vertical_flip", "upside down")) if fields[field]]
    if fields["turns"] != "none":
        words.append("quarter turns")
    if stain := fields["stain"]:
        words.append(f"stain jitter {stain['strength']:g}")
    if jitter := fields["jitter"]:
        words.append("colour jitter " + " / ".join(f"{jitter[k]:g}" for k in ("brightness", "contrast", "saturation", "hue")))
    if fields["grey"]:
        words.append(f"grey {fields['grey']:.0%}")
    if fields["blur"]:
        words.append("blur")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
