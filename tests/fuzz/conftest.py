"""How many examples: seconds' worth in `make test`, as many as asked for in `make fuzz`."""

import os

import hypothesis

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))

hypothesis.settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 10,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
PROFILE = hypothesis.settings.get_profile("fuzz")
