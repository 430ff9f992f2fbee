"""PEFT's private parts. Checked on PEFT 0.21.2."""

from typing import Any

from peft import PeftType


def add_peft_type(name: str) -> None:
    """Add a member to `PeftType`: PEFT takes methods of others, but only under a name in this closed enumeration.

    Writes the enumeration's private tables (`_member_map_`, `_value2member_map_`, `_member_names_`).
    """
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def loss_of_adapter(tuner: Any) -> Any:
    """What KaSA and MonteCLoRA add to the loss (`LoraModel._get_kasa_loss`, `._get_monteclora_loss`); 0 for others.

    PEFT leaves adding it to whoever trains, and gives it no public name.
    """
    return tuner._get_kasa_loss() + tuner._get_monteclora_loss()


def follow_forward_of_base(adapted: Any) -> None:
    """Make an adaption prompt call the `forward` that its base has at each call.

    PEFT keeps the base's `forward` of when it was attached as its own attribute, and TRL replaces the base's later.
    """
    prompt = adapted.base_model
    prompt.forward = lambda *args, **kwargs: prompt.model(*args, **kwargs)
