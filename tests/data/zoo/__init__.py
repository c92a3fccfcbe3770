"""Files of every kind that people have, good and bad, made by code, each with what must become of it."""

from tests.data.zoo.bad import BAD
from tests.data.zoo.making import Case
from tests.data.zoo.plain import JPEG, OTHERS, PNG, TURNED
from tests.data.zoo.tiffs import DAMAGED_TIFF, TIFF

__all__ = ["CASES", "Case"]

CASES = [*JPEG, *PNG, *OTHERS, *TURNED, *TIFF, *BAD, *DAMAGED_TIFF]
