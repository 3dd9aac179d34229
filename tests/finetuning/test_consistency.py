import pytest
import torch
from torch import Tensor

from glocal.finetuning.consistency import (
    channel_dropout,
    confident,
    draw_cutmix,
    noisy,
    paste,
    probabilities,
    rectangles,
    strong_view,
)
from glocal.views.intensity import IntensityOptions


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_cut_and_differs_everywhere() -> None:
    noise = noisy(torch.zeros(3, 2, 20, 20, dtype=torch.float64), 3, 0.1, 0.2, seeded(), 4)
    assert noise.shape == (12, 2, 20, 20)
    assert noise.dtype == torch.float64
    assert noise.abs().max() == pytest.approx(0.2)
    assert (noise.abs() > 0.1999).double().mean() == pytest.approx(0.0455, abs=0.01)  # beyond two deviations
    assert len({float(part.sum()) for part in noise.flatten(0, 1)}) == 24
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert noisy(images, 3, 0.0, 0.2, seeded(), 2)[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_confident_pixels() -> None:
    logits = torch.log(torch.tensor([[0.94, 0.02, 0.04], [0.01, 0.96, 0.03]])).T[None, :, :, None].requires_grad_()
    labels, sure = confident(logits, 0.95)
    assert labels.tolist() == [[[0], [1]]]
    assert sure.tolist() == [[[False], [True]]]
    assert probabilities(logits.bfloat16()).dtype == torch.float32
    assert probabilities(logits.double()).dtype == torch.float64


def test_channels_are_dropped_whole_and_their_mean_kept() -> None:
    features = [torch.ones(4, 200, 3, 3), torch.ones(4, 100, 2, 2)]
    thin = channel_dropout(features, 0.25, 4, seeded())
    for feature, dropped in zip(features, thin, strict=True):
        assert dropped.shape == feature.shape
        assert dropped.flatten(2).std(2).max() == 0
        assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
        assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
        assert not dropped[0].equal(dropped[1])


def test_a_rectangle_has_the_pixels_whose_centres_it_covers() -> None:
    top, left, height, width = (torch.tensor([a, b]) for a, b in ((0.25, 0.0), (0.5, 0.3), (0.5, 1.0), (0.5, 0.4)))
    inside = rectangles(top, left, height, width, (8, 4))
    for k in range(2):
        for y in range(8):
            for x in range(4):
                row, column = (y + 0.5) / 8, (x + 0.5) / 4
                expected = top[k] <= row < top[k] + height[k] and left[k] <= column < left[k] + width[k]
                assert bool(inside[k, y, x]) == expected
    assert inside.sum((1, 2)).tolist() == [4 * 2, 8 * 2]


def test_pasting() -> None:
    inside = torch.tensor([[[True, False]]])
    x, y = torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])
    assert paste(inside, x, y).tolist() == [[[1, 4]]]
    assert paste(inside, x[:, None].expand(1, 2, 1, 2), y[:, None].expand(1, 2, 1, 2)).tolist() == [
        [[[1, 4]], [[1, 4]]]
    ]


def test_boxes_of_cutmix() -> None:
    mixing = draw_cutmix(4000, (40, 60), 0.5, seeded())
    area = mixing.inside.float().mean((1, 2))
    assert float((area > 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    boxes = mixing.inside[area > 0]
    share = area[area > 0]
    assert 0.01 < share.min() < 0.03
    assert 0.38 < share.max() < 0.42
    assert float(share.mean()) == pytest.approx(0.21, abs=0.01)  # uniform: but for the few that had to be cut
    height, width = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert (height * width).equal(boxes.sum((1, 2)))  # rectangles
    ratio = (height / 40) / (width / 60)
    assert 0.2 < ratio.min() < 0.4
    assert 2.5 < ratio.max() < 5
    assert boxes.any(0).float().mean() > 0.99  # everywhere in the image
    assert boxes.any(0)[[0, -1]].any(1).all()
    assert boxes.any(0)[:, [0, -1]].any(0).all()
    place = torch.arange(4000)
    assert mixing.partner.sort()[0].equal(place)  # everyone gives one box
    assert not (mixing.partner == place).any()
    assert not draw_cutmix(50, (8, 8), 0.0, seeded()).inside.any()
    assert draw_cutmix(1, (8, 8), 1.0, seeded()).partner.tolist() == [0]


def test_images_and_maps_are_mixed_alike() -> None:
    mixing = draw_cutmix(5, (16, 16), 1.0, seeded())
    labels = torch.arange(5).view(5, 1, 1).expand(5, 16, 16)
    mixed = mixing(labels)
    assert mixing(labels[:, None].expand(5, 3, 16, 16)).equal(mixed[:, None].expand(5, 3, 16, 16))
    for k in range(5):
        for y in range(16):
            for x in range(16):
                assert int(mixed[k, y, x]) == (int(mixing.partner[k]) if mixing.inside[k, y, x] else k)


def test_strong_views_differ_by_generator_only() -> None:
    weak = torch.rand(4, 1, 16, 16, generator=seeded(1))
    options = IntensityOptions(brightness=0.5)

    def views(seed: int) -> Tensor:
        return strong_view(weak, options, 1.0, 4, seeded(seed))[0]

    assert views(0).equal(views(0))
    assert not views(0).equal(views(1))
    unmixed, mixing = strong_view(weak, options, 0.0, 4, seeded())
    assert not mixing.inside.any()
    assert (unmixed - weak).flatten(1).std(1).max() < 1e-6  # brightness alone
    assert (unmixed - weak).abs().amax((1, 2, 3)).min() > 1e-3
