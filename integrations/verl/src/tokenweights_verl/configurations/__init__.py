"""Hydra configurations: VeRL with token weights, and the experiments of the paper."""
