"""What lies beside predicted masks: a table of the cases, and a page with pictures of those to look at first."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from glocal import __version__
from glocal.data.image import read_file, read_image, read_labels
from glocal.data.orientation import Undo
from glocal.evaluation.cases import ORDER, cases_table, doubt
from glocal.files import replacing
from glocal.predictions import CASES, RECORD
from glocal.progress import track
from glocal.reporting.html import Cell, Picture, Report, Section, Table, papers, write_report
from glocal.reporting.montage import montage

_PICTURES = 20  # cases
_ROWS = 200  # of the page's table
_SLICES = 5  # of a case


def write_cases(out: Path, record: Mapping[str, Any]) -> pd.DataFrame:
    """Write `cases.csv`: every case of `predictions.json`, those that need a human's eye first.

    Args:
        out: folder of the masks.
        record: what `predictions.json` holds.

    Returns:
        The table, see `evaluation.cases.cases_table`, with a column that says whether uncertainty is calibrated.
    """
    table = cases_table(record["cases"])
    table.insert(3, "calibrated", "uncalibrated" if record["temperature"] is None else "calibrated")
    with replacing(out / CASES) as temporary:
        table.to_csv(temporary, index=False)
    return table


def read_cases(folder: Path) -> pd.DataFrame:
    """What `write_cases` wrote; a case may be called 007, and have no flags."""
    table = pd.read_csv(folder / CASES, dtype={"case": str}, keep_default_na=False, na_values={"uncertainty": ""})
    return table


def write_page(path: Path, record: Mapping[str, Any], table: pd.DataFrame, labels: Mapping[str, int]) -> None:
    """Write the page: the table, and slices of the first cases of it with masks and uncertainty.

    Args:
        path: of the page, in the folder of the masks and uncertainty maps.
        record: what `predictions.json` holds.
        table: of `write_cases`.
        labels: structure to label value.
    """
    shown = [name for name in table["case"] if _is_there(path.parent, record["cases"][name])][:_PICTURES]
    pictures = [
        Picture(_caption(table, name), _montage(path.parent, record["cases"][name], name, labels), "png", wide=True)
        for name in track(shown, "Pictures", len(shown))
    ]
    lead = f"{len(table)} cases were segmented, those that need a human's eye come first. {record['summary']}"
    flagged = int((table["flags"] != "").sum())
    models = len(record["models"])
    figures = [
        ("cases", str(len(table))),
        ("cases with a flag", str(flagged)),
        ("models" if models > 1 else "model", str(models)),
    ]
    if record["temperature"] is not None:
        figures.append(("temperature", f"{record['temperature']:.2f}"))
    sections = [
        Section("Cases", ORDER, [_table(table)]),
        Section("Pictures", _reading(len(shown), len(table)), pictures=pictures),
        Section("Models", tables=[_models(record)], collapsed=True),
        *papers(record["papers"]),
    ]
    footer = f"Made by glocal {__version__} on {datetime.now(UTC):%Y-%m-%d}. Research software, not a medical device."
    calibrated = record["temperature"] is not None
    warnings = [text for text in (doubt(table), None if calibrated else record["calibration"]) if text]
    lead += f" {record['calibration']}" if calibrated else ""
    write_report(Report("Predictions", lead, figures, warnings, sections, footer), path)


def _is_there(out: Path, case: Mapping[str, Any]) -> bool:
    """Whether a case has an uncertainty map, and image, mask and map still lie where they were."""
    return bool(case["map"]) and all(
        Path(out, name).exists() for name in (case["image"], case["files"][0], case["map"])
    )


def _reading(shown: int, cases: int) -> str:
    text = (
        "Above the predicted structures, below the uncertainty from black (0, sure) to pale yellow (1, unsure), on the "
        "same scale in all pictures, with the outlines of the structures; slices are spread over the structures, and "
        "the most uncertain one is among them."
    )
    return text if shown == cases else f"{text} Of the {cases} cases {shown} are shown, the first that have all files."


def _table(table: pd.DataFrame) -> Table:
    volumes = [str(name) for name in table if str(name).endswith(" ml") and table[name].notna().any()]
    rows: list[list[str | Cell]] = [
        [
            Cell(str(row["case"]), strong=bool(row["flags"])),
            str(row["flags"]),
            "" if np.isnan(row["uncertainty"]) else f"{row['uncertainty']:.3f}",
            *(f"{row[column]:.1f}" for column in volumes),
        ]
        for _, row in table.head(_ROWS).iterrows()
    ]
    note = f"Mean uncertainty of the structures and one pixel around them; volumes in ml. All cases: {CASES}."
    header = ["Case", "Flags", f"Uncertainty ({table['calibrated'].iloc[0]})", *volumes]
    return Table("Every case", header, rows, note)


def _models(record: Mapping[str, Any]) -> Table:
    rows = [["model", model["file"]] for model in record["models"]]
    rows += [[f"--{name}", str(value)] for name, value in record["options"].items()]
    return Table(RECORD, ["What", "Value"], rows)


def _caption(table: pd.DataFrame, name: str) -> str:
    row = table[table["case"] == name].iloc[0]
    unsure = f"uncertainty {row['uncertainty']:.3f} ({row['calibrated']})"
    return "; ".join(part for part in (name, unsure, row["flags"]) if part)


def _montage(out: Path, case: Mapping[str, Any], name: str, labels: Mapping[str, int]) -> bytes:
    from SimpleITK import GetArrayFromImage

    undo = Undo.from_dict(case["undo"])
    image = read_image([Path(case["image"])]).array
    mask = read_labels(out / case["files"][0]).array
    unsure = GetArrayFromImage(read_file(out / case["map"]))[None]
    slices = [undo.oriented(array)[:, 0] for array in (image, mask, unsure)]
    picks = chosen_slices(slices[1], slices[2], _SLICES)
    height, width = (case["spacing"][2 - axis] if case["spacing"] else 1.0 for axis in undo.order[1:])
    pictures, masks, unsures = (array[picks] for array in slices)
    titles = [f"slice {pick + 1} of {len(slices[0])}" for pick in picks]
    return montage(pictures, masks, unsures, labels, titles, name, height / width)


def chosen_slices(mask: NDArray[Any], uncertainty: NDArray[Any], count: int) -> list[int]:
    """Slices to show of a case, `(n, rows, columns)`: spread over the structures, the most uncertain one among them."""
    filled = np.flatnonzero((mask != 0).any((1, 2)))
    first, last = (filled[0], filled[-1]) if len(filled) else (0, len(mask) - 1)
    picks = sorted(set(np.linspace(first, last, min(count, last - first + 1)).round().astype(int).tolist()))
    most = int(np.argmax(uncertainty.sum((1, 2))))
    if most not in picks:
        picks[int(np.argmin(np.abs(np.array(picks) - most)))] = most
    return sorted(picks)
