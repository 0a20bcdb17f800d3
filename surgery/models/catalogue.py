"""The catalogue: one row for each builder of torchvision, with its family, its inputs and its keywords. Text alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import urlencode

Value = int | float | bool | str | tuple[int, ...]
"""The types of a builder keyword in a source."""

FROZEN_NORM = "frozen_norm"
"""A keyword of this catalogue: the norms of a detection model's backbone become FrozenBatchNorm2d with this eps.
torchvision's builders do that only when they load published weights."""

Kind = Literal["image", "video", "two images", "list of images", "tokens", "features"]

_PLURALS = {
    "image": "images",
    "video": "videos",
    "two images": "two images",
    "list of images": "lists of images",
    "tokens": "token sequences",
    "features": "feature sequences",
}


@dataclass(frozen=True)
class Entry:
    """One builder of torchvision.

    ``kind`` says what the model takes: a batch of images (N, 3, height, width), a batch of videos
    (N, 3, frames, height, width), two batches of images, or a list of images (3, height, width) each; of other
    libraries also token numbers (N, length) or sequences of features (N, channels, length).

    ``input_size`` is the size of one sample, (3, height, width), that the published weights are evaluated at, or
    (3, frames, height, width) of a video; if the model is evaluated at many sizes, the size at which the published
    costs are counted. ``minimum`` is the smallest square image, in pixels, that the model can be trained on with its
    default keywords. ``smallest`` is the smallest that suits tests, with the keywords ``small`` and, for videos,
    ``frames``: its deepest feature map is at least 2 x 2. At a batch of two and 1 x 1 maps, the batch statistics of a
    training pass are so ill-conditioned that float64 rounding alone moves a deep model's outputs.
    """

    name: str
    family: str
    input_size: tuple[int, ...] = (3, 224, 224)
    smallest: int = 64
    minimum: int = 32
    kind: Kind = "image"
    notes: str = ""
    frames: int | None = None
    """The smallest number of frames of a video that suits tests."""
    fixed: bool = False
    """Whether it takes only the sample size that it is built for."""
    size_keyword: str = ""
    """The builder keyword that sets the size of a model whose size is fixed."""
    targets: tuple[str, ...] = ()
    """The targets that the model needs in training, for each image."""
    defaults: Mapping[str, Value | None] = field(default_factory=dict)
    """Builder keywords that apply unless the caller sets them."""
    pretrained: Mapping[str, Value] = field(default_factory=dict)
    """Builder keywords that the published weights need."""
    pretrained_by_name: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """Further keywords by name of the weights; they win over ``pretrained``."""
    small: Mapping[str, Value] = field(default_factory=dict)
    """Builder keywords for tests: a model of the same layers for small inputs, or with few proposals."""

    @property
    def input_words(self) -> str:
        """Describe the input in words: ``videos of 3 x 16 x 112 x 112``."""
        return f"{_PLURALS[self.kind]} of {' x '.join(map(str, self.input_size))}"

    @property
    def small_source(self) -> str:
        """Return the source of the form that is good for tests and takes samples of ``smallest`` pixels."""
        return self.name + (
            "?" + urlencode({k: text(v) for k, v in self.small.items()}, safe=",") if self.small else ""
        )


def text(value: Value | None) -> str:
    """Write a builder keyword's value as a source has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


names: Callable[[str], list[str]] = str.split


def _rows() -> Iterator[Entry]:
    """One row a builder; a family's shared facts are said once."""
    convolutional = {entry.name: entry for entry in _convolutional()}
    yield from convolutional.values()
    yield from _quantized(convolutional)
    yield from _attention()
    yield from _video()
    yield from _segmentation()
    yield from _two_stage_detection()
    yield from _one_stage_detection()
    for name in names("raft_large raft_small"):
        yield Entry(
            name,
            "RAFT",
            (3, 440, 1024),
            smallest=128,
            minimum=128,
            kind="two images",
            notes="multiples of 8 pixels; returns the flow after each of 12 updates",
        )


