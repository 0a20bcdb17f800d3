"""The models that stand for libraries: from configurations alone, with random weights, small but built as they are.

Each is two or three layers deep and 64 channels wide or more, and takes small images or few tokens. Nothing is read
from a hub. Dropout is off, so that gradients can be compared in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model of a library.

    Attributes:
        library: the package that has to be installed.
        make: builds it, in float32 with initial weights.
        inputs: for a batch size and a generator, the inputs by position and by name.
        take: of what the model returns, what a plain wrapper returns; None where there is no wrapper to try.
        outputs: what may change in the outputs of the model as it is, as `surgery.slim` takes it.
        wrapped_outputs: the same of the wrapper.
        target: the MACs at 0.5 that are asked for, of those of the dense model.
        factor: by which the model is widened.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Inputs]
    take: Callable[[Any], Any] | None = None
    outputs: str | tuple[str, ...] | None = None
    wrapped_outputs: str | tuple[str, ...] | None = None
    target: float = 0.32
    factor: float = 2.0


class Wrapper(nn.Module):
    """A model of a library inside a module of the user's own, which returns a plain tensor."""

    def __init__(self, m: nn.Module, take: Callable[[Any], Any]) -> None:
        super().__init__()
        self.m, self.take = m, take

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.take(self.m(*args, **kwargs))


def images(size: int, channels: int = 3) -> Callable[[int, torch.Generator], Inputs]:
    """One batch of images."""
    return lambda batch, generator: ((torch.randn(batch, channels, size, size, generator=generator),), {})


def tokens(length: int = 12, vocabulary: int = 96) -> Callable[[int, torch.Generator], Inputs]:
    """One batch of token numbers."""
    return lambda batch, generator: ((_tokens(batch, length, vocabulary, generator),), {})


def masked_tokens(batch: int, generator: torch.Generator) -> Inputs:
    """Token numbers, and a mask that hides the last two of the first sequence."""
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[0, -2:] = 0
    return (_tokens(batch, 12, 96, generator),), {"attention_mask": mask}


def two_sequences(batch: int, generator: torch.Generator) -> Inputs:
    """What an encoder and what a decoder reads."""
    other = _tokens(batch, 7, 96, generator)
    return (_tokens(batch, 12, 96, generator),), {"decoder_input_ids": other}


def _tokens(batch: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def _logits(output: Any) -> Any:
    return output.logits


def _hidden(output: Any) -> Any:
    return output.last_hidden_state


_ENCODER = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 10}
_TEXT = {**_ENCODER, "vocab_size": 96, "max_position_embeddings": 40}
_DECODER = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 96,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DETR_BACKBONE = {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]}


def _transformers(model: str, config: str, /, **entries: Any) -> Callable[[], nn.Module]:
    """How to build a class of transformers from a configuration."""

    def make() -> nn.Module:
        library = import_module("transformers")
        if isinstance(entries.get("backbone_config"), Mapping):
            backbone = library.ResNetConfig(**entries["backbone_config"], layer_type="basic", out_features=["stage4"])
            given = {**entries, "backbone_config": backbone}
        else:
            given = entries
        module: nn.Module = getattr(library, model)(getattr(library, config)(**given))
        for part in module.modules():
            if getattr(getattr(part, "config", None), "use_cache", None):
                part.config.use_cache = False  # a cache is no part of what a graph computes
        return module.float()

    return make


def _vision(
    name: str, model: str, config: str, size: int = 32, take: Any = _logits, outputs: Any = None, **entries: Any
) -> Case:
    make, free = _transformers(model, config, **entries), "free" if take is _hidden else None
    return Case("transformers", name, make, images(size), take, outputs or free, free)


def _language(name: str, model: str, config: str, inputs: Any = None, take: Any = _hidden, **entries: Any) -> Case:
    make = _transformers(model, config, **entries)
    return Case("transformers", name, make, inputs or tokens(), take, "free", "free", target=0.40)


