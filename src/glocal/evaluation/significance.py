"""What the trainings of an experiment show: means, bootstrap intervals, paired tests, how sure a ranking is.

`values` is everywhere the tidy frame of an experiment: one row per training and test subject, with the columns of the
axes, `split`, `draw`, `subject` and `value` (NaN where nothing could be measured).

**Bootstrap.** Draws by subjects are a crossed design, so both are resampled, independently (McCullagh 2000, Bernoulli
6(2); Owen 2007, Ann. Appl. Stat. 1(2)). A subject has one weight in all trainings that tested it; draws are resampled
within their split; splits are too few to resample and stay. With v[t, s] the value of subject s in training t, which
tested n[t] subjects, and w, u how often a subject and a draw were drawn,

    mean(w, u) = Σ u[t] w[s] v[t, s] / n[t]  /  Σ u[t] w[s] / n[t],

for w = u = 1 the plain mean of the trainings' means. One quotient for all splits, because a split may lose all its
subjects in a resample: here it just has no weight then. Strata of subjects that prevent it, or leaving such resamples
out, fail with leave-one-out: a stratum is one subject that cannot vary, and next to no resample is left.

**Limits.** Percentile intervals over n units are too narrow by about sqrt(n / (n - 1)), 1.22 for three draws, and
cannot know more than three draws can. A split with one draw adds nothing to the interval over draws. With both
resampled, the noise of one training on one subject counts more than once, which errs to the wide side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from glocal.errors import GlocalError

FEWEST_UNITS = 6  # of 5 differences even the clearest have a two-sided Wilcoxon p of 2 / 2^5 > 0.05
OF_ONE = ("trainings", "splits", "draws", "subjects", "mean", "sd")
INTERVALS = ("low", "high", "subjects_low", "subjects_high", "draws_low", "draws_high")
COMPARED = ("difference", "difference_sd", "difference_low", "difference_high", "pairs", "better", "p")
SUMMARY = (*OF_ONE, *INTERVALS, *COMPARED, "p_holm")
_DIGITS = 12  # differences and means are rounded to, so that sums in another order are the same number

Floats = NDArray[np.float64]


class StatisticsOptions(BaseModel):
    """How an experiment is judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Literal["subject", "split"] = Field("subject", description="unit of analysis of the tests")
    resamples: int = Field(10_000, ge=1, description="of the bootstrap")
    level: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(0, ge=0, description="of the bootstrap")


def summarise(
    values: pd.DataFrame,
    axes: Sequence[str],
    baseline: Mapping[str, str],
    options: StatisticsOptions,
    higher_is_better: bool = True,
) -> pd.DataFrame:
    """One row per combination of the axes, in the order in which they first appear.

    Args:
        values: the tidy frame of an experiment.
        axes: its axis columns without `split` and `draw`.
        baseline: values of some axes, such as `{"contender": "random"}`: a row is compared with the one that has these
            and agrees in every other axis, paired by split, draw and subject.
        options: the same resamples serve all rows of one design.
        higher_is_better: whether a pair of trainings with a positive difference is `better`.

    Returns:
        The axes and the columns `SUMMARY`. `mean` and `sd` are over the means of trainings, `low` and `high` resample
        subjects and draws, `subjects_*` and `draws_*` only these; NaN where there is but one to resample. `p` is
        Wilcoxon's over the units, `p_holm` is adjusted for all tests of this one call: the family is the table.
        All about differences is NaN for the baseline itself and where there is none.

    Raises:
        GlocalError: `baseline` names no axis, or the axes do not tell two trainings apart.
    """
    if unknown := [key for key in baseline if key not in axes]:
        raise GlocalError(f"The baseline names {unknown[0]!r}, which does not vary: choose among {', '.join(axes)}.")
    _refuse_doubles(values, axes)
    cells = {key: _matrix(of_key) for key, of_key in values.groupby(list(axes), sort=False)}
    rows = []
    for key, mine in cells.items():
        other = tuple(baseline.get(axis, place) for axis, place in zip(axes, key, strict=True))
        row = dict(zip(axes, key, strict=True)) | _one(mine, options)
        if other != key and other in cells:
            row |= _compared(mine - cells[other], options, 1 if higher_is_better else -1)
        rows.append(row)
    table = pd.DataFrame(rows, columns=[*axes, *SUMMARY])
    return table.assign(p_holm=holm(table["p"].to_numpy(float)))