def _convolutional() -> Iterator[Entry]:
    yield Entry("alexnet", "AlexNet", minimum=64)
    for depth in (11, 13, 16, 19):
        yield Entry(f"vgg{depth}", "VGG")
        yield Entry(f"vgg{depth}_bn", "VGG")
    for name in names("resnet18 resnet34 resnet50 resnet101 resnet152"):
        yield Entry(name, "ResNet")
    for name in names("resnext50_32x4d resnext101_32x8d resnext101_64x4d"):
        yield Entry(name, "ResNeXt")
    for name in names("wide_resnet50_2 wide_resnet101_2"):
        yield Entry(name, "Wide ResNet")
    for name in names("squeezenet1_0 squeezenet1_1"):
        yield Entry(name, "SqueezeNet")
    for name in names("densenet121 densenet161 densenet169 densenet201"):
        yield Entry(name, "DenseNet")
    yield Entry(
        "googlenet",
        "GoogLeNet",
        notes="two auxiliary heads in training",
        defaults={"init_weights": True},
        pretrained={"transform_input": True, "aux_logits": False},
    )
    yield Entry(
        "inception_v3",
        "Inception v3",
        input_size=(3, 299, 299),
        smallest=299,
        minimum=299,
        notes="one auxiliary head in training; with aux_logits=false, 75 pixels are enough",
        defaults={"init_weights": True},
        pretrained={"transform_input": True},
    )
    yield Entry("mobilenet_v2", "MobileNet v2")
    for name in names("mobilenet_v3_small mobilenet_v3_large"):
        yield Entry(name, "MobileNet v3")
    for name in names("mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3"):
        yield Entry(name, "MNASNet")
    for number, size in enumerate((224, 240, 288, 300, 380, 456, 528, 600)):
        yield Entry(f"efficientnet_b{number}", "EfficientNet", (3, size, size))
    for letter, size in (("s", 384), ("m", 480), ("l", 480)):
        yield Entry(f"efficientnet_v2_{letter}", "EfficientNet v2", (3, size, size))
    for name in names("x_400mf x_800mf x_1_6gf x_3_2gf x_8gf x_16gf x_32gf"):
        yield Entry(f"regnet_{name}", "RegNet")
    for name in names("y_400mf y_800mf y_1_6gf y_3_2gf y_8gf y_16gf y_32gf"):
        yield Entry(f"regnet_{name}", "RegNet")
    yield Entry("regnet_y_128gf", "RegNet", (3, 384, 384))
    for name in names("x0_5 x1_0 x1_5 x2_0"):
        yield Entry(f"shufflenet_v2_{name}", "ShuffleNet v2")
    for name in names("convnext_tiny convnext_small convnext_base convnext_large"):
        yield Entry(name, "ConvNeXt")


def _quantized(floats: Mapping[str, Entry]) -> Iterator[Entry]:
    """The models whose layers can be quantized, in their float form."""
    for name in names(
        "resnet18 resnet50 resnext101_32x8d resnext101_64x4d googlenet inception_v3 mobilenet_v2 mobilenet_v3_large "
        "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0"
    ):
        entry = floats[name]
        notes = "; ".join(filter(None, ("float form", entry.notes)))
        yield replace(entry, name=f"quantized_{name}", family=f"{entry.family}, quantizable", notes=notes)


def _attention() -> Iterator[Entry]:
    for name, patch in (("b_16", 16), ("b_32", 32), ("l_16", 16), ("l_32", 32), ("h_14", 14)):
        swag = {"b_16": 384, "l_16": 512}.get(name)
        yield Entry(
            f"vit_{name}",
            "Vision Transformer",
            smallest=2 * patch,
            minimum=224,
            fixed=True,
            size_keyword="image_size",
            notes="one size, set by image_size=" + ("; published at 518" if name == "h_14" else ""),
            pretrained_by_name={"IMAGENET1K_SWAG_E2E_V1": {"image_size": swag or 518}} if swag or patch == 14 else {},
            small={"image_size": 2 * patch},
        )
    for letter in "tsb":
        yield Entry(f"swin_{letter}", "Swin Transformer", minimum=4)
    for letter in "tsb":
        yield Entry(f"swin_v2_{letter}", "Swin Transformer v2", (3, 256, 256), minimum=4)
    yield Entry(
        "maxvit_t",
        "MaxViT",
        smallest=224,
        minimum=224,
        fixed=True,
        size_keyword="input_size",
        notes="one size, set by input_size=H,W: multiples of 224",
    )


def _video() -> Iterator[Entry]:
    for name, family in (("r3d_18", "R3D"), ("mc3_18", "MC3"), ("r2plus1d_18", "R(2+1)D")):
        yield Entry(name, family, (3, 16, 112, 112), smallest=32, minimum=16, kind="video", frames=8)
    yield Entry(
        "s3d",
        "S3D",
        (3, 16, 224, 224),
        smallest=224,
        minimum=209,
        kind="video",
        frames=14,
        notes="at least 13 frames and 209 pixels",
    )
    for letter in "tsb":
        yield Entry(f"swin3d_{letter}", "Swin Transformer 3D", (3, 16, 224, 224), minimum=4, kind="video", frames=4)
    for name in names("mvit_v1_b mvit_v2_s"):
        yield Entry(
            name,
            "MViT",
            (3, 16, 224, 224),
            smallest=224,
            minimum=224,
            kind="video",
            frames=16,
            fixed=True,
            notes="one size",
        )


