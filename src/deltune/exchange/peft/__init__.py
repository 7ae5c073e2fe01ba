"""Checkpoints of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`."""
