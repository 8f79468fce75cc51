"""One file per kind of block. Each defines ``FACTS`` (read without torch) and ``KIND`` (the modules)."""
