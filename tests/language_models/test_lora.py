import copy
import json

import pytest
import torch
from torch import nn

from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.language_models.lora import (
    LoRA,
    adapter_names,
    add_lora_,
    load_adapter_,
    merge_lora_,
    save_adapter,
    set_adapters_,
)
from lightning_accel.quantization.weight_only.layers import integers_of
from lightning_accel.quantization.weight_only.ptq import quantize_weights_

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from tests.support.language import llama, tokens  # after the skip


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2)).logits


def trained(model, steps=3):
    """A few steps, so that B isn't zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(steps):
        ids = tokens(4, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_merged_and_quantized_equals_trained():
    model = llama()
    names = add_lora_(model, LoRA(4))
    assert len(names) == 14
    assert quantize_weights_bare(model) == names
    before = logits(model)
    after = logits(trained(model))
    assert (after - before).abs().max() > 0.01
    stored = integers_of(model)
    merge_lora_(model)
    assert adapter_names(model) == []
    assert torch.equal(logits(model), after)
    plain = llama()  # the network that ships: no adapters, no rounding in it
    with torch.no_grad():
        for name, (integers, scales, grid) in stored.items():
            plain.get_submodule(name).weight.copy_(grid.dequantize(integers, scales))
    assert torch.equal(logits(plain), after)
    again = integers_of(model)
    assert all(torch.equal(stored[name][0], again[name][0]) for name in stored)


def quantize_weights_bare(model):
    """Round adapted layers, as the callback does during training."""
    from lightning_accel.core import structure
    from lightning_accel.quantization.weight_only.group_grid import GroupGrid
    from lightning_accel.quantization.weight_only.layers import quantize_change, select_layers

    names, _ = select_layers(model, 32, (), ("lm_head",))
    structure.apply(model, quantize_change(names, GroupGrid(4, 32), "test"))
    return names


def test_the_usual_order_is_not_exact():
    """Adapters over a rounded base, merged and rounded again: the difference that training inside the grid avoids."""
    model = llama()
    quantize_weights_(model, exclude="lm_head")
    add_lora_(model, LoRA(4, mode="apart"))
    after = logits(trained(model))
    merge_lora_(model)
    assert (logits(model) - after).abs().max() > 1e-3


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft 0.21 on transformers 5.23
def test_peft_computes_the_same_with_the_adapter_that_was_saved(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `lm` is not installed")
    model = llama()
    base = copy.deepcopy(model)
    add_lora_(model, LoRA(4, ["q_proj", "v_proj"], mode="apart"))
    after = logits(trained(model))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(logits(theirs), after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base), after, atol=1e-3)


def test_several_adapters_share_one_quantized_base(tmp_path):
    model = llama()
    quantize_weights_(model, exclude="lm_head")
    base = logits(model)
    outputs = {}
    for i, name in enumerate(("one", "two")):
        add_lora_(model, LoRA(2, mode="apart"), name)
        set_adapters_(model, name)
        outputs[name] = logits(trained(model, 2 + i))
        save_adapter(model, tmp_path / name, name)
    assert adapter_names(model) == ["one", "two"]
    set_adapters_(model, [])
    assert torch.equal(logits(model), base)
    set_adapters_(model, "one")
    assert torch.equal(logits(model), outputs["one"])
    assert not torch.allclose(outputs["one"], outputs["two"])
    fresh = llama()
    quantize_weights_(fresh, exclude="lm_head")
    load_adapter_(fresh, tmp_path / "two", "again")
    assert torch.equal(logits(fresh), outputs["two"])


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = llama()
    add_lora_(model, LoRA(2))
    save_adapter(model, tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"must be an adapter of this base \(\w{12}\), but got .* trained on another one"
    ):
        load_adapter_(llama(seed=1), tmp_path)
    with pytest.raises(MissingFileError, match=r"must be a folder with adapter_model\.safetensors"):
        load_adapter_(llama(), tmp_path / "nothing")
    (tmp_path / "base.json").unlink()  # one that peft wrote
    with pytest.raises(InvalidArgumentError, match=r"for `model.layers.1\S+`, which it lacks"):
        load_adapter_(llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"but got \(2, 128\) for .*, which has \(2, 32\)"):
        load_adapter_(llama(hidden_size=32), tmp_path)
    layers = load_adapter_(llama(), tmp_path)
    assert len(layers) == 14


def test_the_config_is_that_of_peft(tmp_path):
    model = llama()
    add_lora_(model, LoRA(4, "q_proj", alpha=2.0))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 2.0, ["q_proj"])


def test_only_adapters_are_trained():
    model = llama()
    add_lora_(model, LoRA(2, "q_proj"))
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_wrong_settings_are_refused():
    with pytest.raises(InvalidArgumentError, match="`r` must be an integer of at least 1, but got 0"):
        LoRA(0)
    with pytest.raises(InvalidArgumentError, match="`mode` must be one of"):
        LoRA(mode="both")
    with pytest.raises(InvalidArgumentError, match="`alpha` must be above 0"):
        LoRA(alpha=0.0)
    with pytest.raises(InvalidArgumentError, match="`targets` must name layers"):
        LoRA(targets=[])
    with pytest.raises(InvalidArgumentError, match="`targets` must match the name of a linear layer, but got 'query'"):
        add_lora_(llama(), LoRA(targets="query"))
    with pytest.raises(
        InvalidArgumentError, match=r"but got `lm_head`, whose weight is also the embedding `model\.embed_tokens`"
    ):
        add_lora_(llama(tied=True), LoRA(targets="lm_head"))
    with pytest.raises(InvalidArgumentError, match="`targets` must match linear layers, but got 'all-linear'"):
        add_lora_(nn.Conv2d(1, 1, 1), LoRA())
    model = llama()
    add_lora_(model, LoRA(2))
    with pytest.raises(InvalidArgumentError, match="`name` must be new, but got 'default'"):
        add_lora_(model, LoRA(2))
    with pytest.raises(InvalidArgumentError, match="`name` must be an identifier"):
        add_lora_(model, LoRA(2), "a.b")
    with pytest.raises(InvalidArgumentError, match=r"`names` must be some of \['default'\], but got 'other'"):
        set_adapters_(model, "other")
    with pytest.raises(InvalidArgumentError, match=r"`name` must be one of \['default'\], but got 'other'"):
        merge_lora_(model, "other")
