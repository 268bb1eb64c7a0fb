"""Build of idm-fast; everything static (metadata, dependencies, tools) stands in pyproject.toml."""

from setuptools import setup

setup()
