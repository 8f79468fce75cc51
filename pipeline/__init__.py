"""A distributed pretraining pipeline for reversible column networks (RevCol)."""

__version__ = "0.1.0"
