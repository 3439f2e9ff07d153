"""Engines with `prefix_cache`, and conversations with them."""

from engines import NOISE, engine_args, prompts, scheduler_of, worst_error
from vllm import SamplingParams

from vllm_dms.core.integrity import check_integrity
from vllm_dms.reference import ReferenceModel

ON = {"dms": {"prefix_cache": True}}


class Chat:
    """An engine with `prefix_cache`, whose answers are compared with the reference's."""

    def __init__(self, path, make_engine, chunk=96, noise=NOISE, **kwargs):
        args = engine_args(chunk, **{"additional_config": ON, **kwargs})
        self.llm = make_engine(path, **args)
        self.llm.reset_prefix_cache(reset_connector=True)
        self.scheduler = scheduler_of(self.llm)
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.reference, self.noise = ReferenceModel.from_dir(path), noise

    @property
    def kept(self):
        return self.manager.prefix.kept

    def ask(self, token_ids, max_tokens=8, salts=None, every=1, **params):
        """Their outputs, of which ``every`` n-th is compared; nothing is left in use."""
        params = {**sampling_args(max_tokens), **params}
        salts = salts or [None] * len(token_ids)
        asked = [
            {"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})}
            for ids, salt in zip(token_ids, salts, strict=True)
        ]
        outputs = self.llm.generate(asked, SamplingParams(**params), use_tqdm=False)
        for ids, output in list(zip(token_ids, outputs, strict=True))[::every]:
            assert worst_error(self.reference, ids, output) < self.noise
        check_integrity(self.manager)
        assert self.manager.block_pool.get_num_free_blocks() == self.manager.num_usable_blocks
        return outputs


def sampling_args(max_tokens):
    return {
        "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 3,
        "detokenize": False,
    }  # fmt: skip


def answer_of(output):
    return list(output.outputs[0].token_ids)


def talk(chat, turns=5, thinking=False):
    """Conversations of several turns; how many tokens each turn found."""
    texts = prompts((230, 97), seed=20)
    cached = []
    for turn in range(turns):
        outputs = chat.ask(texts)
        cached.append([o.num_cached_tokens for o in outputs])
        for text, output in zip(texts, outputs, strict=True):
            text += [3, 4] if thinking else answer_of(output)
            text += prompts((33,), seed=100 + turn)[0]
    return cached
