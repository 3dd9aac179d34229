"""Who is pre-trained on, chosen on, tested on, and labelled: always by subject, always from a seed."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from glocal import runs
from glocal.errors import GlocalError
from glocal.files import read_json, write_json
from glocal.randomness import generator

Evaluated = Literal["test", "development"]  # the subjects that trainings are measured on


class Member(Protocol):
    """A case as a split sees it."""

    @property
    def case(self) -> str: ...  # noqa: D102
    @property
    def subject(self) -> str: ...  # noqa: D102
    @property
    def labelled(self) -> bool: ...  # noqa: D102


class ProtocolOptions(BaseModel):
    """How a comparison is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    splits: int = Field(1, ge=1, description="the dataset's own split first, further ones of the same sizes by seed")
    folds: int | None = Field(
        None,
        ge=2,
        description="cross-validation: the labelled subjects are parted into so many folds, each the test subjects of "
        "its own split",
    )
    draws: int = Field(1, ge=1, description="random choices of the labelled volumes, per split and budget")
    test: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="labelled subjects kept for testing where the dataset has no split.json; "
        "auto: a fifth of them from ten on, none below",
    )
    budget: Literal["volumes", "subjects"] = Field(
        "volumes", description="what labels and validation count; a subject brings all its labelled volumes"
    )
    evaluate: Evaluated = Field("test", description="choose settings on development subjects")
    tta: bool = Field(False, description="measure means over moved views of each slice, as `predict --tta` makes")
    leave_one_out: bool = Field(False, description="each labelled subject in turn is the test subject of its own split")
    transductive: bool = Field(False, description="test subjects' images may be pre-trained on; every table says so")

    @model_validator(mode="after")
    def _one_way_to_split(self) -> "ProtocolOptions":
        ways = {"splits": self.splits > 1, "folds": self.folds is not None, "leave_one_out": self.leave_one_out}
        chosen = [f"protocol.{name}" for name, is_set in ways.items() if is_set]
        if len(chosen) > 1:
            raise GlocalError(f"{' and '.join(chosen)} each say how subjects are split: choose one of them.")
        return self

    @property
    def measured(self) -> str:
        """What is measured, in one word for the names of files: whom, and `-tta` with moved views."""
        return self.evaluate + "-tta" * self.tta


