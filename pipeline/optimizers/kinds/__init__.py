"""One file per optimizer; the registry finds them."""
