"""Generate text from a language model's bundle with an engine that was proven when the bundle was written.

Every file of the bundle is compared with its manifest first. The answer is greedy: it is the same each time.
"""

import argparse
import json
from pathlib import Path

from lightning_accel.errors import InvalidArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--prompt", required=True, help="text to continue; with --chat what the user says")
    parser.add_argument("--chat", action="store_true", help="render the prompt with the bundle's chat template")
    parser.add_argument("--engine", help="engine to run; default: the first that was proven")
    parser.add_argument("--tokens", type=int, default=64, help="number of new tokens at most; default: 64")
    parser.add_argument("--adapter", help="name of an adapter in the bundle, for an engine that takes adapters")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: 1")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from lightning_accel.language_models.opening import ADAPTERS, TOKENIZER, open_bundle, read_language_manifest
    from lightning_accel.language_models.token_data import load_tokenizer

    if arguments.tokens < 1:
        raise InvalidArgumentError(f"Argument `--tokens` must be at least 1, but got {arguments.tokens}.")
    read_language_manifest(arguments.bundle)
    tokenizer = load_tokenizer(arguments.bundle / TOKENIZER)
    text = arguments.prompt
    if arguments.chat:
        if not tokenizer.chat_template:
            raise InvalidArgumentError("Argument `--chat` must be left out for a bundle without a chat template.")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    options = {"threads": arguments.threads}
    if arguments.adapter is not None:
        options["adapter"] = adapter_folder(arguments.bundle / ADAPTERS, arguments.adapter)
    prompt = tokenizer(text, add_special_tokens=not arguments.chat)["input_ids"]
    with open_bundle(arguments.bundle, arguments.engine, **options) as engine:
        answer = engine.generate(prompt, arguments.tokens)
    ends = end_tokens(arguments.bundle, tokenizer)
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    print(tokenizer.decode(answer[:stop], skip_special_tokens=True))
    return 0


def adapter_folder(folder: Path, name: str) -> Path:
    """Folder of an adapter of a bundle.

    Raises:
        InvalidArgumentError: there is none of this name.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if name not in names:
        raise InvalidArgumentError(
            f"Argument `--adapter` must be one of the bundle's adapters {names}, but got {name!r}."
        )
    return folder / name


def end_tokens(bundle: Path, tokenizer: object) -> set[int]:
    """Tokens that end an answer: those of the generation config in the bundle, and the tokenizer's."""
    found = {getattr(tokenizer, "eos_token_id", None)}
    for file in sorted(bundle.glob("*/generation_config.json")):
        value = json.loads(file.read_text()).get("eos_token_id")
        found |= set(value) if isinstance(value, list) else {value}
    return {int(token) for token in found if token is not None}
