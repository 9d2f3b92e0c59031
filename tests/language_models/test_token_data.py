import pytest
import torch

from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.language_models.token_data import TokenDataModule, chat_tokens, load_tokenizer, pack_tokens

pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from tests.support.language import text, tokenizer  # after the skip


def test_packing_keeps_every_token_in_order():
    tok, texts = tokenizer(), ["one two", "three", "four five six seven"]
    packed = pack_tokens(texts, tok, 4)
    stream = [i for t in texts for i in [*tok(t)["input_ids"], 1]]
    assert packed.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert packed.shape[1] == 4


def test_the_end_of_the_text_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(text(4000))
    data = TokenDataModule(str(tmp_path / "a.txt"), tokenizer(), length=16, batch_size=4, held_out=0.25)
    data.setup("fit")
    joined = tokenizer().decode(data.held.columns["input_ids"].flatten())
    assert text(4000)[3000:].startswith(joined[:200])
    (batch, *_) = data.train_dataloader()
    assert batch["input_ids"].shape == (4, 16)
    assert next(iter(data.val_dataloader()))["input_ids"].shape[1] == 16
    again = TokenDataModule(texts=[text(4000)], tokenizer=tokenizer(), length=16, held_out=0.25)
    again.setup("fit")
    assert torch.equal(again.train.columns["input_ids"], data.train.columns["input_ids"])


def test_only_the_assistants_tokens_of_a_chat_are_scored():
    tok = tokenizer()
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    columns = chat_tokens([turns, turns[:1]], tok, 40)
    scored = columns["labels"][0][columns["labels"][0] != -100]
    assert tok.decode(scored) == "assistant: This.\n"
    assert (columns["labels"][1] == -100).all()
    length = int(columns["attention_mask"][0].sum())
    assert tok.decode(columns["input_ids"][0][:length]) == tok.apply_chat_template(turns, tokenize=False)


def test_wrong_data_is_refused(tmp_path):
    tok = tokenizer()
    with pytest.raises(InvalidArgumentError, match=r"`texts` must have at least `length` \(512\) tokens, but got 4"):
        pack_tokens(["of the"], tok, 512)
    with pytest.raises(InvalidArgumentError, match="`length` must be at least 2"):
        pack_tokens(["a"], tok, 1)
    with pytest.raises(InvalidArgumentError, match="Exactly one of the arguments `files` and `texts`"):
        TokenDataModule()
    with pytest.raises(MissingFileError, match=r"`files` must be text files, but got 'none\.txt'"):
        TokenDataModule("none.txt")
    with pytest.raises(InvalidArgumentError, match="`held_out` must be between 0 and 1"):
        TokenDataModule(texts=["a"], held_out=1.0)
    with pytest.raises(InvalidArgumentError, match="`tokenizer` must be a folder with a tokenizer, but got"):
        load_tokenizer(str(tmp_path))
    tok.chat_template = None
    with pytest.raises(InvalidArgumentError, match="`tokenizer` must have a `chat_template`"):
        chat_tokens([], tok, 8)
    tok.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        InvalidArgumentError, match="a chat template that only appends, but got one that changes turn 1"
    ):
        chat_tokens([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], tok, 8)
