"""jaxlora: LoRA fine-tuning of Qwen2.5 and Mistral in JAX and Flax."""

__version__ = "0.1.0"
