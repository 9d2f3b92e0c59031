"""vLLM, in an interpreter of its own: its pins seldom fit beside those of a training environment."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_accel.errors import EngineError, MissingPackageError
from lightning_accel.language_models.engines import vllm_worker
from lightning_accel.language_models.engines.base import OnToken, TextEngine

PYTHON = "LIGHTNING_ACCEL_VLLM_PYTHON"
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def vllm_python() -> str:
    """The interpreter that has vLLM: the path in ``LIGHTNING_ACCEL_VLLM_PYTHON``.

    Raises:
        MissingPackageError: the variable isn't set, or is no interpreter.
    """
    path = os.environ.get(PYTHON, "")
    if not path or not Path(path).is_file():
        raise MissingPackageError(
            f"Engine `vllm` needs an interpreter with vLLM: set {PYTHON} to its path, e.g. /opt/vllm/bin/python, but it is {path!r}.",
            name="vllm",
        )
    return path


class VllmEngine(TextEngine):
    """A folder in compressed-tensors, served by vLLM.

    Args:
        path: folder.
        threads: CPU threads.
        context: tokens of prompt and answer.
        dtype: type of activations: vLLM's CPU kernels for int4 take ``"float16"`` and ``"bfloat16"``.
        adapter: folder of an adapter in the format of peft.
    """

    name = "vllm"
    callers = 8

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        context: int = 512,
        dtype: str = "float16",
        adapter: str | Path | None = None,
    ) -> None:
        super().__init__(path, threads=threads, context=context)
        settings: dict[str, Any] = {"model": str(path), "dtype": dtype, "max_model_len": context, "max_num_seqs": 8}
        if adapter is not None:
            rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
            settings |= {"adapter": str(adapter), "enable_lora": True, "max_lora_rank": max(8, rank)}
        environment = {**os.environ, **_QUIET, "OMP_NUM_THREADS": str(threads)}

        self._process = subprocess.Popen(
            [vllm_python(), "-I", "-c", Path(vllm_worker.__file__).read_text(), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        try:
            self._answer()
        except EngineError:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            _, mark, text = line.partition(vllm_worker.MARK)
            if mark:
                found: dict[str, Any] = json.loads(text)
                if "error" in found:
                    raise EngineError(f"vLLM failed: {found['error'].splitlines()[0]}")
                return found
        raise EngineError(
            f"vLLM must answer, but ended with exit code {self._process.wait()}. Run the file by hand to see why."
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    @override
    def generate(self, prompt: Sequence[int], new_tokens: int, on_token: OnToken | None = None) -> list[int]:
        (answer,) = self.generate_all([prompt], new_tokens)
        for token in answer if on_token is not None else ():  # the offline interface of vLLM doesn't stream
            on_token(token)  # type: ignore[misc]  # not None here
        return answer

    @override
    def generate_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        for prompt in prompts:
            self.check_context(prompt, new_tokens)
        found = self._ask(do="generate", prompts=[list(map(int, p)) for p in prompts], new_tokens=new_tokens)
        tokens: list[list[int]] = found["tokens"]
        return tokens

    @override
    def token_log_probabilities(self, tokens: Sequence[int]) -> list[float]:
        found: list[float] = self._ask(do="score", tokens=list(map(int, tokens)))["log_probabilities"]
        return found

    @override
    def next_log_probabilities(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        found = self._ask(do="top", tokens=list(map(int, tokens)), count=count)["top"]
        return {int(token): float(value) for token, value in found.items()}

    @override
    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
