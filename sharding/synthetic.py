"""Generate synthetic H&E patches, to try every command without a download or patient data.

    python sharding/synthetic.py --out DIR --organ breast --patches 1200 --size 96 --slides 12 --seed 7

Breast patches lie in `{class}/{slide}/{name}.jpg`, kidney patches in `{slide}/{name}.jpg`. See sharding/drawn_patches/patches.py.
"""

import os
import sys

from sharding.cli import run_script
from sharding.drawn_patches.dataset import LAYOUTS, DrawConfig, draw_set


def main(config: DrawConfig) -> None:
    there = os.path.exists(config.out)
    out = draw_set(config)
    layout = LAYOUTS[config.organ]
    print(f"{out}: {config.patches:,} {config.organ} patches {'are there already' if there else 'drawn'}, --layout '{layout}'")


if __name__ == "__main__":
    sys.exit(run_script(main, DrawConfig, prog="synthetic.py", description=(__doc__ or "").split("\n")[0]))
