"""Whether the kernels can be compiled and run on this machine."""

import torch

from lightning_indexer.cuda.compiler import check_compiler_knows, compiler_version
from lightning_indexer.cuda.launcher import device_arch


def obstacle() -> str | None:
    """What keeps the kernels from torch's current GPU, in one line; None where they run."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    try:
        compiler_version()
        check_compiler_knows(device_arch(torch.cuda.current_device()))
    except (ImportError, NotImplementedError, ValueError) as error:
        return str(error)
    return None