def _whisper() -> nn.Module:
    make = _transformers(
        "WhisperModel", "WhisperConfig", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, vocab_size=96,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    encoder = make().encoder
    assert isinstance(encoder, nn.Module)
    return encoder


def _of_features(*shape: int) -> Callable[[int, torch.Generator], Inputs]:
    return lambda batch, generator: ((torch.randn(batch, *shape, generator=generator),), {})


TRANSFORMERS = [
    _vision("ViT", "ViTForImageClassification", "ViTConfig", **_ENCODER, **_IMAGE),
    _vision("DeiT", "DeiTForImageClassification", "DeiTConfig", **_ENCODER, **_IMAGE),
    _vision("BEiT", "BeitForImageClassification", "BeitConfig", **_ENCODER, **_IMAGE,
            use_relative_position_bias=True, drop_path_rate=0.0),
    _vision("Swin", "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, num_labels=10,
            embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0),
    _vision("Swin v2", "Swinv2ForImageClassification", "Swinv2Config", image_size=32, patch_size=2, num_labels=10,
            embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0),
    _vision("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", num_labels=10,
            hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 2, 1], size=64),
    _vision("ConvNeXt v2", "ConvNextV2ForImageClassification", "ConvNextV2Config", num_labels=10,
            hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 2, 1], size=64),
    _vision("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", num_labels=10, size=64,
            depths=[1, 1, 1, 1], hidden_sizes=[32, 48, 64, 96], num_attention_heads=[2, 3, 4, 6],
            decoder_hidden_size=64, drop_path_rate=0.0, classifier_dropout_prob=0.0, hidden_dropout_prob=0.0),
    _vision("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", **_ENCODER, **_IMAGE, mlp_ratio=2),
    _vision("DINOv2, gated", "Dinov2ForImageClassification", "Dinov2Config", **_ENCODER, **_IMAGE, mlp_ratio=2,
            use_swiglu_ffn=True),
    _vision("CLIP vision", "CLIPVisionModel", "CLIPVisionConfig", take=_hidden, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8),
    _vision("SigLIP vision", "SiglipVisionModel", "SiglipVisionConfig", take=_hidden, hidden_size=64,
            num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8),
    _vision("YOLOS", "YolosForObjectDetection", "YolosConfig", **_ENCODER, image_size=[32, 32], patch_size=8,
            num_detection_tokens=5, num_labels=10, outputs="last_hidden_state"),
    _vision("DETR", "DetrForObjectDetection", "DetrConfig", size=64, d_model=64, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
            num_queries=6, num_labels=10, dropout=0.0, use_timm_backbone=False, use_pretrained_backbone=False,
            backbone=None, backbone_config=_DETR_BACKBONE, outputs=("last_hidden_state", "encoder_last_hidden_state")),
    _vision("ResNet", "ResNetForImageClassification", "ResNetConfig", size=64, num_labels=10, embedding_size=16,
            layer_type="basic", hidden_sizes=[64, 96, 128, 160], depths=[2, 2, 2, 1]),
    _vision("PVT v2", "PvtV2ForImageClassification", "PvtV2Config", size=64, num_labels=10, drop_path_rate=0.0,
            hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 6], image_size=64,
            mlp_ratios=[4, 4, 4, 4]),
    _vision("MobileViT", "MobileViTForImageClassification", "MobileViTConfig", size=64, num_labels=10,
            image_size=64, hidden_sizes=[48, 64, 80], neck_hidden_sizes=[16, 32, 48, 64, 80, 96, 128],
            hidden_dropout_prob=0.0, classifier_dropout_prob=0.0),
    _vision("DPT", "DPTForDepthEstimation", "DPTConfig", **{**_ENCODER, "num_hidden_layers": 4}, image_size=32,
            patch_size=8, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[32, 48, 64, 64], fusion_hidden_size=64,
            take=lambda output: output.predicted_depth),
    _language("BERT", "BertModel", "BertConfig", masked_tokens, **_TEXT),
    _language("RoBERTa", "RobertaModel", "RobertaConfig", masked_tokens, **_TEXT),
    _language("DistilBERT", "DistilBertModel", "DistilBertConfig", masked_tokens, dim=64, n_layers=2, n_heads=4,
              hidden_dim=128, vocab_size=96, max_position_embeddings=40, dropout=0.0, attention_dropout=0.0),
    _language("ELECTRA", "ElectraModel", "ElectraConfig", masked_tokens, **_TEXT, embedding_size=32),
    _language("GPT-2", "GPT2Model", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=40,
              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    _language("GPT-NeoX", "GPTNeoXModel", "GPTNeoXConfig", **_DECODER),
    _language("Llama, grouped queries", "LlamaModel", "LlamaConfig", **_DECODER, num_key_value_heads=2),
    _language("Mistral", "MistralModel", "MistralConfig", **_DECODER, num_key_value_heads=2, head_dim=16),
    _language("Qwen2", "Qwen2Model", "Qwen2Config", **_DECODER, num_key_value_heads=2),
    _language("Gemma 2", "Gemma2Model", "Gemma2Config", **_DECODER, num_key_value_heads=2, head_dim=16),
    _language("T5", "T5Model", "T5Config", two_sequences, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
              vocab_size=96, dropout_rate=0.0),
    _language("T5, gated", "T5Model", "T5Config", two_sequences, d_model=64, d_kv=16, d_ff=128, num_layers=2,
              num_heads=4, vocab_size=96, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
    _language("BART", "BartModel", "BartConfig", two_sequences, d_model=64, encoder_layers=2, decoder_layers=2,
              encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
              vocab_size=96, max_position_embeddings=40, dropout=0.0),
    _language("CLIP text", "CLIPTextModel", "CLIPTextConfig", hidden_size=64, num_hidden_layers=2,
              num_attention_heads=4, intermediate_size=128, vocab_size=96, max_position_embeddings=40,
              bos_token_id=1, eos_token_id=2, pad_token_id=0),
    Case("transformers", "Whisper encoder", _whisper, _of_features(16, 40), _hidden, "free", "free", target=0.40),
]  # fmt: skip


def _smp(name: str, encoder: str = "resnet18", size: int = 64, **options: Any) -> Case:
    def make() -> nn.Module:
        library = import_module("segmentation_models_pytorch")
        module: nn.Module = getattr(library, name)(encoder, encoder_weights=None, classes=5, **options)
        return module

    title = ", ".join(
        [name, *([] if encoder == "resnet18" else [encoder]), *(v for v in options.values() if isinstance(v, str))]
    )
    return Case("segmentation_models_pytorch", title, make, images(size))


SEGMENTATION = [
    *(_smp(name, size=128 if name == "PAN" else 64)
      for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PAN", "DeepLabV3", "DeepLabV3Plus",
                              "PSPNet", "Segformer", "UPerNet")),
    _smp("Unet", "resnet18", decoder_attention_type="scse"),
    _smp("Unet", "mobilenet_v2"),
    _smp("FPN", "mit_b0"),
    _smp("DeepLabV3Plus", "efficientnet-b0"),
    _smp("DPT", "tu-vit_tiny_patch16_224", 224, decoder_intermediate_channels=(32, 48, 64, 64),
         decoder_fusion_channels=64),
]  # fmt: skip


