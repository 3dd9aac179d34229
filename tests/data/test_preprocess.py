import itertools
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from pydantic import ValidationError
from torch.nn.functional import one_hot

from glocal.data.dataset import Case, Dataset
from glocal.data.image import Geometry, Volume, write_volume
from glocal.data.orientation import resize
from glocal.data.prepare import _percentiles, restore
from glocal.data.preprocess import Plan, PreprocessOptions, Undo, make_plan, prepare, prepare_labels
from glocal.errors import GlocalError

LABELS = {"background": 0, "disc": 1, "ring": 2}
# Directions of (slices, rows, columns) of an oblique acquisition, orthonormal.
OBLIQUE = np.linalg.qr(np.array([[0.1, 0.2, 1.0], [0.2, 1.0, -0.1], [1.0, -0.1, -0.2]]).T)[0].T
OBLIQUE = OBLIQUE * np.sign(OBLIQUE[range(3), np.abs(OBLIQUE).argmax(1)])[:, None]


def plan_of(axes=None, labels=LABELS, channels=1, slice_axis="z", **options):
    frame = None if axes is None else tuple(tuple(row) for row in np.asarray(axes).tolist())
    return Plan(
        options=PreprocessOptions(**options), channels=channels, labels=labels, slice_axis=slice_axis, axes=frame
    )


def volume_of(array, spacing=(1.0, 1.0, 1.0), directions=None, known=True):
    """A one-channel volume; spacing and directions in array order (z, y, x)."""
    directions = np.eye(3)[::-1] if directions is None else np.asarray(directions)
    geometry = Geometry(
        size=array.shape[::-1],
        spacing=tuple(spacing[::-1]),
        direction=tuple(directions[::-1].T.ravel().tolist()),
        direction_known=known,
    )
    return Volume(array[None], geometry)


def layouts():
    return itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))


def laid_out(array, spacing, directions, order, back):
    """The same anatomy stored with its axes in another order, some of them reversed."""
    flips = tuple(slice(None, None, -1 if reverse else 1) for reverse in back)
    stored = np.ascontiguousarray(array.transpose(order)[flips])
    signs = np.where(back, -1.0, 1.0)[:, None]
    return volume_of(stored, [spacing[k] for k in order], np.asarray(directions)[list(order)] * signs), flips


def native(probabilities, undo):
    """Probabilities of slices `(n, K, H, W)` as those of the volume `(K, z, y, x)`."""
    shape = [undo.shape[undo.order.index(axis)] for axis in range(3)]
    kept = np.full((probabilities.shape[1], *shape), np.nan, dtype=np.float32)
    oriented = undo.oriented(kept)
    mask = restore(probabilities.split(3), undo, lambda place, part: oriented.__setitem__(place, part.numpy()))
    np.testing.assert_array_equal(mask, kept.argmax(0))
    return kept


@pytest.mark.parametrize("spacing", [(5.0, 1.5, 1.2), (1.0, 1.0, 1.0)], ids=["anisotropic", "isotropic"])
def test_every_layout_of_a_volume_gives_the_same_slices_and_returns_to_its_own_layout(spacing):
    array = np.random.default_rng(0).normal(size=(4, 7, 6)).astype(np.float32)
    plan = plan_of(OBLIQUE, spacing=(1.3, 1.3), field=(6, 8), size=(5, 5))
    expected = prepare(volume_of(array, spacing, OBLIQUE), plan)
    probabilities = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first = native(probabilities, expected.undo)
    for order, back in layouts():
        volume, flips = laid_out(array, spacing, OBLIQUE, order, back)
        prepared = prepare(volume, plan)
        # Equal but for the order in which the percentile and interpolation round.
        torch.testing.assert_close(prepared.images, expected.images)
        assert prepared.warnings == ()
        other = native(probabilities, prepared.undo)
        assert other.shape[1:] == volume.array.shape[1:]
        np.testing.assert_allclose(other, np.stack([k.transpose(order)[flips] for k in first]), atol=1e-6)


def test_without_resampling_nothing_is_interpolated():
    generator = np.random.default_rng(1)
    array = generator.uniform(0, 1, size=(3, 6, 8)).astype(np.float32)
    labels = generator.integers(0, 3, size=(3, 6, 8)).astype(np.int16)
    flipped = -np.eye(3)[::-1]
    plan = plan_of(np.eye(3)[::-1], slice_axis="z", intensity="window", window=(0.0, 1.0), size=(6, 8))
    prepared = prepare(volume_of(array, directions=flipped), plan)
    assert prepared.undo.reversed == (True, True, True)
    np.testing.assert_array_equal(prepared.images[:, 0].numpy(), array[::-1, ::-1, ::-1])
    slices = prepare_labels(volume_of(labels, directions=flipped), prepared.undo, plan)
    back = native(one_hot(slices.long(), 3).movedim(-1, 1).float(), prepared.undo)
    np.testing.assert_array_equal(back.argmax(0), labels)


