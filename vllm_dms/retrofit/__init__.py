"""Retrofit: turns a dense Qwen, Llama or Mistral checkpoint into a DMS checkpoint.

Reading order: gates (what a decision is in training), forward (the masked model), trainer
(the recipe), checkpoint (files in and out). `python -m vllm_dms.retrofit --help` runs it.
"""
