"""Adds the folders configs/ and jobs/ to the package. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

SHIPPED = {"pipeline.configs": "configs", "pipeline.jobs": "jobs"}

setup(
    packages=[*find_packages(include=["pipeline", "pipeline.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "pipeline": ["py.typed"],
        "pipeline.cluster": ["*.sh"],
        "pipeline.configs": ["**/*.yaml", "**/*.txt", "**/*.md"],
        "pipeline.jobs": ["*.yaml"],
    },
)