_NO_DOWNLOAD: Mapping[str, None] = {"weights_backbone": None}
"""torchvision would fetch the weights of the backbone where none are asked for."""


def _segmentation() -> Iterator[Entry]:
    for name, family in (
        ("fcn_resnet50", "FCN"),
        ("fcn_resnet101", "FCN"),
        ("deeplabv3_resnet50", "DeepLabV3"),
        ("deeplabv3_resnet101", "DeepLabV3"),
        ("deeplabv3_mobilenet_v3_large", "DeepLabV3"),
    ):
        yield Entry(
            name,
            family,
            (3, 520, 520),
            minimum=16,
            notes="aux_loss=true, as published, adds an auxiliary head",
            defaults=_NO_DOWNLOAD,
            pretrained={"aux_loss": True},
        )
    yield Entry(
        "lraspp_mobilenet_v3_large",
        "LR-ASPP",
        (3, 520, 520),
        minimum=16,
        defaults=_NO_DOWNLOAD,
    )


_IN_TRAINING = "targets: boxes, labels"
_FROZEN: Mapping[str, Value] = {FROZEN_NORM: 0.0}


def _two_stage_detection() -> Iterator[Entry]:
    few: dict[str, Value] = {
        "min_size": 64,
        "max_size": 96,
        "rpn_post_nms_top_n_train": 16,
        "rpn_post_nms_top_n_test": 8,
        "box_batch_size_per_image": 16,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 4,
    }
    common = Entry(
        "",
        "Faster R-CNN",
        (3, 800, 800),
        kind="list of images",
        notes=_IN_TRAINING,
        targets=("boxes", "labels"),
        defaults=_NO_DOWNLOAD,
        small=few,
    )
    yield replace(common, name="fasterrcnn_resnet50_fpn", pretrained=_FROZEN)
    yield replace(common, name="fasterrcnn_resnet50_fpn_v2")
    mobile = replace(common, pretrained={FROZEN_NORM: 1e-5})
    yield replace(mobile, name="fasterrcnn_mobilenet_v3_large_fpn")
    yield replace(mobile, name="fasterrcnn_mobilenet_v3_large_320_fpn", input_size=(3, 320, 320))
    masks = replace(common, family="Mask R-CNN", notes=f"{_IN_TRAINING}, masks", targets=(*common.targets, "masks"))
    yield replace(masks, name="maskrcnn_resnet50_fpn", pretrained=_FROZEN)
    yield replace(masks, name="maskrcnn_resnet50_fpn_v2")
    yield replace(
        common,
        name="keypointrcnn_resnet50_fpn",
        family="Keypoint R-CNN",
        notes=f"{_IN_TRAINING}, keypoints",
        targets=(*common.targets, "keypoints"),
        pretrained=_FROZEN,
        pretrained_by_name={"COCO_LEGACY": {FROZEN_NORM: 1e-5}},
    )


def _one_stage_detection() -> Iterator[Entry]:
    few: dict[str, Value] = {"score_thresh": 0.0, "topk_candidates": 8, "detections_per_img": 4}
    common = Entry(
        "",
        "RetinaNet",
        (3, 800, 800),
        kind="list of images",
        notes=_IN_TRAINING,
        targets=("boxes", "labels"),
        defaults=_NO_DOWNLOAD,
        small={"min_size": 64, "max_size": 96, **few},
    )
    yield replace(common, name="retinanet_resnet50_fpn", pretrained=_FROZEN)
    yield replace(common, name="retinanet_resnet50_fpn_v2")
    yield replace(common, name="fcos_resnet50_fpn", family="FCOS", pretrained={FROZEN_NORM: 1e-5})
    notes = _IN_TRAINING + "; resizes images to {0} x {0}"
    ssd = replace(common, family="SSD", small=few)
    yield replace(ssd, name="ssd300_vgg16", input_size=(3, 300, 300), smallest=300, notes=notes.format(300))
    yield replace(
        ssd,
        name="ssdlite320_mobilenet_v3_large",
        family="SSDlite",
        input_size=(3, 320, 320),
        smallest=320,
        notes=notes.format(320),
    )


CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _rows()}
