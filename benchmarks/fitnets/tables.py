"""What `fitnets.py` measured, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.fitnets.cost import PUBLISHED
from benchmarks.fitnets.step import WAYS
from benchmarks.fitnets.train import LONGER, METHODS

TARGETS = {"truncated": 1.8, "cached": 3.0}
"""How many times as fast as a step with hooks a step is meant to be."""

WAY_LABELS = {
    "hooks": "both networks whole, with hooks",
    "truncated": "`attach_hint`: truncated networks",
    "cached": "`attach_hint`: truncated student, hints cached",
}


def cost_table(document: dict[str, Any]) -> str:
    where = document["environment"]
    lines = [
        "# What the networks of FitNets cost",
        "",
        f"`{document['command']}`; {machine(where)}.",
        "",
        "Weights and multiplications as the paper counts them: no biases, all pieces of maxout units, each weight as "
        "often as its layer has output positions. *Derived* is what the layers that the paper gives come to, worked "
        "out without this package, *paper* what it prints (tables 3 to 5, section 4.1, appendix A).",
        "",
        *table(
            ("net", "weights", "derived", "paper", "multiplications", "derived", "paper", "as derived"),
            [_count_row(row) for row in document["counts"]],
        ),
        "",
        "FitNet 3 is counted as the paper's table 7 gives its layers. Its table 5 has other figures (~1.6M, ~392M), "
        "which its layers do not come to, with 2 pieces in the maxout layer or with 5; table 3 has ~1.5M for a network "
        "of the same layers. Of SVHN and MNIST the multiplications were not worked out beforehand.",
        "",
        "## Time",
        "",
        "Latency of a query, and how many times as fast as the teacher a network is: ratio of medians, all networks "
        "taking turns in one run, with its 95 % interval. The paper's speed-ups are those of a GPU over the CIFAR-10 "
        "test set.",
        "",
    ]
    for timing in document["timings"]:
        title = f"{timing['group']}, {timing['runtime']} on {timing['device']}, batch {timing['batch_size']}"
        if "missing" in timing:
            continue
        lines += [f"### {title}", "", *_timing(document, timing), ""]
    missing = [t for t in document["timings"] if "missing" in t]
    if missing:
        reasons = {f"{t['runtime']} on {t['device']}: {t['missing']}": None for t in missing}
        lines += ["Not measured:", "", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines)


def _count_row(row: dict[str, Any]) -> list[str]:
    known = PUBLISHED[row["net"]]
    weights, multiplications = (f"{row[key]:,}" for key in ("weights", "multiplications"))
    return [
        *(known.label, weights, known.weights, known.paper[0]),
        *(multiplications, known.multiplications, known.paper[1]),
        "yes" if row["as_derived"] else "**no**",
    ]


def _timing(document: dict[str, Any], timing: dict[str, Any]) -> list[str]:
    costs = {row["net"]: row for row in document["counts"]}
    names = list(timing["results"])
    teacher = costs[names[0]]
    rows = []
    for name in names:
        known, cost, result = PUBLISHED[name], costs[name], timing["results"][name]
        rows.append(
            [
                known.label,
                f"{result['p50_ms']:.2f}",
                f"{100 * result['iqr_ms'] / result['p50_ms']:.0f} %",
                f"{teacher['multiplications'] / cost['multiplications']:.2f}",
                f"{interval(timing['speedups'][name])}" if name in timing["speedups"] else "1",
                f"{known.speedup:g}" if known.speedup else "",
                f"{teacher['weights'] / cost['weights']:.2f}",
                f"{known.compression:g}" if known.compression else "",
            ]
        )
    heads = ("net", "median, ms", "quartiles' range", "multiplications, teacher's over its", "times as fast, measured")
    result = table((*heads, "paper's speed-up", "compression", "paper's"), rows)
    doubts = {note for r in timing["results"].values() for note in r["notes"]}
    samples = len(next(iter(timing["results"].values()))["samples_ms"])
    load = timing["environment"]["load_1min"]
    result += ["", f"{samples} rounds, {timing['threads']} threads; load before {load:.1f}."]
    if doubts:
        noisy = [PUBLISHED[n].label for n, r in timing["results"].items() if r["notes"]]
        result[-1] += f" Noisy: {', '.join(noisy)}."
    return result


def step_table(document: dict[str, Any]) -> str:
    settings, result = document["settings"], document["result"]
    macs, batch = result["macs"], settings["batch_size"]
    backward = 3 * macs["student_prefix"]
    computed = {
        "hooks": macs["teacher"] + macs["student"] + 2 * macs["student_prefix"],
        "truncated": macs["teacher_prefix"] + backward,
        "cached": backward,
    }
    rows = []
    for way in WAYS:
        ratio = result["speedups"].get(way)
        target = TARGETS.get(way)
        met = "" if target is None else f"{target:g}: {'met' if ratio['value'] >= target else 'missed'}"
        rows.append(
            [
                WAY_LABELS[way],
                f"{result['median_ms'][way]:.0f}",
                interval(ratio) if ratio else "1",
                met,
                f"{batch * computed[way] / 1e9:.1f}",
                f"{computed['hooks'] / computed[way]:.2f}",
            ]
        )
    pairs = [zip(result["losses"][way], result["losses"]["hooks"], strict=True) for way in WAYS[1:]]
    spread = max(abs(ours - theirs) / theirs for pair in pairs for ours, theirs in pair)
    heads = ("stage 1", "median, ms", "times as fast", "target", "G MACs, about", "ratio of these")
    return "\n".join(
        [
            f"# A step of stage 1: {settings['teacher']} → {settings['student']}",
            "",
            f"`{document['command']}`; {machine(document['environment'])}.",
            "",
            f"Hint `{settings['hint']}`, guided `{settings['guided']}`, batch {batch}, {settings['image_size']} "
            f"pixels, {'channels last' if settings.get('channels_last') else 'contiguous'}, on {settings['device']}, "
            f"{result['threads']} threads, {settings['rounds']} rounds in which the "
            "three take turns. A step is forward, hint loss, backward and AdamW. Ratios are of medians, with their "
            f"95 % intervals. The three have the same loss at every step (largest relative difference {spread:.1e}).",
            "",
            *table(heads, rows),
            "",
            "MACs: backward counted as twice the forward pass of what it goes through. They bound what leaving things "
            "out can give where time goes with MACs.",
            "",
        ]
    )


METHOD_LABELS = {
    "backprop": "backpropagation",
    "kd": "KD",
    "hints": "hints, then KD",
    LONGER: "hints, then KD as long as alone",
}

TRAINED = 0.1
"""The test error, below which a net counts as trained."""

CHOSEN = (
    "The initial range, optimiser, epochs, number of images and the grid were chosen after trials with seed 0 that "
    "looked at test images: with torch's own initial weights, or at other learning rates, the methods differ less, or "
    "otherwise. Only the learning rate is chosen on images set apart."
)

PAPER = {
    "mnist": "The paper's test errors, on all of MNIST: teacher 0.55 %, backpropagation 1.9 %, KD 0.65 %, hints and "
    "KD 0.51 % (table 4).",
    "depth": "The paper, on CIFAR-10 with the whole nets: of 30 million multiplications backpropagation trains at "
    "most 5 layers, KD 7 and hints 13 (section 4.1).",
}


def train_table(document: dict[str, Any]) -> str:
    settings = document["settings"]
    teacher = errors(document, settings["teacher"], "teacher")
    rows = [
        [
            net,
            f"{outcome[0]['params']:,}",
            METHOD_LABELS[method],
            f"{outcome[0]['lr']:g}",
            spread(errors(document, net, method)),
            f"{mean(errors(document, net, method)):.2%}",
            f"{sum(e < TRAINED for e in errors(document, net, method))} of {len(outcome)}",
            " ".join(f"{100 * e:.1f}" for e in errors(document, net, method)),
        ]
        for net in students(document)
        for method in METHOD_LABELS
        if (outcome := finals(document, net, method))
    ]
    heads = ("net", "parameters", "method", "learning rate", "test error", "mean", f"below {TRAINED:.0%}", "by seed, %")
    total = settings["hint_epochs"] + settings["epochs"]
    init = f"uniform within ±{settings['init_range']:g}" if settings["init_range"] else "as torch makes them"
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    few = f" At most {settings['limit']:,} training images are learned from." if settings["limit"] else ""
    slim = "".join(
        f" The {who} has the first {settings[f'{who}_rate']:g} of its channels (`surgery.slim`)."
        for who in ("teacher", "student")
        if settings[f"{who}_rate"] < 1
    )
    return "\n".join(
        [
            f"# FitNets on {settings['dataset']}: {settings['part']}",
            "",
            f"`{document['command']}`; {machine(document['environment'])}.",
            "",
            f"{settings['optimizer']}, one-cycle schedule, batch {settings['batch_size']}, {total} epochs for every "
            f"method, of which hints have {settings['hint_epochs']} in stage 1, unless it is said otherwise. Students' "
            f"initial weights {init}. The learning rate of each net and method is the one of {rates} that does best on "
            "a fifth of the training images, set apart; then all of them are learned from. Test error after the last "
            "epoch: the median over "
            "seeds, with the least and the greatest." + few + slim,
            "",
            f"Teacher `{settings['teacher']}`, one for each seed: {spread(teacher)} "
            f"({' '.join(f'{100 * e:.1f}' for e in teacher)}).",
            "",
            *table(heads, rows),
            "",
            *_order(document),
            "",
            CHOSEN,
            "",
            PAPER[settings["part"]],
            "",
        ]
    )


def _order(document: dict[str, Any]) -> list[str]:
    """How often each method does as well as the one before, net by net and seed by seed."""
    lines = []
    for net in students(document):
        ours = {method: errors(document, net, method) for method in METHODS}
        count = min(map(len, ours.values()))
        hints = sum(a <= b for a, b in zip(ours["hints"], ours["kd"], strict=False))
        kd = sum(a < b for a, b in zip(ours["kd"], ours["backprop"], strict=False))
        lines.append(
            f"- `{net}`: hints are at least as good as KD in {hints} of {count} seeds, KD is better than "
            f"backpropagation in {kd}."
        )
        if longer := errors(document, net, LONGER):
            wins = sum(a <= b for a, b in zip(longer, ours["kd"], strict=False))
            lines.append(
                f"- `{net}`: hints, and then KD as long as alone, which is the paper's protocol, are at least as good "
                f"as KD in {wins} of {len(longer)} seeds."
            )
    return lines


def students(document: dict[str, Any]) -> list[str]:
    """The nets that there are runs of, in their order."""
    return list(dict.fromkeys(r["net"] for r in document["runs"] if r["method"] in METHOD_LABELS))


def finals(document: dict[str, Any], net: str, method: str) -> list[dict[str, Any]]:
    """The runs that learned from all training images, by seed."""
    found = [r for r in document["runs"] if not r["validation"] and (r["net"], r["method"]) == (net, method)]
    return sorted(found, key=lambda r: r["seed"])


def errors(document: dict[str, Any], net: str, method: str) -> list[float]:
    """Test errors after the last epoch, by seed."""
    return [1 - r["accuracy"][-1] for r in finals(document, net, method)]


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def machine(where: Mapping[str, Any]) -> str:
    """Date, processor, GPU and versions, for the head of a table."""
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "onnxruntime"))
    return f"{where['date'][:10]}, {where['cpu']}, {where['gpu'] or 'no GPU'}, {versions}"
