"""Bridges to the systems that people run; nothing here is imported by the library itself."""
