"""Names of cases and subjects in which nobody is named, as far as files and folders can tell."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from glocal.data.dataset import some
from glocal.data.dicom import Patient
from glocal.errors import GlocalError


def subjects_of(keys: Sequence[Path], patients: Sequence[Patient], pattern: str | None) -> list[str | None]:
    """A number for every DICOM patient, for other cases what the pattern finds, else None (nothing is known).

    A number cannot be turned back, a hash of a name can.

    Args:
        keys: where the cases lie, without ending.
        patients: whose they are.
        pattern: a regular expression; its first group, if it has one, is the subject, else all that it finds.

    Raises:
        GlocalError: the pattern is no regular expression, or finds nothing in a case's path.
    """
    known = sorted({patient.known_by for patient in patients} - {""})
    numbers = {by: f"S{number:03d}" for number, by in enumerate(known, start=1)}
    try:
        search = re.compile(pattern).search if pattern else None
    except re.error as error:
        raise GlocalError(f"{pattern!r} is no regular expression ({error}): correct --subject.") from error
    found: list[str | None] = []
    without = []
    for key, patient in zip(keys, patients, strict=True):
        match = search(key.as_posix()) if search else None
        in_path = plain(match[min(1, match.re.groups)] or "") if match else None
        found.append(numbers.get(patient.known_by) or in_path)
        if search and not found[-1]:
            without.append(key.as_posix())
    if without:
        raise GlocalError(f"{pattern!r} finds no subject in {some(without)}: correct --subject.")
    return found


def case_names(keys: Sequence[Path], patients: Sequence[Patient], subjects: Sequence[str | None]) -> list[str]:
    """Unique plain names: the file's name, or its path where names are not unique; the subject in a patient's place."""
    short = [key.name for key in keys]
    unique = len({name.lower() for name in short}) == len(short)
    names: list[str] = []
    for key, patient, subject in zip(keys, patients, subjects, strict=True):
        name = key.name if unique else "_".join(key.parts)
        hidden = plain(without_patient(name, patient, subject or "X")) or "case"
        taken, number, name = {other.lower() for other in names}, 2, hidden
        while name.lower() in taken:
            name, number = f"{hidden}_{number}", number + 1
        names.append(name)
    return names


def without_patient(name: str, patient: Patient, instead: str) -> str:
    """A name in which nothing tells the patient: exported folders are often called by name and date of birth."""
    name = unicodedata.normalize("NFC", name)
    for pattern in _secrets(patient):
        name = re.sub(pattern, instead, name, flags=re.IGNORECASE)
    return name


def _secrets(patient: Patient) -> Iterator[str]:
    """Regular expressions of what tells a patient."""
    for word in (patient.identifier, *re.split(r"[\^= ,'-]+", patient.name)):
        secret = re.escape(unicodedata.normalize("NFC", word))
        if len(word) > 2:
            yield secret
        elif len(word) == 2:  # which may be part of anything: as a word of its own only
            yield rf"(?<![^\W_]){secret}(?![^\W_])"
    if date := re.fullmatch(r"([0-9]{4})([0-9]{2})([0-9]{2})", patient.birth):
        year, month, day = date.groups()
        for order in ((year, month, day), (day, month, year), (month, day, year)):
            yield "[-_. ]?".join(order)


def plain(name: str) -> str:
    """Letters, digits, `_` and `-` alone: what every system takes for a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")
