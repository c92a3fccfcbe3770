"""The packages; all else is in setup.cfg, which cannot say that configs/ travels as mpp/configs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["mpp*"]), "mpp.configs"], package_dir={"mpp.configs": "configs"})
