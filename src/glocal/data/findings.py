"""What a check can find: every rule with its severity and the way out, and the report that gathers the findings."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]

# Every rule in one place: how bad it is, and the way out.
RULES: dict[str, tuple[Severity, str]] = {
    "description": ("error", "Correct dataset.json; `glocal collect` writes one for a folder of images."),
    "no-images": ("error", "Put images as CASE_0000.nii.gz into imagesTr, or let `glocal collect` do it."),
    "image-name": ("error", "Name every image CASE_0000 and every label map CASE, each with the dataset's ending."),
    "channels": ("error", "Give every case one file per channel of channel_names in dataset.json."),
    "subjects": ("error", "Correct subjects.tsv: one line `case<TAB>subject` for every case."),
    "split": ("error", "Correct split.json: lists of case names, all cases of a subject in one list."),
    "label-without-image": ("error", "Add the image, or move the label map out of labelsTr."),
    "unreadable": ("error", "Copy or export the file again, or remove the case."),
    "dimensions": ("error", "Store one 3-D volume per file: frames as cases, components as channels."),
    "single-slice": ("warning", "Store whole volumes: one slice has no place in a volume to learn from."),
    "channel-geometry": ("error", "Resample the channels of the case to one grid."),
    "label-geometry": ("error", "Resample the label map, or copy the image's header if the voxels match."),
    "direction": ("error", "Resample to axes at right angles, or correct the header."),
    "direction-unknown": ("warning", "Look at it in a viewer: left, right, front and back are guesses."),
    "two-places": (
        "warning",
        "Find out which is right and copy it over the other: programs differ in which of the two they go by.",
    ),
    "not-finite": ("error", "Replace NaN and infinite voxels, for example by the value of air."),
    "not-finite-read-as-0": ("warning", "Replace these voxels yourself if 0 is not the background."),
    "constant": ("error", "Export the image again, or remove the case: it shows nothing."),
    "label-not-whole": ("error", "Resample label maps with nearest neighbours; store whole numbers."),
    "label-unknown": (
        "error",
        "Relabel its voxels, or name it under labels in dataset.json, whose values are 0, 1, 2, ... without a gap.",
    ),
    "label-empty": ("warning", "Remove the label map if nobody segmented the case: it then counts as unlabelled."),
    "label-tiny": ("warning", "Look whether the label map is finished."),
    "label-missing": ("warning", "Remove the label from dataset.json, or look whether its value is right."),
    "no-labels": ("warning", "Pre-training works; fine-tuning and evaluation need label maps in labelsTr."),
    "duplicate": ("warning", "They will count as one subject: remove all but one, or correct subjects.tsv."),
    "duplicate-in-subject": ("warning", "Remove all but one: the same image counts more than once."),
    "named-alike": (
        "warning",
        "If each pair is one person, give it one subject in subjects.tsv; `glocal collect --subject` fills it in.",
    ),
    "count": ("warning", "Look whether files are missing, then correct numTraining in dataset.json."),
    "orientation": ("note", "Nothing to do: their axes will be reordered."),
    "slice-axis-mixed": ("warning", "Check one of each in a viewer; slices of different planes show different views."),
    "slice-axis-guessed": ("note", "Set slice_axis in the recipe if that is not what you want."),
    "placeholder-spacing": ("note", "If so, say spacing_known: false in the recipe: no distance in mm is right."),
}


@dataclass(frozen=True)
class Finding:
    """One problem: how bad, a stable code, the case (None: the dataset), what is wrong, and the way out."""

    severity: Severity
    code: str
    case: str | None
    message: str
    remedy: str


@dataclass(frozen=True)
class CheckReport:
    """All findings, errors first, and a summary of what was read (counts; ranges of size and spacing in x, y, z)."""

    root: Path
    findings: list[Finding]
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings and notes are allowed."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"dataset": str(self.root), "ok": self.ok, "summary": self.summary, "findings": findings}


def finding(code: str, message: str, case: str | None = None) -> Finding:
    """A finding by the code of its rule."""
    severity, remedy = RULES[code]
    return Finding(severity, code, case, message, remedy)
