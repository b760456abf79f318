"""Quantised, low-memory fine-tuning of multimodal LLMs with Conditional Mixture-of-LoRA (arXiv 2402.15896)."""
