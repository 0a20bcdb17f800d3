"""Distil a ResNet-50 into a MobileNet, with hints.

Shows    the two stages of FitNets on two networks of torchvision that have nothing in common: first the MobileNet's
         layers up to its middle learn to predict the ResNet's middle, then the whole of it learns labels and the
         ResNet's softened outputs. Beside it, the same MobileNet on labels alone for as many epochs. Several GPUs or
         processes: `accelerate launch`.
Needs    nothing but the package: MNIST digits that a package carries, and random weights. In earnest,
         `--weights DEFAULT` (ImageNet's, downloaded) or a .pth file for the teacher, and your own images.
Takes    about three minutes on one CPU core; with `--quick` about half a minute.
Prints   which layers are paired, and the test accuracy of the teacher and of both students, with 95 % intervals.

    python examples/distill_resnet.py
    python examples/distill_resnet.py --dataset torchvision:CIFAR10 --image-size 64 --weights DEFAULT --epochs 30
    accelerate launch --num_processes 4 examples/distill_resnet.py
    ACCELERATE_USE_CPU=1 torchrun --standalone --nproc-per-node 2 examples/distill_resnet.py --quick
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

import surgery


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet50", help="a source [resnet50]")
    parser.add_argument("--student", default="mobilenet_v3_small", help="a source [mobilenet_v3_small]")
    parser.add_argument("--weights", help="the teacher's: DEFAULT, or a .pth or .safetensors file")
    parser.add_argument("--dataset", default="mnist5k", help="a name that surgery.load_data takes [mnist5k]")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels [32]")
    parser.add_argument("--limit", type=int, default=1500, help="most training, and most test, images [1500]")
    parser.add_argument("--epochs", type=int, default=4, help="of the teacher, and of the student's second stage [4]")
    parser.add_argument("--hint-epochs", type=int, default=2, help="of the student's first stage [2]")
    parser.add_argument("--quick", action="store_true", help="ResNet-50 on 120 images, one epoch each")
    parser.add_argument("--out", type=Path, help="a folder that does not exist yet: the student, and results.json")
    args = parser.parse_args()
    if args.quick:
        args.limit, args.epochs, args.hint_epochs = 120, 1, 1
    return args


def main() -> None:
    args = read_arguments()
    state = PartialState(cpu=not torch.cuda.is_available())
    say = print if state.is_main_process else lambda *_: None
    data = surgery.load_data(args.dataset, image_size=args.image_size, limit=args.limit)

    def open_source(name: str, weights: str | None = None) -> nn.Module:
        """The same network in each process: the weights are drawn from a seed."""
        source = surgery.models.canonical(name, num_classes=len(data.classes))
        shape = (2, 3, args.image_size, args.image_size)
        return surgery.models.open_model(source, input_shape=shape, weights=weights, seed=0).to(state.device)

    teacher, student = open_source(args.teacher, args.weights), open_source(args.student)
    teacher = surgery.train(teacher, data, epochs=args.epochs, optimizer="adamw").module
    taught = surgery.distill(student, teacher, data, epochs=args.epochs, hint_epochs=args.hint_epochs)
    alone = surgery.train(student, data, epochs=args.epochs + args.hint_epochs, optimizer="adamw").module

    for guided, hint in taught.names:
        say(f"hint: {args.student}'s {guided} learns to predict {args.teacher}'s {hint}")
    scored = {
        "teacher": (teacher, taught.teacher_score),
        "student, taught": (taught.module, taught.score),
        "student, labels alone": (alone, surgery.evaluate(alone, data.test)),
    }
    for name, (model, score) in scored.items():
        low, high = score.interval()
        size = surgery.cost(model).params / 1e6
        say(f"{name:>22}: {score.accuracy:6.1%} ({low:.1%} to {high:.1%}), {size:.1f} M parameters")

    if args.out is not None and state.is_main_process:
        args.out.mkdir(parents=True)
        surgery.save(taught.module, args.out / "student")
        results = {"processes": state.num_processes, "names": taught.names}
        results["accuracy"] = {name: score.accuracy for name, (_, score) in scored.items()}
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
