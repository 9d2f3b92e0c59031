"""Pruned language models: what is left computes as if the rest had never added anything, and is an ordinary model of transformers."""

import copy

import pytest
import torch
import transformers

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.pruning import prune_
from lightning_accel.quantization.weight_only.layers import rounded_layers

SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 32, **settings})
    return transformers.LlamaForCausalLM(config).eval()


def qwen(kind):
    torch.manual_seed(0)
    config = {2: transformers.Qwen2Config, 3: transformers.Qwen3Config}[kind]
    model = {2: transformers.Qwen2ForCausalLM, 3: transformers.Qwen3ForCausalLM}[kind]
    return model(config(**SIZE, num_key_value_heads=2, head_dim=8, max_position_embeddings=32)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(attention_bias=True, mlp_bias=True), lambda: qwen(2), lambda: qwen(3)]
)
def test_a_model_without_use_for_some_parts_is_the_same_without_them(make, tmp_path):
    model = make()
    with torch.no_grad():
        layer = model.model.layers[2]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # the layer adds nothing
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
        for place, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight[:, 16 * (place % 2) : 16 * (place % 2) + 16] = (
                0  # one group of heads adds nothing
            )
            layer.mlp.down_proj.weight[:, place::2] = 0  # nor do these channels
    before = logits(model)
    kept = prune_(
        model, [IDS[:2], {"input_ids": IDS[2:]}], num_hidden_layers=3, num_key_value_heads=1, intermediate_size=40
    )
    assert kept["layers"] == [0, 1, 3]
    assert kept["heads"] == {0: [1], 1: [0], 3: [0]}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 2, 1)
    assert (config.intermediate_size, config.head_dim) == (40, 8)
    model.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again), logits(model))
    tokens = [m.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, again)]
    assert torch.equal(*tokens)  # its cache knows the layers that are left


def test_the_layer_that_changes_least_goes_first():
    model = llama()
    with torch.no_grad():
        for place, scale in enumerate((3.0, 0.1, 1.0, 0.01)):
            for part in (model.model.layers[place].self_attn.o_proj, model.model.layers[place].mlp.down_proj):
                part.weight.mul_(10 * scale)
    order = [prune_(copy.deepcopy(model), [IDS], num_hidden_layers=count)["layers"] for count in (3, 2)]
    assert order == [[0, 1, 2], [0, 2]]


def test_it_trains_distilled_from_the_original_and_on_the_grid(trainer):
    original, model = llama(), llama()
    prune_(model, [IDS], num_hidden_layers=2, num_key_value_heads=1, intermediate_size=32)
    lm = la.CausalLM(model, distill=la.TokenKL(original), lr=1e-2)
    qat = la.QuantizationAwareTraining(target="int4", group=16, exclude=["lm_head"], start=1)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in IDS], 2)
    before = logits(lm.model)
    trainer(qat, max_epochs=2).fit(lm, loader)
    assert torch.isfinite(logits(lm.model)).all()
    assert not torch.equal(logits(lm.model), before)
    assert len(rounded_layers(lm)) == 14


def test_what_cannot_be_pruned_is_told():
    for arguments, message in (
        ({}, "One of the arguments `num_hidden_layers`, `num_key_value_heads`, `intermediate_size` must be given"),
        ({"num_hidden_layers": 5}, "Argument `num_hidden_layers` must be from 1 to 4, the model's, but got 5"),
        ({"num_key_value_heads": 0}, "Argument `num_key_value_heads` must be from 1 to 2"),
        ({"intermediate_size": 64}, "Arguments must leave something to remove"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            prune_(llama(), [IDS], **arguments)
    with pytest.raises(InvalidArgumentError, match="Argument `batches` must hold calibration data, but got none"):
        prune_(llama(), [], num_hidden_layers=2)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(
        InvalidArgumentError, match=r"must have layers in `model\.layers` as a Llama, but got a GPT2LMHeadModel"
    ):
        prune_(gpt2, [IDS], num_hidden_layers=1)
    model = llama()
    la.quantization.quantize_weights_(model, "int4", group=16, exclude="lm_head")
    with pytest.raises(InvalidArgumentError, match="quantized or adapted already: prune first"):
        prune_(model, [IDS], num_hidden_layers=2)
