"""Finds the packages; the rest of the build is in pyproject.toml, where no folder can be added to those found."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["timm_selfdistill*"]), "timm_selfdistill.recipes"])
