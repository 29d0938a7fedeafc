"""What Ray Train calls in each worker. Its controller imports this module too, so it must import quickly."""

import pickle
from typing import Any


def run_pickled(config: dict[str, Any]) -> None:
    """Call a function with its argument. config: "call" is the pair of them, pickled."""
    function, argument = pickle.loads(config["call"])
    function(argument)
