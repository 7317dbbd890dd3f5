"""Make ECKART a type of PEFT. PEFT has no plug-in point: its enum of types must grow by a member, everything else is its public registration."""

from __future__ import annotations

from typing import Any

NAME = "ECKART"
PREFIX = "eckart_"


def register() -> None:
    """Register the type, once; calling it again is harmless.

    Example:
        >>> register()
        >>> from peft import PeftType
        >>> PeftType("ECKART").value
        'ECKART'
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    member = grow(PeftType)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    from .config import EckartConfig
    from .tuner import EckartModel

    register_peft_method(name=NAME.lower(), config_cls=EckartConfig, model_cls=EckartModel, prefix=PREFIX)


def grow(enum: Any) -> Any:
    """The enum's member of that name, made if it is missing."""
    if NAME in enum.__members__:
        return enum[NAME]
    member = str.__new__(enum, NAME)
    member._name_ = NAME
    member._value_ = NAME
    enum._member_names_.append(NAME)
    enum._member_map_[NAME] = member
    enum._value2member_map_[NAME] = member
    type.__setattr__(enum, NAME, member)
    return member
