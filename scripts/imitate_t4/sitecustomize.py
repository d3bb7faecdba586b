"""PYTHONPATH=scripts/imitate_t4 python -m intern.train model.pretrained_model_name_or_path=...

Bounds a larger GPU as a Colab T4 would, in every Python process that finds this folder: 14.7 GiB of memory, no flash and no cuDNN
attention kernels. Speed is that of the real card: only memory and the choice of kernels are imitated. Python imports a module of this
name by itself at its start.
"""

import sys
from pathlib import Path

import torch

T4_GIB = 14.7  # what CUDA leaves of a T4's 16 GB

if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # the project, where it is not installed
    import intern.kernels.isolated_attention

    intern.kernels.isolated_attention.has_flash_attention = lambda query: False
