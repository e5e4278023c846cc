"""The sockets that are ours, by what they carry."""

from comfy_api.latest import io

# The value is a lora2_core.jobs.saving.TrainedLoRA.
LoRA2Socket = io.Custom("LORA2")
# The value is a lora2_core.config.presets.Options.
OptionsSocket = io.Custom("LORA2_OPTIONS")
