"""Projection heads: what a contrastive loss sees instead of the features themselves; dropped after pre-training."""

from itertools import pairwise

from torch import Tensor, nn


class GlobalHead(nn.Module):
    """g1 of Chaitanya et al. 2020 (code): flatten, Linear, ReLU, Linear; neither has a bias.

    Every position of the bottleneck has its own weights, so it takes one image size only:
    `in_features` is channels x height x width of the bottleneck.
    """

    def __init__(self, in_features: int, hidden: int = 1024, outputs: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(in_features, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, outputs, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(B, C, h, w)` -> `(B, outputs)`, not normalised."""
        projected: Tensor = self.layers(x)
        return projected


class PooledHead(nn.Module):
    """The head of Zeng D. et al. 2021 (PCL, code): global average pooling, Linear, ReLU, Linear; any image size."""

    def __init__(self, channels: int, outputs: int = 512):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(B, channels, h, w)` -> `(B, outputs)`, not normalised."""
        projected: Tensor = self.layers(x.mean(dim=(-2, -1)))
        return projected


class DenseHead(nn.Module):
    """g2 of Chaitanya et al. 2020 (code): 1 x 1 convolution, batch norm, ReLU, 1 x 1 convolution; no biases."""

    def __init__(self, channels: int, outputs: int | None = None):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01),
            nn.ReLU(),
            nn.Conv2d(channels, outputs or channels, kernel_size=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(B, channels, h, w)` -> `(B, outputs, h, w)`, not normalised; `outputs=None`: `channels`."""
        projected: Tensor = self.layers(x)
        return projected


class NormedHead(nn.Module):
    """Global average pooling, then linear layers with batch norm and ReLU between them; any image size.

    The projector of BYOL (Grill et al. 2020: two layers) and of SimSiam and SimTriplet (Chen & He 2021, Liu et al.
    2021: three, and batch norm behind the last, `normed`). Layers before a batch norm have no bias: it would take it
    away again.
    """

    def __init__(self, channels: int, hidden: int, outputs: int, layers: int = 2, normed: bool = False):
        super().__init__()
        widths = (channels, *[hidden] * (layers - 1))
        self.layers = nn.Sequential(
            *[
                part
                for inputs, width in pairwise(widths)
                for part in (nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
            ],
            nn.Linear(widths[-1], outputs, bias=not normed),
            *([nn.BatchNorm1d(outputs)] if normed else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps `(B, channels, h, w)` -> `(B, outputs)`, not of length one."""
        projected: Tensor = self.layers(x.mean(dim=(-2, -1)))
        return projected


class Predictor(nn.Module):
    """Tells one view's embedding from the other's (BYOL, SimSiam): Linear, batch norm, ReLU, Linear, of one width."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings `(B, width)` -> the same shape, not of length one."""
        predicted: Tensor = self.layers(z)
        return predicted
