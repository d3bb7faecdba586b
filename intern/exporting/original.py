"""The base's own files -> its weights by name, one at a time: as it was published, not as it was quantized for training."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from intern.errors import UserError


class OriginalWeights:
    """The safetensors files of a base model, opened and read weight by weight."""

    def __init__(self, name: str, revision: str | None) -> None:
        """Args: name: a folder or a name on the hub; revision: of the hub's.

        Raises:
            UserError: there are no such files here, or they cannot be read.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        self._name = name
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from error
        if not self._files:
            raise UserError(f"weights=original: {name} has no safetensors files")

    def __call__(self, name: str) -> torch.Tensor:
        """Return a weight by the name of its module in the model.

        Raises:
            UserError: the files name it in another way, or it is quantized there.
        """
        if name not in self._files:
            raise UserError(f"weights=original: the files of {self._name} have no {name}: use weights=trained")
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        if not tensor.is_floating_point():
            raise UserError(f"weights=original: {self._name} is published quantized: use weights=trained")
        return tensor
