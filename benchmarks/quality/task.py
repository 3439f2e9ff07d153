"""The needle task for any checkpoint: questions and right answers as ids of its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from examples.tiny import needles

BANDS = 4  # of depth, in the report
ROOM = 64  # tokens of a length that are left for the answer


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    answer: list[int]  # the right one, as the documents put it
    codes: tuple[str, ...]
    depths: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]  # of each code's tokens in `answer`


@dataclass
class Task:
    model: Path
    scored: int  # questions a length whose log-probabilities are compared
    questions: dict[int, list[Question]]  # by length
    # First position of prompt + answer that something is hidden from, filled in by the controls.
    starts: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: Path, lengths: list[int], prompts: int, asked: int, scored: int, seed: int
    ) -> "Task":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        made = {
            n: [_question(tokenizer, p) for p in _prompts(tokenizer, seed, n, prompts, asked)]
            for n in lengths
        }
        return cls(model, min(scored, prompts), made)

    def summarize(self, length: int, hits: list[list[bool]], compression: float) -> dict:
        """hits: per question, per needle"""
        bands = [[0, 0] for _ in range(BANDS)]
        for question, right in zip(self.questions[length], hits, strict=True):
            for depth, hit in zip(question.depths, right, strict=True):
                band = bands[min(int(depth * BANDS), BANDS - 1)]
                band[0] += hit
                band[1] += 1
        asked = sum(b[1] for b in bands)
        return {
            "length": length,
            "needles": asked,
            "needle_accuracy": sum(b[0] for b in bands) / asked,
            "accuracy_by_depth": [round(b[0] / b[1], 4) if b[1] else None for b in bands],
            "live_compression": round(compression, 3),
        }


def _prompts(tokenizer, seed: int, length: int, count: int, asked: int) -> list[needles.Prompt]:
    """Prompts that leave room for the answer; the generator counts tokens of its own."""
    words = length - ROOM
    probe = needles.make_prompts(seed, words, 1, asked=asked)[0]
    words = int(words * words / max(words, len(tokenizer(probe.text, verbose=False).input_ids)))
    return needles.make_prompts(seed, words, count, asked=asked)


def _question(tokenizer, prompt: needles.Prompt) -> Question:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.user}], add_generation_prompt=True, return_dict=True
    ).input_ids
    text = " ".join(
        f"The code of {name} is {code}."
        for name, code in zip(prompt.names, prompt.answers, strict=True)
    )
    answer = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, at = [], 0
    for code in prompt.answers:
        first = text.index(code, at)
        at = first + len(code)
        inside = [i for i, (a, b) in enumerate(answer.offset_mapping) if a < at and b > first]
        spans.append((inside[0], inside[-1] + 1))
    return Question(list(ids), list(answer.input_ids), prompt.answers, prompt.depths, tuple(spans))
