"""PYTHONPATH=scripts/imitate_t4 python -m intern.train model.pretrained_model_name_or_path=...

Limits a larger GPU to what a Colab T4 has, in every Python process that finds this folder: 14.7 GiB of memory, no flash and no cuDNN
attention kernels. The speed is that of the real GPU: only memory and the choice of kernels are imitated. Python imports a module of this
name by itself when it starts.
"""

import os

import torch

T4_GIB = 14.7  # what CUDA leaves of a T4's 16 GB

if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ["INTERN_DISABLE_FLASH_ATTENTION"] = "1"  # the switches above do not reach intern's own kernels
