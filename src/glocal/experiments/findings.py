"""What an experiment has found: the tables its recipe describes, and the figures that go with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from glocal.data.dataset import read_dataset
from glocal.data.store import Store
from glocal.errors import GlocalError
from glocal.evaluation.metrics import DISTANCES
from glocal.evaluation.significance import (
    critical_difference,
    order_agreement,
    rank_stability,
    summarise,
    unit_sentence,
)
from glocal.experiments.design import Experiment
from glocal.experiments.layout import METRIC_NAMES, TableOptions, lay_out, p_value
from glocal.experiments.plan import Training
from glocal.experiments.results import values_of
from glocal.experiments.sections import shown_slice
from glocal.finetuning.finetune import TRANSDUCTIVE
from glocal.finetuning.measure import predictions_folder
from glocal.reporting import comparisons
from glocal.reporting.comparisons import PictureRow
from glocal.reporting.html import Picture
from glocal.reporting.typeset import Layout


@dataclass(frozen=True)
class Finding:
    """A table of the experiment: its values (one row per training and subject), their summary, the table laid out."""

    name: str
    options: TableOptions
    values: pd.DataFrame
    summary: pd.DataFrame
    layout: Layout

    @property
    def what(self) -> tuple[str, str, str]:
        """What its values are: tables that only show them otherwise have the same figures."""
        return _what(self.options)

    @property
    def label(self) -> str:
        """What its values are, for an axis of a figure."""
        of = "" if self.options.structure == "mean" else f", {self.options.structure}"
        return f"{METRIC_NAMES[self.options.metric]}{of}"

    @property
    def higher_is_better(self) -> bool:
        """False for distances."""
        return self.options.metric not in DISTANCES


def findings(design: Experiment, results: pd.DataFrame) -> tuple[list[Finding], list[str]]:
    """Every table of an experiment that something was measured for, and why the others are missing."""
    axes = design.axes
    found: list[Finding] = []
    missing: list[str] = []
    for name, options in design.tables.items():
        try:
            values = values_of(results, list(axes), options)
        except GlocalError as error:
            missing.append(f"There is no table {name}. {error}")
            continue
        higher = options.metric not in DISTANCES
        summary = summarise(values, list(axes), design.baseline, design.options.statistics, higher)
        validation = values.groupby(list(axes), sort=False)["validation"].max().reset_index()
        summary = summary.merge(validation, on=list(axes), how="left")
        means = any(_what(other) == _what(options) and not other.only_differences for other in design.tables.values())
        if options.only_differences and means and summary["difference"].isna().all():
            missing.append(
                f"There is no table {name}. It shows differences to {design.baseline_name}, and there is nothing to "
                "compare with it."
            )
            continue
        text = caption(design, summary)
        layout = lay_out(summary, options, design.options.names, text, axes, design.baseline_name)
        found.append(Finding(name, options, _named(design, values), _named(design, summary), layout))
    return found, missing


def _what(options: TableOptions) -> tuple[str, str, str]:
    return options.metric, options.structure, options.checkpoint


def _named(design: Experiment, frame: pd.DataFrame) -> pd.DataFrame:
    """With columns `method`, `group` (within which methods are ranked) and `baseline`, in the place of such axes."""
    names = {tuple(v.axes.values()): (design.method_name(v.axes), design.group_name(v)) for v in design.variants}
    places = frame[list(design.axes)]
    found = [names[place] for place in places.itertuples(index=False, name=None)]
    baseline = [design.baseline.items() <= place.items() for place in places.to_dict("records")]
    return frame.assign(method=[method for method, _ in found], group=[group for _, group in found], baseline=baseline)


def caption(design: Experiment, summary: pd.DataFrame) -> str:
    """What the numbers of a table are, in words: protocol, pairing, unit of analysis."""
    protocol = design.variants[0].recipe.protocol
    judged = (
        "development subjects (for choosing, not for reporting)"
        if protocol.evaluate == "development"
        else "test subjects"
    )
    pretrained = (
        "images of test subjects were part of the pre-training (transductive)"
        if design.transductive
        else ("no test subject was part of any training (inductive)")
    )
    views = ", masks being means over moved views of each slice (test-time augmentation)" if protocol.tta else ""
    trainings = int(summary["trainings"].max())
    counts = f"{trainings} training{'s' * (trainings != 1)} a cell: {_counts(summary)}"
    paired = (
        f"Differences are paired with {design.baseline_name}: same split, draw and subject. "
        if summary["difference"].notna().any()
        else ""
    )
    return (
        f"Means over {judged}, measured in volumes of native resolution{views}; {counts}; {pretrained}. {paired}"
        f"Budgets count labelled {protocol.budget}. {unit_sentence(design.options.statistics, summary)}"
    )


def judged_on(design: Experiment) -> str:
    """On whom its trainings are measured."""
    return f"{design.variants[0].recipe.protocol.evaluate} subjects"


def cautions(design: Experiment) -> str:
    """What a reader of any table must know, if there is something."""
    chosen_on = design.variants[0].recipe.protocol.evaluate == "development"
    development = "Measured on development subjects: for choosing, not for reporting." if chosen_on else ""
    return f"{TRANSDUCTIVE if design.transductive else ''} {development}".strip()


def _counts(summary: pd.DataFrame) -> str:
    splits, draws = int(summary["splits"].max()), int(summary["draws"].max())
    return f"{splits} split{'s' * (splits != 1)} x {draws} draw{'s' * (draws != 1)}"


def figures_of(design: Experiment, finding: Finding) -> Iterator[Picture]:
    """Curves over budgets, and paired differences; what has too little to show is left out."""
    summary = finding.summary.sort_values("baseline", ascending=False, kind="stable")  # the first is drawn in grey
    if finding.values["labels"].nunique() > 1:
        curves = comparisons.means_by_budget(summary, finding.label)
        yield Picture(f"{finding.label} by budget, with intervals over subjects and draws", curves, "svg", wide=True)
    if summary["difference"].notna().any():
        side = "right is better" if finding.higher_is_better else "left is better"
        forest = comparisons.forest(summary, f"{finding.label}, difference to the baseline\n({side})")
        yield Picture(
            f"Paired differences to {design.baseline_name}, with intervals over subjects and draws",
            forest,
            "svg",
            wide=True,
        )


def ranks_of(design: Experiment, finding: Finding) -> Iterator[tuple[str, pd.DataFrame, float, Picture | None]]:
    """For every group: how sure the order of the methods is, how alike draws order them, and the diagram of ranks.

    Left out is a group in which too much failed for methods to have a training in common.
    """
    statistics = design.options.statistics
    for group, values in finding.values.groupby("group", sort=False):
        methods = list(values["method"].unique())
        measured = values.dropna(subset="value").groupby(["split", "draw", "subject"])["method"].nunique()
        common = measured[measured == len(methods)].index.unique("subject")
        if len(methods) < 2 or common.empty:
            continue
        ranks = rank_stability(values, methods, statistics, finding.higher_is_better)
        picture = None
        if len(methods) > 2 and len(common) > 1:
            found = critical_difference(values, statistics.level, finding.higher_is_better)
            text = (
                f"Mean ranks over {found.units} subjects, {group}: methods under one bar do not differ by "
                f"more than the critical difference (Nemenyi); Friedman {p_value(found.friedman_p)}"
            )
            picture = Picture(
                text, comparisons.critical_difference_diagram(found.ranks, found.difference), "svg", wide=True
            )
        yield str(group), ranks, order_agreement(values), picture


def boxes_of(design: Experiment, results: pd.DataFrame) -> Iterator[Picture]:
    """For every group the Dice of every class and method, one point per subject."""
    chosen = results[results["checkpoint"] == "last"]
    keys = [*design.axes, "class", "subject"]
    values = _named(design, chosen.groupby(keys, sort=False)["dice"].mean().rename("value").reset_index())
    values = values.sort_values("baseline", ascending=False, kind="stable")
    for group, of_group in values.groupby("group", sort=False):
        boxes = comparisons.class_boxes_by_method(of_group, "Dice")
        yield Picture(
            f"{group}: Dice by structure, each point a subject (mean over its trainings)",
            boxes,
            "svg",
            wide=True,
        )


def pictures_of(
    design: Experiment, trainings: Sequence[Training], results: pd.DataFrame, stores: Mapping[Path, Store]
) -> Iterator[Picture]:
    """For every group the worst, the median and the best test case, expert and all methods side by side.

    Cases are picked by their mean Dice over all methods, in the first split and draw.

    Raises:
        GlocalError: the raw dataset is no longer where the stores were made from.
    """
    first = (results["split"] == 0) & (results["draw"] == 0) & (results["checkpoint"] == "last")
    trained = {
        (design.group_name(t.variant), design.method_name(t.variant.axes)): t
        for t in trainings
        if t.split.index == 0 and t.draw == 0
    }
    for group, rows in _named(design, results[first]).groupby("group", sort=False):
        chosen = {method: trained[str(group), method] for method in rows["method"].unique()}
        order = rows.groupby("case")["dice"].mean().sort_values()
        picks: dict[str, list[str]] = {}
        for word, place in (("worst", 0), ("median", (len(order) - 1) // 2), ("best", len(order) - 1)):
            picks.setdefault(str(order.index[place]), []).append(word)  # one case may be all of them
        dice = rows.groupby(["case", "method"])["dice"].mean()
        store = stores[next(iter(chosen.values())).job.arguments["store"]]
        drawn = [
            _row(store, case, " and ".join(words).capitalize(), chosen, dice[case].to_dict())
            for case, words in picks.items()
        ]
        grid = comparisons.picture_grid(drawn, list(chosen), store.labels)
        text = f"{group}, first draw: worst, median and best case, with the mean Dice of the whole volume"
        yield Picture(text, grid, "png", wide=True)


def _row(store: Store, case: str, place: str, trainings: Mapping[str, Training], dice: dict[str, float]) -> PictureRow:
    folders = [predictions_folder(t.job.folder, t.job.measured) for t in trainings.values()]
    shown = shown_slice(store, read_dataset(store.dataset), folders, case)
    assert shown.truth is not None  # it was measured
    masks = dict(zip(trainings, shown.masks, strict=True))
    return PictureRow(f"{place}: {shown.title}", shown.image, shown.truth, masks, dice, shown.aspect)
