"""One file per block kind. Each defines ``FACTS`` (read without torch) and ``KIND`` (modules)."""
