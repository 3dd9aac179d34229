"""What there is to choose from."""

from collections.abc import Mapping
from typing import Any

from glocal.finetuning.registry import STRATEGIES
from glocal.networks.registry import NETWORKS
from glocal.pretraining.registry import METHODS

KINDS: dict[str, Mapping[str, Any]] = {
    "Pre-training methods": METHODS,
    "Fine-tuning strategies": STRATEGIES,
    "Networks": NETWORKS,
}


def methods() -> dict[str, dict[str, tuple[str, str]]]:
    """Pre-training methods, fine-tuning strategies and networks: for each kind, name -> (summary, paper)."""
    return {kind: {name: (one.summary, one.paper) for name, one in known.items()} for kind, known in KINDS.items()}
