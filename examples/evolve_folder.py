"""Knowledge Evolution on a folder of images.

Shows    `surgery.evolve` where images are few: generation by generation the slim network that is carved out of the
         dense one catches up with it. The slim network is then exported.
Needs    nothing but the package. `--images DIR` is a folder of class folders, or of `train` and `val` folders of these.
         Without it, one is made of scikit-learn's digits, so that you can see what such a folder looks like.
Takes    about two minutes on one CPU core; with `--quick` about half a minute.
Prints   the test accuracy of the dense and of the slim network after each generation. `--out` gets the folder of images
         (if one was made), `generations.png`, `slim/`, `slim.onnx` and `results.json`.

    python examples/evolve_folder.py --out evolved
    python examples/evolve_folder.py --images photos --image-size 128 --generations 10 --epochs 20 --out evolved
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

import surgery


def make_folder(folder: Path, per_class: int) -> None:
    """Write ``folder/zero/0.png`` and so on, 32 pixels a side: the first ``per_class`` images of each digit."""
    digits = load_digits()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:per_class]):
            pixels = Image.fromarray((image * 15.9375).astype("uint8"))
            pixels.resize((32, 32), Image.Resampling.BICUBIC).save(folder / name / f"{number}.png")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images [made of scikit-learn's digits]")
    parser.add_argument("--per-class", type=int, default=60, help="images of each class of the folder made [60]")
    parser.add_argument("--image-size", type=int, default=16, help="side that images are scaled to [16]")
    parser.add_argument("--model", default="resnet18", help="a source [resnet18]")
    parser.add_argument("--rate", type=float, default=0.5, help="part of the channels in the slim network [0.5]")
    parser.add_argument("--generations", type=int, default=4, help="[4]")
    parser.add_argument("--epochs", type=int, default=6, help="in each generation [6]")
    parser.add_argument("--quick", action="store_true", help="12 images of each class, two generations of one epoch")
    parser.add_argument("--out", type=Path, default=Path("evolved"), help="a folder that does not exist yet [evolved]")
    args = parser.parse_args()
    if args.quick:
        args.per_class, args.generations, args.epochs = 12, 2, 1
    return args


def main() -> None:
    args = read_arguments()
    args.out.mkdir(parents=True)
    images = args.images
    if images is None:
        images = args.out / "images"
        make_folder(images, args.per_class)
    data = surgery.load_data(f"imagefolder:{images}", image_size=args.image_size)
    print(f"{images}: {data.counts[0]} images to train on and {data.counts[1]} to test on, {len(data.classes)} classes")

    source = surgery.models.canonical(args.model, num_classes=len(data.classes))
    dense = surgery.models.open_model(source, input_shape=(2, 3, args.image_size, args.image_size), seed=0)

    settings = surgery.EvolveSettings(epochs=args.epochs, batch_size=32, recalibrate=True)
    found = surgery.evolve(dense, data, args.rate, args.generations, settings)
    for number, generation in enumerate(found.generations, 1):
        print(f"generation {number}: dense {generation.dense.accuracy:6.1%}, slim {generation.slim.accuracy:6.1%}")
    surgery.draw_generations(found, None, args.out / "generations.png", title=f"{args.model} on {images.name}")

    surgery.save(found.slim, args.out / "slim")
    exported = surgery.export_onnx(found.slim, args.out / "slim.onnx")
    share = surgery.cost(found.slim).params / surgery.cost(dense).params
    print(f"slim.onnx: {exported.bytes / 2**20:.1f} MiB, {share:.0%} of the dense network's parameters")
    (args.out / "results.json").write_text(json.dumps({**found.to_dict(), "params": share}, indent=2) + "\n")


if __name__ == "__main__":
    main()
