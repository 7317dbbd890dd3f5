"""Adapters as a method of PEFT: `EckartConfig` is to it what `LoraConfig` is.

Importing eckart is enough for `PeftModel.from_pretrained` to know the type; take `EckartConfig` from `eckart.hub.peft.config`, or use `ek.adapt`.
"""

# before any module here: when PEFT is done importing, it is told of us, and those modules must then be whole
import peft as _peft

__all__: list[str] = []
del _peft
