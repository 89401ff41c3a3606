"""CUDA implementations: kernels compiled at first use by NVRTC, and the wrappers that launch them.

Importing anything here needs neither a GPU nor a CUDA package: those are imported where they are first used.
"""
