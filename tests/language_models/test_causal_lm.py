import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.causal_lm import CausalLM
from lightning_accel.language_models.lora import LoRA, merge_lora_
from lightning_accel.language_models.token_data import TokenSequences
from lightning_accel.language_models.token_kl import TokenKL
from lightning_accel.quantization.weight_only.layers import integers_of

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from tests.support.language import llama, tokens, trainer  # after the skip


def loader(count=16, length=32):
    return DataLoader(TokenSequences(input_ids=tokens(count, length)), 4)


def qat(start=1):
    return la.QuantizationAwareTraining(target="int4", group=32, exclude=["lm_head"], start=start)


def logits(module):
    with torch.no_grad():
        return module.eval()(tokens(2))


def test_it_trains_and_scores(tmp_path):
    module = CausalLM(llama(), lr=1e-2)
    before = trainer(tmp_path).validate(module, loader(), verbose=False)[0]
    assert before["val_perplexity"] == pytest.approx(torch.tensor(before["val_loss"]).exp().item(), rel=1e-4)
    trainer(tmp_path, 6).fit(module, loader())
    after = trainer(tmp_path).test(module, loader(), verbose=False)[0]
    assert after["test_perplexity"] < 0.6 * before["val_perplexity"]


def test_int4_lora_in_a_fit_merges_to_what_was_trained(tmp_path):
    module = CausalLM(llama(), lora=LoRA(4), lr=1e-2)
    trainer(tmp_path, 3, qat()).fit(module, loader())
    trained = logits(module)
    assert len(integers_of(module)) == 14
    merge_lora_(module)
    assert torch.equal(logits(module), trained)


def test_an_own_module_around_a_model_is_quantized_too(tmp_path):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = llama().train()

        def training_step(self, batch, batch_idx):
            return self.net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-2)

    module = Own()
    trainer(tmp_path, 1, qat(0)).fit(module, loader())
    assert len(integers_of(module)) == 14
    assert "net.lm_head" not in integers_of(module)


@pytest.mark.parametrize("checkpoint", ["full", "adapter"])
@pytest.mark.parametrize("mode", ["merged", "apart"])
def test_a_checkpoint_loads_as_what_was_trained(tmp_path, checkpoint, mode):
    folder = tmp_path / "base"
    llama().save_pretrained(folder)

    torch.manual_seed(0)
    module = CausalLM(str(folder), LoRA(2, mode=mode), lr=1e-2, checkpoint=checkpoint)
    fitting = trainer(tmp_path, 4, qat())
    fitting.fit(module, loader())
    whole, path = logits(module), tmp_path / "end.ckpt"
    fitting.save_checkpoint(path)
    again = la.load_from_checkpoint(CausalLM, path)
    assert torch.equal(logits(again), whole)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in saved) == (checkpoint == "adapter")


def test_a_run_goes_on_from_a_checkpoint_of_adapters(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(ckpt=None):
        torch.manual_seed(0)
        module = CausalLM(llama(), LoRA(2), lr=1e-2, checkpoint="adapter")
        saving = ModelCheckpoint(tmp_path / "a", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, 3, qat(), saving, enable_checkpointing=True).fit(module, loader(), ckpt_path=ckpt)
        return logits(module)

    whole = fit()
    assert torch.equal(fit(tmp_path / "a" / "epoch=1.ckpt"), whole)
    module = CausalLM(llama(seed=1), LoRA(2), checkpoint="adapter")
    with pytest.raises(
        InvalidArgumentError, match=r"must hold adapters of this base \(\w{12}\), but got one with adapters of another"
    ):
        trainer(tmp_path, 4, qat()).fit(module, loader(), ckpt_path=tmp_path / "a" / "epoch=1.ckpt")


def test_distillation_lowers_the_divergence(tmp_path):
    teacher = llama(1)
    module = CausalLM(llama(0), distill=TokenKL(teacher, alpha=1.0, top_k=16, cache=tmp_path / "cache"), lr=1e-2)
    before = TokenKL(teacher)
    before.setup(module.model)
    first = before(module.model, tokens(), None, tokens().roll(-1, 1))[0].item()
    trainer(tmp_path, 8).fit(module, loader())
    assert before(module.model, tokens(), None, tokens().roll(-1, 1))[0].item() < 0.7 * first
    assert module.distill.runs == 16  # each sequence once, in eight epochs
    assert not any("teacher" in key or "distill" in key for key in module.state_dict())


def test_padding_and_labels_of_a_batch_are_respected():
    module = CausalLM(llama())
    ids = tokens(2)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    with torch.no_grad():
        labels = ids.masked_fill(mask == 0, -100)
        expected = module.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    module.log = lambda *args, **kwargs: None
    found = module.training_step({"input_ids": ids, "attention_mask": mask}, 0)
    torch.testing.assert_close(found.detach(), expected)


def test_models_with_conv1d_and_tied_embeddings_work(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    module = CausalLM(model, LoRA(2), lr=1e-2)
    trainer(tmp_path, 2, la.QuantizationAwareTraining(target="int4", start=1)).fit(module, loader())
    trained = logits(module)
    assert len(integers_of(module)) == 8  # two blocks of four; the output layer is the embedding
    merge_lora_(module)
    assert torch.equal(logits(module), trained)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="must be a causal language model that transformers knows, but got"):
        CausalLM(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mystery", "architectures": ["MysteryForCausalLM"]}')
    with pytest.raises(
        InvalidArgumentError, match=r"must be a causal language model that transformers knows, but got .*mystery"
    ):
        CausalLM(str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="or its path, but got a Linear"):
        CausalLM(nn.Linear(1, 1))
    with pytest.raises(InvalidArgumentError, match="`checkpoint` must be one of"):
        CausalLM(llama(), checkpoint="all")
    with pytest.raises(InvalidArgumentError, match="`lora` must be given with"):
        CausalLM(llama(), checkpoint="adapter")
    with pytest.raises(InvalidArgumentError, match="`lr` and `warmup` must be"):
        CausalLM(llama(), lr=0.0)
    module = CausalLM(llama())
    with pytest.raises(InvalidArgumentError, match="must have at most 128 tokens, the model's context, but got 160"):
        trainer(tmp_path).fit(module, loader(4, 160))
    with pytest.raises(InvalidArgumentError, match="must be below the model's vocabulary of 320, but got"):
        trainer(tmp_path).validate(module, DataLoader(TokenSequences(input_ids=tokens(4, 8, 999)), 4))
    with pytest.raises(InvalidArgumentError, match=r"must be token ids \(N, T\)"):
        trainer(tmp_path).fit(module, DataLoader(torch.zeros(4, 8), 4))
