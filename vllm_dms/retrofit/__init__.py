"""Retrofit: turns a Qwen3 or Llama checkpoint into a DMS checkpoint.

Reading order: gates (what a decision is in training), forward (the masked model), trainer
(the recipe), checkpoint (files in and out). `python -m vllm_dms.retrofit --help` runs it.
"""