@pytest.mark.parametrize("size", [(48, 48), (96, 96), (41, 37)])
def test_a_linear_ramp_comes_back_without_shift(size):
    # Slope 1: an error of the ramp is a shift in pixels. Shrinking averages, exact only on average over the pixels.
    rows, columns = np.mgrid[0:90, 0:70].astype(np.float32)
    array = np.stack([rows, columns, rows + columns])
    options = {"intensity": "window", "window": (0.0, 160.0), "spacing": (1.0, 1.0), "field": (96, 96), "size": size}
    prepared = prepare(volume_of(array, spacing=(8.0, 1.1, 1.4)), plan_of(**options))
    assert prepared.undo.canvas == (99, 98)
    assert prepared.images.shape == (3, 1, *size)
    back = native(torch.cat([1 - prepared.images, prepared.images], dim=1), prepared.undo)
    assert back.shape == (2, 3, 90, 70)
    shift = (160 * back[1] - array)[:, 10:-10, 10:-10]
    assert np.abs(shift).max() < 0.15
    assert np.abs(shift.mean(axis=(1, 2))).max() < 0.005


def disc_and_ring(size, centre):
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    radius = np.hypot(rows - centre[0], columns - centre[1])
    return ((radius < 30) * 2 - (radius < 16)).astype(np.int16)


@pytest.mark.parametrize("size", [(96, 96), (64, 72), (192, 192)])
def test_labels_come_back_in_place(size):
    centres = np.random.default_rng(0).uniform(70, 110, size=(16, 2))
    labels = np.stack([disc_and_ring((200, 180), centre) for centre in centres])
    plan = plan_of(field=(192, 192), size=size)
    image = volume_of(np.random.default_rng(0).normal(size=labels.shape))
    undo = prepare(image, plan).undo
    slices = prepare_labels(volume_of(labels), undo, plan)
    assert slices.dtype == torch.uint8
    assert slices.shape == (16, *size)
    back = native(one_hot(slices.long(), 3).movedim(-1, 1).float(), undo).argmax(0)
    for value in (1, 2):
        dice = 2 * ((back == value) & (labels == value)).sum() / ((back == value).sum() + (labels == value).sum())
        assert dice > 0.95
        # A nearest neighbour that always takes the same one of four pixels would be off by 0.5 here.
        shift = np.argwhere(back == value).mean(0) - np.argwhere(labels == value).mean(0)
        assert np.abs(shift).max() < 0.1


def test_the_field_is_centred_and_all_outside_it_is_background():
    array = np.random.default_rng(0).uniform(0.5, 1, size=(2, 10, 4)).astype(np.float32)
    plan = plan_of(intensity="window", window=(0.0, 1.0), field=(6, 8), size=(6, 8))
    prepared = prepare(volume_of(array), plan)
    np.testing.assert_array_equal(prepared.images[:, 0, :, 2:6].numpy(), array[:, 2:8])
    assert prepared.images[..., :2].abs().sum() + prepared.images[..., 6:].abs().sum() == 0
    probabilities = torch.zeros(2, 2, 6, 8)
    probabilities[:, 1] = 1
    back = native(probabilities, prepared.undo)
    assert (back[1, :, 2:8] == 1).all()
    assert (back[0, :, :2] == 1).all()
    assert (back[0, :, 8:] == 1).all()
    assert (back.sum(0) == 1).all()


def test_kept_counts_the_foreground_inside_the_field():
    undo = Undo((0, 1, 2), (False,) * 3, (1, 10, 10), (20, 20), (10, 20), (5, 10))
    foreground = np.zeros((1, 10, 10), dtype=bool)
    assert undo.kept(foreground) == 1
    foreground[0, 1:5, 3] = True  # of native rows 1 to 4, the field holds the canvas rows 5 to 14
    assert undo.kept(foreground) == 0.5


