"""Streaming implementations for CPU tensors, built from torch operators alone."""
