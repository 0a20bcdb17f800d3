"""Grow a Vision Transformer in the middle of its training, without losing anything.

Shows    `surgery.widen` and `surgery.deepen` on a ViT, exactly: more heads, a wider stream and further blocks, and the
         same outputs; `surgery.transfer_optimizer`, with which AdamW's moments follow the weights; and that training
         goes on where it was. Beside it the same grown network with an optimizer that begins anew.
Needs    nothing but the package. By default a small ViT of torchvision's class on scikit-learn's digits.
Takes    two to four minutes on one CPU core; with `--quick` about twenty seconds.
Prints   parameters before and after, the largest difference of outputs in float64, and loss and test accuracy after
         each epoch.

    python examples/grow_vit.py
    python examples/grow_vit.py --dataset torchvision:CIFAR10 --image-size 32 --epochs 20
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

import surgery


def build(classes: int, image_size: int) -> nn.Module:
    """A ViT with 2 heads of 24 channels and 4 blocks."""
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=image_size,
        patch_size=image_size // 8,
        num_layers=4,
        num_heads=2,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=classes,
    )


def train_epoch(model: nn.Module, optimizer: Optimizer, batches: DataLoader) -> float:
    """One pass over the training images: an ordinary loop, in which nothing knows of surgery. Returns the mean loss."""
    model.train()
    total = 0.0
    for images, labels in batches:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / len(batches)
    return total


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="a name that surgery.load_data takes [digits]")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images, a multiple of 8 [32]")
    parser.add_argument("--limit", type=int, help="most training, and most test, images")
    parser.add_argument("--epochs", type=int, default=4, help="before the growth, and after it [4]")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW [0.001]")
    parser.add_argument("--quick", action="store_true", help="200 images, one epoch")
    parser.add_argument("--out", type=Path, help="a folder, in which the figures are written as results.json")
    args = parser.parse_args()
    if args.quick:
        args.limit, args.epochs = 200, 1
    return args


def main() -> None:
    args = read_arguments()
    data = surgery.load_data(args.dataset, image_size=args.image_size, limit=args.limit)
    batches = DataLoader(data.train, batch_size=64, shuffle=True, drop_last=True)
    inputs = torch.randn(2, 3, args.image_size, args.image_size)

    def follow(name: str, model: nn.Module, optimizer: Optimizer, epochs: int) -> list[float]:
        scores = []
        for _ in range(epochs):
            loss = train_epoch(model, optimizer, batches)
            scores.append(surgery.evaluate(model, data.test).accuracy)
            print(f"{name:>24}: loss {loss:.3f}, test accuracy {scores[-1]:.1%}")
        return scores

    small = surgery.trace(build(len(data.classes), args.image_size), inputs)
    optimizer = AdamW(small.parameters(), lr=args.lr)
    scores = {"small": follow("small", small, optimizer, args.epochs)}

    # Twice the stream and the heads, 1.5 times the hidden units of each MLP, and two further blocks.
    widths = {"conv_proj": 2.0, "encoder.layers.*.self_attention": 2.0, "encoder.layers.*.mlp.0": 1.5}
    large = surgery.deepen(surgery.widen(small, widths, break_symmetry="zero-sum"), {"encoder.layers": 2})
    carried = surgery.transfer_optimizer(optimizer, small, large)

    check = surgery.verify(large, small, inputs, dtype=torch.float64)
    params = [surgery.cost(model).params for model in (small, large)]
    tensors = {name: len(list(model.parameters())) for name, model in (("small", small), ("grown", large))}
    moments = sum("exp_avg" in state for state in carried.state.values())
    print(f"\ngrown from {params[0]:,} to {params[1]:,} parameters; outputs differ by {check.max_rel:.1e} in float64")
    print(f"AdamW goes on with its moments of {moments} tensors; {tensors['grown'] - moments} are new\n")

    anew = copy.deepcopy(large)
    scores["grown"] = [surgery.evaluate(large, data.test).accuracy]
    print(f"{'grown, before any step':>24}: {'':12}test accuracy {scores['grown'][0]:.1%}")
    scores["grown"] += follow("grown", large, carried, args.epochs)
    scores["anew"] = follow("grown, a new optimizer", anew, AdamW(anew.parameters(), lr=args.lr), args.epochs)

    results = {"scores": scores, "max_rel": check.max_rel, "params": params, "tensors": tensors, "moments": moments}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
