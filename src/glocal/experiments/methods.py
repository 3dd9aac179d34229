"""What there is to choose from."""

from collections.abc import Mapping
from typing import Any, get_args

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
    return {kind: {name: (_summary(one), one.paper) for name, one in known.items()} for kind, known in KINDS.items()}


def _summary(entry: Any) -> str:
    """What it does, and its presets if it has any."""
    preset = entry.options.model_fields.get("preset")
    return str(entry.summary) + (f" (preset={'|'.join(get_args(preset.annotation))})" if preset else "")
