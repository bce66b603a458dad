"""What a model's folder consists of, for those who move it; needs no torch."""

# What of a model's folder would be in the way of another model's: which of these there are says
# how the folder is to be loaded.
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "simcse_adapter.json",
    "modules.json",
    "[0-9]*_*/*",
    "lora/*",
    "adapter/*",
)
