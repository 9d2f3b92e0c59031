"""A tiny Llama with random weights, and a tokenizer trained on Python's documentation."""

import re

import lightning as L
import torch


def text(characters=60_000):
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:characters]


def tokenizer(vocabulary=320):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def llama(seed=0, vocabulary=320, tied=False, **kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    config = LlamaConfig(
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **{**settings, **kwargs},
    )
    return LlamaForCausalLM(config).eval()


def tokens(count=16, length=32, vocabulary=320, seed=0):
    return torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def trainer(tmp_path, epochs=1, *callbacks, **kwargs):
    settings = {"enable_checkpointing": False, "max_epochs": epochs}
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**settings, **kwargs},
    )


def one_line(error):
    return not re.search(r"\n", str(error.value))
