"""python -m intern.exporting.gguf_converter SCRIPT SPLITTING ...: runs one of llama.cpp's converters in a process of its own.

llama.cpp knows how a tokenizer splits text into words by a checksum of published tokenizers. One that was trained or extended since then
has another checksum although it splits in the same way: SPLITTING says which way that is, for such tokenizers alone.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run a converter with the arguments after the second one."""
    script, splitting, *arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
    if splitting:
        from conversion.base import TextModel

        known = TextModel.get_vocab_base_pre

        def named(self: Any, tokenizer: Any) -> str:
            try:
                return str(known(self, tokenizer))
            except NotImplementedError:
                return splitting

        TextModel.get_vocab_base_pre = named
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
