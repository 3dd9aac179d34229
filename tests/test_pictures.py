"""The pictures of the methods: every method has one in the docs, and it is drawn from what a step really does."""

import re
from pathlib import Path

import pytest
import torch
from figures.__main__ import FOLDER, PICTURES
from figures.sheet import Sheet, role_of
from figures.step import pool_of, stage_of, watched

from glocal.contrast.losses import contrastive_loss
from glocal.contrast.pairs import g_random
from glocal.data.store import Store
from glocal.pretraining import simclr
from glocal.pretraining.registry import METHODS

DOCS = (FOLDER.parent / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_made_small_and_shown_with_words_for_who_cannot_see_it(name: str) -> None:
    assert (FOLDER / f"{name}.png").stat().st_size < 120_000
    assert re.search(rf"\n!\[[^]]{{30,}}\]\(figures/{name}\.png\)\n", DOCS)


def test_no_picture_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.png")} == {*PICTURES, "demo"}
    assert set(re.findall(r"\(figures/(.*?)\.png\)", DOCS)) == PICTURES.keys()


def test_the_readme_shows_what_exists() -> None:
    shown = re.findall(r"docs/figures/(.*?)\.png", (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8"))
    assert {"pcl", "demo"} <= set(shown)
    assert all((FOLDER / f"{name}.png").stat().st_size < 200_000 for name in shown)


@pytest.mark.parametrize("name", METHODS)
def test_the_section_of_a_method_begins_with_its_picture(name: str) -> None:
    section = DOCS.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    assert section.startswith(f"\n![{section[3:].split(']')[0]}](figures/{name}")


def test_a_frame_is_what_the_masks_say() -> None:
    positive, negative = torch.tensor([False, True, False, False]), torch.tensor([False, False, True, False])
    roles = [role_of(number, 0, positive, negative) for number in range(4)]
    assert roles == ["anchor", "positive", "negative", ""]


def test_a_step_is_watched_and_not_changed(store: Store) -> None:
    stage = stage_of(pool_of(store, 0, 1), "simclr", batch=5)
    seen = watched(stage, "contrastive_loss")
    (call,) = seen.calls["contrastive_loss"]
    (inputs,) = seen.inputs[0]
    assert all(
        ours.equal(theirs) for ours, theirs in zip(call.given[1:3], g_random(torch.arange(5).repeat(2)), strict=True)
    )
    views = [
        stage.view(stage.options.augmentation, stage.pool.images(stage.pool.epoch(5, 0, 0)), 0, role, 5)
        for role in (0, 1)
    ]
    assert inputs.equal(torch.cat(views))
    assert simclr.contrastive_loss is contrastive_loss
    torch.testing.assert_close(stage.losses(0)["loss"].detach(), call.result)


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        sheet = Sheet(100)
        sheet.image(torch.linspace(0, 1, 64).view(8, 8), 10, 10, 80, "positive")
        sheet.legend(50)
        sheet.save(tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