def _refuse_doubles(values: pd.DataFrame, axes: Sequence[str]) -> None:
    keys = [*axes, "split", "draw", "subject"]
    if len(double := values[values.duplicated(keys)]):
        which = ", ".join(f"{key} {double[key].iloc[0]}" for key in keys)
        raise GlocalError(f"There are two values of {which}: keep one, or name the axis in which they differ.")


def _matrix(values: pd.DataFrame) -> pd.DataFrame:
    """Trainings (split, draw) × subjects, both sorted; NaN where a training did not measure a subject."""
    return values.dropna(subset="value").pivot(index=["split", "draw"], columns="subject", values="value")


def _one(matrix: pd.DataFrame, options: StatisticsOptions) -> dict[str, Any]:
    means, draws = matrix.mean(axis=1), _draws(matrix)
    counts = (len(means), len(draws), max(draws, default=0), matrix.shape[1])
    intervals = (_interval(matrix, options, *over) for over in (("subjects", "draws"), ("subjects",), ("draws",)))
    facts = dict(zip(OF_ONE, (*counts, means.mean(), means.std(ddof=1)), strict=True))
    return facts | dict(zip(INTERVALS, chain(*intervals), strict=True))


def _compared(differences: pd.DataFrame, options: StatisticsOptions, sign: int) -> dict[str, Any]:
    paired = differences.dropna(how="all").dropna(how="all", axis=1)
    if paired.empty:
        return {}
    means = paired.mean(axis=1)
    units = paired.mean() if options.unit == "subject" else means.groupby(level="split").mean()
    spread = (means.mean(), means.std(ddof=1), *_interval(paired, options, "subjects", "draws"))
    better = int((sign * means.round(_DIGITS) > 0).sum())
    return dict(zip(COMPARED, (*spread, len(means), better, _wilcoxon(units.to_numpy(float))), strict=True))


def _draws(matrix: pd.DataFrame) -> tuple[int, ...]:
    """How many draws each split has."""
    return tuple(int(count) for count in matrix.groupby(level="split").size())


def _interval(matrix: pd.DataFrame, options: StatisticsOptions, *over: str) -> tuple[float, float]:
    """Percentile interval of the mean, `over` subjects, draws or both; NaN where there is but one to resample."""
    most = {"subjects": matrix.shape[1], "draws": max(_draws(matrix), default=0)}
    if max(most[units] for units in over) < 2:
        return np.nan, np.nan
    low, high = np.quantile(_resampled(matrix, options, *over), [0.5 - options.level / 2, 0.5 + options.level / 2])
    return float(low), float(high)


def _resampled(matrix: pd.DataFrame, options: StatisticsOptions, *over: str) -> Floats:
    """The mean in every resample, as the head of this file has it; a resample that measured nothing is left out."""
    values = matrix.to_numpy(float)
    measured = np.isfinite(values)
    share = measured / measured.sum(axis=1, keepdims=True)
    w, u = np.ones((1, values.shape[1])), np.ones((1, len(values)))
    if "subjects" in over:
        w = _weights((values.shape[1],), options.resamples, (options.seed, 0))
    if "draws" in over:  # another stream: the weights of subjects must not depend on how many draws there are
        u = _weights(_draws(matrix), options.resamples, (options.seed, 1))
    weight = ((w @ share.T) * u).sum(axis=1)
    total = ((w @ (share * np.nan_to_num(values)).T) * u).sum(axis=1)
    return np.asarray(total[weight > 0] / weight[weight > 0])


