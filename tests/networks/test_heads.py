import pytest
import torch
from torch import nn

from glocal.networks.heads import NormedHead, Predictor


def normed(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def test_a_normed_head_of_two_layers_is_byol_s() -> None:
    torch.manual_seed(0)
    head, x = NormedHead(3, 7, 5).double(), torch.randn(6, 3, 4, 2, dtype=torch.float64)
    first, last = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    assert (first.bias, tuple(last.bias.shape)) == (None, (5,))
    expected = normed(x.mean((2, 3)) @ first.weight.T).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(head(x), expected)


def test_a_normed_head_of_three_layers_and_a_norm_is_simsiam_s() -> None:
    torch.manual_seed(0)
    head, x = NormedHead(3, 7, 5, layers=3, normed=True).double(), torch.randn(6, 3, 4, 2, dtype=torch.float64)
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(7, 3), (7, 7), (5, 7)]
    assert all(layer.bias is None for layer in linear)
    one, two, three = (layer.weight.T for layer in linear)
    inner = normed(normed(x.mean((2, 3)) @ one).relu() @ two).relu()
    torch.testing.assert_close(head(x), normed(inner @ three))


def test_a_predictor_keeps_the_width() -> None:
    torch.manual_seed(0)
    predictor, z = Predictor(8, 3).double(), torch.randn(6, 8, dtype=torch.float64)
    first, last = (layer for layer in predictor.layers if isinstance(layer, nn.Linear))
    assert first.bias is None
    expected = normed(z @ first.weight.T).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(predictor(z), expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 3)])
def test_they_take_maps_of_any_size_and_rows_in_any_order(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, order = torch.randn(5, 4, *size), torch.tensor([3, 0, 4, 1, 2])
    for model in (NormedHead(4, 8, 6), nn.Sequential(NormedHead(4, 8, 6, 3, True), Predictor(6, 2))):
        torch.testing.assert_close(model(x)[order], model(x[order]))
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.15)