def _diffusers(model: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module: nn.Module = getattr(import_module("diffusers"), model)(**options)
        return module

    return make


def _noised(size: int, channels: int, **others: Callable[[int, torch.Generator], Tensor]) -> Any:
    """Noised images, a time step for each, and what else the model reads, by name."""

    def make(batch: int, generator: torch.Generator) -> Inputs:
        sample = torch.randn(batch, channels, size, size, generator=generator)
        named = {name: other(batch, generator) for name, other in others.items()}
        return (sample, torch.randint(1, 1000, (batch,), generator=generator)), named

    return make


def _sample(output: Any) -> Any:
    return output.sample


_UNET = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}

DIFFUSERS = [
    Case("diffusers", "UNet2DModel",
         _diffusers("UNet2DModel", **_UNET, in_channels=3, out_channels=3, attention_head_dim=8,
                    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
         _noised(16, 3), _sample),
    Case("diffusers", "UNet2DConditionModel",
         _diffusers("UNet2DConditionModel", **_UNET, in_channels=4, out_channels=4, cross_attention_dim=48,
                    attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
         _noised(16, 4, encoder_hidden_states=lambda b, g: torch.randn(b, 7, 48, generator=g)), _sample),
    Case("diffusers", "AutoencoderKL",
         _diffusers("AutoencoderKL", in_channels=3, out_channels=3, block_out_channels=(32, 64), latent_channels=4,
                    layers_per_block=1, norm_num_groups=8, sample_size=32,
                    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
         images(32), _sample),
    Case("diffusers", "DiT",
         _diffusers("DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=16, in_channels=4,
                    out_channels=8, num_layers=2, sample_size=8, patch_size=2, norm_num_groups=8, dropout=0.0),
         _noised(8, 4, class_labels=lambda b, g: torch.randint(0, 1000, (b,), generator=g)), _sample),
]  # fmt: skip

CASES = [*TRANSFORMERS, *SEGMENTATION, *DIFFUSERS]