@lru_cache(maxsize=4)
def _weights(groups: tuple[int, ...], resamples: int, seed: tuple[int, ...]) -> Floats:
    """How often each unit is drawn, with replacement within its group: (resamples, sum of groups)."""
    generator = np.random.default_rng(seed)
    counts = [generator.multinomial(n, np.full(n, 1 / n), resamples) for n in groups]
    return np.concatenate(counts, axis=1, dtype=np.float64)


def _wilcoxon(differences: Floats) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; NaN for fewer than `FEWEST_UNITS`, 1 if nothing differs."""
    if len(differences) < FEWEST_UNITS:
        return np.nan
    rounded = np.round(differences, _DIGITS)
    # Without the zeros, which Wilcoxon leaves out too, SciPy knows how few are left and takes the exact distribution.
    unequal = rounded[rounded != 0]
    return float(stats.wilcoxon(unequal).pvalue) if len(unequal) else 1.0


def holm(p: ArrayLike) -> Floats:
    """P-values (tests,) adjusted by Holm's step-down method (1979, Scand. J. Stat. 6); NaN stays and does not count."""
    adjusted = np.array(p, dtype=np.float64)
    order = np.argsort(adjusted)[: np.isfinite(adjusted).sum()]  # NaN come last
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(order), 0, -1) * adjusted[order]))
    return adjusted


def unit_sentence(options: StatisticsOptions, summary: pd.DataFrame) -> str:
    """What the unit of analysis of a summary is, and what its intervals and p-values speak about, for a caption."""
    chance, budgets = "other choices of labelled volumes", set(summary.get("labels", ()))
    if "all" in budgets:  # its draws label the same volumes
        chance = "other seeds" if len(budgets) == 1 else f"{chance}, or of other seeds where all are labelled,"
    counted = {unit: _span(summary[f"{unit}s"], unit) for unit in ("subject", "split", "draw")}
    speaks = "other subjects given these trainings, not of other draws or another pre-training"
    if options.unit == "split":
        speaks = "other splits, as if they shared no subjects, not of other draws"
    tested = (
        f" p is of the two-sided Wilcoxon signed-rank test over {options.unit}s, adjusted by Holm for all tests of the "
        f"table, and speaks of {speaks}; fewer than {FEWEST_UNITS} {options.unit}s cannot reach p < 0.05 and get no p."
    ) * bool(summary["difference"].notna().any())
    return (
        f"The unit of analysis is the {options.unit} ({counted[options.unit]}, each counted once, averaged over all "
        "its trainings): draws of one split share test subjects and one pre-training and are no independent trials. "
        f"{100 * options.level:g} % bootstrap intervals over subjects speak of other subjects given these trainings, "
        f"those over draws of {chance} ({counted['draw']} a split: rather too narrow), all others of both; none of "
        f"another pre-training.{tested}"
    )


def _span(counts: pd.Series, unit: str) -> str:
    least, most = int(counts.min()), int(counts.max())
    return f"{least} to {most} {unit}s" if least < most else f"{most} {unit}" + "s" * (most != 1)


