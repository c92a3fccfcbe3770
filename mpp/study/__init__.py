"""What a pretraining is worth: shares of the labels, seeds, one table."""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Study(ModuleType):
    """This package, which `mpp.study(...)` of mpp.api shares its name with."""

    def __call__(self, config: Any = None, **settings: Any) -> Any:
        return importlib.import_module("mpp.api").study(config, **settings)


sys.modules[__name__].__class__ = _Study