@dataclass(frozen=True)
class Split:
    """Cases by use. `pretrain` holds every case that may be trained on, labelled or not."""

    index: int
    pretrain: tuple[str, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Draw:
    """One random choice of labelled volumes."""

    index: int
    train: tuple[str, ...]
    validation: tuple[str, ...]


def shuffled(items: Iterable[str], seed: int, *keys: int | str) -> list[str]:
    """The distinct items in an order that depends on nothing but the items, the seed and the keys."""
    ordered = sorted(set(items))
    order = torch.randperm(len(ordered), generator=generator(seed, *keys)).tolist()
    return [ordered[k] for k in order]


def make_split(
    members: Sequence[Member], given: dict[str, list[str]] | None, options: ProtocolOptions, seed: int, index: int = 0
) -> Split:
    """Split number `index`: the dataset's own is number 0, further ones have its sizes and are drawn by seed.

    A further split never tests on subjects that split 0 chooses on, nor chooses on subjects that split 0 tests on.
    Folds leave the dataset's development subjects out, and take its test subjects in.

    Args:
        given: the dataset's `split.json` (lists of cases), if it has one.

    Raises:
        GlocalError: too few labelled subjects for what is asked.
    """
    if given and not options.leave_one_out:
        # Cases that split.json does not name are not used.
        named = {case for cases in given.values() for case in cases}
        members = [member for member in members if member.case in named]
    labelled = sorted({member.subject for member in members if member.labelled})
    if options.leave_one_out:
        if index >= len(labelled) or len(labelled) < 2:
            raise GlocalError(f"leave_one_out needs two labelled subjects or more, there are {len(labelled)}.")
        return _by_subject(members, index, {labelled[index]}, set())
    if options.folds:
        kept = {m.subject for m in members if given and m.case in given.get("development", ())}
        return _by_subject(members, index, _fold(labelled, kept, options.folds, seed, index), kept)
    if given:
        test, development = (
            {m.subject for m in members if m.case in given.get(k, ())} for k in ("test", "development")
        )
        development -= test
    else:
        test, development = _drawn_test(labelled, options, seed), set()
    if index:
        test, development = _another(labelled, test, development, seed, index)
    return _by_subject(members, index, test, development)


def split_count(members: Sequence[Member], options: ProtocolOptions) -> int:
    """How many splits there are: with leave-one-out one per labelled subject."""
    if options.leave_one_out:
        return max(1, len({member.subject for member in members if member.labelled}))
    return options.folds or options.splits


def _fold(labelled: list[str], kept: set[str], folds: int, seed: int, index: int) -> set[str]:
    candidates = [subject for subject in labelled if subject not in kept]
    if index >= folds or len(candidates) < folds:
        raise GlocalError(
            f"protocol.folds={folds} asks for more folds than the {len(candidates)} labelled subjects that are not for "
            "development: lower it."
        )
    return set(shuffled(candidates, seed, "folds")[index::folds])


def _drawn_test(labelled: list[str], options: ProtocolOptions, seed: int) -> set[str]:
    count = options.test if options.test != "auto" else (round(len(labelled) / 5) if len(labelled) >= 10 else 0)
    if count and count >= len(labelled):
        raise GlocalError(f"protocol.test={count} leaves none of the {len(labelled)} labelled subjects to train on.")
    return set(shuffled(labelled, seed, "test", 0)[:count])


def _another(
    labelled: list[str], test: set[str], development: set[str], seed: int, index: int
) -> tuple[set[str], set[str]]:
    """Test and development subjects of split `index`: as many as in split 0; no two splits test on the same ones."""
    splits = [(test, development)]
    for attempt in range(1, 100 + index):
        candidates = [s for s in shuffled(labelled, seed, "split", attempt) if s not in development]
        new_test = set(candidates[: len(test)])
        rest = [s for s in shuffled(labelled, seed, "development", attempt) if s not in new_test | test]
        new_development = set(rest[: len(development)])
        if len(new_test) < len(test) or len(new_development) < len(development):
            break
        if (new_test or new_development) not in [earlier_test or earlier for earlier_test, earlier in splits]:
            splits.append((new_test, new_development))
        if len(splits) > index:
            return splits[index]
    raise GlocalError("There are too few labelled subjects for so many splits: use a smaller protocol.splits.")


def _by_subject(members: Sequence[Member], index: int, test: set[str], development: set[str]) -> Split:
    def cases(subjects: set[str], inside: bool = True) -> tuple[str, ...]:
        return tuple(sorted(m.case for m in members if (m.subject in subjects) == inside))

    return Split(index, cases(test | development, inside=False), cases(development), cases(test))


def draw_labels(
    members: Sequence[Member],
    split: Split,
    labels: int | Literal["all"] | Sequence[str],
    validation: int,
    seed: int,
    index: int = 0,
    unit: Literal["volumes", "subjects"] = "volumes",
) -> Draw:
    """The labelled volumes of draw `index`: `labels` of them for training, `validation` others, no subject in both.

    Smaller budgets are parts of larger ones; the validation volumes do not depend on the budget.

    Args:
        labels: a number of volumes (or subjects, see `unit`), `all` that are not for validation, or the cases by name.
        validation: a number of volumes (or subjects).
        unit: what the numbers count; a subject brings all its labelled volumes.

    Raises:
        GlocalError: there are fewer labelled volumes, or a named case is not one that may be trained on.
    """
    trained_on = set(split.pretrain)
    pool = {m.case: m for m in members if m.labelled and m.case in trained_on}
    order = shuffled((m.subject for m in pool.values()), seed, "draw", split.index, index)
    of_subject = [sorted(c for c, m in pool.items() if m.subject == subject) for subject in order]
    queue = of_subject if unit == "subjects" else [[case] for cases in of_subject for case in cases]

    def others(than: list[str]) -> list[list[str]]:
        subjects = {pool[case].subject for case in than}
        return [cases for cases in reversed(queue) if pool[cases[0]].subject not in subjects]

    wanted = 1
    if labels == "all":
        asked, chosen = f"All other labelled {unit}", others([])[:validation]
        train = _joined(reversed(others(_joined(chosen))))
    elif isinstance(labels, int):
        if labels < 1:
            raise GlocalError(f"labels={labels} leaves nothing to train on: ask for one labelled volume or more.")
        asked, wanted, train = f"{labels} labelled {unit}", labels, _joined(queue[:labels])
        chosen = others(train)[:validation]
    else:
        _refuse_unknown(labels, pool, split)
        asked, train = f"{len(labels)} labelled volumes", list(labels)
        chosen = others(train)[:validation]
    if not queue:
        raise GlocalError(
            "There is no labelled volume to train on: put label maps into labelsTr, or name fewer labelled cases under "
            "test in split.json."
        )
    if len(queue) < wanted or not train or len(chosen) < validation:
        raise GlocalError(
            f"{asked} for training and {validation} for validation were asked for, but only {len(queue)} "
            "may be trained on (no subject in both): lower labels or validation, or label more."
        )
    return Draw(index, tuple(train), tuple(sorted(_joined(chosen))))


def _joined(lists: Iterable[list[str]]) -> list[str]:
    return [case for cases in lists for case in cases]


def _refuse_unknown(labels: Sequence[str], pool: dict[str, Member], split: Split) -> None:
    if not labels or len(set(labels)) < len(labels):
        raise GlocalError("Name at least one labelled case, and each only once.")
    for case in labels:
        if case in split.test + split.development:
            raise GlocalError(f"{case} belongs to a test or development subject and may not be trained on.")
        if case not in pool:
            known = sorted(pool)
            listed = ", ".join(known[:5]) + (" ..." if len(known) > 5 else "")
            raise GlocalError(f"{case} is not a labelled case that may be trained on: choose among {listed or 'none'}.")


def refuse_leakage(members: Sequence[Member], split: Split, used: Iterable[str], what: str, transductive: bool) -> None:
    """Refuse to start when a subject of the test or development cases was, or would be, trained on.

    Args:
        used: subjects that training sees.
        what: how it sees them, for the sentence.
        transductive: the recipe allows images (never labels) of test subjects in pre-training.

    Raises:
        GlocalError: names the first such subject and the way out.
    """
    closed = {*split.development, *(() if transductive else split.test)}
    seen = sorted({member.subject for member in members if member.case in closed} & set(used))
    if seen:
        raise GlocalError(
            f"Subject {seen[0]}{f' and {len(seen) - 1} others' if len(seen) > 1 else ''} would be tested on but "
            f"{what}: use weights of the same split, or say protocol.transductive=true and every table will tell."
        )


def begin_on_split(
    stack: ExitStack,
    run: Path,
    kind: str,
    facts: dict[str, Any],
    options: BaseModel,
    split: Split,
    draw: Draw | None = None,
) -> bool:
    """Begin a training's run, or continue it; whether it is finished already. If not, `stack` holds its folder.

    Args:
        stack: what holds the folder until the training has ended.
        run: the folder.
        kind: `pretrain` or `finetune`.
        facts: what makes the run the run it is, beside its options.
        options: of the training.
        split: the cases by use.
        draw: the labelled ones.

    Raises:
        GlocalError: the folder holds something else, a run with other settings or another split, or another process
            works in it (`Busy`).
    """
    runs.begin(run, kind, facts | options.model_dump(mode="json"), type(options))
    if (run / "split.json").exists() and read_split(run) != split:
        raise GlocalError(f"{run} was begun with another split of the cases: choose another run folder.")
    if runs.finished(run):
        return True
    stack.enter_context(runs.held(run))
    if runs.finished(run):  # by another process, meanwhile
        stack.close()
        return True
    write_split(run, split, draw)
    return False


def write_split(folder: Path, split: Split, draw: Draw | None = None) -> None:
    """Write `split.json` of a run."""
    content: dict[str, Any] = {"split": asdict(split)} | ({"draw": asdict(draw)} if draw else {})
    write_json(folder / "split.json", content)


def read_split(folder: Path) -> Split:
    """The split of a run.

    Raises:
        GlocalError: the run has none, or the file is not one of a single training.
    """
    try:
        content = read_json(folder / "split.json")["split"]
        return Split(content["index"], *(tuple(content[key]) for key in ("pretrain", "development", "test")))
    except (KeyError, TypeError) as error:
        raise GlocalError(f"{folder / 'split.json'} is not the split of one training: name the run of one.") from error
