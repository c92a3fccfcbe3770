"""What the settings of a model cannot say of an architecture, as texts that a config can hold: "mlp_ratio=2.0"."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mpp.errors import UserError
from mpp.weights.base import Numerics


def parse_init_args(init_args: Sequence[str]) -> tuple[dict[str, Any], Numerics]:
    """Arguments for timm beside `model_args`, and the numerics, of texts such as "mlp_ratio=2.0", "norm_eps=1e-12".

    Raises:
        UserError: texts of another form.
    """
    told: dict[str, Any] = {}
    for text in init_args:
        name, _, value = text.partition("=")
        try:
            told[name] = json.loads(value)
        except ValueError as error:
            raise UserError(f"init_args: {text!r} is not a name, = and a JSON value, such as mlp_ratio=2.0") from error
    numerics = {field.name: told.pop(field.name) for field in fields(Numerics) if field.name in told}
    if isinstance(numerics.get("stem_units"), list):
        numerics["stem_units"] = tuple(numerics["stem_units"])
    return told, Numerics(**numerics)


def write_init_args(args: Mapping[str, Any], numerics: Numerics) -> tuple[str, ...]:
    """What `parse_init_args` reads; of the numerics only those that are not timm's."""
    standard = asdict(Numerics())
    told = {key: value for key, value in asdict(numerics).items() if value != standard[key]}
    return tuple(f"{name}={json.dumps(value)}" for name, value in {**args, **told}.items())
