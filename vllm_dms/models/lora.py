"""LoRA over a DMS model: on whatever vLLM allows, except what decides.

With an adapter (`decision.AlphaAdapter`) the decision is in no layer that vLLM has LoRA for, so
vLLM refuses a LoRA that names it. A borrowed channel is a row of `q_proj`: a LoRA trained without
DMS moves that row as it likes, and with it what is forgotten.
"""

# vLLM refuses a LoRA for a name that it does not expect, and lists those that it does.
REFUSED = "no LoRA on q_proj: this DMS checkpoint borrows its decision from it"


def refusing_q_proj(packed: dict[str, list[str]]) -> dict[str, list[str]]:
    """A model's `packed_modules_mapping` in which no LoRA's `q_proj` finds its place."""
    return {
        name: [REFUSED if part == "q_proj" else part for part in parts]
        for name, parts in packed.items()
    }
