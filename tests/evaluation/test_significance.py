"""Statistics of experiments, against loops written from the definitions, SciPy, known tables and invariances."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import stats

from glocal.errors import GlocalError
from glocal.evaluation import significance
from glocal.evaluation.significance import (
    SUMMARY,
    StatisticsOptions,
    critical_difference,
    holm,
    order_agreement,
    rank_stability,
    summarise,
    unit_sentence,
)

AXES = ["contender", "labels"]
RANDOM = {"contender": "random"}
FEW = StatisticsOptions(resamples=300)
BOTH = ("subjects", "draws")


def experiment(
    contenders: dict[str, float],
    labels: tuple[str, ...] = ("2",),
    tested: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4, 5, 6), (5, 6, 7, 8)),
    draws: tuple[int, ...] = (3, 2),
    seed: int = 0,
) -> pd.DataFrame:
    """Subjects, draws and noise; a contender adds its number. `tested`: the subjects of each split."""
    generator = np.random.default_rng(seed)
    of_subject = generator.normal(0, 0.1, 100)
    rows: list[dict[str, Any]] = []
    for contender, effect in contenders.items():
        for budget in labels:
            for split, subjects in enumerate(tested):
                for draw in range(draws[split]):
                    of_draw = generator.normal(0, 0.05)
                    rows += [
                        {
                            "contender": contender,
                            "labels": budget,
                            "split": split,
                            "draw": draw,
                            "subject": f"s{subject:02}",
                            "value": 0.5 + effect + of_subject[subject] + of_draw + generator.normal(0, 0.03),
                        }
                        for subject in subjects
                    ]
    return pd.DataFrame(rows)


def one_row(values: pd.DataFrame, options: StatisticsOptions = FEW, **chosen: str) -> pd.Series:
    table = summarise(values, AXES, RANDOM, options)
    for axis, value in chosen.items():
        table = table[table[axis] == value]
    assert len(table) == 1
    return table.iloc[0]


def training_means(values: pd.DataFrame) -> dict[tuple[int, int], float]:
    means = {}
    for split, draw in sorted({(row.split, row.draw) for row in values.itertuples()}):
        mine = [r.value for r in values.itertuples() if (r.split, r.draw) == (split, draw) and not math.isnan(r.value)]
        means[split, draw] = sum(mine) / len(mine)
    return means


def test_columns_order_and_counts() -> None:
    values = experiment({"zebra": 0.1, "random": 0, "ant": 0.2}, labels=("2", "1"))
    table = summarise(values, AXES, RANDOM, FEW)
    assert list(table.columns) == [*AXES, *SUMMARY]
    assert list(zip(table["contender"], table["labels"], strict=True)) == [
        *(("zebra", "2"), ("zebra", "1"), ("random", "2")),
        *(("random", "1"), ("ant", "2"), ("ant", "1")),
    ]
    for name, count in {"trainings": 5, "splits": 2, "draws": 3, "subjects": 9}.items():
        assert set(table[name]) == {count}
    assert table["draws"].dtype.kind == "i"


def test_mean_and_sd_are_of_the_means_of_trainings() -> None:
    values = experiment({"random": 0})
    values.loc[3, "value"] = math.nan
    row = one_row(values)
    means = list(training_means(values).values())
    assert row["mean"] == pytest.approx(sum(means) / 5)
    assert row["sd"] == pytest.approx(math.sqrt(sum((m - sum(means) / 5) ** 2 for m in means) / 4))
    assert row["mean"] != pytest.approx(values["value"].mean(), abs=1e-6)  # splits test unequal numbers of subjects


def test_differences_are_paired_and_baseline_rows_are_empty() -> None:
    values = experiment({"random": 0, "glcl": 0.05}, labels=("1", "2"))
    # The baseline lacks a training of budget 1, and the contender a subject of another.
    values = values[
        ~((values.contender == "random") & (values.labels == "1") & (values.split == 0) & (values.draw == 1))
    ]
    gone = (values.contender == "glcl") & (values.labels == "1") & (values.split == 1) & (values.subject == "s07")
    values = values[~(gone & (values.draw == 0))]
    mine = values[(values.contender == "glcl") & (values.labels == "1")]
    base = values[(values.contender == "random") & (values.labels == "1")]
    found = {(r.split, r.draw, r.subject): r.value for r in base.itertuples()}
    differences: dict[tuple[int, int], list[float]] = {}
    for r in mine.itertuples():
        if (r.split, r.draw, r.subject) in found:
            differences.setdefault((r.split, r.draw), []).append(r.value - found[r.split, r.draw, r.subject])
    means = [sum(d) / len(d) for d in differences.values()]
    row = one_row(values, contender="glcl", labels="1")
    assert row["pairs"] == len(means) == 4
    assert row["difference"] == pytest.approx(sum(means) / 4)
    assert row["difference_sd"] == pytest.approx(np.std(means, ddof=1))
    assert row["better"] == sum(m > 0 for m in means)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    empty = ["difference", "difference_sd", "difference_low", "difference_high", "pairs", "better", "p", "p_holm"]
    assert one_row(values, contender="random", labels="1")[empty].isna().all()
    assert one_row(values, contender="glcl", labels="2")["pairs"] == 5


def test_without_its_baseline_a_row_has_no_difference() -> None:
    values = experiment({"random": 0, "glcl": 0.05}, labels=("1", "2"))
    table = summarise(values[(values.contender != "random") | (values.labels == "1")], AXES, RANDOM, FEW)
    assert table.set_index(AXES)["difference"].isna().to_dict() == {
        ("random", "1"): True,
        ("glcl", "1"): False,
        ("glcl", "2"): True,
    }
    alone = summarise(values[values.contender == "glcl"], AXES, RANDOM, FEW)
    assert alone["p_holm"].isna().all()


def test_lower_is_better_only_turns_better() -> None:
    values = experiment({"random": 0, "glcl": 0.04}, seed=3)
    up, down = (summarise(values, AXES, RANDOM, FEW, higher_is_better=h).iloc[1] for h in (True, False))
    assert up["better"] + down["better"] == up["pairs"] == 5
    assert up["better"] > down["better"]
    columns = [name for name in SUMMARY if name != "better"]
    pd.testing.assert_series_equal(up[columns], down[columns], check_names=False)


def test_equal_trainings_are_not_better() -> None:
    values = experiment({"random": 0})
    values = pd.concat([values, values.assign(contender="copy")])
    row = one_row(values, contender="copy")
    assert (row["difference"], row["better"], row["p"], row["difference_high"]) == (0, 0, 1, 0)


def slow_mean(matrix: pd.DataFrame, w: np.ndarray, u: np.ndarray) -> float:
    """The weighted mean, as the definition has it."""
    above = below = 0.0
    for t in range(matrix.shape[0]):
        tested = [s for s in range(matrix.shape[1]) if not math.isnan(matrix.iloc[t, s])]
        for s in tested:
            above += u[t] * w[s] * matrix.iloc[t, s] / len(tested)
            below += u[t] * w[s] / len(tested)
    return above / below


@pytest.mark.parametrize("over", [BOTH, ("subjects",), ("draws",)])
def test_bootstrap_equals_a_slow_loop(over: tuple[str, ...]) -> None:
    matrix = significance._matrix(experiment({"random": 0}))
    options = StatisticsOptions(resamples=20, seed=4)
    w = significance._weights((9,), 20, (4, 0)) if "subjects" in over else np.ones((20, 9))
    u = significance._weights((3, 2), 20, (4, 1)) if "draws" in over else np.ones((20, 5))
    slow = [slow_mean(matrix, w[r], u[r]) for r in range(20)]
    np.testing.assert_allclose(significance._resampled(matrix, options, *over), slow)
    low, high = significance._interval(matrix, options, *over)
    assert (low, high) == pytest.approx(np.percentile(slow, [2.5, 97.5]))


def test_weights_are_draws_with_replacement_within_groups() -> None:
    weights = significance._weights((4, 2, 1), 4000, (0,))
    for group in (slice(0, 4), slice(4, 6), slice(6, 7)):
        n = group.stop - group.start
        assert (weights[:, group].sum(axis=1) == n).all()
        np.testing.assert_allclose(weights[:, group].mean(axis=0), 1, atol=0.06)
        np.testing.assert_allclose(weights[:, group].var(axis=0), 1 - 1 / n, atol=0.08)


def test_interval_of_one_split_equals_scipys() -> None:
    """One training: the bootstrap of a plain mean."""
    values = experiment({"random": 0}, tested=(tuple(range(30)),), draws=(1,))
    row = one_row(values, StatisticsOptions(resamples=8000))
    reference = stats.bootstrap((values["value"],), np.mean, method="percentile", n_resamples=8000, rng=1)
    assert tuple(row[["low", "high"]]) == pytest.approx(tuple(reference.confidence_interval), abs=0.002)
    assert tuple(row[["low", "high"]]) == tuple(row[["subjects_low", "subjects_high"]])
    assert row[["draws_low", "draws_high", "sd"]].isna().all()  # one draw knows nothing of others


def test_leave_one_out_is_the_bootstrap_over_subjects() -> None:
    """A split of one subject is lost in a third of the resamples; its interval must still be that of a mean."""
    values = experiment({"random": 0}, tested=tuple((s,) for s in range(30)), draws=(1,) * 30)
    together = values.assign(split=0)
    apart, joined = (one_row(v, StatisticsOptions(resamples=4000)) for v in (values, together))
    assert apart["mean"] == pytest.approx(joined["mean"])
    assert tuple(apart[["low", "high"]]) == pytest.approx(tuple(joined[["low", "high"]]))


def test_draws_interval_speaks_of_draws_only() -> None:
    values = experiment({"random": 0})
    values["value"] = values["draw"] * 0.1
    row = one_row(values)
    assert row["subjects_low"] == pytest.approx(row["subjects_high"], abs=0.05)  # splits have unequal draws
    assert row["draws_high"] - row["draws_low"] > 0.05
    values["value"] = values["subject"].str[1:].astype(float)
    row = one_row(values)
    assert row["draws_low"] == pytest.approx(row["mean"])
    assert row["draws_high"] == pytest.approx(row["mean"])
    assert row["subjects_high"] - row["subjects_low"] > 0.5


def test_nothing_to_resample_gives_no_interval() -> None:
    row = one_row(experiment({"random": 0}, tested=((0,),), draws=(1,)))
    assert row[["low", "high", "subjects_low", "draws_high"]].isna().all()


def test_a_cell_that_measured_nothing_is_an_empty_row() -> None:
    values = experiment({"random": 0, "glcl": 0.1})
    values.loc[values.contender == "glcl", "value"] = math.nan
    row = one_row(values, contender="glcl")
    assert tuple(row[["trainings", "splits", "draws", "subjects"]]) == (0, 0, 0, 0)
    assert row[["mean", "sd", "low", "draws_high", "difference", "p"]].isna().all()
    assert summarise(values[:0], AXES, RANDOM, FEW).columns.tolist() == [*AXES, *SUMMARY]


def test_order_of_rows_does_not_matter() -> None:
    values = experiment({"random": 0, "glcl": 0.05, "pcl": 0.02}, labels=("1", "2"))
    shuffled = values.sample(frac=1, random_state=0)
    one, two = (summarise(v, AXES, RANDOM, FEW).set_index(AXES).sort_index() for v in (values, shuffled))
    pd.testing.assert_frame_equal(one, two)


def test_rows_do_not_depend_on_each_other() -> None:
    """Equal designs share their resamples, so equal contenders have equal intervals, whoever stands beside them."""
    values = experiment({"random": 0, "glcl": 0.05})
    copied = pd.concat([values[values.contender == "glcl"].assign(contender="a copy"), values])
    table = summarise(copied, AXES, RANDOM, FEW).set_index("contender").drop(columns="p_holm")
    pd.testing.assert_series_equal(table.loc["a copy"], table.loc["glcl"], check_names=False)
    alone = summarise(values, AXES, RANDOM, FEW).set_index("contender").drop(columns="p_holm")
    pd.testing.assert_series_equal(alone.loc["glcl"], table.loc["glcl"])


def test_relabelled_draws_change_chance_only() -> None:
    values = experiment({"random": 0, "glcl": 0.05})
    other = values.assign(
        draw=[{0: 7, 1: 3, 2: 5}[d] if s == 0 else 9 - d for s, d in zip(values.split, values.draw, strict=True)]
    )
    options = StatisticsOptions(resamples=6000)
    one, two = (one_row(v, options, contender="glcl") for v in (values, other))
    same = ["mean", "sd", "subjects_low", "subjects_high", "difference", "difference_sd", "pairs", "better", "p"]
    assert tuple(one[same]) == pytest.approx(tuple(two[same]))
    chance = ["low", "high", "draws_low", "draws_high", "difference_low", "difference_high"]
    assert tuple(one[chance]) == pytest.approx(tuple(two[chance]), abs=0.004)


@pytest.mark.parametrize("unit", ["subject", "split"])
def test_draws_are_no_independent_trials(unit: Any) -> None:
    """Every draw twice: no subject and no split is added, so what speaks of them stays as sure as it was."""
    tested = tuple(tuple(range(s, s + 4)) for s in range(7))
    values = experiment({"random": 0, "glcl": 0.01}, tested=tested, draws=(2,) * 7)
    twice = pd.concat([values, values.assign(draw=values.draw + 100)])
    options = StatisticsOptions(resamples=300, unit=unit)
    one, two = (one_row(v, options, contender="glcl") for v in (values, twice))
    assert (one["trainings"], two["trainings"]) == (14, 28)
    names = ["subjects_low", "subjects_high", "difference", "p"]
    assert tuple(one[names]) == pytest.approx(tuple(two[names]))
    assert 0 < one["p"] < 1


def test_a_split_more_does_not_make_a_subject_two() -> None:
    """A subject who is tested in two splits has one weight: the same test set again narrows no interval."""
    values = experiment({"random": 0}, tested=(tuple(range(9)),), draws=(2,))
    again = pd.concat([values, values.assign(split=1)])
    one, two = (one_row(v) for v in (values, again))
    names = ["subjects_low", "subjects_high"]
    assert tuple(one[names]) == pytest.approx(tuple(two[names]))


@pytest.mark.parametrize(("of_draw", "enough"), [(0.0, True), (1.0, False)])
def test_coverage(of_draw: float, enough: bool) -> None:
    """An interval over subjects covers the mean if only subjects vary; if draws do too, only both resampled do."""
    generator = np.random.default_rng(0)
    options, hits, runs = StatisticsOptions(resamples=300), {"subjects": 0, "both": 0}, 200
    index = pd.MultiIndex.from_product([[0], range(25)], names=["split", "draw"])
    for _ in range(runs):
        values = generator.normal(size=40) + of_draw * generator.normal(size=(25, 1)) + generator.normal(size=(25, 40))
        matrix = pd.DataFrame(values, index=index)
        for name, over in (("subjects", ("subjects",)), ("both", BOTH)):
            low, high = significance._interval(matrix, options, *over)
            hits[name] += low <= 0 <= high
    assert hits["both"] / runs > 0.9
    assert (0.9 < hits["subjects"] / runs < 0.98) is enough


@pytest.mark.parametrize("unit", ["subject", "split"])
def test_p_equals_scipys_over_units(unit: Any) -> None:
    tested = tuple(tuple(range(s, s + 5)) for s in range(8))
    values = experiment({"random": 0, "glcl": 0.02}, tested=tested, draws=(3, 1, 2, 3, 1, 1, 1, 2), seed=5)
    pairs = values.pivot(index=["split", "draw", "subject"], columns="contender", values="value").reset_index()
    units = []
    for name in sorted(pairs[unit].unique()):
        of_unit = pairs[pairs[unit] == name]
        units.append(float((of_unit["glcl"] - of_unit["random"]).mean()))
    row = one_row(values, StatisticsOptions(resamples=10, unit=unit), contender="glcl")
    assert len(units) == {"subject": 12, "split": 8}[unit]
    assert row["p"] == pytest.approx(stats.wilcoxon(units).pvalue)


@pytest.mark.parametrize(("units", "p"), [(5, math.nan), (6, 2 / 2**6), (7, 2 / 2**7)])
def test_too_few_units_get_no_p(units: int, p: float) -> None:
    values = experiment({"random": 0, "glcl": 1}, tested=(tuple(range(units)),), draws=(1,))
    assert one_row(values, contender="glcl")["p"] == pytest.approx(p, nan_ok=True)


def test_zeros_do_not_make_a_p_of_a_few_differences() -> None:
    """Of 20 units 15 do not differ: the other five alone cannot be clear, whatever the normal approximation says."""
    assert significance._wilcoxon(np.array([0.0] * 15 + [1, 2, 3, 4, 5])) == pytest.approx(2 / 2**5)
    assert significance._wilcoxon(np.array([1e-17, -1e-17] * 4)) == 1


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    np.testing.assert_allclose(holm([math.nan, 0.02, math.nan, 0.01]), [math.nan, 0.02, math.nan, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1, 1])
    assert np.isnan(holm([math.nan])).all()
    assert holm([]).shape == (0,)


def test_holm_counts_the_tests_of_the_table() -> None:
    values = experiment({"random": 0, "glcl": 0.1, "pcl": 0.01}, labels=("1", "2"))
    table = summarise(values, AXES, RANDOM, FEW)
    assert table["p"].notna().sum() == 4
    np.testing.assert_allclose(table["p_holm"], holm(table["p"]))
    assert table["p_holm"].min() == pytest.approx(4 * table["p"].min())


def test_refused() -> None:
    values = experiment({"random": 0})
    with pytest.raises(GlocalError, match="'contendr'"):
        summarise(values, AXES, {"contendr": "random"}, FEW)
    with pytest.raises(GlocalError, match=r"two values of contender random, split 0, draw 0, subject s00"):
        summarise(experiment({"random": 0}, labels=("1", "2")), ["contender"], RANDOM, FEW)
    for wrong in ({"level": 1.0}, {"level": 0}, {"resamples": 0}, {"unit": "draw"}, {"draws": 1}):
        with pytest.raises(ValidationError):
            StatisticsOptions.model_validate(wrong)


def test_unit_sentence() -> None:
    values = experiment({"random": 0, "glcl": 0})
    table = summarise(values, AXES, RANDOM, FEW)
    words = unit_sentence(FEW, table)
    assert "is the subject (9 subjects" in words
    assert "(3 draws a split" in words
    assert "95 %" in words
    assert "not of other draws" in words
    some = table.assign(subjects=[8, 9], splits=[1, 1], draws=[1, 1])
    assert "8 to 9 subjects" in unit_sentence(FEW, some)
    by_split = unit_sentence(StatisticsOptions(unit="split", level=0.9), some)
    assert "is the split (1 split," in by_split
    assert "90 %" in by_split
    assert "p is of" in words
    assert "p is of" not in unit_sentence(FEW, table[:1])  # the baseline alone is compared with nothing


def test_draws_of_all_labels_are_seeds() -> None:
    table = summarise(experiment({"random": 0, "glcl": 0}), AXES, RANDOM, FEW)
    few, both, every = (unit_sentence(FEW, table.assign(labels=labels)) for labels in ("2", ["2", "all"], "all"))
    assert "over draws of other choices of labelled volumes (" in few
    assert "other choices of labelled volumes, or of other seeds where all are labelled, (" in both
    assert "over draws of other seeds (" in every


def methods_of(*effects: float, **design: Any) -> pd.DataFrame:
    named = dict(zip("abcdef", effects, strict=False))
    return experiment(named, **design).rename(columns={"contender": "method"})


def test_ranks_equal_a_slow_loop() -> None:
    values = methods_of(0, 0.02, 0.03)
    options = StatisticsOptions(resamples=40, seed=2)
    matrices = {m: significance._matrix(values[values.method == m]) for m in "abc"}
    w, u = significance._weights((9,), 40, (2, 0)), significance._weights((3, 2), 40, (2, 1))
    ranks: dict[str, list[int]] = {m: [] for m in "abc"}
    for r in range(40):
        means = {m: slow_mean(matrix, w[r], u[r]) for m, matrix in matrices.items()}
        for m in "abc":
            ranks[m].append(1 + sum(other > means[m] for other in means.values()))
    table = rank_stability(values, ["c", "a", "b"], options).set_index("method")
    assert list(table.index) == ["c", "a", "b"]
    for m in "abc":
        assert table.loc[m, "rank"] == pytest.approx(np.mean(ranks[m]))
        assert table.loc[m, "first"] == pytest.approx(np.mean([rank == 1 for rank in ranks[m]]))
        assert tuple(table.loc[m, ["low", "high"]]) == pytest.approx(np.percentile(ranks[m], [2.5, 97.5]))
        assert table.loc[m, "mean"] == pytest.approx(np.mean(list(training_means(values[values.method == m]).values())))
    assert table["rank"].nunique() > 1


def test_clear_and_shared_ranks() -> None:
    values = methods_of(0, 1, 5)
    table = rank_stability(values, ["a", "b", "c"], FEW).set_index("method")
    assert table["rank"].to_dict() == {"a": 3, "b": 2, "c": 1}
    assert table["first"].to_dict() == {"a": 0, "b": 0, "c": 1}
    down = rank_stability(values, ["a", "b", "c"], FEW, higher_is_better=False).set_index("method")
    assert down["rank"].to_dict() == {"a": 1, "b": 2, "c": 3}
    same = pd.concat([values, values[values.method == "c"].assign(method="d")])
    shared = rank_stability(same, ["a", "b", "c", "d"], FEW).set_index("method")
    assert shared["first"].to_dict() == {"a": 0, "b": 0, "c": 0.5, "d": 0.5}
    assert shared.loc["d", "rank"] == 1.5


def test_rankings_compare_like_with_like() -> None:
    """A method without the hard subject is no better for it."""
    values = methods_of(0.6, 0.2)
    values.loc[values.subject == "s00", "value"] = -9
    values = values[(values.subject != "s00") | (values.method == "a")]
    assert rank_stability(values, ["a", "b"], FEW)["first"].tolist() == [1, 0]
    with pytest.raises(GlocalError, match="each of a, z"):
        rank_stability(values, ["a", "z"], FEW)


def test_agreement_equals_scipys_tau() -> None:
    values = methods_of(0, 0.01, 0.02, 0.03, 0.04, seed=1)
    means = values.groupby(["split", "draw", "method"])["value"].mean().unstack()
    rows = means.to_numpy()
    taus = [stats.kendalltau(one, two).statistic for one, two in combinations(rows, 2)]
    assert len(taus) == 10
    assert order_agreement(values) == pytest.approx(np.mean(taus))
    assert -1 < order_agreement(values) < 1


def test_agreement_of_equal_and_opposite_orders() -> None:
    values = methods_of(0, 5, 9, draws=(1, 1))
    assert order_agreement(values) == 1
    assert order_agreement(values.assign(value=values.value * (1 - 2 * values.split))) == -1
    assert math.isnan(order_agreement(values[values.split == 0]))
    assert math.isnan(order_agreement(values[values.method == "a"]))


# Ranks of Demšar's table 6: C4.5 and three ways of tuning it, on 14 data sets.
DEMSAR = """4 3 2 1|1 2 3 4|4 1 2 3|4 1 3 2|4 2 3 1|1 2.5 4 2.5|3 2 4 1|2.5 2.5 4 1|4 3 2 1|2.5 2.5 2.5 2.5|4 2.5 1 2.5
|3 2 4 1|4 1 2 3|3 1 4 2"""


def blocks_of(table: np.ndarray, names: str = "abcdef") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": names[m], "split": 0, "draw": 0, "subject": f"s{s}", "value": float(table[s, m])}
            for s in range(len(table))
            for m in range(table.shape[1])
        ]
    )


def test_demsars_example() -> None:
    table = np.array([[float(rank) for rank in line.split()] for line in DEMSAR.split("|")])
    found = critical_difference(blocks_of(table), 0.95, higher_is_better=False)
    assert found.units == 14
    assert found.ranks == pytest.approx({"a": 3.143, "b": 2.000, "c": 2.893, "d": 1.964}, abs=5e-4)
    assert found.difference == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(blocks_of(table), 0.9, False).difference == pytest.approx(1.12, abs=5e-3)
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*table.T).pvalue)
    up = critical_difference(blocks_of(table), 0.95)
    assert up.ranks == pytest.approx({name: 5 - rank for name, rank in found.ranks.items()})


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850)])
def test_nemenyis_q(methods: int, q: float) -> None:
    """Demšar's table 5a."""
    table = np.random.default_rng(0).normal(size=(10, methods))
    found = critical_difference(blocks_of(table), 0.95)
    assert found.difference / math.sqrt(methods * (methods + 1) / 60) == pytest.approx(q, abs=1e-3)
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*table.T).pvalue)


def test_blocks_are_subjects_averaged_over_trainings() -> None:
    values = methods_of(0, 0.02, 0.04, seed=2)
    found = critical_difference(values, 0.95)
    means = values.groupby(["subject", "method"])["value"].mean().unstack()
    assert found.units == 9
    assert list(found.ranks.values()) == pytest.approx((4 - means.rank(axis=1)).mean())
    twice = pd.concat([values, values.assign(draw=values.draw + 10)])
    assert critical_difference(twice, 0.95) == found
    lacking = values[(values.subject != "s08") | (values.method != "b")]
    assert critical_difference(lacking, 0.95).units == 8


def test_critical_difference_of_nothing() -> None:
    assert critical_difference(blocks_of(np.ones((4, 3))), 0.95).friedman_p == 1
    with pytest.raises(GlocalError, match="3 methods, not 2"):
        critical_difference(methods_of(0, 1), 0.95)
    with pytest.raises(GlocalError, match="2 subjects"):
        critical_difference(blocks_of(np.eye(3)[:1]), 0.95)
