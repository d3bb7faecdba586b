"""A GGUF file -> answers of llama.cpp's server: its own chat template, tokens and stop tokens, over HTTP as users ask it."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from intern.errors import RunError
from intern.exporting.proof import LogProbs, Message
from intern.exporting.reference import Answer

_MOST_LIKELY = 256  # tokens whose probabilities are compared; all others count as one
_SECONDS = 600.0  # for one answer
_POSITIONS = 8192  # of the context that is given memory, at most


class LlamaServer:
    """llama.cpp's server with one GGUF file."""

    def __init__(self, file: Path) -> None:
        """Start it.

        Raises:
            RunError: it cannot load the file.
        """
        import xllamacpp
        from gguf import GGUFReader

        fields = GGUFReader(file).fields
        architecture = str(fields["general.architecture"].contents())
        length = int(fields[f"{architecture}.context_length"].contents())
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.port = min(length, _POSITIONS), 1, 0
        params.warmup, params.ui, params.verbosity = False, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise RunError(f"{file}: llama.cpp cannot load it: {' '.join(str(error).split())[:200]}") from error
        self.name = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
        # A proxy for the rest of the machine is none for a server of this process.
        self._http = httpx.Client(base_url=self._server.listening_address, timeout=_SECONDS, trust_env=False)

    def template_ids(self, messages: Sequence[Message]) -> list[int]:
        text = self._ask("/apply-template", {"messages": list(messages)})["prompt"]
        found = self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in found["tokens"]]

    def answers(self, conversations: Sequence[Sequence[Message]], most: int) -> list[Answer]:
        found = []
        for messages in conversations:
            body = {"messages": list(messages), "max_tokens": most, "temperature": 0, "reasoning_format": "none"}
            choice = self._ask("/v1/chat/completions", body)["choices"][0]
            found.append(Answer(choice["message"]["content"].strip(), choice["finish_reason"] == "stop"))
        return found

    def log_probs(self, prompt: Sequence[int], answer: Sequence[int]) -> LogProbs:
        ids, values = [], []
        for count in range(len(answer)):
            body = {"prompt": [*prompt, *answer[:count]], "n_predict": 1, "temperature": 0, "cache_prompt": True}
            # Probabilities before sampling, of the model itself.
            found = self._ask("/completion", body | {"n_probs": _MOST_LIKELY, "post_sampling_probs": False})
            top = found["completion_probabilities"][0]["top_logprobs"]
            ids.append([one["id"] for one in top])
            values.append([one["logprob"] for one in top])
        return LogProbs(torch.tensor(values), torch.tensor(ids))

    def close(self) -> None:
        self._http.close()
        del self._server

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        reply = self._http.post(path, json=body)
        if reply.status_code != 200:
            raise RunError(f"llama.cpp's server: {path}: {' '.join(reply.text.split())[:200]}")
        return reply.json()