def _complete(values: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """(split, draw, subject) × methods, where every method has a value: rankings compare like with like."""
    _refuse_doubles(values, ["method"])
    table = values.pivot(index=["split", "draw", "subject"], columns="method", values="value")
    table = table.reindex(columns=list(methods)).dropna()
    if table.empty:
        raise GlocalError(f"No test subject of one training has a value of each of {', '.join(methods)}: rank fewer.")
    return table


def rank_stability(
    values: pd.DataFrame, methods: Sequence[str], options: StatisticsOptions, higher_is_better: bool = True
) -> pd.DataFrame:
    """How sure the ranking of methods by their mean is, under the bootstrap of subjects and draws.

    Args:
        values: of one budget, with a column `method`; what not every method has is left out.
        methods: those to rank, 1 the best; equal means share their ranks.
        options: resamples, level, seed.
        higher_is_better: False for distances and errors.

    Returns:
        In the order of `methods`: `method`, `mean`, mean `rank` over resamples with its interval `low`, `high`, and
        `first`, the share of resamples in which the method comes first (shared where several do).

    Raises:
        GlocalError: no subject was tested with every method.
    """
    complete = _complete(values, methods)
    matrices = [complete[method].unstack("subject") for method in methods]
    means = np.stack([_resampled(matrix, options, "subjects", "draws") for matrix in matrices], axis=1).round(_DIGITS)
    ranks = stats.rankdata(-means if higher_is_better else means, axis=1)
    first = ranks == ranks.min(axis=1, keepdims=True)
    low, high = np.quantile(ranks, [0.5 - options.level / 2, 0.5 + options.level / 2], axis=0)
    table = pd.DataFrame({"method": list(methods), "mean": [matrix.mean(axis=1).mean() for matrix in matrices]})
    share = (first / first.sum(axis=1, keepdims=True)).mean(axis=0)
    return table.assign(rank=ranks.mean(axis=0), low=low, high=high, first=share)


def order_agreement(values: pd.DataFrame) -> float:
    """How alike two draws or splits order the methods: Kendall's tau (1938), averaged over all pairs of (split, draw).

    Args:
        values: of one budget, with a column `method`; what not every method has is left out.

    Returns:
        1 for equal, -1 for opposite orders; ties count 0 (tau-a). NaN with one method or one (split, draw). Draws of
        one split share subjects and pre-training, so that they agree more easily than splits.
    """
    methods = list(values["method"].unique())
    means = _complete(values, methods).groupby(level=["split", "draw"]).mean().to_numpy(float)
    if min(means.shape) < 2:
        return np.nan
    left, right = np.triu_indices(len(methods), 1)
    signs = np.sign(np.round(means[:, left] - means[:, right], _DIGITS))  # (trainings, pairs of methods)
    tau = signs @ signs.T / len(left)
    return float(tau[np.triu_indices(len(tau), 1)].mean())


@dataclass(frozen=True)
class CriticalDifference:
    """Mean ranks over units, and by how much two must differ for Nemenyi's test."""

    ranks: dict[str, float]
    difference: float
    units: int
    friedman_p: float


def critical_difference(values: pd.DataFrame, level: float, higher_is_better: bool = True) -> CriticalDifference:
    """Friedman's test and Nemenyi's critical difference (Demšar 2006, JMLR 7, section 3.2.2); blocks are subjects.

    Args:
        values: with a column `method`. A subject's values are averaged over the trainings in which every method has
            one; a subject without is left out.
        level: of confidence, 1 - α.
        higher_is_better: False for distances and errors.

    Raises:
        GlocalError: fewer than 3 methods, or fewer than 2 subjects that every method was tested on.
    """
    methods = [str(method) for method in values["method"].unique()]
    if len(methods) < 3:
        raise GlocalError(f"A critical difference needs 3 methods, not {len(methods)}: for two, see the table's p.")
    blocks = _complete(values, methods).groupby(level="subject").mean().to_numpy(float).round(_DIGITS)
    units, count = blocks.shape
    if units < 2:
        raise GlocalError("A critical difference needs 2 subjects that every method was tested on: here is one.")
    ranks = stats.rankdata(-blocks if higher_is_better else blocks, axis=1)
    tied = bool((ranks == ranks[0, 0]).all())  # nothing differs anywhere: SciPy would divide by zero
    p = 1.0 if tied else float(stats.friedmanchisquare(*ranks.T).pvalue)
    q = float(stats.studentized_range.ppf(level, count, np.inf)) / 2**0.5
    difference = q * (count * (count + 1) / (6 * units)) ** 0.5
    return CriticalDifference(dict(zip(methods, ranks.mean(axis=0).tolist(), strict=True)), difference, units, p)
