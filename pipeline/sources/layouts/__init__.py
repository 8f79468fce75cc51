"""One file per layout of a source: it defines ``LAYOUT``, and its docstring describes it."""
