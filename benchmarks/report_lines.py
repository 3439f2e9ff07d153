"""Which figures of a workload's rows the tables show, and how a line is named."""

import re
from typing import NamedTuple


class Figure(NamedTuple):
    title: str  # with a {c} a workload has a line per concurrency, with an {n} one per load
    key: str  # of the row
    unit: str = ""
    digits: int = 0

    def text(self, concurrency: int, prompts: int) -> str:
        title = self.title.format(c=concurrency, n=prompts)
        return f"{title}, {self.unit}" if self.unit else title


# The lines of README.md, in this order. Other workloads are in the table of the README here.
README = {
    "decode-8k": Figure("decode at 8K, concurrency {c}", "decode_tok_s", "tok/s"),
    "saturated-8k": Figure("decode at 8K, pool full", "decode_tok_s", "tok/s"),
    "capacity-8k": Figure("requests of 8K held at once", "requests_held"),
    "prefill-8k": Figure("prefill, 8K prompt", "prefill_tok_s", "tok/s"),
    "prefill-32k": Figure("prefill, 32K prompt", "prefill_tok_s", "tok/s"),
    "prefill-128k": Figure("prefill, 128K prompt", "prefill_tok_s", "tok/s"),
    "reason-1k-8k": Figure("1K in, 8K out, concurrency {c}", "decode_tok_s", "tok/s"),
}
LATENCIES = (("mean TTFT", "mean_ttft_ms"), ("p99 TTFT", "p99_ttft_ms"),
             ("mean TPOT", "mean_tpot_ms"), ("p99 ITL", "p99_itl_ms"))  # fmt: skip


def figures_of(workload: str) -> list[Figure]:
    if workload in README:
        return [README[workload]]
    if workload == "batch-1k":
        return [Figure("1K in, 256 out, {c} at once", "decode_tok_s", "tok/s")]
    if workload == "first-request":
        title = "1K prompts after the server's start, concurrency {c}, "
        first = Figure(f"{title}TTFT of the first", "first_ttft_ms", "ms", 1)
        tenth = Figure(f"{title}TTFT of the tenth", "tenth_ttft_ms", "ms", 1)
        return [first, tenth, Figure(f"{title}first over tenth", "first_over_tenth", digits=2)]
    if found := re.fullmatch(r"ttft-(\d+)", workload):
        title = f"prompts of {found[1]}, concurrency {{c}}"
        return [Figure(f"{title}, {name}", key, "ms", 1) for name, key in LATENCIES[:2]]
    if found := re.fullmatch(r"host-(decode|mixed)", workload):
        step = {"decode": "decode step", "mixed": "step with a 1K prompt beside decodes"}[found[1]]
        title = f"host time of a {step}, {{c}} requests"
        host = [Figure(title, "host_cpu_ms", "CPU ms", 2), Figure(title, "host_wall_ms", "ms", 2)]
        return [*host, Figure(f"{title}, the step as a whole", "step_ms", "ms", 2)]
    if found := re.fullmatch(r"serve-(mixed|(\d+)-(\d+))", workload):
        lengths = f"{found[2]} in, {found[3]} out" if found[2] else "2048 ± 80 % in and out"
        title = f"`vllm bench serve`, {lengths}, concurrency {{c}}, {{n}} prompts"
        rate = Figure(title, "decode_tok_s", "tok/s")
        return [rate, *(Figure(f"{title}, {name}", key, "ms", 1) for name, key in LATENCIES)]
    if workload == "kept-8k":
        return [Figure("conversations of 8K that keep their cache", "conversations_kept")]
    talks = {"turns-1k-256": "8 turns of 1K, 256 out", "document-16k": "questions about 16K"}
    if workload in talks:
        title = f"{talks[workload]}, concurrency {{c}}, {{n}} answers"
        first = Figure(f"{title}, mean TTFT", "mean_ttft_ms", "ms", 1)
        return [first, Figure(f"{title}, in all", "seconds", "s", 2)]
    raise ValueError(f"workload {workload!r} has no line in the report. Add it to figures_of.")
