"""SmallResNet: a small CNN with skip connections for 32×32 colour images."""

from torch import Tensor, nn
from torch.nn import functional as F

STEM_CHANNELS = 64


def conv_bn(in_channels: int, out_channels: int) -> list[nn.Module]:
    """3×3 convolution that keeps height and width, then batch norm: (B, in, H, W) → (B, out, H, W)."""
    # Batch norm subtracts the mean, so a bias before it would do nothing.
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


class ResidualBlock(nn.Module):
    """Two conv–batch norm–ReLU layers with a skip connection around them, x + f(x).

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition".
    Shapes: (B, channels, H, W) → (B, channels, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(channels, channels), nn.ReLU(inplace=True), *conv_bn(channels, channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def stage(in_channels: int, out_channels: int, pool: int) -> nn.Sequential:
    """Widen, shrink and refine: (B, in, H, W) → (B, out, H / pool, W / pool)."""
    # ReLU and maximum commute: pooling first leaves ReLU pool² times fewer numbers.
    return nn.Sequential(
        *conv_bn(in_channels, out_channels), nn.MaxPool2d(pool), nn.ReLU(inplace=True), ResidualBlock(out_channels)
    )


class SmallResNet(nn.Module):
    """A small ResNet: a stem, and two stages with h_1 and h_2 features.

    With 64 and 512 features it has 5.2 M parameters, and a forward pass takes 0.42 GFLOP (multiplications and
    additions) per image; with 128 and 1024, 20.5 M and 1.51 GFLOP.

    Args:
        h_1: features of the first stage (at 16×16), an int ≥ 1.
        h_2: features of the second stage (at 4×4) and of the classifier's input, an int ≥ 1.
        p_drop: dropout probability before the classifier, 0 ≤ p_drop < 1.
        num_classes: number of logits, an int ≥ 1.
    """

    def __init__(self, h_1: int, h_2: int, p_drop: float, num_classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, STEM_CHANNELS), nn.ReLU(inplace=True))
        self.stage_1 = stage(STEM_CHANNELS, h_1, pool=2)
        self.stage_2 = stage(h_1, h_2, pool=4)
        self.dropout = nn.Dropout(p_drop)
        self.classifier = nn.Linear(h_2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float (B, num_classes), of normalised float images (B, 3, 32, 32)."""
        x = self.stem(images)  # (B, 64, 32, 32)
        x = self.stage_1(x)  # (B, h_1, 16, 16)
        x = self.stage_2(x)  # (B, h_2, 4, 4)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, h_2)
        return self.classifier(self.dropout(x))
