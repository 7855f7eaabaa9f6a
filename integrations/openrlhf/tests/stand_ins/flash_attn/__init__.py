"""The few functions of flash-attn that OpenRLHF imports, for CPUs. There are no kernels in it."""

__version__ = "2.8.3"
