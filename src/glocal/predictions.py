"""A folder of predicted masks: what its record says, and what in it may be kept, replaced, or must be refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glocal.data.dataset import some
from glocal.data.inputs import Input
from glocal.errors import GlocalError
from glocal.files import digest, read_json

RECORD = "predictions.json"
CASES = "cases.csv"
PAGE = "predictions.html"


@dataclass(frozen=True)
class Maps:
    """What is written beside the masks, and by which temperature its probabilities are softened."""

    probabilities: bool
    uncertainty: bool
    temperature: float | None

    def files(self, case: Input) -> list[str]:
        """The names of all files of a case."""
        wanted = {case.target: True, f"{case.name}.npz": self.probabilities, case.uncertainty: self.uncertainty}
        return [name for name, is_wanted in wanted.items() if is_wanted]


def begun(
    out: Path, models: Sequence[Path], options: dict[str, Any], inputs: Sequence[Input], overwrite: bool
) -> dict[str, Any]:
    """What `predictions.json` says: masks that exist are kept only if these very models made them in this way.

    Args:
        out: the folder of the masks.
        models: the model files.
        options: over what is averaged.
        inputs: the cases that are asked for.
        overwrite: masks that exist may be replaced.

    Raises:
        GlocalError: the folder holds masks of something else, or its record is of something else.
    """
    path = out / RECORD
    before = read_json(path) if path.exists() else {}
    if not isinstance(before, dict):
        raise GlocalError(f"{path} was not written by `glocal predict`: choose another folder for the masks.")
    made_by: dict[str, Any] = {
        "models": [{"file": str(file.resolve()), "digest": digest(file)} for file in models],
        "options": options,
    }
    same = [model["digest"] for model in before.get("models", [])] == [model["digest"] for model in made_by["models"]]
    if same and before["options"] == options:
        return {**made_by, "cases": before["cases"], "writing": before.get("writing")}
    asked = {case.name for case in inputs}
    left = [name for name, case in before.get("cases", {}).items() if name not in asked and _any_of(out, case["files"])]
    if left:  # beside masks of this model, and with no record of how they were made
        raise GlocalError(
            f"{out} holds masks by {_maker(before)} that would not be replaced ({some(left)}): choose another folder."
        )
    if not overwrite and any((out / case.target).exists() for case in inputs):
        raise GlocalError(
            f"{out} holds masks of these images by {_maker(before)}: choose another folder, or replace them with "
            "--overwrite."
        )
    stale = [name for case in inputs for name in before.get("cases", {}).get(case.name, {}).get("files", [])]
    for name in (*stale, PAGE):  # no map shall lie beside a mask that it was not made with
        (out / name).unlink(missing_ok=True)
    return {**made_by, "cases": {}}


def _any_of(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)


def refuse_changes(
    out: Path, cases: Mapping[str, Any], inputs: Sequence[Input], maps: Maps, writing: str | None
) -> None:
    """Refuse before anything is predicted what would replace, be kept for, or lie beside what it does not belong to.

    `writing` is the mask that a stopped prediction was about to write: it is ours.
    """
    for case in inputs:
        mask, known = out / case.target, cases.get(case.name)
        if not mask.exists():
            continue
        if known is None:
            if case.target == writing:
                continue
            raise GlocalError(
                f"{mask} was not written by this prediction: choose another folder, or replace it with --overwrite."
            )
        if known.get("digest") != case.digest():
            raise GlocalError(
                f"{mask} was predicted from another image ({known['image']}) than {case.files[0]} is now: choose "
                "another folder, or replace it with --overwrite."
            )
        if not all((out / name).exists() for name in maps.files(case)) and known.get("mask") != digest(mask):
            raise GlocalError(
                f"{mask} was changed after it was predicted, and the maps that are asked for would not belong to it: "
                "choose another folder for them, or give the changes up with --overwrite."
            )


def _maker(record: dict[str, Any]) -> str:
    """Who made the masks of a record, in words."""
    files = [model["file"] for model in record.get("models", [])]
    options = [
        name if value is True else f"{name}={value}" for name, value in record.get("options", {}).items() if value
    ]
    return " and ".join(files) + (f" with {', '.join(options)}" if options else "") if files else "something else"
