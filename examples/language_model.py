"""A small language model from nothing to four engines: train, distill into int4, ship, generate from the bundle.

    python -m examples.language_model [--quick]

The text is Python's documentation, which every installation contains; the extra `lm-engines` installs everything else.
"""

from pathlib import Path
from typing import Any

import lightning as L

import lightning_accel as la
from examples.options import is_quick
from lightning_accel.core.optional import require

VOCABULARY, LENGTH = 1024, 128
ENGINES = ["transformers", "onnxruntime-genai", "llama.cpp", "openvino-genai"]


def documentation() -> str:
    """Python's documentation of its keywords and topics, 0.7 million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def byte_pair_tokenizer(text: str, vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer trained on a text, with a chat template."""
    inner = require("tokenizers", "lm", "This example")
    transformers = require("transformers", "lm", "This example")
    levels = inner.pre_tokenizers.ByteLevel
    tokenizer = inner.Tokenizer(inner.models.BPE())
    tokenizer.pre_tokenizer = levels(add_prefix_space=False)
    tokenizer.decoder = inner.decoders.ByteLevel()
    trainer = inner.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=levels.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def small_llama() -> Any:
    """A Llama of 2.9 million parameters: 4 layers of width 256, 4 heads of queries and 2 of keys."""
    transformers = require("transformers", "lm", "This example")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


class Documentation(la.language_models.TokenDataModule):
    """Python's documentation with the tokenizer that was trained on it, for ``configs/lm.yaml``.

    Args:
        length: tokens per sequence.
        batch_size: sequences per batch.
    """

    def __init__(self, length: int = LENGTH, batch_size: int = 12) -> None:
        text = documentation()
        super().__init__(texts=[text], tokenizer=byte_pair_tokenizer(text), length=length, batch_size=batch_size)


def trainer(steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A quiet Trainer."""
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
    )


def main() -> None:
    """Train, distill into int4, ship, and generate."""
    quick = is_quick(__doc__)
    L.seed_everything(0, verbose=False)
    text = documentation()
    tokenizer = byte_pair_tokenizer(text)
    data = la.language_models.TokenDataModule(
        texts=[text[:60_000] if quick else text], tokenizer=tokenizer, length=LENGTH, batch_size=12
    )
    teacher = la.CausalLM(small_llama(), lr=3e-3)
    trainer(4 if quick else 400).fit(teacher, data)
    folder = Path("artifacts/language_model_teacher")
    teacher.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # The student is the teacher's copy; it learns to give the same distributions with int4 weights.
    student = la.CausalLM(
        str(folder),
        lr=3e-4,
        distill=la.TokenKL(str(folder), alpha=1.0, top_k=32, cache="artifacts/language_model_cache"),
    )
    engines = ["transformers", "llama.cpp"] if quick else ENGINES
    export = la.LanguageModelExport("artifacts/language_model", tokenizer, engines=engines)
    int4 = la.QuantizationAwareTraining(target="int4", group=32, exclude=["lm_head"], start=0)
    trainer(4 if quick else 200, int4, export).fit(student, data)

    score = trainer(0).validate(student, data, verbose=False)[0]["val_perplexity"]
    before = trainer(0).validate(teacher, data, verbose=False)[0]["val_perplexity"]
    with la.language_models.open_bundle("artifacts/language_model", "llama.cpp") as engine:
        prompt = tokenizer("The import statement")["input_ids"]
        answer = tokenizer.decode(engine.generate(prompt, 24))
    print(f"Held-out perplexity: {before:.2f} in float32, {score:.2f} in int4.")
    print(f"From the bundle, by llama.cpp: The import statement{answer!r}")


if __name__ == "__main__":
    main()
