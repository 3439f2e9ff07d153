"""Through vLLM's engine, with `prefix_cache` in a small pool: requests come, fork, are aborted, are
preempted, and what is kept is forgotten in between; each answer is that of the reference."""

import random

import pytest
from chats import Chat, sampling_args
from checkpoints import random_tokens
from engines import NOISE, worst_error
from vllm import SamplingParams

from vllm_dms.core.integrity import check_integrity


class Storm:
    def __init__(self, chat, seed):
        self.chat, self.engine, self.random = chat, chat.llm.llm_engine, random.Random(seed)
        self.texts = [random_tokens(n, seed=seed + n) for n in (5, 40, 130, 290)]
        self.open: dict[str, tuple[list[int], dict]] = {}
        self.asked = self.hits = self.done = 0

    def ask(self):
        pick = self.random.choice
        text = pick(self.texts)
        text = text[: pick([len(text), len(text), self.random.randint(1, len(text))])]
        text = [*text, *self.random.choices(range(3, 250), k=pick([0, 1, 3, 17, 40]))][:400]
        params = sampling_args(pick([1, 2, 5, 20, 60]))
        params |= pick([{}] * 7 + [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
        params |= pick([{}] * 7 + [{"n": 3, "temperature": 1.0}])
        prompt = {"prompt_token_ids": text} | pick([{}, {}, {}, {"cache_salt": "a"}])
        self.asked += 1
        by_priority = self.chat.scheduler.policy.value == "priority"
        priority = self.asked % 3 if by_priority else 0
        self.engine.add_request(
            str(self.asked), prompt, SamplingParams(**params), priority=priority
        )
        self.open[str(self.asked)] = text, params

    def step(self):
        for output in self.engine.step():
            if not output.finished or output.request_id not in self.open:
                continue
            text, params = self.open.pop(output.request_id)
            self.done += 1
            self.hits += bool(output.num_cached_tokens)
            for answer in list(output.outputs):
                assert len(answer.token_ids) == params["max_tokens"]
                output.outputs[0] = answer
                assert worst_error(self.chat.reference, text, output) < NOISE
            said = [*text, *output.outputs[0].token_ids]
            if len(said) < 380:
                self.texts[self.random.randrange(len(self.texts))] = said
        check_integrity(self.chat.manager)

    def blow(self, num_done):
        while self.done < num_done or self.engine.has_unfinished_requests():
            chance = self.random.random()
            if self.done < num_done and len(self.open) < 14 and chance < 0.3:
                self.ask()
            elif self.open and chance < 0.33:
                request_id = self.random.choice(list(self.open))
                self.engine.abort_request([request_id])
                del self.open[request_id]
            elif chance < 0.335:
                self.engine.reset_prefix_cache(chance < 0.333, True)
            else:
                self.step()


@pytest.mark.parametrize(("name", "policy"), [("nvidia-borrowed", "fcfs"), ("fastdms", "priority")])
def test_answers_in_a_storm_are_those_of_the_reference(checkpoint, make_engine, name, policy):
    args = {"max_model_len": 512, "max_num_seqs": 6, "num_gpu_blocks_override": 44}
    chat = Chat(checkpoint(name, evict_rate=0.5), make_engine, 64, scheduling_policy=policy, **args)
    preemptions = chat.scheduler.connector.stats.preemptions
    storm = Storm(chat, seed=5)
    storm.blow(100)
    assert storm.hits > 10 and chat.scheduler.connector.stats.preemptions > preemptions
    manager = chat.manager
    assert manager.block_pool.get_num_free_blocks() == manager.num_usable_blocks
    chat.ask([[3] * 20])  # a state may have been due of a request that was aborted
    prefix = manager.prefix
    tables = (prefix._hits, prefix._ending, prefix._lineage, prefix._due, prefix.kept._pending)
    tables += (prefix.branches._prompts, prefix.branches._reading, prefix.branches._cuts)
    assert not any(tables), "something stays of requests that are gone"
