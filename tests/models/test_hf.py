"""Configurations of transformers as sources."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import surgery
from surgery import models
from surgery.cli import main

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
VIT = "hf:vit?hidden_size=24&image_size=16&intermediate_size=48&num_attention_heads=4&num_hidden_layers=1&patch_size=8"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_a_library_that_is_not_installed_is_one_line_that_says_what_to_do(capsys):
    with pytest.raises(surgery.UsageError, match=r"^'hf:' sources need transformers, .*: pip install 'surgery\[hf\]'$"):
        models.build("hf:vit")
    assert main(["inspect", "hf:vit"]) == 2
    assert "pip install 'surgery[hf]'" in capsys.readouterr().err


def test_an_unknown_library_is_refused_with_those_that_are_known():
    with pytest.raises(surgery.UsageError, match="unknown library 'hff'; did you mean 'hf'"):
        models.list_models(library="hff")


@needs_transformers
def test_a_source_has_one_form_wherever_the_configuration_was_read_from(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    entries = {
        "model_type": "vit",
        "image_size": 16,
        "patch_size": 8,
        "transformers_version": "4.0",
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps({**entries, "architectures": ["ViTForImageClassification"]}))
    wanted = "hf:vit?class=ViTForImageClassification&image_size=16&patch_size=8"
    assert models.canonical(f"hf:{folder}") == wanted
    assert models.canonical(f"hf:{folder / 'config.json'}") == wanted
    assert models.canonical(wanted) == wanted
    nested = models.canonical('hf:{"model_type":"clip_vision_model","old":{"a":"b?c:d"}}', num_classes=3)
    assert models.canonical(nested) == nested
    assert models.short(nested) == "clip_vision_model"


@needs_transformers
def test_a_model_is_built_as_configured_and_runs_on_its_example_inputs():
    module = models.build(VIT, num_classes=7, seed=0)
    assert type(module).__name__ == "ViTForImageClassification"
    assert module(models.example_inputs(VIT, batch_size=3)).logits.shape == (3, 7)
    text = "hf:t5?d_ff=16&d_kv=4&d_model=8&num_heads=2&num_layers=1&vocab_size=50&class=T5ForConditionalGeneration"
    tokens = models.example_inputs(text)
    assert [None if given is None else tuple(given.shape) for given in tokens] == [(2, 32), None, (2, 8)]
    assert models.build(text)(*tokens).logits.shape == (2, 8, 50)


@needs_transformers
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:vitt", "unknown model type of transformers 'vitt'; did you mean 'vit'"),
        ("hf:vit?hiden_size=3", "unknown entry of a configuration of 'vit' 'hiden_size'; did you mean 'hidden_size'"),
        ("hf:no/such/folder", "there is no configuration at no/such/folder: 'hf:' takes files, and fetches nothing"),
        ("hf:vit?class=Vit", "transformers has no model class 'Vit'"),
        ("hf:vit?weights=DEFAULT", "configurations, without weights: load them into the model that is built"),
        ("hf:{", "hf: is no JSON"),
        ("hf:{}", "hf: is no configuration of transformers: it has no model_type"),
        ("hf:vit?hidden_size=wide", "'hf:vit'"),
    ],
)
def test_what_is_no_configuration_is_refused_with_the_reason(source, message):
    with pytest.raises(surgery.UsageError) as refused:
        models.build(source)
    assert message in str(refused.value)


@needs_transformers
def test_the_command_line_opens_a_configuration_and_lists_model_types(capsys, tmp_path):
    assert main(["models", "vit*", "--library", "hf", "--json"]) == 0
    assert "vit" in [one["name"] for one in json.loads(capsys.readouterr().out)["models"]]
    assert main(["slim", VIT, "--rate", "0.5", "--out", str(tmp_path / "slim")]) == 0
    slim = surgery.load(tmp_path / "slim")
    assert surgery.recipe(slim).source == VIT
    assert type(slim(torch.rand(2, 3, 16, 16))).__name__ == "BaseModelOutputWithPooling"


@needs_transformers
def test_text_is_generated_without_a_cache():
    source = "hf:gpt2?n_embd=16&n_head=2&n_layer=1&n_positions=32&vocab_size=40&bos_token_id=0&eos_token_id=1"
    model = models.build(f"{source}&class=GPT2LMHeadModel", seed=0).eval()
    words = torch.randint(2, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    places = torch.arange(5).expand(2, -1)
    given = {"input_ids": words, "position_ids": places, "logits_to_keep": 1, "use_cache": False, "return_dict": True}
    traced = surgery.trace(model, (), kwargs=given)
    settings = {"attention_mask": torch.ones_like(words), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(words, **settings)
    assert torch.equal(traced.generate(words, **settings), expected)  # its configuration says that it has no cache
    with pytest.raises(surgery.UsageError, match="the value is a DynamicCache here and was None"):
        traced.generate(words, use_cache=True, **settings)
    assert surgery.slim(traced, 0.5).generate(words, **settings).shape == expected.shape
