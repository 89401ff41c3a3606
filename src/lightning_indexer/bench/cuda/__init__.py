"""The benchmark on a GPU. Only `gpu.py` touches torch.cuda, so that everything else is tested on a CPU."""
