"""Block kinds: ``registry`` (imports no torch), ``kinds`` (one file per kind), shared layers."""