def test_undo_and_plan_survive_json():
    undo = Undo((1, 0, 2), (True, False, True), (5, 6, 7), (8, 9), (10, 11), (12, 13))
    assert Undo.from_dict(json.loads(json.dumps(undo.as_dict()))) == undo
    plan = plan_of(OBLIQUE, spacing=(1.5, 1.25), size=(9, 8))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_intensities():
    array = np.random.default_rng(0).normal(50, 20, size=(3, 16, 16)).astype(np.float32)
    array[0, 0, 0] = 9000
    volume = volume_of(array)
    low, high = np.percentile(array, (1, 99))

    def images(**options):
        return prepare(volume, plan_of(size=(16, 16), **options)).images[:, 0].numpy()

    np.testing.assert_allclose(images(clip=False), (array - low) / (high - low), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(images(), ((array - low) / (high - low)).clip(0, 1), atol=1e-5)
    np.testing.assert_allclose(images(intensity="window", window=(40, 80)), ((array - 40) / 40).clip(0, 1), atol=1e-6)
    standard = images(intensity="zscore")
    np.testing.assert_allclose((standard.mean(), standard.std()), (0, 1), atol=1e-5)
    assert standard.max() < 3
    assert images(intensity="zscore", clip=False).max() > 20


def test_channels_are_normalised_each_for_itself():
    array = np.random.default_rng(0).uniform(size=(2, 3, 8, 8)).astype(np.float32)
    array[1] = array[1] * 500 + 100
    volume = Volume(array, Geometry((8, 8, 3)))
    images = prepare(volume, plan_of(channels=2, size=(8, 8))).images
    assert images.shape == (3, 2, 8, 8)
    assert images[:, 0].max() == images[:, 1].max() == 1
    assert images[:, 0].min() == images[:, 1].min() == 0


def test_n4_flattens_a_bias_field():
    rows = np.sin(np.linspace(0, np.pi, 32))
    bias = 1 + 0.5 * rows[None, :, None] * rows[None, None, :] * np.ones((8, 1, 1))
    tissue = np.random.default_rng(0).normal(100, 8, size=bias.shape)
    likeness = {}
    for n4 in (False, True):
        images = prepare(volume_of((tissue * bias).astype(np.float32)), plan_of(n4=n4, size=(32, 32))).images
        likeness[n4] = np.corrcoef(images.numpy().ravel(), bias.ravel())[0, 1]
    assert likeness[False] > 0.8
    assert abs(likeness[True]) < 0.2


def test_values_beyond_half_precision_are_cut_off_with_a_warning():
    array = np.random.default_rng(0).uniform(size=(2, 20, 20)).astype(np.float32)
    array[0, 0, 0] = 1e9
    prepared = prepare(volume_of(array), plan_of(clip=False, size=(20, 20)))
    assert prepared.images.half().isfinite().all()
    assert "clip" in prepared.warnings[0]


def test_what_cannot_be_prepared_is_refused():
    array = np.random.default_rng(0).uniform(size=(2, 4, 4)).astype(np.float32)
    plan = plan_of(size=(4, 4))
    with pytest.raises(GlocalError, match="NaN"):
        prepare(volume_of(np.where(array > 0.5, np.nan, array)), plan)
    with pytest.raises(GlocalError, match="same value everywhere"):
        prepare(volume_of(np.zeros_like(array)), plan)
    sparse = np.zeros((4, 20, 20), dtype=np.float32)
    sparse[0, 0, 0] = 1
    with pytest.raises(GlocalError, match="percentiles"):
        prepare(volume_of(sparse), plan)
    with pytest.raises(GlocalError, match="1 channels, 2 are expected"):
        prepare(volume_of(array), plan_of(channels=2, size=(4, 4)))
    undo = prepare(volume_of(array), plan).undo
    with pytest.raises(GlocalError, match="value 7"):
        prepare_labels(volume_of(np.full((2, 4, 4), 7, dtype=np.int16)), undo, plan)
    with pytest.raises(GlocalError, match="differ in size"):
        prepare_labels(volume_of(np.zeros((2, 4, 5), dtype=np.int16)), undo, plan)


def test_contradictory_options_are_refused():
    with pytest.raises(GlocalError, match="spacing_known"):
        PreprocessOptions(size=(8, 8), spacing=(1, 1), spacing_known=False)
    with pytest.raises(GlocalError, match="window"):
        PreprocessOptions(size=(8, 8), intensity="window")
    with pytest.raises(GlocalError, match="low below high"):
        PreprocessOptions(size=(8, 8), percentiles=(99, 1))
    with pytest.raises(ValidationError):
        PreprocessOptions(size=(8, 8), spaceing=(1, 1))


def dataset_of(tmp_path, shape, spacing, directions=None, labels=LABELS):
    path = tmp_path / "first_0000.nii.gz"
    volume = volume_of(np.zeros(shape, dtype=np.float32), spacing, directions)
    write_volume(path, volume.array[0], volume.geometry)
    return Dataset(tmp_path, "toy", ("MRI",), labels, ".nii.gz", (Case("first", "s", (path,), None),), None)


def test_slices_lie_across_the_clearly_largest_spacing(tmp_path):
    dataset = dataset_of(tmp_path, (9, 8, 7), (1.0, 3.0, 1.0))
    plan = make_plan(dataset, PreprocessOptions(size=(8, 8)))
    assert (plan.slice_axis, plan.warnings) == ("y", ())
    np.testing.assert_allclose(plan.axes, [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert "slice_axis: x is not used" in make_plan(dataset, PreprocessOptions(size=(8, 8), slice_axis="x")).warnings[0]
    placeholder = make_plan(dataset, PreprocessOptions(size=(8, 8), spacing_known=False))
    assert placeholder.slice_axis == "x"


def test_without_a_clearly_largest_spacing_the_option_or_the_fewest_slices_decide(tmp_path):
    dataset = dataset_of(tmp_path, (9, 8, 7), (1.05, 1.0, 1.0))
    chosen = make_plan(dataset, PreprocessOptions(size=(8, 8), slice_axis="y"))
    assert (chosen.slice_axis, chosen.warnings) == ("y", ())
    guessed = make_plan(dataset, PreprocessOptions(size=(8, 8)))
    assert guessed.slice_axis == "x"
    assert "slice_axis" in guessed.warnings[0]


def test_the_frame_points_to_positive_patient_axes(tmp_path):
    dataset = dataset_of(tmp_path, (4, 8, 7), (5.0, 1.0, 1.0), -OBLIQUE)
    np.testing.assert_allclose(make_plan(dataset, PreprocessOptions(size=(8, 8))).axes, OBLIQUE, atol=1e-6)


def test_labels_with_gaps_and_empty_datasets_are_refused(tmp_path):
    with pytest.raises(GlocalError, match="numbered 0, 1, 2"):
        make_plan(
            dataset_of(tmp_path, (4, 8, 7), (5, 1, 1), labels={"background": 0, "a": 2}), PreprocessOptions(size=(8, 8))
        )
    with pytest.raises(GlocalError, match="no case"):
        make_plan(Dataset(tmp_path, "toy", ("MRI",), LABELS, ".nii.gz", (), None), PreprocessOptions(size=(8, 8)))


@pytest.mark.parametrize("shape", [(8, 9), (2, 4, 8, 9)])
def test_a_first_image_that_is_no_volume_is_refused(tmp_path, shape):
    dataset = dataset_of(tmp_path, (4, 8, 7), (5, 1, 1))
    path = dataset.cases[0].images[0]
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape, np.float32), isVector=False), str(path))
    with pytest.raises(GlocalError, match=rf"{path.name} is not one three-dimensional volume \({len(shape)}-D"):
        make_plan(dataset, PreprocessOptions(size=(8, 8)))


