"""ResNet-18 and -50 for 32 x 32 images: the backbones of T1."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.skip(x))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = nn.Conv2d(outputs, 4 * outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, 4 * outputs, 1, stride, bias=False), nn.BatchNorm2d(4 * outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.skip(x))


def resnet18(width: int, features: int) -> nn.Sequential:
    """For 32 x 32 images; another number of features than 8 x width comes from a linear layer and a ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if inputs != features:
        layers += [nn.Linear(inputs, features), nn.ReLU()]
    return nn.Sequential(*layers)


def resnet50(width: int, features: int) -> nn.Sequential:
    """As :func:`resnet18`; its own features are 32 x width."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, (stride, depth) in enumerate(((1, 3), (2, 4), (2, 6), (2, 3))):
        outputs = width * 2**stage
        for index in range(depth):
            layers.append(Bottleneck(inputs, outputs, stride if index == 0 else 1))
            inputs = 4 * outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if inputs != features:
        layers += [nn.Linear(inputs, features), nn.ReLU()]
    return nn.Sequential(*layers)
