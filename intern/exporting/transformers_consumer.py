"""A folder of a merged model, or of an adapter and its base -> answers as plain transformers and PEFT give them."""

import gc
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from intern.exporting.proof import LogProbs, Message
from intern.exporting.reference import Answer, greedy, predictions, to_answer


class TransformersConsumer:
    """A model that transformers has loaded as its users load it."""

    def __init__(self, model: Any, folder: Path, name: str, stop_ids: Sequence[int] | None) -> None:
        """Args: model: loaded; folder: with its tokenizer; name: of the consumer; stop_ids: None: those of the model's own files."""
        self.name = name
        self._model = model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self._stop_ids = stop_ids

    @classmethod
    def merged(cls, folder: Path) -> "TransformersConsumer":
        """Load a merged model with the dtype of its files, on a CPU in float32 as everywhere here; it must know itself how to stop."""
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": _device()}, trust_remote_code=False, local_files_only=True
        )
        return cls(model, folder, f"transformers {importlib.metadata.version('transformers')}", None)

    @classmethod
    def adapter(
        cls,
        folder: Path,
        base: str,
        quantization: BitsAndBytesConfig | None,
        dtype: torch.dtype,
        stop_ids: Sequence[int],
    ) -> "TransformersConsumer":
        """Load an adapter on its base, quantized as in training. The end of an answer is said by whoever asks: see the card.

        Args:
            folder: of the adapter.
            base: a folder or a name on the hub.
            quantization: None for a base that is not quantized, or that was published quantized.
            dtype: of weights that are not quantized.
            stop_ids: what ends an answer.
        """
        more: dict[str, Any] = {"quantization_config": quantization} if quantization is not None else {}
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, device_map={"": _device()}, trust_remote_code=False, local_files_only=True, **more
        )
        name = f"peft {importlib.metadata.version('peft')}, transformers {importlib.metadata.version('transformers')}"
        return cls(PeftModel.from_pretrained(model, str(folder)), folder, name, stop_ids)

    def template_ids(self, messages: Sequence[Message]) -> list[int]:
        found = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        return [int(token) for token in found]

    def answers(self, conversations: Sequence[Sequence[Message]], most: int) -> list[Answer]:
        prompts = [self.template_ids(messages) for messages in conversations]
        replies = greedy(self._model, self._tokenizer, prompts, most, self._stop_ids)
        own = self._model.generation_config.eos_token_id
        ends = self._stop_ids if self._stop_ids is not None else [own] if isinstance(own, int) else own or []
        return [to_answer(self._tokenizer, reply, ends) for reply in replies]

    def log_probs(self, prompt: Sequence[int], answer: Sequence[int]) -> LogProbs:
        return LogProbs(predictions(self._model, prompt, answer))

    def close(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _device() -> Any:
    return 0 if torch.cuda.is_available() else "cpu"
