"""Kinds of blocks: ``registry`` (imports no torch), ``kinds`` (one file each), and the layers that kinds are made of."""
