"""Wrap PEFT's private parts. Checked on PEFT 0.21.2."""

from typing import Any

from peft import PeftType


def add_peft_type(name: str) -> None:
    """Add a member to `PeftType`: PEFT accepts methods of other packages, but only under a name in this closed enum.

    Writes to the enum's private tables (`_member_map_`, `_value2member_map_`, `_member_names_`).
    """
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


def loss_of_adapter(tuner: Any) -> Any:
    """Return what KaSA and MonteCLoRA add to the loss; 0 for other methods.

    These are `LoraModel._get_kasa_loss` and `._get_monteclora_loss`. PEFT expects training code to add them, but
    has no public name for them.
    """
    return tuner._get_kasa_loss() + tuner._get_monteclora_loss()


def follow_forward_of_base(adapted: Any) -> None:
    """Make an adaption prompt look up its base's `forward` at each call.

    PEFT stores the base's `forward` in its own attribute when the prompt is attached, but TRL replaces the base's
    `forward` later.
    """
    prompt = adapted.base_model
    prompt.forward = lambda *args, **kwargs: prompt.model(*args, **kwargs)