def test_odd_orientations_are_warned_about():
    array = np.random.default_rng(0).uniform(size=(4, 6, 8)).astype(np.float32)
    plan = plan_of(np.eye(3)[::-1], size=(6, 8))
    coronal = prepare(volume_of(array, (5.0, 1.0, 1.0), np.eye(3)[[1, 2, 0]]), plan)
    assert "across the others" in coronal.warnings[0]
    unknown = prepare(volume_of(array, known=False, directions=-np.eye(3)[::-1]), plan)
    assert "no direction" in unknown.warnings[0]
    assert (unknown.undo.order, unknown.undo.reversed) == ((0, 1, 2), (False, False, False))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 20001])
def test_percentiles_are_numpys(size):
    values = np.random.default_rng(size).normal(100, 40, size=size).astype(np.float32)
    for array in (values, values.round(), np.sort(values)):
        percents = (0.0, 0.5, 1.0, 37.2, 50.0, 99.0, 99.9, 100.0)
        assert list(_percentiles(array, percents)) == np.percentile(array, percents).tolist()


def test_labels_shrink_to_the_class_that_covers_most_and_of_equal_ones_the_lowest():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size=(5, 24, 18)).astype(np.uint8))
    labels[1], labels[2] = 0, 3
    labels[3, :, 9:] = 2
    for size in ((12, 9), (10, 13), (30, 40)):
        undo = Undo((0, 1, 2), (False,) * 3, (5, 24, 18), (24, 18), (24, 18), size)
        shares = resize(one_hot(labels.long(), 4).movedim(-1, 1).float(), size)
        assert torch.equal(undo.labels_to_network(labels).long(), shares.max(dim=1).indices)
