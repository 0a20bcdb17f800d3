"""One of several trainings at once: ``python -m benchmarks.gpu.training FILE DEVICE SMALL`` writes its weights."""

from __future__ import annotations

import sys
import warnings

import torch

import surgery
from benchmarks.gpu.parts import net, random_images


def main() -> None:
    file, device, small = sys.argv[1:]
    warnings.filterwarnings("ignore")
    data = random_images(bool(int(small)))
    trained = surgery.train(net(device), data, epochs=3, batch_size=64, lr=0.05, test_each_epoch=False).module
    torch.save({name: value.cpu() for name, value in trained.state_dict().items()}, file)


if __name__ == "__main__":
    main()
