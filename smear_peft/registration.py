"""The door into PEFT: the one place that touches PEFT's own tables.

PEFT keeps its method names in a closed enum, `PeftType`, and refuses to register a method that is not a member. There
is no public way to add one, so `extend_peft_type` adds the member in place; everything else goes through PEFT's own
`register_peft_method`. Nothing else of PEFT is changed.
"""

from peft import PeftType

NAME = "SMEAR"


def extend_peft_type(name: str = NAME) -> PeftType:
    """Give `peft.PeftType` a member `name`, or return the one that it has.

    The member's name and value are the same string on purpose: `Enum` hashes a member by its name, and PEFT looks its
    tables up with the plain string of `adapter_config.json`.

    Args:
        name: upper-case name of the method.

    Returns:
        The member, a true `PeftType` under `in`, `list()`, lookup by name and value, pickling and copying.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register SMEAR with PEFT. Called by `import smear_peft`; calling it again does nothing.

    When the package itself was imported afresh (a notebook's reload), its new classes take the place of the old ones.

    Raises:
        RuntimeError: if PEFT, or another package, already has a method called SMEAR.
    """
    from peft.mapping import (  # noqa: PLC0415
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.utils import register_peft_method  # noqa: PLC0415

    from smear_peft.config import SmearConfig  # noqa: PLC0415
    from smear_peft.model import SmearModel  # noqa: PLC0415

    member = extend_peft_type()
    owner = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if owner is SmearModel:
        return
    if owner is not None and owner.__module__ == SmearModel.__module__:
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(member, None)
    elif owner is not None:
        raise RuntimeError(
            f"PEFT's method {NAME} already belongs to {owner.__module__}.{owner.__name__}; smear_peft cannot share the "
            "name. Uninstall one of the two, or import only one of them in a process."
        )
    register_peft_method(name=NAME.lower(), config_cls=SmearConfig, model_cls=SmearModel)
