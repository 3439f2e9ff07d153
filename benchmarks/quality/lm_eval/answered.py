"""The metric of needles.yaml."""


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Share of the facts asked for that stand in the generated text."""
    answers = doc["answers"]
    return {"answered": sum(answer in results[0] for answer in answers) / len(answers)}
