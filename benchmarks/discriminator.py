"""By what the discriminator of an `adversarial` training recognises labelled slices: their maps, or their images.

    python -m benchmarks.discriminator RUN

shows it the slices of some steps as in training, and again with one of the two taken away: the same mean map, or the
same mean image, for all slices. What it still tells apart is kept in `results/discriminator.json`, as the area under
the ROC curve (1/2: nothing).
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu
from torch import Tensor

from benchmarks.harness import RESULTS, machine, pinned
from glocal.checkpoints import checkpoint_in
from glocal.data.sampling import Pool
from glocal.data.store import Store
from glocal.finetuning.adversarial import Adversarial, Options
from glocal.networks.registry import build
from glocal.runs import manifest_of

STEPS = 20


def trained(run: Path) -> Adversarial:
    """The strategy as its training left it, with the volumes it learnt from."""
    settings = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    options = Options.model_validate({key: value for key, value in settings.items() if key in Options.model_fields})
    store = Store.open(Path(manifest_of(run)["store"]))
    split = json.loads((run / "split.json").read_text("utf-8"))
    labelled = split["draw"]["train"]
    unlabelled = [case for case in split["split"]["pretrain"] if case not in labelled]
    strategy = Adversarial(
        lambda _: build(options.network, store.plan.channels, len(store.labels)),
        Pool(store, labelled),
        Pool(store, unlabelled),
        options,
        run,
    )
    weights = load_file(checkpoint_in(run))
    strategy.load_state_dict({k.removeprefix("learner."): v for k, v in weights.items() if k.startswith("learner.")})
    return strategy.train()


@torch.no_grad()
def judged(strategy: Adversarial) -> dict[str, tuple[Tensor, Tensor]]:
    """By what it is shown: how surely it takes labelled and unlabelled slices for labelled ones."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for step in range(STEPS):
        both = strategy.both_batches(step)
        images, maps = both.images, strategy.network(both.images).softmax(1)
        strategy.discriminator.eval()
        shown = {
            "maps and images": (maps, images),
            "maps, one image for all": (maps, images.mean(0, keepdim=True).expand_as(images)),
            "images, one map for all": (maps.mean(0, keepdim=True).expand_as(maps), images),
        }
        for name, inputs in shown.items():
            answers = strategy.discriminator(*inputs).softmax(1)[:, 1]
            for kept, part in zip(found.setdefault(name, ([], [])), both.apart(answers), strict=True):
                kept.append(part)
    return {name: (torch.cat(labelled), torch.cat(unlabelled)) for name, (labelled, unlabelled) in found.items()}


def main(run: Path) -> None:
    """Judge, print and keep."""
    pinned()
    rows = []
    for name, (labelled, unlabelled) in judged(trained(run)).items():
        area = mannwhitneyu(labelled.numpy(), unlabelled.numpy()).statistic / (len(labelled) * len(unlabelled))
        means = {"labelled": round(float(labelled.mean()), 3), "unlabelled": round(float(unlabelled.mean()), 3)}
        rows.append({"shown": name, "area under the ROC curve": round(float(area), 3), "taken for labelled": means})
        print(rows[-1])
    content = {"machine": machine(), "command": "python -m benchmarks.discriminator RUN", "rows": rows}
    (RESULTS / "discriminator.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.discriminator RUN")
    main(Path(sys.argv[1]))
