"""GPUs that a run can be planned for without having one: memory, peak rates and bandwidth from their makers' data sheets."""

import difflib
import re
from dataclasses import dataclass

from intern.errors import UserError
from intern.units import GIB

_BRANDS = re.compile(r"nvidia|tesla|geforce|rtx|[\s_-]")  # what people write before and inside a name


@dataclass(frozen=True)
class Card:
    """One GPU.

    Args:
        key: what `gpu=` calls it.
        name: its maker's name.
        aliases: other spellings of `key`.
        gib: memory that a process can use: what the driver reports for the card, less its own context; less than what the box says.
        fp16: peak TFLOP/s of dense float16 matrix products that add up in float32, without sparsity.
        bf16: the same of bfloat16; None if the card has none.
        bandwidth: of its memory, in GB/s.
        capability: its compute capability.
        source: of the rates.
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    gib: float
    fp16: float
    bf16: float | None
    bandwidth: float
    capability: tuple[int, int]
    source: str

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.bf16 is not None

    @property
    def is_hopper(self) -> bool:
        """Whether cuDNN's attention for packed rows runs on it."""
        return self.capability[0] == 9

    @property
    def budget(self) -> int:
        """Bytes of its memory that a run may use."""
        return int(self.gib * GIB)


def _geforce(chip: str) -> str:
    return f"NVIDIA {chip} GPU architecture white paper"


# Data-center cards: the SXM form where there are several, unless the key says otherwise. T4, RTX 20 and older have no bfloat16.
CARDS = (
    Card("t4", "NVIDIA T4", ("t4-16gb",), 14.6, 65, None, 320, (7, 5), "NVIDIA T4 data sheet"),
    Card("l4", "NVIDIA L4", ("l4-24gb",), 21.8, 121, 121, 300, (8, 9), "NVIDIA L4 data sheet"),
    Card("a10", "NVIDIA A10", ("a10-24gb",), 21.8, 125, 125, 600, (8, 6), "NVIDIA A10 data sheet"),
    Card("a40", "NVIDIA A40", ("a40-48gb",), 44.0, 149.7, 149.7, 696, (8, 6), "NVIDIA A40 data sheet"),
    Card("a6000", "NVIDIA RTX A6000", ("a6000-48gb",), 47.0, 154.8, 154.8, 768, (8, 6), "NVIDIA RTX A6000 data sheet"),
    Card("l40s", "NVIDIA L40S", ("l40s-48gb",), 44.0, 362, 362, 864, (8, 9), "NVIDIA L40S data sheet"),
    Card("3090", "NVIDIA GeForce RTX 3090", ("3090-24gb",), 23.3, 71, 71, 936, (8, 6), _geforce("Ampere GA102")),
    Card("4090", "NVIDIA GeForce RTX 4090", ("4090-24gb",), 23.2, 165.2, 165.2, 1008, (8, 9), _geforce("Ada")),
    Card("5090", "NVIDIA GeForce RTX 5090", ("5090-32gb",), 30.9, 209.5, 209.5, 1792, (12, 0), _geforce("RTX Blackwell")),
    Card("a100", "NVIDIA A100 40GB", ("a100-40gb", "a100-40"), 39.0, 312, 312, 1555, (8, 0), "NVIDIA A100 data sheet"),
    Card("a100-80gb", "NVIDIA A100 80GB", ("a100-80",), 78.7, 312, 312, 2039, (8, 0), "NVIDIA A100 data sheet"),
    Card("h100", "NVIDIA H100 SXM", ("h100-80gb", "h100-sxm"), 78.5, 989.4, 989.4, 3350, (9, 0), "NVIDIA H100 data sheet"),
    Card("h100-pcie", "NVIDIA H100 PCIe", (), 78.5, 756, 756, 2000, (9, 0), "NVIDIA H100 data sheet"),
    Card("h200", "NVIDIA H200 SXM", ("h200-141gb", "h200-sxm"), 139.0, 989.4, 989.4, 4800, (9, 0), "NVIDIA H200 data sheet"),
)  # fmt: skip


def find_card(name: object) -> Card:
    """Return the card that somebody means: "t4", "Tesla T4", "RTX 4090", 4090.

    Args:
        name: the value of `gpu=`.

    Raises:
        UserError: there is no such card in the table; names the nearest ones.
    """
    spelled = {_plain(one): card for card in CARDS for one in (card.key, card.name, *card.aliases)}
    wanted = _plain(str(name))
    if wanted in spelled:
        return spelled[wanted]
    near = list(dict.fromkeys(spelled[one].key for one in difflib.get_close_matches(wanted, spelled, n=3, cutoff=0.5)))
    meant = f"did you mean {' or '.join(f'gpu={key}' for key in near)}? " if near else ""
    raise UserError(f"gpu={name}: no such card is known here; {meant}known: {', '.join(card.key for card in CARDS)}")


def _plain(name: str) -> str:
    return _BRANDS.sub("", name.lower())
