"""Joins the Ray cluster and prints after how many seconds it was refused, and with which text."""

from __future__ import annotations

import os
import time

from pipeline.errors import ConfigError
from pipeline.orchestrate.joined_ray import ADDRESS, joined_ray

if __name__ == "__main__":
    began = time.monotonic()
    try:
        with joined_ray(os.environ[ADDRESS]):
            print("accepted")
    except ConfigError as error:
        print(f"{time.monotonic() - began:.2f} {error.exit_code} {error.message}")
