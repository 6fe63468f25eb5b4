"""The same network and training step in PyTorch, written for `step_time.py` to compare with.

Plain RepOpt-VGG under SGD with momentum, as the target trains: uint8 images are normalized on the
device, the loss has smoothed labels, convolutions run channels-last.
"""

import contextlib
import os

import torch
from torch import nn


def vgg(num_blocks, widths, num_classes=1000):
    """Stem and four stages of 3x3 convolution, BatchNorm, ReLU; then pooling and a dense layer."""
    layers, channels = [], 3
    for width, count in zip(widths, (1, *num_blocks), strict=True):
        for index in range(count):
            stride = 1 if index else 2
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers, *head)


class TorchStep:
    """The training step of the network.

    Args:
      num_blocks: blocks of stages 1 to 4.
      widths: channels of stages 0 to 4.
      images: uint8, (batch, height, width, 3).
      labels: int, (batch,).
      bfloat16: whether to run under autocast; parameters stay float32.
      compiled: whether to use `torch.compile`.
      learning_rate: of SGD with Nesterov momentum 0.9 and weight decay 4e-5.
    """

    def __init__(
        self, num_blocks, widths, images, labels, *, bfloat16, compiled, learning_rate=0.1
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # what XLA takes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = vgg(num_blocks, widths).to(self.device, memory_format=torch.channels_last)
        decayed = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": 4e-5}, {"params": others}],
            lr=learning_rate,
            momentum=0.9,
            nesterov=True,
        )
        # NHWC bytes seen as NCHW are channels-last already.
        self.images = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        shape = (1, 3, 1, 1)
        mean = torch.tensor((0.485, 0.456, 0.406), device=self.device).reshape(shape)
        std = torch.tensor((0.229, 0.224, 0.225), device=self.device).reshape(shape)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

        def loss(images, labels):
            return criterion(network((images.float() / 255 - mean) / std), labels)

        self.loss = torch.compile(loss) if compiled else loss
        self.network = network
        if bfloat16:
            self.context = lambda: torch.autocast(self.device.type, torch.bfloat16)
        else:
            self.context = contextlib.nullcontext

    def run(self, count):
        """Run steps and wait for their end; the last loss."""
        for _ in range(count):
            with self.context():
                loss = self.loss(self.images, self.labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return loss.item()  # waits

    def peak_bytes(self):
        """Most memory in use since `reset_peak`. None: unknown, on CPU."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    @staticmethod
    def reset_peak():
        """Forget earlier peaks."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def fair_float32():
    """Let float32 use TensorFloat-32, as JAX's default precision does on the same GPUs."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # XLA measures its candidates too
