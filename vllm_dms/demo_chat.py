"""vllm-dms demo --base DIR --adapter DIR --text FILE: a chat about a long text, with eviction and
without.

One server after the other, asked the same questions. Exit code 1: nothing was evicted, or there was
no answer; whether an answer is right is for the reader.
"""

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import demo

if TYPE_CHECKING:
    from openai import OpenAI

ANSWER_TOKENS = 96
QUESTIONS = (
    "What is this text about? Answer in three sentences.",
    "Name one thing that it forbids or requires.",
)


def chat(client: "OpenAI", text: str, questions: list[str]) -> tuple[list[str], dict[str, Any]]:
    """-> answers, the last request's counts as the server reports them"""
    messages: list[Any] = []
    answers, counts = [], {}
    for number, question in enumerate(questions):
        content = f"{text}\n\n{question}" if number == 0 else question
        messages.append({"role": "user", "content": content})
        start = time.monotonic()
        reply = client.chat.completions.create(
            model=demo.MODEL_NAME, messages=messages, temperature=0, max_tokens=ANSWER_TOKENS
        )
        answers.append((reply.choices[0].message.content or "").strip())
        messages.append({"role": "assistant", "content": answers[-1]})
        counts = (reply.model_extra or {})["kv_transfer_params"]["dms"]
        counts["prompt_tokens"] = reply.usage.prompt_tokens if reply.usage else 0
        print(f"\n    > {question}\n")
        print(textwrap.fill(answers[-1], 92, initial_indent="    ", subsequent_indent="    "))
        demo.say(
            f"{counts['prompt_tokens']} prompt tokens, answered in {time.monotonic() - start:.1f} s"
        )
    return answers, counts


def run(
    base: Path, adapter: Path, text: str, questions: list[str], logs: Path, arms: dict[str, dict]
) -> int:
    """arms: title -> settings beside the adapter; -> exit code"""
    demo.say(f"model: {base} with {adapter}")
    rows: dict[str, dict[str, Any]] = {}
    answered = True
    for title, settings in arms.items():
        print()
        demo.say(f"{len(rows) + 1}/{len(arms)} {title}")
        log = logs / f"{title.lower().replace(' ', '-')}.log"
        settings = {"adapter": str(adapter.resolve()), "log_interval": 0.2, **settings}
        with demo.server(log, settings, base) as client:
            answers, rows[title] = chat(client, text, questions)
            for line in demo.from_log(log, "^DMS: live compression")[-1:]:
                demo.say(f"the server's last report: {line}")
        answered = answered and all(answers)
    print()
    demo.say("at the end of the last request of each")
    demo.print_table(rows)
    first = next(iter(rows.values()))
    return 0 if answered and first["live_tokens"] < first["dense_tokens"] else 1
