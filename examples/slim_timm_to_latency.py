"""Slim a model of timm to a latency, and ship it.

Shows    `surgery.slim_to_budget` with a latency, measured on this machine; the same widths compensated
         (`surgery.slim(..., calibration=)`); what the dense network can still teach the slim one
         (`surgery.distill`); and both as ONNX files, checked against torch and timed in turns.
Needs    `pip install '.[timm]'`. By default timm's `resnet18` with random weights, trained here on
         MNIST digits that a package carries. Your own: `--weights best.pth --dataset imagefolder:DIR`.
Takes    a few minutes on one CPU core; most of it is measuring, with `--quick` too.
Prints   the latency of the dense and the slim network, the accuracy of the slim one after each step, and the ratio of
         the ONNX files' latencies with its interval. `--out` gets `dense.onnx`, `slim.onnx`, `slim/` (for
         `surgery.load`) and `results.json`.

    python examples/slim_timm_to_latency.py --out shipped
    python examples/slim_timm_to_latency.py --model mobilenetv3_small_100 --weights DEFAULT \\
        --dataset torchvision:CIFAR10 --image-size 96 --latency 4ms --out shipped
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import surgery


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of timm's [resnet18]")
    parser.add_argument("--weights", help="DEFAULT or a tag of timm's (downloaded), or a .pth or .safetensors file")
    parser.add_argument("--dataset", default="mnist5k", help="a name that surgery.load_data takes [mnist5k]")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels [32]")
    parser.add_argument("--limit", type=int, default=1500, help="most training, and most test, images [1500]")
    parser.add_argument("--latency", help="the budget of one image, such as 5ms [half of the dense model's]")
    parser.add_argument("--epochs", type=int, default=3, help="for the dense model, and for the slim one [3]")
    parser.add_argument("--quick", action="store_true", help="300 images")
    parser.add_argument("--out", type=Path, default=Path("shipped"), help="a folder that does not exist yet [shipped]")
    args = parser.parse_args()
    if args.quick:
        args.limit = 300
    return args


def main() -> None:
    args = read_arguments()
    args.out.mkdir(parents=True)
    data = surgery.load_data(args.dataset, image_size=args.image_size, limit=args.limit)

    source = f"timm:{args.model}?num_classes={len(data.classes)}"
    shape = (2, 3, args.image_size, args.image_size)
    traced = surgery.models.open_model(source, input_shape=shape, weights=args.weights, seed=0)
    dense = surgery.train(traced, data, epochs=args.epochs, batch_size=32, optimizer="adamw").module
    accuracy = {"dense": surgery.evaluate(dense, data.test).accuracy}
    print(f"{args.model}: {accuracy['dense']:.1%} of {data.counts[1]} test images, {surgery.cost(dense).macs:,} MACs")

    # One thread: what is measured depends less on what else the machine does. Short measurements: this is an example.
    timing = {"threads": 1, "min_seconds": 0.2, "min_runs": 30, "memory": False}
    budget = args.latency or 0.5 * surgery.benchmark(dense, **timing).p50_ms
    found = surgery.slim_to_budget(
        dense,
        latency_ms=budget,
        importance="magnitude",
        round_to=8,
        by="stage",
        tolerance=0.1,
        on_figure=lambda figure: print(f"  {figure.what} {figure.name}: {figure.measured:.2f} ms", flush=True),
        **timing,
    )
    print(
        f"from {found.before:.2f} ms an image to {found.measured:.2f} ms, for a budget of {found.limit:.2f} ms: "
        f"{surgery.cost(found.module).macs:,} MACs"
    )
    accuracy["carved"] = surgery.evaluate(found.module, data.test).accuracy

    # The budget says which widths; with calibration the channels that stay take over what the others said.
    options = {"round_to": found.round_to, "importance": found.importance}
    slim = surgery.slim(dense, found.rates, **options, calibration=data)
    accuracy["compensated"] = surgery.evaluate(slim, data.test).accuracy
    taught = surgery.distill(slim, dense, data, hint_epochs=0, epochs=args.epochs, lr=5e-4)
    slim = taught.module
    accuracy["taught"] = taught.score.accuracy
    for name in ("carved", "compensated", "taught"):
        print(f"{name:>12}: {accuracy[name]:.1%}")

    surgery.save(slim, args.out / "slim")
    files = {"dense": args.out / "dense.onnx", "slim": args.out / "slim.onnx"}
    for name, network in (("dense", dense), ("slim", slim)):
        surgery.export_onnx(network, files[name])
    timed = surgery.compare(files, **timing)
    ratio = timed.ratios["slim"]
    print(
        f"ONNX Runtime: {timed.results['slim'].p50_ms:.2f} ms for {timed.results['dense'].p50_ms:.2f}, "
        f"{ratio.value:.2f} of the dense model's latency ({ratio.low:.2f} to {ratio.high:.2f})"
    )
    if timed.too_noisy:
        print(timed.too_noisy)

    results = {
        "accuracy": accuracy,
        "macs": {
            name: surgery.cost(network).macs
            for name, network in (("dense", dense), ("carved", found.module), ("slim", slim))
        },
        "budget": found.to_dict(),
        "onnx": {"p50_ms": {name: result.p50_ms for name, result in timed.results.items()}, "ratio": ratio.value},
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
