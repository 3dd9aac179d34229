"""The report of a run says in words what was done, whatever the budgets and the splits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from glocal.data.split import ProtocolOptions
from glocal.experiments.report import _budget, _lead
from glocal.experiments.run import run


@pytest.mark.parametrize(
    ("labels", "unit", "words"),
    [
        (1, "volumes", "1 labelled volume"),
        ([1], "subjects", "1 labelled subject"),
        ([1, 8], "volumes", "1 or 8 labelled volumes"),
        ("all", "volumes", "all labelled volumes"),
        ([2, "all"], "subjects", "2 or all labelled subjects"),
        (["all", 2], "volumes", "all or 2 labelled volumes"),
        (["case1", "case2"], "volumes", "the labelled volumes case1, case2"),
    ],
)
def test_a_budget_in_words(labels: Any, unit: str, words: str) -> None:
    assert _budget(labels, unit) == words


@pytest.mark.parametrize(
    ("labels", "protocol", "words"),
    [
        ([1, "all"], {"draws": 3}, "fine-tuned on 1 or all labelled volumes, chosen 3 times at random."),
        ("all", {"draws": 3}, "fine-tuned on all labelled volumes, 3 times at random."),  # nothing was chosen
        (2, {"folds": 5}, "fine-tuned on 2 labelled volumes, in 5-fold cross-validation by subject."),
        (2, {"budget": "subjects"}, "fine-tuned on 2 labelled subjects."),
    ],
)
def test_the_first_sentences_say_budgets_draws_and_folds(labels: Any, protocol: dict[str, Any], words: str) -> None:
    settings = {"protocol": ProtocolOptions(**protocol).model_dump(mode="json"), "finetune": {"labels": labels}}
    store: Any = SimpleNamespace(name="Tiny", volumes=[])
    assert _lead(settings, store, ["random"]).endswith(words)


def test_a_run_with_all_labels_has_its_table_and_its_report(raw: Path, tmp_path: Path) -> None:
    """In folds of subjects with one case more or less, `all` is one budget."""
    recipe = {
        "name": "tiny",
        "device": "cpu",
        "precision": "float32",
        "preprocess": {"size": [32, 32]},
        "network": {"widths": [4, 8]},
        "finetune": {"labels": ["all", 1], "batch": 2, "log": [], "max_iterations": 1},
        "protocol": {"folds": 3},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    out = run(str(tmp_path / "tiny.yaml"), [f"data={raw}", f"out={tmp_path / 'run'}"], workers=1)
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert [row.split(" | ")[:3] for row in table[2:4]] == [["| 1", "random", "3"], ["| all", "random", "3"]]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "random/labels-1-draw-0" in page  # the training that is shown is one of the smallest budget
    assert "Dice, random, all labelled" in page
