"""A call that Ray Train's controller passes on to the workers without importing what it needs, which takes seconds."""

import pickle
from typing import Any


def call_pickled(config: dict[str, Any]) -> None:
    """Call a function with its argument. config: "call" is the pair of them, pickled."""
    function, argument = pickle.loads(config["call"])
    function(argument)
