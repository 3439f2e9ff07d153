"""DMS model classes, by the name of vLLM's own class with DMS before it.

vLLM asks for one of them by name (`plugin` registers them). It is made then, so that the table of
families can be read without importing vLLM.
"""

from typing import Any

from vllm_dms.models.families import FAMILIES


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if name == family.dms_architecture:
            from vllm_dms.models.graft import model_class

            return model_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
