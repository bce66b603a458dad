"""Layers and attention that are faster on CPUs, put in openly by `use_cpu_kernels`."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "CPUDropout": "layers",
        "CPULinear": "layers",
        "grouped_attention": "attention",
        "use_cpu_kernels": "layers",
    },
)
