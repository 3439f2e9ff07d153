"""Against NVIDIA's own code: checkpoints as it exports them, and what it computed from them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from engines import NOISE, engine_args, engine_config, generate
from vllm import SamplingParams

from vllm_dms.reference import ReferenceModel, live_counts

GOLDEN = Path(__file__).with_name("golden")
FORMS = ("borrowed-channel", "adapter-exported")


def sequences(form):
    """-> tokens [T], length of the prompt, ids [T, 12], log-probabilities [T, 12], live [L, H]"""
    with np.load(GOLDEN / form / "golden.npz") as file:
        for s in range(2):
            names = ("tokens", "prompt_len", "ids", "logprobs", "live")
            tokens, prompt_len, *rest = (file[f"{name}_{s}"] for name in names)
            yield tokens.tolist(), int(prompt_len), *rest


def errors(row, ids, expected):
    """Differences of one position's log-probabilities, where both have the token."""
    likely = dict(zip(ids.tolist(), expected.tolist(), strict=True))
    found = [abs(likely[t] - entry.logprob) for t, entry in row.items() if t in likely]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_nvidias_model(form):
    reference = ReferenceModel.from_dir(GOLDEN / form)
    for tokens, _, ids, expected, live in sequences(form):
        output = reference.forward(tokens)
        logprobs = output.logits.log_softmax(-1).gather(-1, torch.tensor(ids).long())
        torch.testing.assert_close(logprobs, torch.tensor(expected), rtol=0, atol=1e-4)
        assert live_counts(output.evict, reference.dms.window).tolist() == live.tolist()


def engine(make_engine, path, chunk, **kwargs):
    args = engine_args(chunk, max_model_len=512, max_logprobs=12, skip_tokenizer_init=True)
    return make_engine(path, **args | kwargs)


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("form", FORMS)
def test_prompts_in_chunks_have_nvidias_log_probabilities(make_engine, form, chunk):
    llm = engine(make_engine, GOLDEN / form, chunk)
    params = SamplingParams(max_tokens=1, prompt_logprobs=12, detokenize=False)
    golden = list(sequences(form))
    outputs = generate(llm, [tokens for tokens, *_ in golden], params)
    for output, (_, _, ids, expected, _) in zip(outputs, golden, strict=True):
        for t, row in enumerate(output.prompt_logprobs[1:]):
            assert max(errors(row, ids[t], expected[t])) < NOISE


@pytest.mark.parametrize(
    ("form", "flags"),
    [("borrowed-channel", {}), *(("adapter-exported", {"trust_remote_code": t}) for t in (0, 1))],
)
def test_tokens_one_by_one_have_nvidias_log_probabilities(make_engine, form, flags):
    """NVIDIA's code chose the most likely token each time, and so does the engine."""
    llm = engine(make_engine, GOLDEN / form, 512, **flags)
    for tokens, prompt_len, ids, expected, _ in sequences(form):
        params = SamplingParams(
            temperature=0, max_tokens=160, ignore_eos=True, logprobs=12, detokenize=False
        )
        (output,) = generate(llm, [tokens[:prompt_len]], params)
        assert list(output.outputs[0].token_ids) == tokens[prompt_len:]
        for t, row in enumerate(output.outputs[0].logprobs, start=prompt_len - 1):
            assert max(errors(row, ids[t], expected[t])) < NOISE


@pytest.fixture
def with_its_code(tmp_path):
    """The export with a tokenizer and the code that it names, which imports what is not there."""
    path = tmp_path / "exported"
    shutil.copytree(GOLDEN / "adapter-exported", path)
    byte_tokenizer().save_pretrained(path)
    for name in ("configuration_qwen3_dms", "modeling_qwen3_dms"):
        (path / f"{name}.py").write_text("import experimental_dms_not_installed\n")
    return path


@pytest.mark.parametrize("trust", [False, True])
def test_the_checkpoints_own_code_is_not_needed(with_its_code, make_engine, trust):
    flags = {"trust_remote_code": trust, "hf_overrides": {"vocab_size": 300}}
    llm = engine(make_engine, with_its_code, 512, skip_tokenizer_init=False, **flags)
    assert llm.generate("abc", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].text
    model = llm.llm_engine.model_config
    assert (model.runner_type, model.trust_remote_code) == ("generate", False)
    assert model.hf_config.vocab_size == 300


def test_without_the_flag_an_export_is_what_vllm_makes_of_it():
    config = engine_config(GOLDEN / "adapter-exported", kv_cache_dtype="auto")
    assert config.model_config.architecture == "Qwen3Model"


def test_architectures_given_by_hand_win():
    by_hand = {"architectures": ["Qwen3ForCausalLMDMS"]}
    config = engine_config(GOLDEN / "adapter-exported", hf_overrides=by_hand)
    assert config.model_config.architecture == "DMSQwen3ForCausalLM"
    wrong = {"architectures": ["GemmaForCausalLM"]}
    with pytest.raises(ValueError, match=r"GemmaForCausalLM.*--hf-overrides"):
        engine_config(GOLDEN / "adapter-exported", hf_overrides=wrong)
