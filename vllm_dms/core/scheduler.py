"""vLLM's schedulers, with chunks of prompts that end where a state is to be kept.

vLLM has that for Mamba's states: a method that clips a chunk, asked where a flag is set. Only with
`prefix_cache`; without it vLLM's own classes run.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class CutScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = request.num_computed_tokens + num_external_computed_tokens
        return self.connector.chunk_of(request, start, num_new_tokens)


class CutAsyncScheduler(CutScheduler, AsyncScheduler):
    pass


def make_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """In place of a class, because async scheduling is decided after the flags were read."""
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (CutAsyncScheduler if is_async else CutScheduler)(*args, **kwargs)
