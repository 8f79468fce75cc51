"""Optimizers: a registry that needs no torch, and one file per optimizer."""
