"""python scripts/imitate_t4.py intern.train model.pretrained_model_name_or_path=...

Runs a module of the project on a larger GPU as a Colab T4 would bound it: 14.7 GiB of memory, no flash and no cuDNN
attention kernels. Speed is that of the real card: only memory and the choice of kernels are imitated.
"""

import runpy
import sys

import torch

import intern.attention

T4_GIB = 14.7  # what CUDA leaves of a T4's 16 GB


def main() -> None:
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    intern.attention.has_flash_attention = lambda query: False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
